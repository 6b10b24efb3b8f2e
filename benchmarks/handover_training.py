"""What it costs to train hand-over, and whether a hand-over is then as good as reading again.

**Second run** (three seeds of its rows and draws, every task of the lab): the trained family goes on for a seventh of its steps

- *plain*: as before, without hand-overs, which is what the others are compared with at equal steps;
- *both trained*: every second micro-batch is a hand-over, and both sizes are compared with the teacher, each on what it reads;
- *both trained, always*: every micro-batch is one (two seeds);
- *second trained, always*: the same, and only the size that goes on is compared, from the cut on (one seed).

**Conversions** (`book`, one seed; the whole parent and the smaller half of the sizes) leave the weights as they are. What a size kept is multiplied, per layer
and kind of state, by

- *formula*: the square root of the ratio of widths, or the ratio, as generation does it for every family;
- *least squares*: factors per head or channel, or a matrix, with the least square error to what the other size keeps after the same tokens;
- *fitted*: factors per channel or a matrix, by gradient steps on the divergence of what the other size says from what it says after reading
  everything itself.

Sizes are compared by the share of held-out solutions that they would write to the last token by greedy decoding, which one forward pass over the
right solution tells: the thinking by one size, the end of thinking and the answer by the other.

Runs are kept, see `lab_runs`. `--seeds`, `--tasks` and `--only` do a part of them, and write a result only where `--output` says.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from handover_conversions import fitted, least_squares
from harness import Claim, Report
from lab_runs import SEEDS, Runs, lab_arguments, mean
from transformers import DynamicCache, PreTrainedTokenizerBase

from hf_elastic import ElasticForCausalLM
from hf_elastic.errors import HandoverError
from hf_elastic.generation.caches import States, check_hand_over, hand_over, read_cache, write_cache
from hf_elastic.lab.exercises import EOS, THINK_END, THINK_START, LabTask
from hf_elastic.lab.family import load_family, train_family
from hf_elastic.lab.tasks import get_task
from hf_elastic.trainers import handover
from hf_elastic.trainers.handover import split_rows

TASKS = ("book", "stories")
TRAINED = {"handover_token": THINK_END}
SECOND: dict[str, dict[str, Any]] = {
    "plain": {},
    "both trained": {"handover_probability": 0.5, **TRAINED},
    "both trained, always": {"handover_probability": 1.0, **TRAINED},
    "second trained, always": {"handover_probability": 1.0, **TRAINED},
}
"""Of the second run."""
SECOND_SEEDS = {
    "plain": SEEDS,
    "both trained": SEEDS,
    "both trained, always": SEEDS[:2],
    "second trained, always": SEEDS[:1],
}
ABLATED = "book"
"""The task of the ways that are not run with every seed, and of the conversions."""
SECOND_STEPS = 150
SECOND_RATE = 3e-3
"""Half of what the family is trained with."""
WORTH = 0.02
"""Share of right solutions that training hand-over may cost a size."""
NEAR = 0.01
"""Share of right solutions that a hand-over may cost against reading again."""

COST = "both trained: accuracy of any size below plain, mean of seeds, largest"
GAP = "both trained: cache below reading again, mean of seeds, largest of any pair"


@dataclass
class Solutions:
    """Right solutions of problems as rows: prompt, thinking, answer and end.

    Args:
        ids, mask (`torch.Tensor`): `(B, T)`, padded on the right.
        start, cut (`torch.Tensor`): `(B,)`; the token that begins the thinking, and the one that ends it.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    start: torch.Tensor
    cut: torch.Tensor

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Solutions:
        batch = tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
        start, cut = (
            (batch["input_ids"] == tokenizer.convert_tokens_to_ids(token)).int().argmax(1)
            for token in (THINK_START, THINK_END)
        )
        return cls(batch["input_ids"], batch["attention_mask"], start, cut)

    @property
    def targets(self) -> torch.Tensor:
        """Boolean `(B, T - 1)`: what is written, from the first token of thinking on."""
        columns = torch.arange(self.ids.shape[1] - 1)
        return (columns >= self.start[:, None]) & self.mask[:, 1:].bool()


