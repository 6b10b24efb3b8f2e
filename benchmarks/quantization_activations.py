"""What 4-bit activations would cost beside 4-bit weights, and how long a step of distillation with rounded weights takes.

The lab's family of whole blocks in NVFP4 by the default recipe, per size: share of held-out problems of 12 lines whose whole answer is right, by
generation, and the divergence from the whole model in nats per token.

- *weights*: weights in 4 bits, activations as they are (W4A16), which is what this package writes;
- *weights and activations*: the inputs of the matrices that are in 4 bits are rounded to NVFP4 as well (W4A4): a scale in E4M3 for 16 elements,
  one for the tensor, made from what is there;
- each by calibration alone, and *distilled*: 150 steps while the same is rounded, one seed, gradients straight through;
- *not quantised*: the family as it ships, in float32.

Step: `training_step` of the trainer with and without `quantization`, in turns, on a random model of 40M parameters in float32; seconds of one core,
which another program on the machine does not change. Rounding takes the same time however many tokens a step has, so its share falls with them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import torch
from datasets import Dataset
from harness import Claim, Report, in_turns
from lab_runs import Runs, by_name, lab_arguments
from synthetic import nano_like
from torch import nn
from transformers import TrainerCallback

from hf_elastic import ElasticConfig, ElasticForCausalLM
from hf_elastic.lab.book import EOS, THINK_START, build_tokenizer, evaluate, problems
from hf_elastic.lab.formats import write_quantized
from hf_elastic.lab.quantized import BLOCKS, QUANTIZED_STEPS, load_block_family, train_quantized
from hf_elastic.quantization.codec import global_scale_of, rounded
from hf_elastic.quantization.recipes import resolve_recipe
from hf_elastic.trainers import ElasticDistillationConfig, ElasticDistillationTrainer, divergence

RECIPE = "nvfp4"
SIZES = ("full", *BLOCKS)
SEED = 7
PLAIN = "not quantised"
LOST = "weights and activations, distilled: most exact answers that a size loses against weights, distilled"
SLOWER = "step of 2048 tokens of the whole model: rounded / plain"
CLAIMS = [Claim(LOST, 0.02), Claim(SLOWER, 1.25)]


# -- activations -------------------------------------------------------------------------------------------------------


def in_four_bits(hidden: torch.Tensor) -> torch.Tensor:
    """Activations rounded to NVFP4, gradients straight through. Largest elements become a 6: hardware has no time to choose."""
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    if not len(flat):
        return hidden
    scale = global_scale_of(flat, choose=False)
    made = rounded(flat, "nvfp4", global_scale=scale, choose=False).view(hidden.shape)
    return hidden + (made - hidden).detach()


def first_rounded(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (in_four_bits(args[0]), *args[1:])


def output_rounded(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return in_four_bits(output)


def hook(find: Callable[[str], nn.Module], names: Any) -> list[Any]:
    """Round what goes into these weights: the inputs of linear layers and of experts, and what experts have between their two matrices.

    Args:
        find: The module of a path.
        names: Names of weights.
    """
    handles = []
    for name in names:
        path, _, leaf = name.rpartition(".")
        module: Any = find(path)
        if leaf == "down_proj":  # a stack of experts, which has no module for either matrix
            handles.append(module.act_fn.register_forward_hook(output_rounded))
        else:
            handles.append(module.register_forward_pre_hook(first_rounded))
    return handles


class RoundInputs(TrainerCallback):
    """Rounds the activations of a run: of the modules that compute in it at every size."""

    def __init__(self, family: ElasticForCausalLM):
        self.family = family

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        family = self.family
        encodings = resolve_recipe(RECIPE, family.architecture, family.elastic_config.parent_config)
        family.round_weights(encodings)
        layers = {id(layer): i for i, layer in enumerate(family.architecture.layers_of(family))}
        for size in family.elastic_config.family():
            with family.computing(size):
                for unit in family._stencils[family.submodel]:
                    prefix = f"model.layers.{layers.get(id(unit.module))}."
                    inside = [name.removeprefix(prefix) for name in encodings if name.startswith(prefix)]
                    if unit.stencil is not None:
                        hook(unit.stencil.get_submodule, inside)
        family.round_weights(None)


def measure(runs: Runs, folder: Path, activations: bool, count: int) -> list[dict[str, Any]]:
    """Rates of every size of a quantised checkpoint."""
    teacher = load_block_family()[0]
    source = problems("heldout", runs.letters, 1)
    ids = torch.tensor(runs.tokenizer([next(source).text + EOS for _ in range(min(count, 64))])["input_ids"])
    start = ids[0].tolist().index(runs.tokenizer.convert_tokens_to_ids(THINK_START))
    entries = []
    for size in SIZES:
        model = ElasticForCausalLM.from_pretrained(folder, budget=size, dtype=torch.float32).eval()
        elastic = model.elastic_config
        names = resolve_recipe(RECIPE, elastic.architecture, elastic.parent_config)
        handles = hook(model.get_submodule, names) if activations else []
        rates = evaluate(model, runs.tokenizer, letters=runs.letters, count=count, batch_size=200)
        with torch.no_grad():
            theirs, ours = (m(ids).logits[:, start:-1].flatten(0, 1) for m in (teacher, model))
        for handle in handles:
            handle.remove()
        kl = float(divergence(ours, theirs).mean())
        entries.append({"name": size, "exact": rates.exact, "trace": rates.trace, "kl": kl})
    return entries


def trained(runs: Runs, activations: bool, steps: int) -> ElasticForCausalLM:
    """The family after some steps with rounded weights, or rounded weights and activations."""

    def train() -> ElasticForCausalLM:
        family = load_block_family()[0]
        options: dict[str, Any] = {"callback": RoundInputs(family)} if activations else {}
        with tempfile.TemporaryDirectory(prefix="hf-elastic-lab-") as scratch:
            train_quantized(
                family,
                runs.tokenizer,
                Path(scratch),
                RECIPE,
                steps=steps,
                seed=SEED,
                progress=False,
                per_device_train_batch_size=runs.rows,
                **options,
            )
        family.forget_budgets()
        return family

    name = "nvfp4-activations-distilled" if activations else "nvfp4-distilled"
    return runs.model(f"{name}-{SEED}", train)


def accuracy(runs: Runs, report: Report, quick: bool) -> None:
    count, steps = (2, 1) if quick else (runs.problems, QUANTIZED_STEPS)
    ways: Mapping[str, tuple[bool, Callable[[], ElasticForCausalLM]]] = {
        PLAIN: (False, lambda: load_block_family()[0]),
        "weights": (False, lambda: load_block_family()[0]),
        "weights and activations": (True, lambda: load_block_family()[0]),
        "weights, distilled": (False, lambda: trained(runs, False, steps)),
        "weights and activations, distilled": (True, lambda: trained(runs, True, steps)),
    }
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for way, (activations, family) in ways.items():

        def action(way: str = way, activations: bool = activations, family: Any = family) -> list[dict[str, Any]]:
            with tempfile.TemporaryDirectory(prefix="hf-elastic-lab-") as scratch:
                write_quantized(family(), runs.tokenizer, Path(scratch), None if way == PLAIN else RECIPE)
                return measure(runs, Path(scratch), activations, count)

        found[way] = by_name(runs.run(f"activations-{way.replace(', ', '-').replace(' ', '-')}", action))
        for size, entry in found[way].items():
            for rate in ("exact", "trace", "kl"):
                unit = "nats per token" if rate == "kl" else "share"
                report.measure(f"{way}: {size}, {rate}", unit, [entry[rate]], problems=count)
    one, both = (found[f"{what}, distilled"] for what in ("weights", "weights and activations"))
    report.settle(LOST, max(one[size]["exact"] - both[size]["exact"] for size in SIZES))


# -- time --------------------------------------------------------------------------------------------------------------


@contextmanager
def stepping(quick: bool, tokens: int) -> Iterator[dict[str, Callable[[], float]]]:
    """Steps at two sizes, plain and rounded, on one model."""
    config = nano_like(
        torch.float32, scale=16 if quick else 4, experts=8 if quick else 16, layers="MEM*ME", vocab_size=4096
    )
    config.n_groups, config.hidden_size = 2, config.hidden_size // 64 * 64
    config.mamba_num_heads, config.num_attention_heads = config.mamba_num_heads // 2 * 2, 2
    config.moe_intermediate_size = config.moe_intermediate_size // 32 * 32
    config.moe_shared_expert_intermediate_size = config.moe_shared_expert_intermediate_size // 32 * 32
    half = {"hidden": max(16, config.hidden_size // 32 * 16), "expert_ffn": config.moe_intermediate_size // 32 * 16}
    torch.manual_seed(0)
    model = ElasticForCausalLM._from_config(ElasticConfig.from_parent(config, {"half": half})).train()
    ids = torch.randint(5, config.vocab_size, (1, 64 if quick else tokens))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with tempfile.TemporaryDirectory(prefix="hf-elastic-lab-") as scratch:
        trainer = ElasticDistillationTrainer(
            model=model,
            args=ElasticDistillationConfig(
                output_dir=scratch,
                max_steps=1,
                use_cpu=True,
                bf16=False,
                report_to=[],
                activation_checkpointing=False,
                quantization=RECIPE,
            ),
            train_dataset=Dataset.from_list([{"input_ids": ids[0].tolist()}]),
            processing_class=build_tokenizer(),
        )
        trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
        trainer.current_gradient_accumulation_steps = 1
        quantizing = trainer.quantizing

        def step(budget: str, rounds: bool) -> float:
            trainer.quantizing = quantizing if rounds else None
            trainer.curriculum.budget = lambda *_: budget  # type: ignore[method-assign]

            def run() -> None:
                trainer.model.train()
                trainer.training_step(trainer.model_wrapped, dict(inputs), ids.numel() - 1)
                trainer.model.zero_grad()

            start = process_time()
            run()
            return process_time() - start

        yield {
            f"{budget}, {'rounded' if rounds else 'plain'}": partial(step, budget, rounds)
            for budget in ("full", "half")
            for rounds in (False, True)
        }


def time_steps(report: Report, quick: bool) -> None:
    times: dict[str, float] = {}
    for tokens in (512, 2048):
        with stepping(quick, tokens) as actions:
            for action in actions.values():
                action()
            for name, runs in in_turns(actions, 1 if quick else 3).items():
                times[name] = report.measure(f"step of {tokens} tokens: {name}", "s", runs)
    report.settle(SLOWER, times["full, rounded"] / times["full, plain"])


def run(options: argparse.Namespace) -> int:
    runs = Runs(options)
    report = Report("quantization_activations", CLAIMS)
    time_steps(report, options.quick)
    accuracy(runs, report, options.quick)
    runs.say_commits(report)
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(run(lab_arguments(__doc__).parse_args()))
