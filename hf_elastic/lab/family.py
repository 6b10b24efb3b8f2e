"""The second chapter of the lab: all sizes of a model learned in one run, by distillation from the parent.

Trained families ship with the package, see [`load_family`]. `python -m hf_elastic.lab.family --task stories --output DIR` trains one again.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from ..architectures.cost import CostModel
from ..elastification.elastify import elastify
from ..modeling_elastic import ElasticForCausalLM
from .book_model import FAMILY as FAMILY
from .exercises import ASSETS, LabTask
from .tasks import TASKS, get_task

logger = logging.getLogger(__name__)

FAMILY_DIR = ASSETS / "family"
"""Folder of the shipped family of `book`: its checkpoint, its tokenizer and `training.json`, the record of its training."""

BETWEEN: dict[str, int] = {"hidden": 28, "expert_ffn": 12, "shared_expert_ffn": 24}
"""A submodel between `half` and `third` that is never drawn in training."""


ROUTER_TARGETS: dict[str, str] = {"half": "45.9k active", "third": "30.3k active", "quarter": "20.8k active"}
"""What the sizes may cost that a router learns: the active parameters of [`FAMILY`], within half a per cent."""

ROUTER_CHOICES: dict[str, list[int]] = {
    "hidden": [48, 44, 40, 36, 32, 28, 24, 20, 16],
    "expert_ffn": [32, 28, 24, 20, 16, 12, 8, 4],
    "shared_expert_ffn": [64, 56, 48, 40, 32, 24, 16, 12, 8],
    "mamba_heads": [8, 6, 4],
}
"""What it chooses among. Experts are left out: under a target of active parameters they cost nothing, so nothing would hold them."""


def make_family(
    parent: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    budgets: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    task: LabTask | str = "book",
    seed: int = 0,
    sort: bool = True,
    progress: bool = False,
) -> ElasticForCausalLM:
    """The sorted parent of a task with untrained budgets, by default the task's; `sort=False` leaves the parent's order, to see what
    sorting is worth."""
    task = get_task(task)
    budgets = task.sizes if budgets is None else budgets
    if not sort:
        return elastify(parent, budgets=budgets, sort=False)
    return elastify(
        parent, task.calibration_dataset(tokenizer, 256, seed), budgets=budgets, batch_size=32, progress=progress
    )


def make_open_family(
    parent: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, progress: bool = False
) -> ElasticForCausalLM:
    """The sorted parent with choices and no budgets yet, for a run whose router decides them (`router_targets=ROUTER_TARGETS`)."""
    return elastify(
        parent,
        get_task("book").calibration_dataset(tokenizer, 256, seed),
        axes=ROUTER_CHOICES,
        batch_size=32,
        progress=progress,
    )


def measure_family(
    model: ElasticForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    budgets: Mapping[str, Any],
    *,
    count: int = 100,
    size: int | None = None,
    seed: int = 0,
    task: LabTask | str = "book",
    split: str = "heldout",
) -> list[dict[str, Any]]:
    """Accuracy of live budgets on held-out problems.

    Args:
        budgets (`dict[str, Any]`): Anything `model.at` takes, under the name to report it by.
        size (`int`, *optional*): How long problems are, in the task's unit; by default as long as its `measured`.
        split (`str`, *optional*, defaults to `"heldout"`): See [`LabTask.evaluate`].

    Returns:
        `list[dict]`: `name`, `total_params`, `active_params`, `sizes`, `exact`, `trace`, `code` per budget.
    """
    task = get_task(task)
    count_cost = CostModel(model.elastic_config.parent_config)
    entries = []
    for name, budget in budgets.items():
        submodel = model.elastic_config.resolve(budget)
        cost = count_cost(submodel)
        with model.at(submodel):
            result = task.evaluate(model, tokenizer, size=size, count=count, seed=seed, split=split)
        entries.append(
            {
                "name": name,
                "total_params": cost.total_params,
                "active_params": cost.active_params,
                "sizes": submodel.to_dict(),
                "exact": result.exact,
                "trace": result.trace,
                "code": result.code,
            }
        )
    return entries


def train_family(
    family: ElasticForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    steps: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    progress: bool = True,
    callback: TrainerCallback | None = None,
    rows: Any = None,
    teacher: PreTrainedModel | None = None,
    task: LabTask | str = "book",
    **options: Any,
) -> list[dict[str, float]]:
    """Distil all budgets in place.

    The recipe is that of the lab's trials: AdamW without weight decay, batch 32, warm-up of 30 steps, constant to the middle, linear to 2 %.

    Args:
        family ([`ElasticForCausalLM`]): From [`make_family`].
        output (`Path`): Folder of the trainer.
        steps (`int`, *optional*): Optimizer steps, by default those of the task.
        learning_rate (`float`, *optional*): Of AdamW, by default the task's; half of it leaves the smallest size of `book` behind.
        seed (`int`, *optional*, defaults to 0): Of problems and budgets; the problems are others than the parent was trained on.
        rows (`datasets.IterableDataset`, *optional*):
            Other data than the problems of `task`, with `input_ids` and `labels`. By default the stream of another seed than the parent saw.
        teacher (`PreTrainedModel`, *optional*): What to learn from; the family as it is, which is its parent, by default.
        options: Fields of `ElasticDistillationConfig`, instead of these or besides them.

    Returns:
        `list[dict[str, float]]`: What the trainer logged.

    Raises:
        `ImportError`: trl is not installed.
    """
    from ..trainers import ElasticDistillationConfig, ElasticDistillationTrainer

    task = get_task(task)
    steps = task.family_steps if steps is None else steps
    learning_rate = task.learning_rate if learning_rate is None else learning_rate
    defaults = {
        "max_steps": steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": steps // 2, "min_lr_ratio": 0.02},
        "warmup_steps": min(30, steps // 4),
        "adam_beta2": 0.98,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": 32,
        "max_length": None,
        "activation_checkpointing": False,
        "use_cpu": family.device.type == "cpu",
        "bf16": False,
        "seed": seed,
        "logging_steps": max(1, steps // 20),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": not progress,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    trainer = ElasticDistillationTrainer(
        model=family,
        teacher_model=teacher,
        args=ElasticDistillationConfig(output_dir=str(output), **defaults | options),
        train_dataset=task.training_dataset(tokenizer, seed + 1000) if rows is None else rows,
        processing_class=tokenizer,
        callbacks=[callback] if callback else None,
    )
    if not progress:
        trainer.remove_callback(PrinterCallback)  # without a progress bar the trainer would print every log
    trainer.train()
    family.eval()
    return trainer.state.log_history


def train_open_family(
    family: ElasticForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    steps: int = 1000,
    targets: Mapping[str, Any] = ROUTER_TARGETS,
    **options: Any,
) -> list[dict[str, float]]:
    """As [`train_family`], of a family from [`make_open_family`], whose router decides the sizes in the first 30 % of the steps."""
    routed: dict[str, Any] = {"router_targets": dict(targets), "router_steps": router_steps(steps)}
    return train_family(family, tokenizer, output, steps=steps, **(routed | options))


def router_steps(steps: int) -> int:
    """Steps of a run until its router decides."""
    return max(1, steps * 3 // 10)


def load_family(task: LabTask | str = "book") -> tuple[ElasticForCausalLM, PreTrainedTokenizerBase]:
    """Loads the trained family of a task that ships with the package. Needs no network.

    Returns:
        `tuple[ElasticForCausalLM, PreTrainedTokenizerBase]`: The whole family, in float32 and evaluation mode, and its tokenizer.

    Example:

    ```python
    >>> from hf_elastic.lab.family import load_family
    >>> family, tokenizer = load_family()
    >>> inputs = tokenizer("^a6b-1c-5d-4><think>", return_tensors="pt")
    >>> with family.at("third"):
    ...     tokenizer.decode(family.generate(**inputs)[0])
    '^a6b-1c-5d-4><think>a6b6-1=5c5-5=0d0-4=6</think>bLcLdJ<eos>'
    ```
    """
    folder = get_task(task).family_folder
    return ElasticForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def divergences(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Of what a trainer logged, what the record of a training keeps."""
    return [
        {key: round(value, 4) for key, value in entry.items() if key == "step" or key.endswith("kl")}
        for entry in history
    ]


