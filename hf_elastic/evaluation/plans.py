"""Phase plans measured on a task: every thinker with every answerer under every cap, what that costs, and which plans are worth it.

Accuracy, tokens and seconds are measured; `cost` is modelled. Its unit is one decoded token of a model with one active parameter:

    cost = sum over phases of active parameters * (tokens written + tokens read / prefill_speed)

which is the time model of the papers (arXiv 2605.07182, its plans re-read everything when the submodel changes) for decoding that is bound
by the weights it reads.
"""

from __future__ import annotations

import itertools
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .._version import __version__
from ..architectures.cost import CostModel
from ..configuration.budgets import Budget
from ..errors import PhasePlanError, TokenizerError
from ..generation import PhaseOutput, PhasePlan, PhaseRecord
from ..generation.plan import Signal
from ..generation.texts import readable, unknown_token
from ..modeling_elastic import ElasticForCausalLM

PREFILL_SPEED = 16.0
"""Tokens that are read in the time in which one is written, where nobody measured it. It only moves `cost`."""


class Task(ABC):
    """Something to be good at, by writing text."""

    name: str

    @abstractmethod
    def score(
        self, model: ElasticForCausalLM, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[str, int, dict[str, float]]:
        """Solve it with `model.generate`; returns which rate is the accuracy, the number of problems and all rates."""

    def follow(self, plan: PhasePlan, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> PhasePlan:
        """The plan for one call of `generate`, whose arguments may be changed in place; for a task that knows nothing of phases."""
        return plan


@dataclass
class Recorded:
    """What calls of `generate` did under a plan: their phases, and the tokens of their prompts, padding not counted."""

    phases: list[list[PhaseRecord]] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)


@contextmanager
def planned(
    model: ElasticForCausalLM, plan: PhasePlan, tokenizer: PreTrainedTokenizerBase, task: Task
) -> Iterator[Recorded]:
    """Have every `model.generate` inside a `with` block follow a plan, whoever calls it, and record what it did."""
    recorded, unknown = Recorded(), unknown_token(tokenizer)

    def generate(*args: Any, **kwargs: Any) -> torch.Tensor:
        followed = task.follow(plan, tokenizer, kwargs)
        kwargs |= {"phase_plan": followed, "tokenizer": tokenizer, "return_dict_in_generate": True}
        ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask")
        seen = torch.ones_like(ids) if mask is None else mask  # type: ignore[arg-type]
        if unknown is not None and bool(((ids == unknown) & (seen != 0)).any()):
            raise TokenizerError(
                f"task {task.name!r}: the tokenizer has no tokens for parts of a prompt and reads {tokenizer.unk_token!r} instead; what "
                "comes out would say nothing of the model. Use the tokenizer that it was trained with."
            )
        output: PhaseOutput = type(model).generate(model, *args, **kwargs)
        assert output.phases is not None
        recorded.phases.append(output.phases)
        recorded.prompts.append(seen.sum(-1).tolist())
        return output.sequences

    model.__dict__["generate"] = generate
    try:
        yield recorded
    finally:
        del model.__dict__["generate"]


def plan_matrix(
    thinkers: Sequence[Budget],
    answerers: Sequence[Budget],
    caps: Sequence[int | None],
    *,
    escalate_to: Budget = None,
    confidences: Sequence[float] = (),
    signals: Sequence[Signal] = ("answer_min",),
    **options: Any,
) -> list[PhasePlan]:
    """Every thinker with every answerer under every cap on thinking tokens (`None` for no cap), and after these the plans chosen per prompt.

    Args:
        escalate_to (*optional*): Who answers instead of every other answerer where the confidence is too low.
        confidences (`list[float]`, *optional*): Thresholds of these plans, each a plan of its own.
        signals (`list[str]`, *optional*): What their confidence is, each with every threshold.
        options: Further arguments of [`PhasePlan`], the same for all.
    """
    triples = list(itertools.product(caps, thinkers, answerers))
    plans = [
        PhasePlan(thinking, answering, max_thinking_tokens=cap, **options) for cap, thinking, answering in triples
    ]
    if escalate_to is None:
        return plans
    return plans + [
        PhasePlan(
            thinking,
            answering,
            max_thinking_tokens=cap,
            escalate_to=escalate_to,
            confidence=confidence,
            signal=signal,
            **options,
        )
        for (cap, thinking, answering), signal, confidence in itertools.product(triples, signals, confidences)
        if answering != escalate_to
    ]


def measure_plan(
    model: ElasticForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    plan: PhasePlan,
    *,
    prefill_speed: float = PREFILL_SPEED,
) -> dict[str, Any]:
    """One plan on one task.

    Returns:
        `dict[str, Any]`: `plan` (its JSON form), `thinking` and `answering` (names of the first and last submodel), `max_thinking_tokens`,
            `accuracy`, `metrics`, `n`, `handover`, `device`, `dtype`; means per problem: `prompt_tokens`, `thinking_tokens` (those of a thinking
            that the answering submodel opened again are among them, and not among) `answer_tokens`, `seconds` (of the batches, divided by their problems) and modelled `cost` (see the module); and `prefill_speed`. Of a plan
            that is chosen per prompt also `escalate_to` (a name), `confidence`, `signal`, `escalated` (share of problems) and `drafted_tokens` (written for nothing).

    Raises:
        `PhasePlanError`: the task does not generate, so that no plan can be followed.
        `TokenizerError`: the tokenizer cannot read the task.
    """
    plan = plan.with_markers(tokenizer)
    with planned(model, plan, tokenizer, task) as recorded, readable(f"task {task.name!r}"):
        main, count, metrics = task.score(model, tokenizer)
    if not recorded.phases:
        raise PhasePlanError(
            f"task {task.name!r} compares likelihoods and writes no text; a phase plan needs one that generates."
        )
    config = model.elastic_config
    count_cost = CostModel(config.parent_config)
    active = [count_cost(config.resolve(budget, model.dtype)).active_params for budget in plan.budgets]
    texts = sum(map(len, recorded.prompts))
    cost = sum(
        _cost(phases, prompts, active, prefill_speed)
        for phases, prompts in zip(recorded.phases, recorded.prompts, strict=True)
    )
    seconds = sum(record.prefill_seconds + record.decode_seconds for phases in recorded.phases for record in phases)
    again = sum(sum(record.reopened) for phases in recorded.phases for record in phases)
    count_phases = len(plan.phases)
    first, last = recorded.phases[0][0], recorded.phases[0][count_phases - 1]
    answers = [record for phases in recorded.phases for record in phases[count_phases - 1 :]]
    return {
        "plan": plan.to_dict(),
        "thinking": first.budget,
        "answering": last.budget,
        "max_thinking_tokens": plan.phases[0].max_new_tokens,
        "handover": last.handover,
        "accuracy": metrics[main],
        "metrics": metrics,
        "n": count,
        "prompt_tokens": sum(map(sum, recorded.prompts)) / texts,
        "thinking_tokens": (sum(sum(phases[0].generated) for phases in recorded.phases) + again) / texts,
        "answer_tokens": (sum(sum(record.generated) for record in answers) - again) / texts,
        "seconds": seconds / texts,
        "cost": cost / texts,
        "prefill_speed": prefill_speed,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        **_choices(plan, recorded, texts),
    }


def _choices(plan: PhasePlan, recorded: Recorded, texts: int) -> dict[str, Any]:
    """What is said of a plan that is chosen per prompt."""
    last = plan.phases[-1]
    if last.escalate_to is None:
        return {}
    second = [phases[-1] for phases in recorded.phases]
    return {
        "escalate_to": second[0].budget,
        "confidence": last.confidence,
        "signal": last.signal,
        "escalated": sum(reason is not None for record in second for reason in record.reasons) / texts,
        "drafted_tokens": sum(sum(phases[-2].drafted) for phases in recorded.phases) / texts,
    }


def _cost(phases: Sequence[PhaseRecord], prompts: Sequence[int], active: Sequence[int], prefill_speed: float) -> float:
    """Modelled cost of one batch. A token is read once by every submodel that did not write it, or got the cache of one that did."""
    cost = 0.0
    begun: set[int] = set()  # what skipped the phases before is read by the first submodel that writes in it
    for record, params in zip(phases, active, strict=True):
        for row, prompt in enumerate(prompts):
            drafted = record.drafted[row] if record.drafted else 0
            if record.reasons[row] in (None, "skipped") and not drafted:
                continue
            read = 0 if record.handover == "cache" and row in begun else prompt + record.spans[row][0]
            begun.add(row)
            cost += params * (record.generated[row] + drafted + (read + record.inserted[row]) / prefill_speed)
    return cost


def pareto_front(points: Sequence[Mapping[str, Any]], by: str = "cost") -> list[int]:
    """Indices of the points that no other one beats: none is at least as accurate and cheaper, or as cheap and more accurate.

    Args:
        points (`list[dict]`): With `accuracy` and the quantity that counts as price.
        by (`str`, *optional*, defaults to `"cost"`): That quantity, `"cost"` or `"seconds"`.

    Returns:
        `list[int]`: From the cheapest to the most accurate; the first of points that are alike.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][by], -points[i]["accuracy"])):
        if not front or points[i]["accuracy"] > points[front[-1]]["accuracy"]:
            front.append(i)
    return front


def results_file(repo: str, task: str, points: Sequence[Mapping[str, Any]], by: str) -> dict[str, Any]:
    """What `hf-elastic evaluate` writes: the points, which of them are on the front, and what they were measured with."""
    import transformers

    return {
        "repo": repo,
        "task": task,
        "by": by,
        "points": list(points),
        "front": pareto_front(points, by),
        "machine": {"processor": platform.processor() or platform.machine(), "system": platform.system()},
        "versions": {"hf_elastic": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
