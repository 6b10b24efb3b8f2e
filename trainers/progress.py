"""How the divergence of every budget went over a run: sums over spans of steps, few enough to keep in every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SPANS = 128
"""Spans of steps that are kept at most; a run that needs more has them twice as long from then on."""
FIRST_BATCHES = 16
"""Micro-batches of a run whose teacher's entropy is counted: it is a property of the data, which does not change."""
_FEWEST = 4  # micro-batches that a mean is taken over at least, where there are so many


class Progress:
    """Divergence of every budget by step.

    All numbers are those of all processes together, so every process has the same.
    """

    def __init__(self) -> None:
        self.width = 1
        """Steps of a span."""
        self.spans: dict[str, dict[int, list[float]]] = {}
        """Per budget and span the sum of divergences, target tokens, and micro-batches."""
        self.first: dict[str, float] = {}
        """Per budget the divergence per token of its first micro-batch."""
        self.entropy = [0.0, 0.0]
        """Of the teacher: its sum, and target tokens."""
        self.batches = 0
        self.peak = 0.0
        self.high = [0, 0]
        """Steps until the learning rate fell below 90 % and below 50 % of its peak."""

    def add(self, step: int, budget: str, divergence: float, tokens: float) -> None:
        """Count a micro-batch of an optimizer step (from 0): the sum of its divergences, and its target tokens."""
        self.batches += 1
        if tokens <= 0:
            return
        self.first.setdefault(budget, divergence / tokens)
        while step // self.width >= SPANS:
            self._halve()
        span = self.spans.setdefault(budget, {}).setdefault(step // self.width, [0.0, 0.0, 0])
        span[0] += divergence
        span[1] += tokens
        span[2] += 1

    def add_rate(self, step: int, rate: float) -> None:
        """Count the learning rate of a step."""
        self.peak = max(self.peak, rate)
        self.high = [
            step + 1 if rate >= share * self.peak else at for share, at in zip((0.9, 0.5), self.high, strict=True)
        ]

    def high_until(self, steps: int) -> int:
        """Steps in which the learning rate was about constant; of a schedule that falls from the start, those before it has halved."""
        constant, halved = (min(at, steps) for at in self.high)
        return constant if constant >= steps / 4 else halved

    def add_entropy(self, entropy: float, tokens: float) -> None:
        """Count the teacher's entropy of a micro-batch, in nats, summed over its target tokens."""
        self.entropy[0] += entropy
        self.entropy[1] += tokens

    def _halve(self) -> None:
        self.width *= 2
        for budget, spans in self.spans.items():
            merged: dict[int, list[float]] = {}
            for i, span in spans.items():
                total = merged.setdefault(i // 2, [0.0, 0.0, 0])
                for j in range(3):
                    total[j] += span[j]
            self.spans[budget] = merged

    @property
    def teacher_entropy(self) -> float:
        """Of the teacher, nats per target token."""
        return self.entropy[0] / max(self.entropy[1], 1.0)

    def mean(self, budget: str, start: float, end: float) -> float | None:
        """Divergence per target token over the spans whose middle lies in steps `[start, end)`; `None` if there is none."""
        chosen = [s for i, s in self.spans.get(budget, {}).items() if start <= (i + 0.5) * self.width < end]
        return sum(s[0] for s in chosen) / sum(s[1] for s in chosen) if chosen else None

    def last(self, budget: str, steps: int) -> float | None:
        """Divergence per target token over the last twentieth of the steps, or the last few micro-batches of the budget if these are more."""
        spans, chosen = self.spans.get(budget, {}), [0.0, 0.0, 0]
        for i in sorted(spans, reverse=True):
            if chosen[2] >= _FEWEST and (i + 0.5) * self.width < 0.95 * steps:
                break
            chosen = [a + b for a, b in zip(chosen, spans[i], strict=True)]
        return chosen[0] / chosen[1] if chosen[2] else None

    def gain(self, budget: str, steps: int) -> float | None:
        """What going on for as many steps again would take off the divergence, as a share, if it went on falling as it does.

        The mean over the last quarter of the first `steps` steps is compared with that over the quarter before. A divergence that falls as
        a power of the steps falls by `(0.875 / 0.625) ** -a` from one to the other and by `2 ** -a` when they are doubled.

        Returns:
            `float`, *optional*: Below 0 if it rises; `None` if there are too few micro-batches to tell.
        """
        before, now = self.mean(budget, steps / 2, 0.75 * steps), self.mean(budget, 0.75 * steps, steps)
        if before is None or now is None or before <= 0:
            return None
        return 1.0 - (now / before) ** (math.log(2) / math.log(0.875 / 0.625))

    def to_dict(self) -> dict[str, Any]:
        spans = {budget: [[i, *span] for i, span in sorted(kept.items())] for budget, kept in self.spans.items()}
        return {**vars(self), "spans": spans}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `to_dict` gave; from nothing, if that is empty."""
        vars(self).update({key: saved[key] for key in vars(self) if key in saved})
        self.spans = {budget: {int(i): span for i, *span in kept} for budget, kept in saved.get("spans", {}).items()}
        self.first, self.entropy, self.high = dict(self.first), list(self.entropy), list(self.high)
