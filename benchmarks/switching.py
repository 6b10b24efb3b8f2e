"""Live switching: all sizes on one set of weights, switched for nothing, as fast as stock models of their size.

Random parents in the proportions of published hybrids; memory in float32.

- Memory, in a process of its own: anonymous memory, and bytes of all different tensor storages, before and after every budget has
  been active once, divided by the bytes of the parent's weights. The larger of the two counts. Axes that keep one prefix are views;
  heads cut per group, and the fused gate and up of `granitemoehybrid`, have to be copied, so that family is only reported.
- A warm switch, between budgets that have been active before: tensors whose data moved, tensor operations run (any copy or
  allocation is one), and time.
- Speed, all models in one process, one token of each in turn: greedy decoding with a cache by a live budget (`budget`), by the same
  size loaded alone (`slice`, whose weights lie close together) and by the stock class on the exported checkpoint (`stock`), in the
  same loop, and the same for reading a prompt. The stock loader maps files, where a weight may start off a cache line, which costs
  some per cent by chance; its weights are copied to where none does, the best it can have. Where memory lies decides some more, so
  it is done in several processes; the result is the median of their ratios. The claim is about `budget` / `stock` in layers as wide
  as Nemotron Nano v3's and its 12B budget's, in bfloat16, which is what such checkpoints are loaded in; float32, and layers of half
  these widths, are reported.

Claims: memory at most 1.01 with hidden, FFN and expert axes and at most 1.10 with every axis (`nemotron_h`); a warm switch moves no
tensor and runs no tensor operation; decoding in bfloat16 takes at most 1.03 times as long per token.
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from harness import Claim, Report, arguments, in_turns
from processes import anonymous_bytes, in_child
from synthetic import granite_like, half_budget, nano_like, write_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_elastic import ElasticConfig
from hf_elastic.architectures import get_architecture

VIEW_AXES = ("hidden", "expert_ffn", "shared_expert_ffn", "experts")
COPIED_AXES = ("attention_heads", "mamba_heads", "mamba_head_dim")
SHARES = (0.75, 0.5)
"""Sizes of the two budgets below the parent, along every axis they cut; the published family has two as well."""
SWITCHES = 50
"""How often the warm switches go through all budgets."""
MEMORY_VIEWS = "memory of the parent and all budgets / its weights, hidden, FFN and expert axes"
MEMORY_ALL = "memory of the parent and all budgets / its weights, every axis"
MOVED = "tensors that moved in warm switches"
OPERATIONS = "tensor operations in warm switches"
DECODE = "decode time per token in bfloat16, budget / stock model of that size"
PROCESSES = 3
CLAIMS = [Claim(MEMORY_VIEWS, 1.01), Claim(MEMORY_ALL, 1.10), Claim(MOVED, 0, "=="), Claim(OPERATIONS, 0, "==")]
CLAIMS += [Claim(DECODE, 1.03)]

transformers.logging.set_verbosity_error()  # also in the child processes, which import this module
transformers.logging.disable_progress_bar()


def main() -> int:
    options = arguments(__doc__).parse_args()
    report = Report("switching", CLAIMS)
    scale = 8 if options.quick else 4
    memory(
        report,
        nano_like(torch.float32, scale=scale, experts=128, layers="MEM*E"),
        granite_like(torch.float32, scale=scale),
    )
    if options.quick:
        report.settle(DECODE, speed(report, "quick", nano_like(torch.bfloat16, scale=8, experts=16), 1, 2, 16, 4))
        return report.finish(options)
    wide = {"scale": 1, "experts": 16, "layers": "MEM*E", "vocab_size": 16384}
    report.settle(DECODE, speed(report, "published widths, bfloat16", nano_like(torch.bfloat16, **wide)))
    # Rows of a view lie apart: where memory is streamed as fast as it can be, some of what lies between is fetched as well.
    speed(report, "published widths, float32", nano_like(torch.float32, **wide))
    speed(report, "half of the published widths, bfloat16", nano_like(torch.bfloat16, experts=32))
    speed(report, "half of the published widths, float32", nano_like(torch.float32, experts=32))
    return report.finish(options)


# -- memory and switching ----------------------------------------------------------------------------------------------


def memory(report: Report, parent: PreTrainedConfig, granite: PreTrainedConfig) -> None:
    """Measure memory and switches of a `nemotron_h` parent, settle their claims, and report the memory of a `granitemoehybrid` one."""
    views = [_cut(parent, VIEW_AXES, share) for share in SHARES]
    every = [_cut(parent, (*VIEW_AXES, *COPIED_AXES), share) for share in SHARES]
    moved = operations = 0
    for name, budgets, claim in (("hidden, FFN, experts", views, MEMORY_VIEWS), ("every axis", every, MEMORY_ALL)):
        measured = _measure_memory(report, f"nemotron_h, {name}", parent, budgets)
        report.settle(claim, max(measured["anonymous"], measured["storages"]))
        report.measure(f"nemotron_h, {name}: time of a warm switch", "us", measured["microseconds"])
        moved, operations = moved + measured["moved"], operations + measured["operations"]
    report.settle(MOVED, moved)
    report.settle(OPERATIONS, operations)
    # Granite's Mamba width is a whole multiple of hidden, so hidden alone can only be halved.
    fused = [_cut(granite, ("expert_ffn", "experts"), 0.75), _cut(granite, ("hidden", "expert_ffn", "experts"), 0.5)]
    _measure_memory(report, "granitemoehybrid, hidden, expert_ffn, experts (fused: copied)", granite, fused)


def _measure_memory(
    report: Report, name: str, parent: PreTrainedConfig, budgets: list[dict[str, int]]
) -> dict[str, Any]:
    named = {f"budget-{i}": sizes for i, sizes in enumerate(budgets)}
    measured: dict[str, Any] = in_child(_live_budgets, parent, named).result
    report.measure(f"{name}: bytes of the parent's weights", "bytes", [measured["weights"]], budgets=named)
    report.measure(f"{name}: anonymous memory, all budgets live / weights", "", [measured["anonymous"]])
    report.measure(f"{name}: bytes of storages, all budgets live / weights", "", [measured["storages"]])
    return measured


def _cut(config: PreTrainedConfig, axes: Iterable[str], share: float) -> dict[str, int]:
    """Sizes of about this share of the parent's, in multiples that every group and kernel can take."""
    architecture = get_architecture(config.model_type)
    sizes = {}
    for name in axes:
        axis = architecture.axis(name)
        step = int(getattr(config, axis.groups)) if axis.groups else 1
        step *= 1 if "heads" in name or name == "experts" else 8
        sizes[name] = max(step, int(getattr(config, axis.field) * share) // step * step)
    return sizes


def _live_budgets(parent: PreTrainedConfig, budgets: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Child process: make the parent, activate every budget once, then switch among them again and again."""
    before = anonymous_bytes()
    model = AutoModelForCausalLM.from_config(ElasticConfig.from_parent(parent, budgets)).eval()
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    gc.collect()
    with_parent = anonymous_bytes()
    places: dict[str, list[int]] = {}
    storages: dict[int, int] = {}
    for name in (*budgets, "full"):
        model.set_budget(name)
        tensors = list(model.state_dict(keep_vars=True).values())  # of the budget; parameters() are the family's
        places[name] = [tensor.data_ptr() for tensor in tensors]
        storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors})
    del tensors
    gc.collect()
    with_all = anonymous_bytes()
    moved, microseconds = 0, []
    with _CountOperations() as counter:
        for name in (*budgets, "full") * SWITCHES:
            start = perf_counter()
            model.set_budget(name)
            microseconds.append(1e6 * (perf_counter() - start))
            places_now = [tensor.data_ptr() for tensor in model.state_dict(keep_vars=True).values()]
            moved += sum(old != new for old, new in zip(places[name], places_now, strict=True))
    assert with_parent - before > 0.9 * weights, (
        "the parent's weights are not in anonymous memory, so this shows nothing"
    )
    return {
        "weights": weights,
        "anonymous": (weights + with_all - with_parent) / weights,
        "storages": sum(storages.values()) / weights,
        "moved": moved,
        "operations": counter.count,
        "microseconds": microseconds,
    }


class _CountOperations(TorchDispatchMode):
    """Counts everything that reaches a tensor kernel, allocations and copies included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


# -- speed -------------------------------------------------------------------------------------------------------------


def speed(
    report: Report,
    name: str,
    parent: PreTrainedConfig,
    processes: int = PROCESSES,
    rounds: int = 9,
    prompt: int = 128,
    tokens: int = 96,
) -> float:
    """Compare a budget with the stock model of its size; returns the median over processes of the ratio of their times per token."""
    with tempfile.TemporaryDirectory(prefix="hf-elastic-switching-") as scratch:
        elastic, export = Path(scratch, "elastic"), Path(scratch, "export")
        in_child(prepare, elastic, export, parent, {"half": half_budget(parent)}, "half")
        runs = [
            in_child(decode_in_turns, elastic, export, "half", "cpu", rounds, prompt, tokens).result
            for _ in range(processes)
        ]
    return report_speed(report, name, runs, prompt=prompt, tokens=tokens)


def report_speed(report: Report, name: str, runs: list[dict[str, Any]], **about: Any) -> float:
    """Record what [`decode_in_turns`] found in several processes; returns the median of the ratio of times per token, budget / stock."""
    report.measure(f"{name}: active parameters of the budget", "parameters", [runs[0]["active"]])
    agreement = [run["agreement"] for run in runs]
    report.measure(f"{name}: share of generated tokens that both models agree on", "", agreement)
    ratio = {}
    for what, unit in (("prefill", "s"), ("decode", "s per token")):
        medians = {
            model: [statistics.median(run[what][model]) for run in runs] for model in ("budget", "slice", "stock")
        }
        for model, times in medians.items():
            report.measure(f"{name}: {what}, {model}", unit, times, **about)
        for model in ("budget", "slice"):
            ratios = [own / stock for own, stock in zip(medians[model], medians["stock"], strict=True)]
            ratio[what, model] = report.measure(f"{name}: {what}, {model} / stock", "", ratios)
    return ratio["decode", "budget"]


def prepare(
    elastic: Path, export: Path, parent: PreTrainedConfig, budgets: dict[str, dict[str, int]], budget: str
) -> None:
    """Child process: write a checkpoint, and a budget of it as a stock one."""
    elastic.mkdir()
    write_checkpoint(elastic, parent, budgets)
    AutoModelForCausalLM.from_pretrained(elastic).export(export, budget)


def decode_in_turns(
    elastic: Path, export: Path, budget: str, device: str, rounds: int, prompt: int, tokens: int
) -> dict[str, Any]:
    """Child process: all models live on a device, one token of each in turn."""
    load = AutoModelForCausalLM.from_pretrained
    family = load(elastic).to(device)
    family.set_budget(budget)
    models: dict[str, PreTrainedModel] = {
        "budget": family,
        "slice": load(elastic, budget=budget).to(device),
        "stock": load(export).to(device),
    }
    for parameter in models["stock"].parameters():
        parameter.data = parameter.data.clone()
    ids = torch.randint(3, family.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    runs = {name: Generation(model, ids) for name, model in models.items()}
    prefill = {name: run.prefill for name, run in runs.items()}
    decode = {name: run.decode for name, run in runs.items()}
    in_turns(prefill, 1)  # warm up, such as thread pools
    in_turns(decode, 3)
    measured = {"prefill": in_turns(prefill, rounds), "decode": in_turns(decode, tokens)}
    same = torch.cat(runs["budget"].tokens) == torch.cat(runs["stock"].tokens)
    return {
        **measured,
        "active": family.elastic_config.costs()[budget].active_params,
        "agreement": same.float().mean().item(),
    }


class Generation:
    """Greedy generation with a cache, as `generate` does it, one call per step so that two models can take turns."""

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor):
        self.model, self.ids = model, ids
        self.cache: Any = None
        self.tokens: list[torch.Tensor] = []

    def prefill(self) -> float:
        """Read the prompt into a new cache; returns seconds."""
        self.cache, self.tokens = None, []
        return self._step(self.ids)

    def decode(self) -> float:
        """Generate one token; returns seconds."""
        return self._step(self.tokens[-1])

    @torch.inference_mode()
    def _step(self, ids: torch.Tensor) -> float:
        start = perf_counter()
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        int(token[0, 0])  # as who asks whether the text ends; waits for a GPU
        taken = perf_counter() - start
        self.cache = output.past_key_values
        self.tokens.append(token)
        return taken


if __name__ == "__main__":
    sys.exit(main())
