"""Tasks of lm-evaluation-harness on a model that is loaded already, at whatever budget it runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import ElasticConfigError, did_you_mean


def evaluate_with_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str],
    *,
    limit: int | float | None = None,
    include_path: str | os.PathLike[str] | None = None,
    include_defaults: bool = True,
    batch_size: int = 1,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Run tasks on the active budget; to compare budgets, call it inside `with model.at(...)`.

    Args:
        model (`PreTrainedModel`): Live model; it stays where it is.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        tasks (`str` or `list[str]`): Names of tasks or groups, as `lm_eval --tasks` takes them.
        limit (`int` or `float`, *optional*): Only so many examples of each task, or this share of them.
        include_path (`str` or `os.PathLike`, *optional*): Folder with further task files (YAML).
        include_defaults (`bool`, *optional*, defaults to `True`): `False` knows only the tasks of `include_path`; reading all of lm-eval's takes seconds.
        batch_size (`int`, *optional*, defaults to 1): Sequences per forward pass.
        options: As `lm_eval.simple_evaluate` takes them (`num_fewshot`, `bootstrap_iters`, ...).

    Returns:
        `dict[str, dict[str, Any]]`: Per task or group the metrics, such as `acc,none`, as lm-eval names them.

    Raises:
        `ImportError`: lm-eval is not installed.
        `ElasticConfigError`: no such task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("tasks are run by lm-eval: pip install 'hf-elastic[eval]'") from error
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    folder = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=folder, include_defaults=include_defaults)
    for name in names:
        if not manager.match_tasks([name]):
            raise ElasticConfigError(f"lm-eval has no task {name!r}.{did_you_mean(name, manager.all_tasks)}")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = lm_eval.simple_evaluate(model=wrapped, tasks=names, limit=limit, task_manager=manager, **options)
    return {name: dict(metrics) for name, metrics in found["results"].items()}
