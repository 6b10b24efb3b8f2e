"""Plans that are chosen per prompt: how sure a submodel was of what it wrote, who goes on, and drafts that may be taken back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

from .batch import Row
from .binding import BoundPhase
from .events import PhaseEvent, PhaseRecord
from .plan import Signal


def confidence_of(signal: Signal, log_probs: Sequence[float]) -> float | None:
    """The confidence that a signal reads off the log-probabilities of the tokens that were written; `None` if there are none.

    Args:
        signal (`str`): See [`Phase`]. Of one that is about the answer the tokens are those of the draft so far.
        log_probs (`list[float]`): Natural logarithms, one per token that the submodel chose.

    Returns:
        `float`: From 0 to 1.
    """
    if not log_probs:
        return None
    if signal == "answer_first":
        return math.exp(log_probs[0])
    return math.exp(min(log_probs) if signal.endswith("min") else math.fsum(log_probs) / len(log_probs))


@dataclass
class Draft:
    """What a submodel wrote of one sequence and may have to take back.

    Args:
        before (`Row`): The sequence when the submodel began.
        events (`list[PhaseEvent]`): What is told if it stands.
    """

    before: Row
    events: list[PhaseEvent] = field(default_factory=list)


class Cascade:
    """Which of two submodels writes the last phase of every sequence; does nothing for plans that say it beforehand.

    Args:
        phases (`list[BoundPhase]`): Of the plan.
        rows (`list[Row]`): All sequences; one whose draft is taken back is exchanged for what it was before.
        records (`list[PhaseRecord]`): One per bound phase.
        began (`float`): When generation began, by `perf_counter`.
    """

    def __init__(self, phases: Sequence[BoundPhase], rows: list[Row], records: Sequence[PhaseRecord], began: float):
        self._phases, self._rows, self._records, self._began = phases, rows, records, began
        self._drafts: dict[int, Draft] = {}

    def listens(self, bound: BoundPhase) -> bool:
        """Whether anybody decides by what is written in a phase."""
        decided = self._phases[-1].escalated
        by_thinking = decided and not self._phases[-2].drafts and bound.index + 1 == self._phases[-1].index
        return bound.drafts or by_thinking

    def choose(self, index: int) -> list[PhaseEvent]:
        """Decide by what the phase before wrote, if the plan does."""
        bound, record = self._phases[index], self._records[index]
        if bound.phase.escalate_to is None or bound.escalated or bound.drafts:
            return []
        rows = [i for i, row in enumerate(self._rows) if not row.done]
        for i in rows:
            record.confidence[i] = confidence_of(bound.phase.signal, self._rows[i].log_probs)
            self._rows[i].escalates = self._is_unsure(index, i)
        return [self._choice(index, i) for i in rows]

    def draft(self, i: int) -> None:
        """What is written of a sequence from now on may be taken back."""
        self._drafts[i] = Draft(self._rows[i].copy())

    def tell(self, i: int, events: list[PhaseEvent]) -> list[PhaseEvent]:
        """Events of a sequence that can be told; those of a draft have to wait."""
        if (draft := self._drafts.get(i)) is None:
            return events
        draft.events += events
        return []

    def keep(self, index: int, i: int) -> list[PhaseEvent]:
        """What was drafted of a sequence stands; tells it."""
        if (draft := self._drafts.pop(i, None)) is None:
            return []
        choice = self._choice(index, i)
        return [choice, *(replace(event, seconds=choice.seconds) for event in draft.events)]

    def take_back(self, index: int, i: int) -> list[PhaseEvent]:
        """If the newest token is one too unsure, the sequence is what it was before the draft, for the other submodel to go on from."""
        if i not in self._drafts:
            return []
        record = self._records[index]
        record.confidence[i] = confidence_of(self._phases[index].phase.signal, self._rows[i].log_probs)
        if not self._is_unsure(index, i):
            return []
        record.drafted[i] = record.generated[i]
        record.generated[i] = record.reopened[i] = record.inserted[i] = 0
        record.spans[i] = (record.spans[i][0],) * 2
        self._rows[i] = self._drafts.pop(i).before
        self._rows[i].escalates = True
        return [self._choice(index, i)]

    def _is_unsure(self, index: int, i: int) -> bool:
        """Whether a sequence escalates; it does where nothing says how sure the first submodel was."""
        confidence, threshold = self._records[index].confidence[i], self._phases[index].phase.confidence
        return confidence is None or (threshold is not None and confidence < threshold)

    def _choice(self, index: int, i: int) -> PhaseEvent:
        first, to = self._phases[index], index + self._rows[i].escalates
        return PhaseEvent(
            "choice",
            to,
            first.phase.name,
            self._phases[to].label,
            i,
            seconds=perf_counter() - self._began,
            signal=first.phase.signal,
            confidence=self._records[index].confidence[i],
        )