def main(arguments: list[str] | None = None) -> None:
    """Trains the family from the parent in the package, measures it and saves it with its tokenizer and a record."""
    from .parent import load_parent, save_trained

    parser = argparse.ArgumentParser(prog="python -m hf_elastic.lab.family", description=main.__doc__)
    parser.add_argument("--task", choices=list(TASKS), default="book", help="what it is for (default: book)")
    parser.add_argument("--parent", type=Path, help="folder of a parent (default: the one in the package)")
    parser.add_argument("--output", type=Path, required=True, help="folder to save to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the problems and of the budgets (default: 0)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: those of the task)")
    parser.add_argument("--problems", type=int, default=200, help="problems per measurement (default: 200)")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # the model is so small that a second thread waits more than it works
    started = time.perf_counter()
    task = get_task(options.task)
    steps = task.family_steps if options.steps is None else options.steps
    if options.parent is not None:
        task = dataclasses.replace(task, parent_folder=options.parent)
    parent, tokenizer = load_parent(task)[0], task.build_tokenizer()
    family = make_family(parent, tokenizer, task=task, seed=options.seed)
    with tempfile.TemporaryDirectory(prefix="hf-elastic-lab-") as scratch:
        history = train_family(family, tokenizer, Path(scratch), task=task, steps=steps, seed=options.seed)
    seconds = time.perf_counter() - started
    measured = measure_family(
        family, tokenizer, {"full": None, **{name: name for name in task.sizes}}, task=task, count=options.problems
    )
    for entry in measured:
        logger.info("%s: exact %.3f, thinking %.3f", entry["name"], entry["exact"], entry["trace"])
    save_trained(
        options.output,
        family,
        tokenizer,
        seed=options.seed,
        steps=steps,
        seconds=seconds,
        evaluation={task.unit: task.measured, "count": options.problems, "budgets": measured},
        history=divergences(history),
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