class Readings:
    """What every size of a family keeps of the thinking in some solutions, and which of them it would write itself."""

    def __init__(self, model: ElasticForCausalLM, solutions: Solutions, names: Sequence[str]):
        self.model, self.solutions, self.names = model, solutions, names
        tokens = {"input_ids": solutions.ids, "attention_mask": solutions.mask}
        self.first, self.rest, _, self.compared = split_rows(tokens, solutions.targets, solutions.cut)
        self.states: dict[str, States] = {}
        self.submodels: dict[str, Any] = {}
        self.thinks: dict[str, torch.Tensor] = {}
        self.answers: dict[str, torch.Tensor] = {}
        before = torch.arange(solutions.ids.shape[1] - 1) < solutions.cut[:, None]
        for name in names:
            with torch.no_grad(), model.at(name):
                cache = DynamicCache(config=model.config)
                model(**self.first, past_key_values=cache, use_cache=True)
                right = model(**tokens).logits[:, :-1].argmax(-1) == solutions.ids[:, 1:]
                self.states[name], self.submodels[name] = read_cache(cache), model.submodel
            self.thinks[name] = (right | ~solutions.targets | ~before).all(1)
            self.answers[name] = (right | ~solutions.targets | before).all(1)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Thinker and answerer, where a cache can be handed over."""
        config = self.model.elastic_config
        for source, target in itertools.permutations(self.names, 2):
            try:
                check_hand_over(
                    config.architecture, config.parent_config, self.submodels[source], self.submodels[target]
                )
            except HandoverError:
                continue
            yield source, target

    def logits(self, target: str, given: States) -> torch.Tensor:
        """What a size says of the answers, `(B, R, V)`, when it goes on from `given`; inside `at` or `computing`."""
        cache = write_cache(given, self.model.elastic_config.stock_config(self.submodels[target]), self.width)
        return self.model(**self.rest, past_key_values=cache, use_cache=True).logits

    @property
    def width(self) -> int:
        return self.first["input_ids"].shape[1]

    def after(self, source: str, target: str, given: States) -> float:
        """Share of solutions of which `source` would write the thinking, and `target` the rest, going on from `given`."""
        with torch.no_grad(), self.model.at(target):
            said = self.logits(target, given)[:, :-1].argmax(-1)
        answers = ((said == self.rest["input_ids"][:, 1:]) | ~self.compared).all(1)
        return share(self.thinks[source] & answers)

    def again(self, source: str, target: str) -> float:
        """The same, where `target` reads everything."""
        return share(self.thinks[source] & self.answers[target])

    def converted(self, source: str, target: str, scale: bool = True) -> States:
        """What `source` keeps, as `target` would go on with it."""
        config = self.model.elastic_config
        return hand_over(
            self.states[source],
            config.architecture,
            config.parent_config,
            self.submodels[source],
            self.submodels[target],
            scale=scale,
        )

    def measure(self) -> dict[str, dict[str, float]]:
        """Per pair, by reading again and by cache; a pair of the same size is that size alone."""
        found = {f"{name} > {name}": {"again": self.again(name, name)} for name in self.names}
        for source, target in self.pairs():
            cache = self.after(source, target, self.converted(source, target))
            found[f"{source} > {target}"] = {"again": self.again(source, target), "cache": cache}
        return found


def share(right: torch.Tensor) -> float:
    return float(right.float().mean())


@contextmanager
def second_alone() -> Iterator[None]:
    """Training of hand-over compares only the size that goes on with the teacher."""
    whole = handover.Handovers.cut

    def cut(self: Any, batch: dict[str, torch.Tensor], step: int, micro_batch: int) -> dict[str, torch.Tensor]:
        made = whole(self, batch, step, micro_batch)
        if handover.CUT in made:
            before = torch.arange(made["labels"].shape[1]) <= made[handover.CUT][:, None]
            made["labels"] = made["labels"].masked_fill(before, -100)
        return made

    handover.Handovers.cut = cut  # type: ignore[method-assign]
    try:
        yield
    finally:
        handover.Handovers.cut = whole  # type: ignore[method-assign]


class Study:
    """The runs of one task.

    Args:
        runs (`Runs`): Keeps what was measured.
        task (`LabTask`): Whose family it is.
    """

    def __init__(self, runs: Runs, task: LabTask):
        self.runs, self.task, self.tokenizer = runs, task, task.build_tokenizer()
        self.size = task.trained[0] if runs.steps < SECOND_STEPS else task.measured

    def solutions(self, split: str, size: Any, seed: int, count: int) -> Solutions:
        source = self.task.problems(split, size, seed)
        return Solutions.of([self.task.solved(next(source)) + EOS for _ in range(count)], self.tokenizer)

    def heldout(self) -> Solutions:
        return self.solutions("heldout", self.size, 1, self.runs.problems)

    def measure(self, model: ElasticForCausalLM) -> dict[str, dict[str, float]]:
        return Readings(model, self.heldout(), list(model.elastic_config.family())).measure()

    def second(self, way: str, seed: int) -> Any:
        """Train the family further and measure it; `seconds` is the CPU time of a step."""
        steps, seed = min(SECOND_STEPS, self.runs.steps), seed + 50  # whose rows the family has not seen
        schedule = {"num_decay_steps": steps * 4 // 5, "min_lr_ratio": 0.02}
        options = {"learning_rate": SECOND_RATE, "warmup_steps": min(10, steps // 4), "lr_scheduler_kwargs": schedule}

        def action() -> dict[str, Any]:
            family, started = load_family(self.task)[0], time.process_time()
            as_said = second_alone() if way.startswith("second trained") else nullcontext()
            given = {"per_device_train_batch_size": self.runs.rows, "progress": False, **options, **SECOND[way]}
            with tempfile.TemporaryDirectory(prefix="hf-elastic-lab-") as scratch, as_said:
                train_family(family, self.tokenizer, Path(scratch), task=self.task, steps=steps, seed=seed, **given)
            seconds = (time.process_time() - started) / steps
            return {"pairs": self.measure(family), "seconds": seconds}

        name = "" if self.task.name == "book" else f"{self.task.name}-"
        return self.runs.run(f"handover-training-{name}second-{way.replace(',', '').replace(' ', '-')}-{seed}", action)

    def conversions(self, seed: int, quick: bool) -> dict[str, dict[str, float]]:
        """Per pair and conversion the share of right solutions, and `again`."""
        whole, *others = load_family(self.task)[0].elastic_config.family()
        others = others[:1] if quick else others[len(others) // 3 :]
        pairs = [pair for other in others for pair in ((other, whole), (whole, other))]
        return {
            f"{source} > {target}": self.runs.run(
                f"handover-conversions-{seed}-{source}-{target}",
                lambda source=source, target=target: self._converted(source, target, seed, quick),
            )
            for source, target in pairs
        }

    def _converted(self, source: str, target: str, seed: int, quick: bool) -> dict[str, float]:
        model = load_family(self.task)[0].requires_grad_(False)
        held = Readings(model, self.heldout(), [source, target])
        drawn = self.calibration(model, [source, target], seed, 2 if quick else 18)
        plain = held.converted(source, target, scale=False)
        found = {"again": held.again(source, target), "as is": held.after(source, target, plain)}
        found["formula"] = held.after(source, target, held.converted(source, target))
        for kind in ("head", "channel", "matrix"):
            convert = least_squares(drawn, source, target, kind)
            found[f"least squares, {kind}"] = held.after(source, target, convert(plain))
        for kind in ("channel", "matrix"):
            convert = fitted(drawn, source, target, kind, steps=2 if quick else 100)
            found[f"fitted, {kind}"] = held.after(source, target, convert(plain))
        return found

    def calibration(self, model: ElasticForCausalLM, names: Sequence[str], seed: int, groups: int) -> list[Readings]:
        """Readings of training problems; two of three are cut where thinking ends, the others somewhere before."""
        rng, made = random.Random(f"calibration {seed}"), []
        for group in range(groups):
            size = self.size if groups < 9 else 4 + group % 9
            solutions = self.solutions("train", size, 1000 * (seed + 1) + group, 16)
            if group % 3 == 2:
                length = int((solutions.cut - solutions.start).min())
                solutions.cut = solutions.start + 1 + rng.randrange(max(1, length - 1))
            made.append(Readings(model, solutions, names))
        return made


def differences(runs: Sequence[Any], pairs: Sequence[str]) -> dict[str, float]:
    """Per pair by how much the cache is below reading again, mean of seeds."""
    return {p: mean([run["pairs"][p]["again"] - run["pairs"][p]["cache"] for run in runs]) for p in pairs}


def run(options: argparse.Namespace) -> int:
    tasks, parts = options.tasks or TASKS, options.only or ["second", "conversions"]
    claims = [Claim(f"{task}: {name}", limit) for task in tasks for name, limit in ((COST, WORTH), (GAP, NEAR))]
    report, runs = Report("handover_training", claims if "second" in parts else []), Runs(options)
    studies = {name: Study(runs, get_task(name)) for name in tasks}
    seeds = [0] if options.quick else options.seeds or list(SEEDS)
    for name, study in studies.items() if "second" in parts else ():
        ways = [way for way in SECOND if name == ABLATED or SECOND_SEEDS[way] == SEEDS]
        done = {way: [study.second(way, seed) for seed in seeds if seed in SECOND_SEEDS[way]] for way in ways}
        steps = min(SECOND_STEPS, runs.steps)
        record(report, name, done, steps=steps, problems=runs.problems)
        settle(report, name, done)
    if "conversions" in parts and not options.seeds:
        for pair, rates in studies[ABLATED].conversions(0, options.quick).items():
            for way, rate in rates.items():
                report.measure(f"{ABLATED}, {way}: {pair}", "share", [rate], seeds=[0], problems=runs.problems)
    runs.say_commits(report)
    partial = options.only or options.seeds or options.tasks
    return 0 if partial and not options.output else report.finish(options)


def record(report: Report, name: str, ways: Mapping[str, Sequence[Any]], **about: Any) -> None:
    for way, done in ways.items():
        about["seeds"] = list(SECOND_SEEDS[way])
        if not done:
            continue
        for pair, rates in done[0]["pairs"].items():
            for rate in rates:
                values = [entry["pairs"][pair][rate] for entry in done]
                report.measure(f"{name}, {way}: {pair}, {rate}", "share", values, mean=mean(values), **about)
        report.measure(f"{name}, {way}: CPU time of a step", "s", [entry["seconds"] for entry in done], **about)


def settle(report: Report, name: str, second: Mapping[str, Sequence[Any]]) -> None:
    pairs = second["plain"][0]["pairs"]
    alone = [pair for pair, rates in pairs.items() if "cache" not in rates]
    others = [pair for pair in pairs if pair not in alone]

    def accuracy(way: str, pair: str) -> float:
        return mean([entry["pairs"][pair]["again"] for entry in second[way]])

    costs = [accuracy("plain", pair) - accuracy("both trained", pair) for pair in alone]
    report.settle(f"{name}: {COST}", max(costs))
    report.settle(f"{name}: {GAP}", max(differences(second["both trained"], others).values()))


if __name__ == "__main__":
    parser = lab_arguments(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="do only these tasks")
    parser.add_argument("--seeds", type=int, nargs="+", help="do only the runs of these seeds")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("second", "conversions"),
        help="do only these parts",
    )
    sys.exit(run(parser.parse_args()))
