"""An engine without a model, to look at the Space and to test it: seeded words at a chosen speed."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Generator
from typing import Any

from hf_elastic.errors import UnknownBudgetError

from .asking import Ask, RequestError, Size, TextEvent
from .tasks import Task

_WORDS = (
    "so",
    "the",
    "light",
    "that",
    "is",
    "left",
    "bends",
    "less",
    "than",
    "what",
    "we",
    "see",
    "at",
    "dusk",
    "because",
    "air",
    "moves",
)
_SIZES = (("XS", 0.34), ("S", 0.6), ("M", 1.1), ("L", 2.2))  # name, billions of parameters
_THINKING, _ANSWER = 48, 12


class FakeEngine:
    """As [`Engine`]: repeats the words of the prompt among others. `FAKE_SLEEP` is the time of a token in seconds, 0.02 by default.

    Args:
        sleep (`float`, *optional*): Instead of `FAKE_SLEEP`.
    """

    name, device, dtype, limit, fake = "no model: made-up words", "cpu", "bfloat16", 4096, True
    task: Task | None = None

    def __init__(self, sleep: float | None = None):
        self.sleep = float(os.environ.get("FAKE_SLEEP", "0.02")) if sleep is None else sleep
        self.sizes = [Size(n, int(b * 1e9), int(b * 4e8), int(b * 2e9), int(b * 2e4), int(b * 2e7)) for n, b in _SIZES]
        self.running = 0
        """Requests in the engine now."""
        self.most = 0
        """Highest `running` so far."""
        self._lock = threading.Lock()

    def check(self, ask: Ask) -> None:
        """As [`Engine.check`]."""
        plan = ask.check(self.limit)
        names = [size.name for size in self.sizes]
        for phase in plan.phases:
            if phase.budget not in names:
                raise UnknownBudgetError(f"unknown budget {phase.budget!r}; this engine has {', '.join(names)}.")
        if (words := len(ask.messages[-1][1].split())) > self.limit:
            raise RequestError(f"The prompt has {words} words, and the context ends at {self.limit}.")

    def stream(self, ask: Ask) -> Generator[TextEvent, None, None]:
        """As [`Engine.stream`]."""
        self.check(ask)
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            yield from self._phases(ask, ask.messages[-1][1].split())
        finally:
            with self._lock:
                self.running -= 1

    def _phases(self, ask: Ask, words: list[str]) -> Generator[TextEvent, None, None]:
        rng, began, context = random.Random(f"{ask.seed} {words}"), time.perf_counter(), len(words)
        lengths = ((_THINKING, ask.max_thinking_tokens), (_ANSWER, ask.max_answer_tokens))
        budgets = (("thinking", ask.thinking), ("answering", ask.answering))
        for index, ((name, budget), (length, cap)) in enumerate(zip(budgets, lengths, strict=True)):

            def event(kind: Any, phase: Any = (index, name, budget), **what: Any) -> TextEvent:
                what["seconds"] = time.perf_counter() - began
                return TextEvent(kind, *phase, **what)

            time.sleep(self.sleep)
            yield event("start", context=context, handover="reprefill" if index else None)
            if not index:
                context += 1
                yield event("token", row=0, token_id=1, inserted=True, context=context)
            for n in range(min(length, cap)):
                time.sleep(self.sleep)
                context += 1
                word = words[n % len(words)] if n % 4 == 0 else rng.choice(_WORDS)
                last = n + 1 == length and not index  # the model's own end marker
                text = "" if last else word + " "
                yield event("token", row=0, token_id=2 if last else 9, text=text, context=context)
            capped = cap < length
            if capped and not index:
                context += 1
                yield event("token", row=0, token_id=2, inserted=True, context=context)
            reason = "cap" if capped else "eos" if index else "marker"
            yield event("end", row=0, reason=reason, context=context)
