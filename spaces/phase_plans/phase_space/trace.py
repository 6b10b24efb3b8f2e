"""A request as far as it has come: events folded into one record per phase, which everything that is shown is made from."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

from .asking import Size, TextEvent

State = Literal["idle", "running", "done", "stopped"]

YIELDS_PER_SECOND = 12


@dataclass
class Part:
    """One phase.

    Args:
        name, budget, handover: As in [`PhaseEvent`].
        began, ready, ended (`float`): Seconds since the request began: when its reading began, when it was read, its newest event.
        text (`str`): Without markers.
        generated, inserted (`int`): Tokens by the submodel, and by the plan.
        first (`float`, *optional*): When the submodel's first token came.
        context (`int`): Tokens in the context at the newest event.
        reason (`str`, *optional*): Why it ended.
    """

    name: str
    budget: str
    handover: str | None = None
    began: float = 0.0
    ready: float = 0.0
    ended: float = 0.0
    text: str = ""
    generated: int = 0
    inserted: int = 0
    first: float | None = None
    context: int = 0
    reason: str | None = None
    state: State = "running"

    @property
    def seconds(self) -> float:
        """From the beginning of reading to the newest event."""
        return self.ended - self.began

    @property
    def first_token_seconds(self) -> float | None:
        """Reading and the first token."""
        return None if self.first is None else self.first - self.began

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding, without reading and the first token; `None` before there are two."""
        if self.first is None or self.generated < 2 or self.ended <= self.first:
            return None
        return (self.generated - 1) / (self.ended - self.first)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, for the API."""
        return {
            "name": self.name,
            "budget": self.budget,
            "state": self.state,
            "handover": self.handover,
            "generated_tokens": self.generated,
            "inserted_tokens": self.inserted,
            "first_token_seconds": self.first_token_seconds,
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            "reason": self.reason,
        }


@dataclass
class Trace:
    """All phases that have begun."""

    parts: list[Part] = field(default_factory=list)
    stopped: bool = False

    def add(self, event: TextEvent) -> None:
        """Take one event in."""
        if event.kind == "start":
            began = self.parts[-1].ended if self.parts else 0.0
            self.parts.append(
                Part(
                    event.name,
                    event.budget,
                    event.handover,
                    began,
                    event.seconds,
                    event.seconds,
                    context=event.context,
                )
            )
            return
        if event.kind == "choice":
            return
        part = self.parts[-1]
        part.text += event.text
        part.context, part.ended = event.context, event.seconds
        if event.kind == "end":
            part.reason, part.state = event.reason, "done"
        elif event.inserted:
            part.inserted += 1
        else:
            part.generated += 1
            part.first = event.seconds if part.first is None else part.first

    def stop(self) -> None:
        """The visitor does not want more."""
        self.stopped = True
        for part in self.parts:
            if part.state == "running":
                part.state = "stopped"

    def text(self, name: str) -> str:
        """What the phase of this name wrote so far."""
        return next((part.text for part in self.parts if part.name == name), "")

    @property
    def tokens(self) -> int:
        """That submodels wrote."""
        return sum(part.generated for part in self.parts)

    @property
    def seconds(self) -> float:
        """From the beginning to the newest event."""
        return self.parts[-1].ended if self.parts else 0.0


def compute(trace: Trace, sizes: Sequence[Size]) -> int:
    """Active parameters times tokens written, over all phases; 0 if a size is not known."""
    active = {size.name: size.active_params for size in sizes}
    if any(part.budget not in active for part in trace.parts):
        return 0
    return sum(active[part.budget] * part.generated for part in trace.parts)


def follow(
    events: Generator[TextEvent, None, None], is_stopped: Callable[[], bool] = lambda: False
) -> Generator[Trace, None, None]:
    """The same growing [`Trace`] again and again: at every start and end of a phase, and about 12 times a second between.

    The first one is empty and comes before the engine begins: gradio closes a generator only if it got something from it, so a visitor who left
    earlier would else leave the engine running.

    Args:
        events: Are closed when this generator is, when the visitor stops, and at the end.
        is_stopped (`Callable`): Asked before every event.
    """
    trace, shown = Trace(), 0.0
    try:
        yield trace
        while not is_stopped():
            event = next(events, None)
            if event is None:
                break
            trace.add(event)
            if event.kind != "token" or perf_counter() - shown > 1 / YIELDS_PER_SECOND:
                shown = perf_counter()
                yield trace
        else:
            trace.stop()
    finally:
        events.close()
    yield trace
