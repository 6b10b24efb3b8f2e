"""When a run has learned what it can: the learning rate is constant until no budget comes nearer any more, then it falls, and the run ends."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from .progress import Progress
from .verdict import WORTHWHILE, near

logger = logging.getLogger(__name__)

DECAY_SHARE = 0.5
"""Steps in which the learning rate falls, as a share of those before."""
_FIRST_LOOK = 100  # steps
_EVERY = 1.1  # each look at so many times the steps of the last one
_LOOKS = 2  # in a row that have to find nothing left to gain


class Plateau(TrainerCallback):
    """A run of as many steps as its budgets need, by a warm-up-stable-decay schedule (arXiv 2404.06395) whose stable part has no fixed length.

    It is looked at how every budget goes after 100 steps and four times the warm-up, and each time the steps have grown by a tenth. Where two looks in a row find no budget
    that is still away from its teacher and of whose distance twice the steps would take off more than a fifth ([`Progress.gain`]), the learning
    rate falls to zero over half as many steps as were made. It falls early enough to end at the limit.

    Everything is decided by numbers that all processes share and that checkpoints keep.

    Args:
        progress ([`Progress`]): Of the run.
        budgets (`Sequence[str]`): Those that are drawn.
    """

    def __init__(self, progress: Progress, budgets: Sequence[str]):
        self.progress, self.budgets = progress, list(budgets)
        self.limit: int | None = None
        """Steps that the run has at most; known when the schedule is made."""
        self.decay_from: int | None = None
        self.next_look, self.flat_looks = _FIRST_LOOK, 0

    def begin(self, limit: int, warmup: int) -> None:
        """Say how many steps the run has at most, and in how many of them the learning rate rises. What these are like says nothing yet."""
        self.limit, self.next_look = limit, max(self.next_look, 4 * warmup)

    @property
    def decays_from(self) -> float:
        """The step from which the learning rate falls, as far as that is known."""
        latest = math.inf if self.limit is None else math.ceil(self.limit / (1 + DECAY_SHARE))
        return latest if self.decay_from is None else min(self.decay_from, latest)

    @property
    def ends_at(self) -> float:
        """Steps of the whole run, as far as that is known."""
        if self.decay_from is None:
            return math.inf if self.limit is None else self.limit
        return self.decays_from + max(1, round(DECAY_SHARE * self.decays_from))

    def factor(self, step: int) -> float:
        """What the learning rate of optimizer step `step` (from 0) is multiplied by."""
        start, end = self.decays_from, self.ends_at
        return 1.0 if step < start else max(0.0, (end - step) / (end - start + 1))

    def look(self, steps: int) -> None:
        """Decide, after so many steps, whether the learning rate falls from now on."""
        if self.decay_from is not None or steps < self.next_look:
            return
        self.next_look = max(steps + 1, math.ceil(_EVERY * steps))
        self.flat_looks = 0 if any(self._gains(budget, steps) for budget in self.budgets) else self.flat_looks + 1
        if self.flat_looks >= _LOOKS and steps + 1 < self.decays_from:
            self.decay_from = steps + 1  # the rate of the next step is set already
            logger.info(
                "no budget has come much nearer: the learning rate falls from step %d to %d.", steps, self.ends_at
            )

    def _gains(self, budget: str, steps: int) -> bool:
        distance, gain = self.progress.last(budget, steps), self.progress.gain(budget, steps)
        if distance is None or gain is None:
            return True  # too early to tell
        return gain > WORTHWHILE and not near(self.progress, distance)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.look(state.global_step)
        if state.global_step >= self.ends_at:
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy == "steps"
        return control

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _KEPT}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `to_dict` gave; from nothing, if that is empty."""
        for name in _KEPT:
            setattr(self, name, saved.get(name, getattr(self, name)))


_KEPT = ("decay_from", "next_look", "flat_looks")
