"""The verdict on a run: how far every budget is from the model it is taught by, and whether more steps would bring it nearer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from hf_elastic.checkpoints.replacing import replacing_file
from hf_elastic.hub.card_sections import VERDICT_FILE

from .progress import Progress

NEAR, NEAR_OF_START = 1 / 100, 1 / 800
"""Shares of the teacher's entropy, and of the largest distance before training, below which a distance counts as none."""
WORTHWHILE = 0.2
"""What twice the steps would have to take off a distance for a longer run to be advised."""

State = Literal["done", "falling", "settled", "away", "untrained"]


@dataclass(frozen=True)
class Verdict:
    """What a run made of a budget.

    Args:
        budget (`str`): Its name.
        state (`str`):
            `"done"`: nothing is left to learn that would be noticed. `"falling"`: the distance still fell while the learning rate was high, so
            a longer run would make it smaller. `"settled"`: there is a distance, but it no longer fell. `"away"`: a budget that began as
            near as none is noticeably away from the teacher: the largest, as a rule, which begins as the teacher itself. `"untrained"`: never drawn.
        distance (`float`, *optional*): Divergence from the teacher at the end, in nats per target token.
        start (`float`, *optional*): The same of its first micro-batch.
        teacher_entropy (`float`): Of the teacher's own predictions, in nats per target token: what is uncertain in the data.
        gain (`float`, *optional*): Share of the distance that twice the steps would have taken off, see [`Progress.gain`].
        measured_on (`str`): `"evaluation"`: the evaluation data after the last step. `"training"`: the last micro-batches.
        sentence (`str`): All of this in words.
    """

    budget: str
    state: State
    distance: float | None
    start: float | None
    teacher_entropy: float
    gain: float | None
    measured_on: str
    sentence: str


def near(progress: Progress, distance: float) -> bool:
    """Whether a distance counts as none: below a hundredth of the teacher's entropy, or 1/800 of the largest distance before training.

    Neither scale needs tuning. The entropy says how uncertain the data are: a distance of a hundredth of it raises the student's
    cross-entropy by 1 %. Where a teacher is certain of nearly everything, as of solutions that are worked out, there is little entropy, and what
    it cost to cut deepest says what is a lot. (On the lab's `book`, sizes at 1/1000 were within 0.01 of the accuracy of their
    teacher, one at 1/570 was 0.06 below.)
    """
    deepest = max(progress.first.values(), default=0.0)
    return distance <= max(NEAR * progress.teacher_entropy, NEAR_OF_START * deepest)


def judge(
    progress: Progress,
    budgets: Sequence[str],
    steps: int,
    evaluated: Mapping[str, float] | None = None,
    own: str | None = None,
) -> list[Verdict]:
    """The verdict on every budget.

    Whether a budget was still falling is judged by the steps before the learning rate fell: when the rate falls, every distance does, which says
    nothing about a longer run.

    Args:
        progress ([`Progress`]): Of the run.
        budgets (`Sequence[str]`): Names, in the order to report.
        steps (`int`): Optimizer steps that were made.
        evaluated (`dict[str, float]`, *optional*): Divergences on evaluation data after the last step; they go before those of training.
        own (`str`, *optional*): The budget that began as the teacher itself, if one did.
    """
    return [_judge(progress, budget, steps, (evaluated or {}).get(budget), own) for budget in budgets]


def _judge(progress: Progress, budget: str, steps: int, evaluated: float | None, own: str | None) -> Verdict:
    trained, start = progress.last(budget, steps), progress.first.get(budget)
    distance = trained if evaluated is None else evaluated
    gain = progress.gain(budget, progress.high_until(steps))
    state: State = "settled"
    if trained is None:
        state = "untrained"
    elif distance is not None and near(progress, distance):
        state = "done"
    elif budget == own:
        state = "away"
    elif gain is not None and gain > WORTHWHILE:
        state = "falling"
    return Verdict(
        budget=budget,
        state=state,
        distance=distance,
        start=start,
        teacher_entropy=progress.teacher_entropy,
        gain=gain,
        measured_on="training" if evaluated is None else "evaluation",
        sentence=_sentence(budget, state, distance, start, gain),
    )


def _sentence(budget: str, state: State, distance: float | None, start: float | None, gain: float | None) -> str:
    if distance is None or state == "untrained":
        return f"{budget} was never drawn: nothing is known of it."
    far = f"{distance:.2g} nats a token"
    if state == "away":
        return f"{budget} has moved {far} away from the model that it is taught by, which it began as: train longer, or draw it more often."
    where = f"{budget} is {far} from the model that it is taught by"
    if state == "done":
        return f"{where}: done."
    if state == "falling":
        return f"{where}, and was still falling: train longer (twice the steps would take off about {gain or 0:.0%})."
    if start is not None and distance >= start:
        return f"{where}, no nearer than at the start ({start:.2g}): the learning rate is too high or too low."
    return f"{where}, and no longer falling: more steps will bring little, a larger size or other data might."


def render(verdicts: Sequence[Verdict]) -> str:
    """One line per budget."""
    return "\n".join(f"- {verdict.sentence}" for verdict in verdicts)


def save(verdicts: Sequence[Verdict], steps: int, folder: Path) -> None:
    """Write the verdict on a run of so many optimizer steps into a folder, as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"steps": steps, "budgets": [asdict(v) for v in verdicts]}, indent=2, allow_nan=False) + "\n"
    with replacing_file(folder / VERDICT_FILE) as file:
        file.write_text(text, encoding="utf-8")
