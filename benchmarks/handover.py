"""Cache hand-over between submodels: what it costs in fidelity, and what it saves in time.

**Accuracy** (the `book` family of the lab, three seeds): one size thinks, another answers, every pair. The answering one goes on

- *as is*: with the other's cache, of a family that was never trained for it, without the correction of its size;
- *scaled*: the same with the correction, as `handover="cache"` does it;
- *trained*: as `handover="cache"` does it, of a family trained with `handover_probability=0.5`;
- *re-prefill*, *trained re-prefill*: after reading everything again, in either family.

**Fidelity**, on the true thinking of held-out problems: the divergence of the answer from that after re-prefill, in nats for its first token and
per token of all of it, and the cosine between the cache handed over and the answering size's own.

**Time** to the first token of the answer by cache and by re-prefill, after 1,024, 4,096 and 16,384 tokens, of a model with random weights that
is large enough for its size to decide (the tokens are a prompt that the thinking size reads, which leaves the state that writing leaves).

Runs are kept, see `lab_runs`: two trainings and 68 evaluations a seed. `--seeds 1` does only the runs of that seed, beside others, and writes
no result; `--only accuracy` or `--only time` does one part, and writes none either.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Claim, Report, in_turns
from lab_runs import SEEDS, SIZES, Runs, lab_arguments, mean
from synthetic import NANO_LAYERS, half_budget, nano_like, write_checkpoint

from hf_elastic import ElasticForCausalLM
from hf_elastic.evaluation.plans import measure_plan
from hf_elastic.generation import Phase, PhasePlan, batch
from hf_elastic.generation.caches import States, hand_over, read_cache, write_cache
from hf_elastic.lab.book import EOS, THINK_END, problems
from hf_elastic.lab.book_task import BookTask
from hf_elastic.trainers import divergence

NAMES = ("full", *SIZES)
WAYS = ("as is", "scaled", "trained")
TRAINING = {"handover_probability": 0.5, "handover_token": THINK_END}
"""What a family trained for hand-over is trained with, besides what every family is."""
LENGTHS = (1024, 4096, 16384)
ROUNDS = 3
CHUNK = 512
"""Tokens that are read at a time; without kernels the scan of a long text at once would need tens of GB."""

CLAIMS = [
    Claim(
        "exact, half thinks and full answers: trained cache - trained re-prefill, smallest of any seed", -0.03, ">="
    ),
    Claim("exact, half thinks and full answers: scaled - as is, untrained, mean", 0.0, ">="),
    *(Claim(f"time to first answer token after {length} tokens: cache / re-prefill", 0.2) for length in LENGTHS),
]


@contextmanager
def unscaled() -> Iterator[None]:
    """Generation hands caches over as they are."""
    before = batch.hand_over
    batch.hand_over = partial(before, scale=False)  # type: ignore[assignment]
    try:
        yield
    finally:
        batch.hand_over = before


class Pairs:
    """What every size makes of what every other one thought.

    Args:
        runs (`Runs`): Keeps families and results.
        seed (`int`): Of both families.
        names (`Sequence[str]`, *optional*): Sizes.
    """

    def __init__(self, runs: Runs, seed: int, names: Sequence[str] = NAMES):
        self.runs, self.seed, self.names = runs, seed, names

    def family(self, trained: bool) -> ElasticForCausalLM:
        if trained:
            return self.runs.trained_family(f"trained-handover-{self.seed}", self.seed, **TRAINING)
        return self.runs.trained_family(f"trained-{self.seed}", self.seed)

    def results(self) -> dict[str, Any]:
        """Per family what was measured, by `way: thinker > answerer`."""
        return {
            "plain": self.runs.run(f"handover-plain-{self.seed}", lambda: self.measure(False)),
            "trained": self.runs.run(f"handover-trained-{self.seed}", lambda: self.measure(True)),
        }

    def measure(self, trained: bool) -> dict[str, dict[str, float]]:
        model = self.family(trained)
        found: dict[str, dict[str, float]] = {}
        for thinker, answerer in itertools.product(self.names, repeat=2):
            pair = f"{thinker} > {answerer}"
            found[f"{'trained ' if trained else ''}re-prefill: {pair}"] = self.rates(
                model, thinker, answerer, "reprefill"
            )
            if thinker == answerer:
                continue
            for way in WAYS[2:] if trained else WAYS[:2]:
                if way == "as is":
                    with unscaled():
                        rates = self.rates(model, thinker, answerer, "cache")
                else:
                    rates = self.rates(model, thinker, answerer, "cache")
                found[f"{way}: {pair}"] = rates | self.fidelity(model, thinker, answerer, way != "as is")
        return found

    def rates(self, model: ElasticForCausalLM, thinker: str, answerer: str, handover: Any) -> dict[str, float]:
        task = BookTask(letters=self.runs.letters, count=self.runs.problems)
        point = measure_plan(model, self.runs.tokenizer, task, PhasePlan(thinker, answerer, handover=handover))
        return {rate: point["metrics"][rate] for rate in ("exact", "code")}

    @torch.no_grad()
    def fidelity(self, model: ElasticForCausalLM, thinker: str, answerer: str, scale: bool) -> dict[str, float]:
        source = problems("heldout", self.runs.letters, 1)
        texts = [next(source).text + EOS for _ in range(min(self.runs.problems, 64))]
        ids = torch.tensor(self.runs.tokenizer(texts)["input_ids"])
        cut = ids[0].tolist().index(self.runs.tokenizer.convert_tokens_to_ids(THINK_END))
        states, members = {}, {}
        for name in (thinker, answerer):
            with model.at(name):
                states[name], members[name] = (
                    read_cache(model(ids[:, :cut], use_cache=True).past_key_values),
                    model.submodel,
                )
        config = model.elastic_config.parent_config
        given = hand_over(
            states[thinker], model.architecture, config, members[thinker], members[answerer], scale=scale
        )
        with model.at(answerer):
            after = model(ids[:, cut:-1], past_key_values=write_cache(given, model.config), use_cache=True).logits
            expected = model(ids).logits[:, cut:-1]
        per_token = divergence(after.flatten(0, 1), expected.flatten(0, 1)).view(after.shape[:2])
        return {
            "kl_first": float(per_token[:, 0].mean()),
            "kl": float(per_token.mean()),
            **cosines(given, states[answerer]),
        }


def cosines(given: States, own: States) -> dict[str, float]:
    """Mean cosine over sequences and layers, per kind of state."""
    found: dict[str, list[float]] = {}
    for ours, theirs in zip(given, own, strict=True):
        for kind, tensor in ours.items():
            alike = torch.cosine_similarity(tensor.flatten(1), theirs[kind].flatten(1), dim=1)
            found.setdefault(f"cosine_{kind}", []).append(float(alike.mean()))
    return {kind: mean(values) for kind, values in found.items()}


def accuracy(options: argparse.Namespace, report: Report) -> None:
    runs = Runs(options)
    seeds = [0] if options.quick else options.seeds or list(SEEDS)
    names = NAMES[:2] if options.quick else NAMES
    done = [Pairs(runs, seed, names).results() for seed in seeds]
    merged = [entry["plain"] | entry["trained"] for entry in done]
    about = {"seeds": seeds, "steps": runs.steps, "problems": runs.problems}
    for name in merged[0]:
        for rate in merged[0][name]:
            unit = "nats per token" if rate.startswith("kl") else "cosine" if rate.startswith("cos") else "share"
            values = [entry[name][rate] for entry in merged]
            report.measure(f"{name}, {rate}", unit, values, mean=mean(values), **about)
    pair = "half > full"
    losses = [entry[f"trained: {pair}"]["exact"] - entry[f"trained re-prefill: {pair}"]["exact"] for entry in merged]
    report.settle(CLAIMS[0].name, min(losses))
    gains = [entry[f"scaled: {pair}"]["exact"] - entry[f"as is: {pair}"]["exact"] for entry in merged]
    report.settle(CLAIMS[1].name, mean(gains))
    runs.say_commits(report)


# -- time --------------------------------------------------------------------------------------------------------------


def first_token_seconds(model: ElasticForCausalLM, ids: torch.Tensor, handover: Any) -> float:
    """From the end of what `half` wrote to the first token that the whole model can choose."""
    phases = [Phase("half", "thinking", 1), Phase(None, "answering", 1, handover=handover)]
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        phase_plan=PhasePlan(phases=phases),
        prefill_chunk_size=CHUNK,
        do_sample=False,
        return_dict_in_generate=True,
    )
    return output.phases[1].prefill_seconds


def time(options: argparse.Namespace, report: Report) -> None:
    torch.set_num_threads(options.threads)
    if options.quick:
        config = nano_like(torch.float32, scale=8, experts=8, layers="ME*E", vocab_size=512)
    else:
        config = nano_like(torch.float32, scale=4, experts=64, layers=NANO_LAYERS[:7], vocab_size=16384)
    config.max_position_embeddings = 2 * LENGTHS[-1]
    with tempfile.TemporaryDirectory(prefix="hf-elastic-handover-") as folder:
        write_checkpoint(Path(folder), config, {"half": half_budget(config)})
        model = ElasticForCausalLM.from_pretrained(folder).eval()
    costs: Mapping[str, Any] = model.elastic_config.costs()
    about = {name: cost.total_params for name, cost in costs.items()} | {"threads": options.threads, "chunk": CHUNK}
    generator = torch.Generator().manual_seed(0)
    first_token_seconds(model, torch.randint(2, 500, (1, 64), generator=generator), "cache")  # views are made once
    for length in LENGTHS:
        # a quick run only looks whether it runs
        ids = torch.randint(2, 500, (1, length // 64 if options.quick else length), generator=generator)
        ways = {way: partial(first_token_seconds, model, ids, way) for way in ("cache", "reprefill")}
        seconds = in_turns(ways, 1 if options.quick else ROUNDS)
        medians = {
            way: report.measure(f"first answer token after {length} tokens: {way}", "s", runs, **about)
            for way, runs in seconds.items()
        }
        name = f"time to first answer token after {length} tokens: cache / re-prefill"
        report.settle(name, medians["cache"] / medians["reprefill"])


def run(options: argparse.Namespace) -> int:
    report = Report("handover", CLAIMS)
    if options.only != "time":
        accuracy(options, report)
    if options.only != "accuracy" and not options.seeds:
        time(options, report)
    return 0 if options.only or options.seeds else report.finish(options)


if __name__ == "__main__":
    parser = lab_arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", help="do only the runs of these seeds, and write no result")
    parser.add_argument("--only", choices=("accuracy", "time"), help="do only this part, and write no result")
    parser.add_argument("--threads", type=int, default=2, help="threads of the measurements of time (default: 2)")
    sys.exit(run(parser.parse_args()))
