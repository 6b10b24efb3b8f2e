"""Tasks of lm-evaluation-harness on a model that is loaded already, at whatever budget it runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from ..errors import ElasticConfigError, did_you_mean
from ..generation import PhasePlan
from ..modeling_elastic import ElasticForCausalLM
from .plans import Task


def evaluate_with_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str],
    *,
    limit: int | float | None = None,
    include_path: str | os.PathLike[str] | None = None,
    include_defaults: bool = True,
    batch_size: int = 1,
    think_end_token: str | None = None,
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
        think_end_token (`str`, *optional*): What comes before it in generated text is not looked at.
        options: As `lm_eval.simple_evaluate` takes them (`num_fewshot`, `bootstrap_iters`, ...).

    Returns:
        `dict[str, dict[str, Any]]`: Per task or group the metrics, such as `acc,none`, as lm-eval names them.

    Raises:
        `ImportError`: lm-eval is not installed.
        `ElasticConfigError`: no such task.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    manager = find_tasks(names, include_path, include_defaults)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, think_end_token=think_end_token)
    found = lm_eval.simple_evaluate(model=wrapped, tasks=names, limit=limit, task_manager=manager, **options)
    return {name: dict(metrics) for name, metrics in found["results"].items()}


def find_tasks(
    names: Sequence[str], include_path: str | os.PathLike[str] | None, include_defaults: bool = True
) -> Any:
    """The `TaskManager` of lm-eval that knows these tasks; arguments as in [`evaluate_with_lm_eval`].

    Raises:
        `ImportError`: lm-eval is not installed.
        `ElasticConfigError`: no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("tasks are run by lm-eval: pip install 'hf-elastic[eval]'") from error
    folder = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=folder, include_defaults=include_defaults and folder is None)
    if include_defaults and folder is not None and not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=folder)  # takes seconds, and often what is asked for is in the folder
    for name in names:
        if not manager.match_tasks([name]):
            raise ElasticConfigError(f"lm-eval has no task {name!r}.{did_you_mean(name, manager.all_tasks)}")
    return manager


@dataclass
class LmEvalTask(Task):
    """A generating task of lm-eval. One sequence at a time: its stopping criteria count on the rows of a batch staying where they are.

    What the task says about lengths and stop strings is about the answer: it does not end the thinking.

    Args:
        name (`str`): Name of the task.
        limit (`int`, *optional*): Only so many problems.
        include_path (`str`, *optional*): Folder with further task files.
        metric (`str`, *optional*): Which metric is the accuracy; the first that is a rate if not given.
        options: Further arguments of [`evaluate_with_lm_eval`].
    """

    name: str
    limit: int | None = None
    include_path: str | None = None
    metric: str | None = None
    options: dict[str, Any] | None = None
    think_end_token: str | None = None

    def score(
        self, model: ElasticForCausalLM, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[str, int, dict[str, float]]:
        found = evaluate_with_lm_eval(
            model,
            tokenizer,
            self.name,
            limit=self.limit,
            include_path=self.include_path,
            think_end_token=self.think_end_token,
            **(self.options or {}),
        )[self.name]
        rates = {key: float(value) for key, value in found.items() if isinstance(value, (int, float)) and "," in key}
        metrics = {key: value for key, value in rates.items() if "_stderr" not in key}
        main = self.metric or next(iter(metrics), None)
        if main not in metrics:
            raise ElasticConfigError(
                f"task {self.name!r} has no metric {main!r}; it has {', '.join(metrics) or 'none'}."
            )
        return main, int(found.get("sample_len", self.limit or 0)), metrics

    def follow(self, plan: PhasePlan, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> PhasePlan:
        *before, answer = plan.with_markers(tokenizer).phases
        room = kwargs.pop("max_length", None)
        if room is not None:
            room -= kwargs["input_ids"].shape[1]
            answer = replace(answer, max_new_tokens=min(room, answer.max_new_tokens or room))
        thinking = next((phase for phase in reversed(before) if phase.end), None)
        if thinking is not None:
            end: Any = tokenizer.convert_tokens_to_ids(thinking.end)
            start: Any = tokenizer.convert_tokens_to_ids(thinking.start) if thinking.start else None
            prompt = kwargs["input_ids"][0].tolist()
            asked_for_none = tokenizer.decode(prompt).rstrip().endswith(thinking.end)
            begin = len(prompt) - 1 - prompt[::-1].index(end) if asked_for_none else len(prompt)
            criteria = kwargs.pop("stopping_criteria", None) or []
            kwargs["stopping_criteria"] = [_InAnswer(c, start, end, begin) for c in criteria]
        return PhasePlan(phases=[*before, answer])


class _InAnswer(StoppingCriteria):
    """Another criterion that only sees the answer: it finds the marker that ends the thinking in place of everything before.
    It has to: lm-eval's criteria remember what they saw.

    Args:
        criterion (`StoppingCriteria`): The other one.
        start, end (`int`): The markers.
        begin (`int`): Where markers count from; a prompt may speak of them.
    """

    def __init__(self, criterion: StoppingCriteria, start: int | None, end: int, begin: int):
        self.criterion, self.start, self.end, self.begin = criterion, start, end, begin

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        ended = (input_ids == self.end).long()
        ended[:, : self.begin] = 0
        count = ended.sum(-1, keepdim=True)
        in_answer = (count > 0) & (ended.cumsum(-1) == count) & (ended == 0)
        opened_again = (in_answer & (input_ids == self.start)).any(-1) if self.start is not None else False
        answering = in_answer[:, -1] & ~torch.as_tensor(opened_again, device=input_ids.device)
        seen = torch.where(in_answer, input_ids, self.end)
        return answering & torch.as_tensor(self.criterion(seen, scores, **kwargs), device=input_ids.device)  # type: ignore
