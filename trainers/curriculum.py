"""Which budget a micro-batch runs at, and how that changes over the stages of a run."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from hf_elastic.errors import ElasticConfigError, did_you_mean


@dataclass(frozen=True)
class Stage:
    """A part of a training run.

    Args:
        steps (`int`): Optimizer steps.
        budget_probabilities (`dict[str, float]`): How often each budget is drawn; sums to 1.
        max_length (`int`, *optional*): Longer rows are cut to this many tokens during the stage.
        learning_rate_scale (`float`, *optional*, defaults to 1.0): Multiplies the learning rate that the scheduler gives.
    """

    steps: int
    budget_probabilities: Mapping[str, float]
    max_length: int | None = None
    learning_rate_scale: float = 1.0


class Curriculum:
    """The stages of a run. What it answers depends on the step alone, so a resumed run draws what the uninterrupted one would have.

    Args:
        stages (`list[Stage]`): In order; the last one goes on if training does.
        seed (`int`): Of the budget stream; the same on all ranks, which have to run the same budget at the same time.
    """

    def __init__(self, stages: Sequence[Stage], seed: int = 0):
        if not stages:
            raise ElasticConfigError("a curriculum needs at least one stage.")
        self.stages = list(stages)
        self.seed = seed

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """The stage that optimizer step `step` (from 0) belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def budget(self, step: int, micro_batch: int = 0) -> str:
        """The budget of a micro-batch of a step: one per micro-batch (arXiv 2511.16664, section 4)."""
        probabilities = self.stage(step).budget_probabilities
        draw = random.Random(f"{self.seed}:{step}:{micro_batch}").random()
        for name, probability in probabilities.items():
            draw -= probability
            if draw < 0:
                return name
        return max(probabilities, key=lambda name: probabilities[name])  # rounding at the very end of the interval

    def learning_rate_scale(self, step: int) -> float:
        return self.stage(step).learning_rate_scale


def make_curriculum(
    names: Sequence[str],
    probabilities: Any,
    stages: Any,
    max_steps: int,
    max_length: int | None,
    seed: int,
    context: int | None = None,
) -> Curriculum:
    """Check what a config says about budgets and stages, and complete it.

    Args:
        names (`list[str]`): Budgets of the model, the whole parent first.
        probabilities (`dict[str, float]`, *optional*): Default of the stages; uniform if not given.
        stages (`list[dict]`, *optional*): Each with the fields of [`Stage`]; one stage of `max_steps` if not given.
        max_steps (`int`): Steps of the whole run, or -1 if stages say it.
        max_length (`int`, *optional*): Longest row that the dataset keeps, in tokens.
        context (`int`, *optional*): Longest row that the model takes, in tokens.

    Raises:
        `ElasticConfigError`: unknown budgets or fields, probabilities that do not sum to 1, stages longer than the rows or than the
            model's context.
    """
    default = dict.fromkeys(names, 1.0 / len(names))
    if probabilities is not None:
        default = _checked_probabilities(probabilities, names, "budget_probabilities")
    if stages is None:
        return Curriculum([Stage(max(1, max_steps), default)], seed)
    if isinstance(stages, (str, Mapping)) or not isinstance(stages, Sequence) or not stages:
        raise ElasticConfigError(f"stages={stages!r} must be a list of at least one dict.")
    made = [
        _checked_stage(entry, f"stages[{i}]", names, default, max_length, context) for i, entry in enumerate(stages)
    ]
    curriculum = Curriculum(made, seed)
    if max_steps > 0 and max_steps != curriculum.total_steps:
        raise ElasticConfigError(
            f"max_steps={max_steps}, but the stages have {curriculum.total_steps} steps; leave max_steps out or make them agree."
        )
    return curriculum


def _checked_stage(
    entry: Any,
    where: str,
    names: Sequence[str],
    default: dict[str, float],
    max_length: int | None,
    context: int | None,
) -> Stage:
    known = {field.name for field in fields(Stage)}
    if not isinstance(entry, Mapping):
        raise ElasticConfigError(f"{where}={entry!r} must be a dict with {', '.join(sorted(known))}.")
    for key in entry:
        if key not in known:
            raise ElasticConfigError(
                f"unknown key {key!r} in {where}; it takes {', '.join(sorted(known))}.{did_you_mean(key, known)}"
            )
    steps: Any = entry.get("steps")
    if not _whole(steps) or steps < 1:
        raise ElasticConfigError(f"{where}.steps={steps!r} must be a whole number of at least 1.")
    length: Any = entry.get("max_length")
    if length is not None:
        if not _whole(length) or length < 2:
            raise ElasticConfigError(f"{where}.max_length={length!r} must be a whole number of at least 2 tokens.")
        if max_length is not None and length > max_length:
            raise ElasticConfigError(
                f"{where}.max_length={length}, but rows are cut to max_length={max_length} when the dataset is prepared; give the "
                "longest stage's length as max_length."
            )
        if context is not None and length > context:
            raise ElasticConfigError(
                f"{where}.max_length={length} is longer than the context of the model, {context} tokens."
            )
    scale: Any = entry.get("learning_rate_scale", 1.0)
    if not _number(scale) or not 0 < scale < math.inf:
        raise ElasticConfigError(f"{where}.learning_rate_scale={scale!r} must be a positive number.")
    given = entry.get("budget_probabilities")
    chosen = default if given is None else _checked_probabilities(given, names, f"{where}.budget_probabilities")
    return Stage(steps, chosen, length, float(scale))


def _checked_probabilities(given: Any, names: Sequence[str], where: str) -> dict[str, float]:
    if not isinstance(given, Mapping):
        raise ElasticConfigError(f"{where}={given!r} must be a dict from budget to probability.")
    for name, probability in given.items():
        if name not in names:
            raise ElasticConfigError(
                f"{where}: unknown budget {name!r}; the model has {', '.join(names)}.{did_you_mean(name, names)}"
            )
        if not _number(probability) or not 0 <= probability <= 1:
            raise ElasticConfigError(f"{where}[{name!r}]={probability!r} must be a number in [0, 1].")
    total = sum(given.values())
    if abs(total - 1.0) > 1e-6:
        raise ElasticConfigError(f"{where} sums to {total}, it must sum to 1: {dict(given)}.")
    return {name: float(given[name]) for name in names if given.get(name, 0.0) > 0}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
