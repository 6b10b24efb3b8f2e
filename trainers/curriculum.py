"""Which budget a micro-batch runs at, and how that changes over the stages of a run."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from hf_elastic.errors import ElasticConfigError, did_you_mean


@dataclass(frozen=True)
class Stage:
    """A part of a training run.

    Args:
        steps (`int`): Optimizer steps. In a config, `tokens` can stand in its place, see [`steps_of`].
        budget_probabilities (`dict[str, float]`): How often each budget is drawn; sums to 1.
        max_length (`int`, *optional*): Longer rows are cut to this many tokens during the stage.
        learning_rate_scale (`float`, *optional*, defaults to 1.0): Multiplies the learning rates that the scheduler gives.
        learning_rate (`float`, *optional*):
            Takes the place of the run's `learning_rate` during the stage; the schedule (warm-up, decay) still multiplies it.
        router_learning_rate (`float`, *optional*): The same for `router_learning_rate`.
        handover_probability (`float`, *optional*):
            Takes the place of the run's `handover_probability` during the stage: how often a micro-batch is a hand-over.
    """

    steps: int
    budget_probabilities: Mapping[str, float]
    max_length: int | None = None
    learning_rate_scale: float = 1.0
    learning_rate: float | None = None
    router_learning_rate: float | None = None
    handover_probability: float = 0.0


def first_step(start: float, steps: int) -> int:
    """How many steps are made before something begins that does not from the start.

    Args:
        start (`float`): A share of the steps below 1, from 1 on a number of steps.
        steps (`int`): Of the whole run.
    """
    return math.ceil(start * steps) if start < 1 else int(start)


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

    def with_handovers_from(self, start: float) -> Curriculum:
        """The same curriculum without hand-overs before a step.

        Args:
            start (`float`): A share of all steps below 1, from 1 on a number of steps.
        """
        first, made = first_step(start, self.total_steps), []
        for i, stage in enumerate(self.stages):
            last = i == len(self.stages) - 1  # which goes on if training does
            before = max(0, first if last else min(first, stage.steps))
            first -= stage.steps
            if before and stage.handover_probability:
                made.append(replace(stage, steps=before, handover_probability=0.0))
                stage = replace(stage, steps=max(stage.steps - before, int(last)))
            if stage.steps:
                made.append(stage)
        return Curriculum(made, self.seed)

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

    def learning_rate_factor(self, step: int, base: float = 1.0, router: bool = False) -> float:
        """What the stage of a step multiplies the schedule by.

        Args:
            base (`float`, *optional*, defaults to 1.0): The run's learning rate, which a rate of the stage's own replaces.
            router (`bool`, *optional*, defaults to `False`): Of the router's rate.
        """
        stage = self.stage(step)
        own = stage.router_learning_rate if router else stage.learning_rate
        return stage.learning_rate_scale if own is None else own / base

    @property
    def rates(self) -> list[str]:
        """Names of the fields by which stages change the learning rate."""
        changed = [name for name, neutral in _RATES.items() for s in self.stages if getattr(s, name) != neutral]
        return list(dict.fromkeys(changed))


_RATES = {"learning_rate_scale": 1.0, "learning_rate": None, "router_learning_rate": None}


def steps_of(entry: Mapping[str, Any], rows: int, max_length: int | None) -> int | None:
    """Optimizer steps of a stage: its `steps`, or as many as its `tokens` need, rounded up.

    A step counts as `rows` full rows of the stage's length, so a dataset with shorter rows gives fewer tokens.

    Args:
        rows (`int`): Rows of a step: batch per device x accumulation x processes.
        max_length (`int`, *optional*): Length of rows, in tokens, in stages that do not say it.

    Returns:
        `int`, *optional*: `None` if the stage does not say it in numbers that make sense.
    """
    steps: Any = entry.get("steps")
    length: Any = entry.get("max_length") or max_length
    tokens = _read(entry.get("tokens"))
    if steps is not None:
        return steps if _whole(steps) and steps > 0 else None
    if tokens is None or not _whole(length) or length < 1:
        return None
    return math.ceil(tokens / (rows * length))


def make_curriculum(
    names: Sequence[str],
    probabilities: Any,
    stages: Any,
    max_steps: int,
    max_length: int | None,
    seed: int,
    context: int | None = None,
    rows: int = 1,
    routed: bool = False,
    handover: float = 0.0,
) -> Curriculum:
    """Check what a config says about budgets and stages, and complete it.

    Args:
        names (`list[str]`): Budgets of the model, the whole parent first.
        probabilities (`dict[str, float]`, *optional*): Default of the stages; uniform if not given.
        stages (`list[dict]`, *optional*):
            Each with the fields of [`Stage`], and `tokens` instead of `steps` if wanted; one stage of `max_steps` if not given.
        max_steps (`int`): Steps of the whole run, or -1 if stages say it.
        max_length (`int`, *optional*): Longest row that the dataset keeps, in tokens.
        context (`int`, *optional*): Longest row that the model takes, in tokens.
        rows (`int`, *optional*, defaults to 1): Rows of an optimizer step, of all processes together.
        routed (`bool`, *optional*, defaults to `False`): Whether the run has a router.
        handover (`float`, *optional*, defaults to 0.0): `handover_probability` of stages that do not say it.

    Raises:
        `ElasticConfigError`: unknown budgets or fields, probabilities that do not sum to 1, stages longer than the rows or than the
            model's context, `tokens` without a length to count them by, two ways to say the same learning rate.
    """
    default = dict.fromkeys(names, 1.0 / len(names))
    if probabilities is not None:
        default = _checked_probabilities(probabilities, names, "budget_probabilities")
    if stages is None:
        return Curriculum([Stage(max(1, max_steps), default, handover_probability=handover)], seed)
    if isinstance(stages, (str, Mapping)) or not isinstance(stages, Sequence) or not stages:
        raise ElasticConfigError(f"stages={stages!r} must be a list of at least one dict.")
    made = []
    for i, entry in enumerate(stages):
        where = f"stages[{i}]"
        _check_keys(entry, where)
        length = _checked_length(entry.get("max_length"), where, max_length, context)
        steps = _checked_steps(entry, where, rows, max_length)
        given = entry.get("budget_probabilities")
        chosen = default if given is None else _checked_probabilities(given, names, f"{where}.budget_probabilities")
        rates = _checked_rates(entry, where, routed)
        made.append(
            Stage(steps, chosen, length, handover_probability=_checked_handover(entry, where, handover), **rates)
        )
    curriculum = Curriculum(made, seed)
    if max_steps > 0 and max_steps != curriculum.total_steps:
        raise ElasticConfigError(
            f"max_steps={max_steps}, but the stages have {curriculum.total_steps} steps; leave max_steps out or make them agree."
        )
    return curriculum


def _check_keys(entry: Any, where: str) -> None:
    known = {field.name for field in fields(Stage)} | {"tokens"}
    if not isinstance(entry, Mapping):
        raise ElasticConfigError(f"{where}={entry!r} must be a dict with {', '.join(sorted(known))}.")
    for key in entry:
        if key not in known:
            raise ElasticConfigError(
                f"unknown key {key!r} in {where}; it takes {', '.join(sorted(known))}.{did_you_mean(key, known)}"
            )


def _checked_steps(entry: Mapping[str, Any], where: str, rows: int, max_length: int | None) -> int:
    steps: Any = entry.get("steps")
    tokens: Any = entry.get("tokens")
    if steps is not None and tokens is not None:
        raise ElasticConfigError(f"{where} has steps={steps!r} and tokens={tokens!r}; give one of them.")
    if tokens is None:
        if not _whole(steps) or steps < 1:
            raise ElasticConfigError(
                f"{where}.steps={steps!r} must be a whole number of at least 1 (or give tokens instead)."
            )
    elif _read(tokens) is None:
        raise ElasticConfigError(f"{where}.tokens={tokens!r} must be a positive number, such as 100.0e+9.")
    elif entry.get("max_length") is None and max_length is None:
        raise ElasticConfigError(
            f"{where}.tokens={tokens!r} cannot be turned into steps: no length is known. Give the stage or the run a max_length, or give "
            "steps."
        )
    made = steps_of(entry, rows, max_length)
    assert made is not None
    return made


def _checked_length(length: Any, where: str, max_length: int | None, context: int | None) -> int | None:
    if length is None:
        return None
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
    return length


def _checked_rates(entry: Mapping[str, Any], where: str, routed: bool) -> dict[str, float]:
    given = {name: entry[name] for name in _RATES if entry.get(name) is not None}
    for name, value in given.items():
        if _read(value) is None:
            raise ElasticConfigError(f"{where}.{name}={value!r} must be a positive number.")
        if name != "learning_rate_scale" and "learning_rate_scale" in given:
            raise ElasticConfigError(
                f"{where} has {name}={value!r} and learning_rate_scale={given['learning_rate_scale']!r}; give one of them."
            )
    if "router_learning_rate" in given and not routed:
        raise ElasticConfigError(
            f"{where}.router_learning_rate={given['router_learning_rate']!r} has no router to act on; give router_targets, or leave it out."
        )
    return {name: float(value) for name, value in given.items()}


def _checked_handover(entry: Mapping[str, Any], where: str, default: float) -> float:
    given: Any = entry.get("handover_probability")
    if given is None:
        return default
    if not _number(given) or not 0 <= given <= 1:
        raise ElasticConfigError(f"{where}.handover_probability={given!r} must be a number in [0, 1].")
    return float(given)


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


def _read(value: Any) -> float | None:
    """A positive, finite number, also from text: YAML reads `1e-4` and `100e9` as text. `None` if it is none."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if _number(value) and 0 < value < math.inf else None
