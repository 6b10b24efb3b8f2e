"""What a training step costs at a budget: time and peak memory against masks and against a stock fine-tuning step.

A step is: teacher forward, student forward at the budget, forward KL in chunks, backward. It runs in four ways on the same batches:

- *elastic*: stencils, at the full, 75 % and 50 % budget (share of the active parameters);
- *masked*: the whole parent with masks for the 50 % budget, as a router that has not decided runs it;
- *stock*: the stock model with cross-entropy, after the same teacher forward.

Claim: an elastic step at the 50 % budget takes at most 0.65 times as long as the masked one. Medians of interleaved runs; peak memory
is that of activations and gradients, from a fresh process per way.

The model is a random `nemotron_h` (Mamba, MoE and attention layers) of more than 100M parameters in float32, large enough that
arithmetic decides, not Python.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Claim, Report, arguments, in_turns, seconds
from synthetic import nano_like

from hf_elastic import ElasticConfig, ElasticForCausalLM
from hf_elastic.soft import Mixture, SoftUnits
from hf_elastic.submodel import Submodel
from hf_elastic.trainers import chunked_divergence

CLAIM = "time of an elastic step at the 50 % budget / time of the masked step"
WAYS = ("elastic full", "elastic 75 %", "elastic 50 %", "masked 50 %", "stock")


def make_family(quick: bool) -> ElasticForCausalLM:
    """The parent with its two budgets, found by search over active parameters."""
    config = nano_like(
        torch.float32, scale=16 if quick else 2, experts=8 if quick else 16, layers="MEM*ME", vocab_size=4096
    )
    for field, multiple in (
        ("hidden_size", 64),
        ("moe_intermediate_size", 32),
        ("moe_shared_expert_intermediate_size", 32),
    ):
        setattr(config, field, getattr(config, field) // multiple * multiple)
    config.n_groups = 2
    config.mamba_num_heads = config.mamba_num_heads // 2 * 2
    config.num_attention_heads = max(2, config.num_attention_heads // 2 * 2)
    hidden, ffn, shared = config.hidden_size, config.moe_intermediate_size, config.moe_shared_expert_intermediate_size
    budgets = {
        "three quarters": _sizes(hidden, ffn, shared, 0.82),
        "half": _sizes(hidden, ffn, shared, 0.6),
    }
    torch.manual_seed(0)
    return ElasticForCausalLM._from_config(ElasticConfig.from_parent(config, budgets)).train()


def _sizes(hidden: int, ffn: int, shared: int, share: float) -> dict[str, int]:
    def cut(size: int) -> int:
        return max(8, round(size * share / 8) * 8)

    return {"hidden": cut(hidden), "expert_ffn": cut(ffn), "shared_expert_ffn": cut(shared)}


def make_steps(quick: bool) -> tuple[ElasticForCausalLM, dict[str, Callable[[], float]], int]:
    """The model, a step per way, and the tokens of a step."""
    model = make_family(quick)
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    masked = SoftUnits(model, model.architecture)
    mixture = hard_mixture(model, model.elastic_config.submodel("half"))
    batch, length = (1, 64) if quick else (2, 256)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)

    def hidden(which: Any) -> torch.Tensor:
        return which.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)

    def distil() -> None:
        with torch.no_grad():
            target = hidden(teacher)
        loss = chunked_divergence(hidden(model), target, model.lm_head, teacher.lm_head)
        loss.backward()
        model.zero_grad()

    def elastic(budget: str | None) -> float:
        with model.at(budget):
            return seconds(distil)

    def at_masks() -> float:
        masked.install(mixture)
        try:
            return seconds(distil)
        finally:
            masked.uninstall()

    def stock() -> float:
        def step() -> None:
            with torch.no_grad():
                hidden(teacher)
            model(ids, labels=ids, use_cache=False).loss.backward()
            model.zero_grad()

        return seconds(step)

    steps = {
        "elastic full": lambda: elastic(None),
        "elastic 75 %": lambda: elastic("three quarters"),
        "elastic 50 %": lambda: elastic("half"),
        "masked 50 %": at_masks,
        "stock": stock,
    }
    return model, steps, batch * length


def hard_mixture(model: ElasticForCausalLM, submodel: Submodel) -> Mixture:
    """One-hot probabilities over two sizes per axis that the submodel cuts: the masked way to run it."""
    full = model.elastic_config.architecture.full(model.elastic_config.parent_config)
    choices, probabilities = {}, {}
    for axis in submodel.cuts(full):
        choices[axis] = (max(full.values(axis)), max(submodel.values(axis)))
        probabilities[axis, None] = torch.tensor([0.0, 1.0])
    return Mixture(choices, probabilities)


def peak_bytes(way: str, quick: bool) -> float:
    """Peak resident memory that three steps of one way add, in a fresh process."""
    command = [sys.executable, __file__, "--peak-of", way, *(["--quick"] if quick else [])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def _print_peak(way: str, quick: bool) -> None:
    _, steps, _ = make_steps(quick)
    steps[way]()  # builds stencils
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of making the model
    before = _status("VmRSS")
    for _ in range(3):
        steps[way]()
    print(_status("VmHWM") - before)


def _status(field: str) -> int:
    """A memory figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:"))) * 1024


def run(options: argparse.Namespace) -> int:
    report = Report("training", [Claim(CLAIM, 0.65)])
    model, steps, tokens = make_steps(options.quick)
    costs = model.elastic_config.costs()
    shares = {name: cost.active_params / costs["full"].active_params for name, cost in costs.items()}
    about = {"parameters": costs["full"].total_params, "active_shares": shares, "tokens_per_step": tokens}
    for step in steps.values():  # the first call builds stencils
        step()
    times = in_turns(steps, 3 if options.quick else 9)
    for way, runs in times.items():
        report.measure(f"{way}: time per step", "s", runs, **about)
        report.measure(f"{way}: throughput", "tokens/s", [tokens / run for run in runs])
    for way in WAYS:
        report.measure(f"{way}: peak memory added by steps", "bytes", [peak_bytes(way, options.quick)])
    ratios = [fast / slow for fast, slow in zip(times["elastic 50 %"], times["masked 50 %"], strict=True)]
    report.settle(CLAIM, statistics.median(ratios))
    return report.finish(options)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.peak_of:
        _print_peak(parsed.peak_of, parsed.quick)
    else:
        sys.exit(run(parsed))
