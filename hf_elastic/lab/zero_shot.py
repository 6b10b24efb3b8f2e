"""The first chapter of the lab: a reasoning hybrid made elastic, cut without training, switched live, exported, and checked.

Nothing in here is a shortcut: slices are read back from the saved checkpoint, accuracy is measured by generating, and the exported
model is loaded by a process in which this package cannot be imported.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .._version import __version__
from ..elastification.elastify import elastify
from ..errors import HFElasticError
from ..modeling_elastic import ElasticForCausalLM
from .book import calibration_dataset, evaluate, problems

BUDGETS: dict[str, dict[str, Any]] = {
    "ffn-88": {"expert_ffn": 28, "shared_expert_ffn": 56},
    "ffn-75": {"expert_ffn": 24, "shared_expert_ffn": 48},
    "ffn-63": {"expert_ffn": 20, "shared_expert_ffn": 40},
    "ffn-50": {"expert_ffn": 16, "shared_expert_ffn": 32},
    "small": {"hidden": 40, "mamba_heads": 6, "expert_ffn": 16, "shared_expert_ffn": 32},
}
"""Submodels of the `book` parent, largest first. The last one cuts the residual stream and Mamba heads, which no untrained model survives."""

# Run in a fresh interpreter: a finder in front of all others refuses this package by name.
_WITHOUT_US = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_elastic":
            raise ImportError("hf_elastic must not be needed here")

sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, ids, output = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
assert not problems, problems
assert type(model).__module__.startswith("transformers."), type(model)
AutoTokenizer.from_pretrained(directory)
with torch.no_grad():
    logits = model(torch.load(ids)).logits
torch.save(logits, output)
"""


def run_zero_shot(
    parent: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    count: int = 100,
    letters: int = 12,
    seed: int = 0,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Elastify, save, slice, evaluate, switch, export and check.

    Args:
        parent (`PreTrainedModel`): A `book` parent.
        tokenizer: Its tokenizer.
        output (`Path`): Folder for `elastic/`, `export/` and `results.json`.
        count (`int`, *optional*, defaults to 100): Held-out problems per budget.
        letters (`int`, *optional*, defaults to 12): Lines per problem.
        seed (`int`, *optional*, defaults to 0): Of calibration and problems.
        progress (`bool`, *optional*, defaults to `True`): Show progress bars.
        say (`Callable[[str], None]`, *optional*): Is told what happens.

    Returns:
        `dict`: what `results.json` holds: `budgets` (counts, sizes, accuracies, differences), `export`, `versions`.

    Raises:
        `HFElasticError`: two ways to the same submodel disagree.
    """
    start = time.perf_counter()
    say("scoring, sorting and saving the parent ...")
    calibration = calibration_dataset(tokenizer, 256, seed)
    elastic = elastify(parent, calibration, budgets=BUDGETS, batch_size=32, progress=progress)
    elastic.save_pretrained(output / "elastic")
    tokenizer.save_pretrained(output / "elastic")
    ids = _sample_ids(tokenizer, letters, seed)
    sort_difference = _difference(_logits(elastic, ids), _logits(parent, ids))
    family = AutoModelForCausalLM.from_pretrained(output / "elastic")
    budgets = []
    for name, cost in family.elastic_config.costs().items():
        say(f"budget {name}: slicing, switching, solving {count} held-out problems ...")
        budgets.append(
            {
                "name": name,
                "total_params": cost.total_params,
                "active_params": cost.active_params,
                "sizes": family.elastic_config.submodel(name).to_dict(),
                **_measure(family, tokenizer, output / "elastic", name, ids, count, letters, seed),
            }
        )
    exported = "ffn-75"
    say(f"exporting {exported}, and loading it where hf_elastic cannot be imported ...")
    export_difference = check_export(family, exported, output / "export", ids)
    results = {
        "task": {"letters": letters, "problems": count, "seed": seed},
        "budgets": budgets,
        "sorted_parent_difference": sort_difference,
        "export": {"budget": exported, "difference": export_difference},
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf_elastic": __version__,
        },
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def _measure(
    family: ElasticForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    name: str,
    ids: torch.Tensor,
    count: int,
    letters: int,
    seed: int,
) -> dict[str, Any]:
    """Accuracy of the slice read from disk, and that the live family computes and generates the same at this budget."""
    loaded = AutoModelForCausalLM.from_pretrained(directory, budget=name)
    result = evaluate(loaded, tokenizer, letters=letters, count=count, seed=seed)
    with family.at(name):
        live = evaluate(family, tokenizer, letters=letters, count=count, seed=seed)
        difference = _difference(_logits(family, ids), _logits(loaded, ids))
        weights = loaded.state_dict()
        same = all(torch.equal(weights[key], tensor) for key, tensor in family.state_dict().items())
    if not same or live != result:
        raise HFElasticError(
            f"budget {name}: the live submodel is not the slice from disk (same weights: {same}, {live} != {result})"
        )
    return {"exact": result.exact, "trace": result.trace, "code": result.code, "live_difference": difference}


def check_export(family: ElasticForCausalLM, budget: str, directory: Path, ids: torch.Tensor) -> float:
    """Export a budget, load it in a process without this package, and return the largest difference of the logits."""
    family.export(directory, budget)
    inputs, outputs = directory / "ids.pt", directory / "logits.pt"
    torch.save(ids, inputs)
    try:
        command = [sys.executable, "-c", _WITHOUT_US, str(directory), str(inputs), str(outputs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise HFElasticError(f"plain transformers could not load the export:\n{done.stderr.strip()[-2000:]}")
        theirs = torch.load(outputs)
    finally:
        inputs.unlink(missing_ok=True)
        outputs.unlink(missing_ok=True)
    with family.at(budget):
        return _difference(_logits(family, ids), theirs)


def _sample_ids(tokenizer: PreTrainedTokenizerBase, letters: int, seed: int) -> torch.Tensor:
    stream = problems("heldout", letters, seed)
    return tokenizer([next(stream).text for _ in range(4)], return_tensors="pt")["input_ids"]


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, attention_mask=torch.ones_like(ids)).logits


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())
