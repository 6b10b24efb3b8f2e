"""What a training step costs at a budget: time and peak memory against masks and against a stock fine-tuning step.

A step is `training_step` of a trainer on the same batch, forward and backward, in one process and in turns:

- *elastic*: `ElasticDistillationTrainer` at the full, 75 % and 50 % budget (share of the active parameters): teacher forward, student
  forward by stencils, forward KL in chunks;
- *masked*: the same trainer with the whole parent under the masks of the 50 % budget, as a router that has not decided runs it;
- *stock*: `trl.SFTTrainer` with the stock model, after the same teacher forward.

Claim: an elastic step at the 50 % budget takes at most 0.65 times as long as the masked one. Medians of interleaved runs; peak memory
is that of activations and gradients, from a fresh process per way.

The model is a random `nemotron_h` (Mamba, MoE and attention layers) of more than 100M parameters in float32, large enough that
arithmetic decides, not Python.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from harness import Claim, Report, arguments, in_turns, seconds
from processes import PRELOADED, in_child
from synthetic import nano_like
from trl import SFTConfig, SFTTrainer

from hf_elastic import ElasticConfig, ElasticForCausalLM
from hf_elastic.architectures.submodel import Submodel
from hf_elastic.lab.book import build_tokenizer
from hf_elastic.submodels.soft import Mixture, SoftUnits
from hf_elastic.trainers import ElasticDistillationConfig, ElasticDistillationTrainer

transformers.logging.set_verbosity_error()
PRELOADED += ["trl.trainer.sft_trainer", "hf_elastic.trainers.elastic_distillation_trainer"]

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
    stock_model = model.architecture.causal_class(copy.deepcopy(model.config))
    stock_model.load_state_dict(model.state_dict())
    batch, length = (1, 64) if quick else (2, 256)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, model.config.vocab_size, (batch, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    common: dict[str, Any] = {
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": [],
        "router_aux_loss_coef": 0.0,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    rows = {"train_dataset": Dataset.from_dict({"input_ids": ids.tolist()}), "processing_class": build_tokenizer()}
    with tempfile.TemporaryDirectory(prefix="hf-elastic-training-") as scratch:  # nothing is saved there
        common["output_dir"] = scratch
        elastic = ElasticDistillationTrainer(model=model, args=ElasticDistillationConfig(**common), **rows)
        stock = SFTTrainer(model=stock_model, args=SFTConfig(**common), **rows)
    for trainer in (elastic, stock):
        trainer.current_gradient_accumulation_steps = 1
    teacher = elastic.teacher_model
    masked = SoftUnits(model, model.architecture)
    mixture = hard_mixture(model, model.elastic_config.submodel("half"))
    count = torch.tensor(batch * (length - 1))

    def step(trainer: Any, budget: str) -> float:
        trainer_model = trainer.model
        elastic.curriculum.budget = lambda step, micro_batch=0: budget  # type: ignore[method-assign]
        taken = seconds(lambda: trainer.training_step(trainer_model, dict(inputs), count))
        trainer_model.zero_grad()
        return taken

    def at_masks() -> float:
        masked.install(mixture)
        try:
            return step(elastic, "full")
        finally:
            masked.uninstall()

    def taught() -> float:
        with torch.no_grad():
            return seconds(lambda: teacher.base_model(ids, use_cache=False))

    steps = {
        "elastic full": lambda: step(elastic, "full"),
        "elastic 75 %": lambda: step(elastic, "three quarters"),
        "elastic 50 %": lambda: step(elastic, "half"),
        "masked 50 %": at_masks,
        "stock": lambda: taught() + step(stock, "full"),
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


def peak_bytes(way: str, quick: bool) -> int:
    """Peak resident memory that three steps of one way add; to be called in a fresh process."""
    _, steps, _ = make_steps(quick)
    steps[way]()  # builds stencils
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of making the model
    before = _status("VmRSS")
    for _ in range(3):
        steps[way]()
    return _status("VmHWM") - before


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
        peak = in_child(peak_bytes, way, options.quick).result
        report.measure(f"{way}: peak memory added by steps", "bytes", [peak])
    ratios = [fast / slow for fast, slow in zip(times["elastic 50 %"], times["masked 50 %"], strict=True)]
    report.settle(CLAIM, statistics.median(ratios))
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(run(arguments(__doc__).parse_args()))
