"""On a GPU: sizes that are switched there, and written with; at the published widths, in bfloat16.

Needs a CUDA device; the other benchmarks need none. Weights are random.

- Nine layers as wide as Nemotron Nano v3's with 32 experts (3.4 GB), which nest the 23B and 12B sizes of `hf_elastic.configuration.known`: the time of a
  decoded token at the live 12B budget (`budget`), of the same size loaded alone (`slice`) and of the stock class on its export (`stock`), one
  token of each in turn, in several processes.
- The published model itself, 52 layers and 128 experts (63 GB), where it fits: memory before and after all sizes have been active, warm
  switches, the time of reading a prompt and of a decoded token for every size, and phase plans in which 12B thinks and 30B answers.

Claims: memory of the parent and all sizes / its weights at most 1.01; a warm switch allocates nothing; a decoded token at a live budget / of
the stock model at most 1.03.
"""

from __future__ import annotations

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
from switching import PROCESSES, Generation, decode_in_turns, prepare, report_speed
from synthetic import PUBLISHED_LAYERS, published_family
from transformers import AutoModelForCausalLM, NemotronHConfig

from hf_elastic import ElasticConfig, Phase, PhasePlan

THINKER = "12b"
PROMPT = 1024
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
        in_child(prepare, elastic, export, *family, THINKER)
        runs = [
            in_child(decode_in_turns, elastic, export, THINKER, "cuda", rounds, PROMPT, 96).result
            for _ in range(PROCESSES)
        ]
    report.settle(DECODE, report_speed(report, "published widths", runs, prompt=PROMPT, tokens=96))
    name = "same"
    if not options.quick and torch.cuda.mem_get_info()[0] > 1.1 * PUBLISHED_BYTES:
        name = "published"
        family = published_family(torch.bfloat16, experts=128, layers=PUBLISHED_LAYERS, vocab_size=131072)
    live(report, name, family, rounds)
    return report.finish(options)


def live(report: Report, name: str, family: Family, rounds: int) -> None:
    """All sizes of one model on the GPU, in a process of its own."""
    found = in_child(_live, *family, rounds).result
    report.measure(f"{name} model: bytes of the parent's weights", "bytes", [found["weights"]])
    report.settle(MEMORY, report.measure(f"{name} model: {MEMORY}", "", [found["memory"]]))
    report.settle(ALLOCATED, report.measure(f"{name} model: {ALLOCATED}", "", [found["allocated"]]))
    report.measure(f"{name} model: time of a warm switch", "us", found["microseconds"])
    for what, times in found["times"].items():
        report.measure(f"{name} model: {what}", "s", times)


def _live(parent: NemotronHConfig, budgets: dict[str, dict[str, int]], rounds: int) -> dict[str, Any]:
    """Child process: make the model on the GPU, activate every size once, then switch, write and plan."""
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
    ids = torch.randint(3, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to("cuda")
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


if __name__ == "__main__":
    sys.exit(main())
