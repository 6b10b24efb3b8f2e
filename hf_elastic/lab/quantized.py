"""The third chapter of the lab: all sizes of the `book` model in one checkpoint of 8 or 4 bits, calibrated or distilled while rounded.

NVFP4 has a scale for every 16 elements of a row, so no size may cut a block. A trained family of such sizes ships with the package, see
[`load_block_family`]; `python -m hf_elastic.lab.quantized --output DIR` trains it again, and `hf-elastic lab --task book --quantize` quantises it.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..configuration_elastic import ElasticConfig
from ..modeling_elastic import ElasticForCausalLM
from ..quantization.recipes import KINDS
from .family import divergences, load_family, train_family
from .formats import measure_stored

logger = logging.getLogger(__name__)

BLOCK_DIR = Path(str(resources.files("hf_elastic.lab"))) / "assets" / "blocks"
"""Folder of the shipped family of whole blocks: its checkpoint in bfloat16, its tokenizer and `training.json`, the record of its training."""

BLOCKS: dict[str, dict[str, Any]] = {
    "most": {"hidden": 32, "expert_ffn": 32, "shared_expert_ffn": 64},
    "half": {"hidden": 32, "expert_ffn": 16, "shared_expert_ffn": 32},
    "quarter": {"hidden": 16, "expert_ffn": 16, "shared_expert_ffn": 32},
}
"""Sizes that NVFP4 can hold, every cut at a multiple of 16: about 67, 53 and 28 % of the parent's active parameters."""

EVERYTHING: dict[str, str | None] = dict.fromkeys(KINDS, "nvfp4")
"""A recipe that keeps nothing of what can be quantised: attention, and the Mamba layer that feeds it, are in 4 bits as well."""

STEPS = 600
"""Optimizer steps from the weights of [`~hf_elastic.lab.family.FAMILY`] to those of [`BLOCKS`]."""
QUANTIZED_STEPS = 150
"""Optimizer steps of distillation while the weights are rounded: 15 % of what the family took."""


def make_block_family(family: ElasticForCausalLM) -> ElasticForCausalLM:
    """The weights of a trained family, with the sizes of [`BLOCKS`] instead of its own, which are not trained yet."""
    made = ElasticForCausalLM(ElasticConfig.from_parent(family.elastic_config.parent_config, BLOCKS))
    made.load_state_dict(family.state_dict())
    made.generation_config = family.generation_config
    return made.to(family.dtype).eval()


def train_block_family(
    family: ElasticForCausalLM, tokenizer: PreTrainedTokenizerBase, output: Path, *, steps: int = STEPS, **options: Any
) -> list[dict[str, float]]:
    """Distil a family from [`make_block_family`], its smallest size twice as often as the others. Options as for `train_family`."""
    smallest = list(BLOCKS)[-1]
    probabilities = {name: 0.4 if name == smallest else 0.2 for name in ("full", *BLOCKS)}
    options = {"learning_rate": 4e-3, "budget_probabilities": probabilities, **options}
    return train_family(family, tokenizer, output, steps=steps, **options)


def train_quantized(
    family: ElasticForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    recipe: Any = "nvfp4",
    *,
    steps: int = QUANTIZED_STEPS,
    **options: Any,
) -> list[dict[str, float]]:
    """Distil a trained family while its weights are rounded to what the recipe says, with a third of the learning rate it had.

    Options as for `train_family`. The weights are not rounded afterwards: [`~hf_elastic.lab.formats.write_quantized`] does that.
    """
    options = {"learning_rate": 2e-3, **options}
    return train_family(family, tokenizer, output, steps=steps, quantization=recipe, **options)


def load_block_family(
    dtype: torch.dtype = torch.float32,
) -> tuple[ElasticForCausalLM, PreTrainedTokenizerBase]:
    """Loads the family of whole blocks that ships with the package, trained and not quantised. Needs no network.

    Example:

    ```python
    >>> from hf_elastic.lab.quantized import load_block_family
    >>> family, tokenizer = load_block_family()
    >>> family.elastic_config.submodel("quarter")["hidden"]
    16
    ```
    """
    return ElasticForCausalLM.from_pretrained(BLOCK_DIR, dtype=dtype), AutoTokenizer.from_pretrained(BLOCK_DIR)


def main(arguments: list[str] | None = None) -> None:
    """Trains the family of whole blocks from the family in the package, measures it and saves it in bfloat16, with a record."""
    from .parent import save_trained

    parser = argparse.ArgumentParser(prog="python -m hf_elastic.lab.quantized", description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to save to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the problems and of the budgets (default: 0)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default: {STEPS})")
    parser.add_argument("--problems", type=int, default=400, help="problems per measurement (default: 400)")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # the model is so small that a second thread waits more than it works
    started = time.perf_counter()
    shipped, tokenizer = load_family()
    family = make_block_family(shipped)
    with tempfile.TemporaryDirectory(prefix="hf-elastic-lab-") as scratch:
        history = train_block_family(family, tokenizer, Path(scratch), steps=options.steps, seed=options.seed)
    seconds = time.perf_counter() - started
    family.to(torch.bfloat16).save_pretrained(options.output)
    measured = measure_stored(options.output, tokenizer, family.float(), count=options.problems)
    for entry in measured:
        logger.info(
            "%s: exact %.4f, thinking %.4f, KL %.4f", *(entry[key] for key in ("name", "exact", "trace", "kl"))
        )
    save_trained(
        options.output,
        family.to(torch.bfloat16),
        tokenizer,
        seed=options.seed,
        steps=options.steps,
        seconds=seconds,
        evaluation={"letters": 12, "count": options.problems, "budgets": measured},
        history=divergences(history),
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
