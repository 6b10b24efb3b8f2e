"""The parent of the lab: a small hybrid that learned a task from nothing.

Those of all tasks ship with the package, see [`load_parent`]. `python -m hf_elastic.lab.parent --task stories --output DIR` trains one again.
"""

import argparse
import json
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_elastic.checkpoints.loading import load_stock
from hf_elastic.lab.book_model import parent_config
from hf_elastic.lab.exercises import ASSETS, LabTask
from hf_elastic.lab.muon import Muon
from hf_elastic.lab.tasks import TASKS, get_task

logger = logging.getLogger(__name__)

__all__ = ["PARENT_DIR", "load_parent", "parent_config", "save_trained", "train_parent"]

PARENT_DIR = ASSETS / "parent"
"""Folder of the shipped parent of `book`: its checkpoint, its tokenizer and `training.json`, the record of its training."""

# Where the schedule of the learning rate bends, as fractions of the run, and its last value as a fraction of the peak.
_WARMUP_STEPS = 50
_DECAY_START = 0.6
_LAST_FACTOR = 0.02
_CLIP_NORM = 1.0

# Matrices by shape, but not weights that act as one: look-up tables, the router's few rows, a depthwise convolution.
_NOT_MUON = (
    "embeddings.weight",
    "embed_tokens.weight",
    "lm_head.weight",
    "gate.weight",
    "conv1d.weight",
    "conv.conv.weight",
)

_EVALUATED_PROBLEMS = 200


def _optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices, those of the experts batched, and AdamW for everything else."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not name.endswith(_NOT_MUON)
        (matrices if is_matrix else others).append(parameter)
    return [
        Muon(matrices, lr=0.01, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _learning_rate_factor(step: int, steps: int) -> float:
    """Warm-up, constant, then linear to the last value; `step` counts from 0, the result is in (0, 1]."""
    warmup = (step + 1) / _WARMUP_STEPS
    progress = (step + 1) / steps
    decay = 1 - (1 - _LAST_FACTOR) * max(0.0, progress - _DECAY_START) / (1 - _DECAY_START)
    return min(1.0, warmup, decay)


def train_parent(
    task: LabTask | str = "book",
    *,
    seed: int = 0,
    steps: int = 1000,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    progress: bool = True,
    log: Callable[[dict[str, float]], None] | None = None,
    **overrides: Any,
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """Trains a parent from scratch, in a few minutes on one CPU core.

    The thinking is learned first and the answer last. With seed 0, a whole run of 400, 700 or 1000 steps of `book` has every
    thinking of 12 letters right, but 0, 0.26 or 0.995 of the answers. Runs shorter than the default are for trials.

    Args:
        task ([`LabTask`] or `str`, *optional*, defaults to `"book"`): What it learns.
        seed (`int`, *optional*, defaults to 0): Seed of the weights and of the data. The same seed gives the same
            weights on the same machine with the same number of threads.
        steps (`int`, *optional*, defaults to 1000): Optimizer steps.
        batch_size (`int`, *optional*, defaults to 32): Examples per step.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where to train.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        log (`Callable`, *optional*): Called after every step with its record.
        **overrides (`Any`): Fields of the model's configuration, as for [`parent_config`] of `book`, to train another size.

    Returns:
        `tuple[PreTrainedModel, list[dict]]`: The model, in evaluation mode, and one record per step: `step`,
        counted from 1, and `loss`, the mean cross-entropy in nats per target token before the step.

    Raises:
        `ValueError`: If `steps` or `batch_size` is not positive.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps!r}.")
    task = get_task(task)
    model: Any = task.new_parent(seed, overrides)
    model = model.to(device).train()
    optimizers = _optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, steps))
        for optimizer in optimizers
    ]
    batches = task.training_batches(task.build_tokenizer(), seed, batch_size)
    history = []
    bar = tqdm(range(1, steps + 1), desc="train parent", unit="step", disable=not progress)
    for step in bar:
        batch = {name: tensor.to(device) for name, tensor in next(batches).items()}
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        history.append({"step": step, "loss": loss.item()})
        bar.set_postfix(loss=f"{history[-1]['loss']:.3f}", refresh=False)
        if log is not None:
            log(history[-1])
    return model.eval(), history


def load_parent(task: LabTask | str = "book") -> tuple[Any, PreTrainedTokenizerFast]:
    """Loads the parent of a task that ships with the package. Needs no network.

    That of `book` solves problems of 4 to 12 letters. Longer ones can be made, but it never saw their letters and fails on them.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerFast]`: The model, in float32 and evaluation mode, and its
        tokenizer.

    Example:

    ```python
    >>> from hf_elastic.lab.parent import load_parent
    >>> model, tokenizer = load_parent()
    >>> inputs = tokenizer("^a6b-1c-5d-4><think>", return_tensors="pt")
    >>> tokenizer.decode(model.generate(**inputs)[0])
    '^a6b-1c-5d-4><think>a6b6-1=5c5-5=0d0-4=6</think>bLcLdJ<eos>'
    ```
    """
    task = get_task(task)
    return load_stock(task.parent_folder, dtype=torch.float32), AutoTokenizer.from_pretrained(task.parent_folder)


def save_trained(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    steps: int,
    seconds: float,
    **measured: Any,
) -> None:
    """Saves a trained model with its tokenizer and `training.json`, a record of how it came about and what was measured."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "seed": seed,
        "steps": steps,
        "seconds": round(seconds, 1),
        "num_threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        **measured,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Trains a parent, evaluates it and saves it with its tokenizer and a record of the training."""
    parser = argparse.ArgumentParser(prog="python -m hf_elastic.lab.parent", description=main.__doc__)
    parser.add_argument("--task", choices=list(TASKS), default="book", help="what it learns (default: book)")
    parser.add_argument("--output", type=Path, required=True, help="folder to save to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the data")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: those of the task)")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # the model is so small that a second thread waits more than it works
    task = get_task(options.task)
    steps = task.parent_steps if options.steps is None else options.steps
    started = time.perf_counter()
    model, history = train_parent(task, seed=options.seed, steps=steps)
    seconds = time.perf_counter() - started
    tokenizer = task.build_tokenizer()
    evaluation = []
    low, high = task.trained
    for size in (low, (low + high) // 2, high):
        for thinking in (True, False):
            rates = task.evaluate(model, tokenizer, size=size, count=_EVALUATED_PROBLEMS, thinking=thinking)
            found = asdict(rates)
            evaluation.append({"thinking": thinking, task.unit: found.pop("size"), **found})
            logger.info("%s", evaluation[-1])

    kept = [entry for entry in history if entry["step"] == 1 or entry["step"] % 10 == 0]
    save_trained(
        options.output,
        model,
        tokenizer,
        seed=options.seed,
        steps=steps,
        seconds=seconds,
        num_parameters=model.num_parameters(),
        evaluation=evaluation,
        history=[{"step": entry["step"], "loss": round(entry["loss"], 4)} for entry in kept],
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
