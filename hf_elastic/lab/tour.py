"""The lab's tour: a family of a reasoning hybrid, trained at four sizes, is cut, solved with, switched live, exported, and checked.

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
from ..checkpoints.replacing import replacing
from ..errors import HFElasticError
from ..generation import PhasePlan
from ..modeling_elastic import ElasticForCausalLM
from .clock import time_plans
from .exercises import EOS, THINK_END, LabTask
from .family import measure_family
from .tasks import get_task

EXPORTED = "half"
CONTRAST = "half"
"""The size that is also measured as it is when it is only cut, without training."""

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

Say = Callable[[str], None]


def run_tour(
    parent: PreTrainedModel,
    untrained: ElasticForCausalLM,
    family: ElasticForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    task: LabTask | str = "book",
    count: int = 100,
    size: int | None = None,
    seed: int = 0,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Save, slice, evaluate, switch, export and check.

    Args:
        parent (`PreTrainedModel`): A parent of the task.
        untrained ([`ElasticForCausalLM`]): The parent sorted, with sizes that are only cut ([`~hf_elastic.lab.family.make_family`]).
        family ([`ElasticForCausalLM`]): The same after training.
        tokenizer: Of all of them.
        output (`Path`): Folder for `elastic/` (the trained family), `parent/` (what it is made from), `export/` and `results.json`.
        task ([`LabTask`] or `str`, *optional*, defaults to `"book"`): What they solve.
        count (`int`, *optional*, defaults to 100): Held-out problems per size.
        size (`int`, *optional*): How long problems are, in the task's unit; by default as its accuracy is measured on.
        seed (`int`, *optional*, defaults to 0): Of the problems.
        say (`Callable[[str], None]`, *optional*): Is told what happens.

    Returns:
        `dict`: what `results.json` holds: `budgets` (counts, sizes, accuracies, differences), `untrained` (the same of one size that is
            only cut), `example` (one problem as several sizes solve it), `clock` (what a plan with two sizes saves), `export`, `versions`.

    Raises:
        `HFElasticError`: two ways to the same submodel disagree.
    """
    start = time.perf_counter()
    for model, name in ((family, "elastic"), (parent, "parent")):
        with replacing(output / name) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    task = get_task(task)
    size = task.measured if size is None else size
    ids = _sample_ids(task, tokenizer, seed)
    options: dict[str, Any] = {"count": count, "size": size, "seed": seed}
    budgets = []
    for name, cost in family.elastic_config.costs().items():
        started = time.perf_counter()
        budgets.append(
            {
                "name": name,
                "total_params": cost.total_params,
                "active_params": cost.active_params,
                "sizes": family.elastic_config.submodel(name).to_dict(),
                **_measure(task, family, tokenizer, output / "elastic", name, ids, options),
            }
        )
        right = round(budgets[-1]["exact"] * count)
        say(f"     {name}: {right} of {count} answers right ({time.perf_counter() - started:.0f} s)")
    [contrast] = measure_family(untrained, tokenizer, {CONTRAST: CONTRAST}, task=task, **options)
    say(f"     {CONTRAST}, only cut from the model, without training: {round(contrast['exact'] * count)} of {count}")
    results = {
        "task": {"name": task.name, task.unit: size, "problems": count, "seed": seed},
        "budgets": budgets,
        "untrained": contrast,
        "example": solved(family, untrained, tokenizer, seed, task),
        "clock": timed(family, tokenizer, seed, task, size),
        "sorted_parent_difference": _difference(_logits(untrained, ids), _logits(parent, ids)),
        "export": {
            "budget": EXPORTED,
            "difference": check_export(family, EXPORTED, output / "export", ids, tokenizer),
        },
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


def solved(
    family: ElasticForCausalLM,
    untrained: ElasticForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    task: LabTask,
) -> dict[str, Any]:
    """One short held-out problem, as the largest and the smallest size solve it, both together, and one that is only cut."""
    problem = next(task.problems("heldout", task.shown, seed))
    largest, *_, smallest = family.elastic_config.family()
    inputs = tokenizer(task.opening(problem.prompt), return_tensors="pt")
    both = PhasePlan(smallest, largest)
    runs: list[tuple[str, ElasticForCausalLM, str, str, dict[str, Any]]] = [
        (largest, family, largest, largest, {}),
        (smallest, family, smallest, smallest, {}),
        (
            f"{smallest} thinks, {largest} answers",
            family,
            smallest,
            largest,
            {"phase_plan": both, "tokenizer": tokenizer},
        ),
        (f"{CONTRAST}, only cut", untrained, CONTRAST, CONTRAST, {}),
    ]
    costs = {name: cost.active_params for name, cost in family.elastic_config.costs().items()}
    whole = len(tokenizer(problem.thinking + THINK_END + problem.answer + EOS)["input_ids"]) * costs[largest]
    lines = []
    for who, model, thinking, answering, options in runs:
        with model.at(thinking if thinking == answering else None):
            ids = model.generate(**inputs, **({"max_new_tokens": 100} | options))[0, inputs["input_ids"].shape[1] :]
        found = task.verdict(problem, tokenizer.decode(ids))
        thought = len(tokenizer(f"{found['thinking']}{THINK_END}")["input_ids"])
        cost = thought * costs[thinking] + max(0, len(ids) - thought) * costs[answering]
        lines.append({"who": who, **found, "cost": cost / whole})
    return {"prompt": problem.prompt, "answer": problem.answer, "lines": lines}


def timed(
    family: ElasticForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int, task: LabTask, size: int
) -> dict[str, Any]:
    """What it takes on this machine that the smallest size thinks for the largest, beside the largest alone."""
    largest, *_, smallest = family.elastic_config.family()
    stream = task.problems("heldout", size, seed)
    texts = [task.opening(next(stream).prompt) for _ in range(4)]
    alone, plan = time_plans(family, tokenizer, texts, [(largest, largest), (smallest, largest)])
    return {"alone": largest, "thinking": smallest, "answering": largest, "alone_seconds": alone, "plan_seconds": plan}


def _measure(
    task: LabTask,
    family: ElasticForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    name: str,
    ids: torch.Tensor,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Accuracy of the slice read from disk, and that the live family computes and generates the same at this budget."""
    loaded = AutoModelForCausalLM.from_pretrained(directory, budget=name)
    result = task.evaluate(loaded, tokenizer, **options)
    with family.at(name):
        live = task.evaluate(family, tokenizer, **options)
        difference = _difference(_logits(family, ids), _logits(loaded, ids))
        weights = loaded.state_dict()
        same = all(torch.equal(weights[key], tensor) for key, tensor in family.state_dict().items())
    if not same or live != result:
        raise HFElasticError(
            f"budget {name}: the live submodel is not the slice from disk (same weights: {same}, {live} != {result})"
        )
    return {"exact": result.exact, "trace": result.trace, "code": result.code, "live_difference": difference}


def check_export(
    family: ElasticForCausalLM,
    budget: str,
    directory: Path,
    ids: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> float:
    """Export a budget, load it in a process without this package, and return the largest difference of the logits."""
    family.export(directory, budget, tokenizer=tokenizer)
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


def _sample_ids(task: LabTask, tokenizer: PreTrainedTokenizerBase, seed: int) -> torch.Tensor:
    """Four problems of the greatest length, cut to the shortest of them, so that none is padded."""
    stream = task.problems("heldout", task.trained[1], seed)
    ids = tokenizer([task.solved(next(stream)) for _ in range(4)])["input_ids"]
    return torch.tensor([row[: min(map(len, ids))] for row in ids])


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, attention_mask=torch.ones_like(ids)).logits


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())
