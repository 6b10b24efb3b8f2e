"""What a family costs and what it can do in each format: written, read back size by size, and told on its card."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._version import __version__
from ..checkpoints.quantizing import quantize_checkpoint
from ..checkpoints.replacing import replacing
from ..configuration_elastic import ElasticConfig
from ..hub.cards import render_card
from ..modeling_elastic import ElasticForCausalLM
from .book import EOS, THINK_START, evaluate, problems

RESULTS_FILE = "formats.json"
"""What was measured, beside the checkpoints, and in `results/` of each, where its card has it from."""

Say = Callable[[str], None]


def write_quantized(family: ElasticForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, recipe: Any) -> None:
    """Save a family, quantised as the recipe says; `None` saves it as it is."""
    if recipe is None:
        with replacing(folder) as made:
            family.save_pretrained(made)
            tokenizer.save_pretrained(made)
        return
    with tempfile.TemporaryDirectory(prefix="hf-elastic-lab-") as scratch:
        family.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        quantize_checkpoint(scratch, folder, recipe, progress=False)


def measure_stored(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel,
    *,
    count: int = 100,
    letters: int = 12,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, Any]]:
    """Accuracy of every size of a checkpoint, cut from its files and decoded.

    Args:
        folder (`Path`): An elastic checkpoint, quantised or not.
        teacher (`PreTrainedModel`): What distributions are compared with.
        count (`int`, *optional*, defaults to 100): Held-out problems per size; the divergence is of 64 others at most.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): What is computed in.

    Returns:
        `list[dict]`: Per size `name`, `total_params`, `active_params`, `stored_bytes` (what is not quantised counted in bfloat16), `exact`, `trace`, and
            `kl` (from the teacher, in nats per token of thinking and answer).
    """
    entries = []
    for name, cost in ElasticConfig.from_pretrained(folder).costs().items():
        model = ElasticForCausalLM.from_pretrained(folder, budget=name, dtype=dtype).eval()
        rates = evaluate(model, tokenizer, letters=letters, count=count, seed=seed, batch_size=min(count, 500))
        entries.append(
            {
                "name": name,
                "total_params": cost.total_params,
                "active_params": cost.active_params,
                "stored_bytes": cost.stored_bytes(torch.bfloat16),
                "exact": rates.exact,
                "trace": rates.trace,
                "kl": _divergence(model, teacher, tokenizer, letters, min(count, 64), seed + 1),
            }
        )
    return entries


@torch.no_grad()
def _divergence(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    letters: int,
    count: int,
    seed: int,
) -> float:
    """Mean Kullback-Leibler divergence from the teacher over tokens of thinking and answer."""
    source = problems("heldout", letters, seed)
    ids = torch.tensor(tokenizer([next(source).text + EOS for _ in range(count)])["input_ids"])
    start = ids[0].tolist().index(tokenizer.convert_tokens_to_ids(THINK_START))
    theirs, ours = (m(ids).logits[:, start:-1].float().log_softmax(-1) for m in (teacher, model))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def compare_formats(
    family: ElasticForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    formats: Mapping[str, Any],
    *,
    distilled: Mapping[str, ElasticForCausalLM] | None = None,
    say: Say = lambda text: None,
    **options: Any,
) -> dict[str, list[dict[str, Any]]]:
    """Write a family in every format, each into a folder of its name, and measure all sizes of each.

    Args:
        formats (`dict[str, Any]`): Recipes by the name of the folder; `None` is not quantised.
        distilled (`dict[str, ElasticForCausalLM]`, *optional*): By these names, families that are quantised instead.
        options: As for [`measure_stored`].

    Returns:
        `dict[str, list[dict]]`: By name, what [`measure_stored`] gives.
    """
    found = {}
    for name, recipe in formats.items():
        write_quantized((distilled or {}).get(name, family), tokenizer, output / name, recipe)
        found[name] = measure_stored(output / name, tokenizer, family, **options)
        said = ", ".join(f"{entry['name']} {entry['exact']:.3f}" for entry in found[name])
        say(f"     {name}: {said}")
    return found


def write_formats(
    output: Path, found: Mapping[str, list[dict[str, Any]]], quantized: list[str], **about: Any
) -> dict[str, Any]:
    """Write what [`compare_formats`] measured, and cards of quantised families with a column per format.

    Args:
        output (`Path`): Folder of the folders.
        quantized (`list[str]`): Names of those that get a card.
        about: What else the file says: seed, problems, ...

    Returns:
        `dict`: what the file says.
    """
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_elastic": __version__,
    }
    results = {"formats": dict(found), **about, "versions": versions}
    text = json.dumps(results, indent=2) + "\n"
    (output / RESULTS_FILE).write_text(text, encoding="utf-8")
    for name in quantized:
        card = render_card(ElasticConfig.from_pretrained(output / name), results=[output / RESULTS_FILE])
        card.save(output / name / "README.md")
        (output / name / "results").mkdir(exist_ok=True)
        (output / name / "results" / RESULTS_FILE).write_text(text, encoding="utf-8")
    return results
