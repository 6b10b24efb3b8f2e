"""On a GPU: sizes that are switched there, and written with; at the published widths, in bfloat16.

Needs a CUDA device; the other benchmarks need none. Weights are random.

- Nine layers as wide as Nemotron Nano v3's with 32 experts (3.4 GB), which nest the 23B and 12B sizes of `hf_elastic.known`: the time of a
  decoded token at the live 12B budget (`budget`), of the same size loaded alone (`slice`) and of the stock class on its export (`stock`), one
  token of each in turn, in several processes.
- The published model itself, 52 layers and 128 experts (63 GB), where it fits: memory before and after all sizes have been active, warm
  switches, the time of reading a prompt and of a decoded token for every size, and phase plans in which 12B thinks and 30B answers.

Claims: memory of the parent and all sizes / its weights at most 1.01; a warm switch allocates nothing; a decoded token at a live budget / of
the stock model at most 1.03.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from harness import Claim, Report, arguments, in_turns
from processes import in_child
from switching import Generation
from synthetic import PUBLISHED_LAYERS, published_family, write_checkpoint
from transformers import AutoModelForCausalLM, NemotronHConfig

from hf_elastic import ElasticConfig, Phase, PhasePlan

THINKER = "12b"
PUBLISHED_BYTES = 64e9
DECODE = "decode time per token, budget / stock model of that size"
MEMORY = "memory of the parent and all sizes on the GPU / its weights"
ALLOCATED = "allocations in warm switches"
CLAIMS = [Claim(DECODE, 1.03), Claim(MEMORY, 1.01), Claim(ALLOCATED, 0, "==")]

Family = tuple[NemotronHConfig, dict[str, dict[str, int]]]

transformers.logging.set_verbosity_error()  # also in the child processes, which import this module
transformers.logging.disable_progress_bar()


def main() -> int:
    options = arguments(__doc__).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu.py measures on a CUDA device, and torch sees none.")
    report = Report("gpu", CLAIMS)
    family = published_family(torch.bfloat16, **({"scale": 8, "experts": 16} if options.quick else {}))
    rounds = 3 if options.quick else 9
    with tempfile.TemporaryDirectory(prefix="hf-elastic-gpu-") as scratch:
        elastic, export = Path(scratch, "elastic"), Path(scratch, "export")
        in_child(_prepare, elastic, export, *family)
        decode(report, elastic, export, rounds, 96)
    name = "same"
    if not options.quick and torch.cuda.mem_get_info()[0] > 1.1 * PUBLISHED_BYTES:
        name = "published"
        family = published_family(torch.bfloat16, experts=128, layers=PUBLISHED_LAYERS, vocab_size=131072)
    live(report, name, family, rounds)
    return report.finish(options)


# -- decoding and switching --------------------------------------------------------------------------------------------


def decode(report: Report, elastic: Path, export: Path, rounds: int, tokens: int, processes: int = 3) -> None:
    """A token of each model in turn, in several processes."""
    runs = [in_child(_decode, elastic, export, rounds, tokens).result for _ in range(processes)]
    agreement = [run["agreement"] for run in runs]
    report.measure("share of generated tokens that budget and stock agree on", "", agreement)
    for what in ("prefill", "decode"):
        medians = {m: [statistics.median(run[what][m]) for run in runs] for m in ("budget", "slice", "stock")}
        for model, times in medians.items():
            report.measure(f"{what}, {model}", "s", times)
        for model in ("budget", "slice"):
            ratios = [own / stock for own, stock in zip(medians[model], medians["stock"], strict=True)]
            ratio = report.measure(f"{what}, {model} / stock", "", ratios)
            if (what, model) == ("decode", "budget"):
                report.settle(DECODE, ratio)


def live(report: Report, name: str, family: Family, rounds: int) -> None:
    """All sizes of one model on the GPU, in a process of its own."""
    found = in_child(_live, *family, rounds).result
    report.measure(f"{name} model: bytes of the parent's weights", "bytes", [found["weights"]])
    report.settle(MEMORY, report.measure(f"{name} model: {MEMORY}", "", [found["memory"]]))
    report.settle(ALLOCATED, report.measure(f"{name} model: {ALLOCATED}", "", [found["allocated"]]))
    report.measure(f"{name} model: time of a warm switch", "us", found["microseconds"])
    for what, times in found["times"].items():
        report.measure(f"{name} model: {what}", "s", times)


# -- in processes of their own -----------------------------------------------------------------------------------------


def _prepare(elastic: Path, export: Path, parent: NemotronHConfig, budgets: dict[str, dict[str, int]]) -> None:
    elastic.mkdir()
    write_checkpoint(elastic, parent, budgets)
    AutoModelForCausalLM.from_pretrained(elastic).export(export, THINKER)


def _decode(elastic: Path, export: Path, rounds: int, tokens: int) -> dict[str, Any]:
    load = partial(AutoModelForCausalLM.from_pretrained, device_map="cuda")
    family = load(elastic)
    family.set_budget(THINKER)
    models = {"budget": family, "slice": load(elastic, budget=THINKER), "stock": load(export)}
    ids = _prompt(family.config.vocab_size, 1024)
    runs = {name: Generation(model, ids) for name, model in models.items()}
    prefill = {name: run.prefill for name, run in runs.items()}
    decode = {name: run.decode for name, run in runs.items()}
    in_turns(prefill, 2)
    in_turns(decode, 3)
    measured = {"prefill": in_turns(prefill, rounds), "decode": in_turns(decode, tokens)}
    same = torch.cat(runs["budget"].tokens) == torch.cat(runs["stock"].tokens)
    return {**measured, "agreement": same.float().mean().item()}


def _live(parent: NemotronHConfig, budgets: dict[str, dict[str, int]], rounds: int) -> dict[str, Any]:
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(ElasticConfig.from_parent(parent, budgets))
    model.eval().generation_config.pad_token_id = 0
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    sizes = (*budgets, "full")
    for name in sizes:
        model.set_budget(name)
    memory = (weights + torch.cuda.memory_allocated() - before) / weights
    counted = torch.cuda.memory_stats()["allocation.all.allocated"]
    microseconds = []
    for name in sizes * 50:
        start = perf_counter()
        model.set_budget(name)
        microseconds.append(1e6 * (perf_counter() - start))
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"] - counted
    ids = _prompt(model.config.vocab_size, 1024)
    runs = {name: Generation(model, ids) for name in sizes}

    def step(name: str, what: str) -> float:
        with model.at(name):
            return getattr(runs[name], what)()

    times: dict[str, list[float]] = {}
    for what, label, count in (
        ("prefill", f"reading {ids.shape[1]} tokens", rounds),
        ("decode", "a decoded token", 4 * rounds),
    ):
        actions = {f"{label}, {name}": partial(step, name, what) for name in sizes}
        in_turns(actions, 3)  # warm up
        times.update(in_turns(actions, count))
    for label, plan in _plans().items():
        times[label] = [_timed(model, ids, plan) for _ in range(2)]
    return {
        "weights": weights,
        "memory": memory,
        "allocated": allocated,
        "microseconds": microseconds,
        "times": times,
    }


def _plans() -> dict[str, PhasePlan]:
    thinking, answering = 64, 32
    text = f"{thinking} thinking tokens by {{}}, {answering} answer tokens by full{{}}"
    return {
        text.format(thinker, after): PhasePlan(
            phases=[
                Phase(budget=thinker, name="thinking", max_new_tokens=thinking),
                Phase(budget="full", name="answer", max_new_tokens=answering, handover=handover),
            ]
        )
        for thinker, handover, after in (
            ("full", "cache", ""),
            (THINKER, "reprefill", ", everything read again"),
            (THINKER, "cache", ", cache handed over"),
        )
    }


def _timed(model: Any, ids: torch.Tensor, plan: PhasePlan) -> float:
    torch.cuda.synchronize()
    start = perf_counter()
    text = model.generate(ids, phase_plan=plan, do_sample=False, eos_token_id=None)
    torch.cuda.synchronize()
    assert text.shape[1] == ids.shape[1] + 96
    return perf_counter() - start


def _prompt(vocab_size: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to("cuda")


if __name__ == "__main__":
    sys.exit(main())
