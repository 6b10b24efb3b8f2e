"""What visitors ask and are told: a request, the events it leads to, and the sizes that there are. No engine in here."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from hf_elastic import HFElasticError, PhasePlan
from hf_elastic.architectures.cost import Cost, tokens_kept
from hf_elastic.generation import PhaseEvent

MAX_CHARACTERS = 100_000


class RequestError(HFElasticError, ValueError):
    """A visitor's request cannot be run; the message is for the visitor."""


@dataclass(frozen=True)
class Ask:
    """One request; plain values, so that it can be sent to another process.

    Args:
        messages (`tuple[tuple[str, str], ...]`): Role and text of what was said, the question last.
        thinking, answering (`str`): Budgets of the two phases, as `model.set_budget` takes them.
        max_thinking_tokens, max_answer_tokens (`int`): Caps, from 1.
        temperature (`float`): 0 takes the most likely token.
        seed (`int`): Of sampling.
    """

    messages: tuple[tuple[str, str], ...]
    thinking: str
    answering: str
    max_thinking_tokens: int = 512
    max_answer_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0

    def plan(self, tokenizer: Any = None) -> PhasePlan:
        """Its phase plan, with the markers of this tokenizer."""
        return PhasePlan(
            self.thinking,
            self.answering,
            max_thinking_tokens=self.max_thinking_tokens,
            max_answer_tokens=self.max_answer_tokens,
        ).with_markers(tokenizer)

    def check(self, limit: int, tokenizer: Any = None) -> PhasePlan:
        """Refuse what no engine would run.

        Returns:
            [`PhasePlan`]: As `plan` gives it.

        Raises:
            `RequestError`: an empty or far too long prompt, control characters or an end marker in it, caps above `limit`, a temperature or seed
                out of range.
            `PhasePlanError`: caps that are no caps, or several pairs of markers that may be meant.
        """
        question = self.messages[-1][1] if self.messages else ""
        if not isinstance(question, str) or not question.strip():
            raise RequestError("The prompt is empty. Write a question first.")
        if len(question) > MAX_CHARACTERS:
            raise RequestError(f"The prompt has {len(question):,} characters; at most {MAX_CHARACTERS:,} are read.")
        if strange := sorted({c for c in question if unicodedata.category(c) == "Cc" and c not in "\n\r\t"}):
            raise RequestError(f"The prompt has control characters ({_name(strange)}). Take them out.")
        plan = self.plan(tokenizer)
        for phase in plan.phases:
            if phase.end and phase.end in question:  # a chat template would put its own start behind it, and hide it
                raise RequestError(
                    f"The prompt is past the {phase.name} already: it holds {phase.end}, the end marker. Take it out."
                )
        for name, cap in (("thinking", self.max_thinking_tokens), ("answer", self.max_answer_tokens)):
            if cap == 0:
                raise RequestError(f"max_{name}_tokens=0 must be a whole number of at least 1 here.")
            if cap is None or cap > limit:
                raise RequestError(f"From 1 to {limit} {name} tokens can be asked for here, not {cap}.")
        if not _is_number(self.temperature, float) or not 0 <= self.temperature <= 2:
            raise RequestError(f"The temperature must be from 0 to 2, not {self.temperature}.")
        if not _is_number(self.seed, int) or not 0 <= self.seed < 2**31:
            raise RequestError(f"The seed must be a whole number from 0 to {2**31 - 1}, not {self.seed}.")
        return plan


@dataclass(frozen=True)
class TextEvent(PhaseEvent):
    """A [`PhaseEvent`] of the one sequence, with its text.

    Args:
        text (`str`): What became readable with this event; markers have none.
        context (`int`): Tokens in the context by now, prompt included.
    """

    text: str = ""
    context: int = 0


@dataclass(frozen=True)
class Size:
    """A budget that visitors choose, and what it costs at the dtype of the engine.

    Args:
        name (`str`): Of the budget.
        total_params, active_params, weight_bytes, kv_bytes_per_token, state_bytes (`int`): As in [`hf_elastic.architectures.cost.Cost`].
        windows (`tuple[tuple[int, int], ...]`): Per sliding window the bytes of the KV cache per token in layers that have it.
    """

    name: str
    total_params: int
    active_params: int
    weight_bytes: int
    kv_bytes_per_token: int
    state_bytes: int
    windows: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, name: str, cost: Cost, dtype: torch.dtype) -> Size:
        """The size with this cost."""
        windows = tuple((window, dtype.itemsize * elements) for window, elements in cost.windowed)
        kept = (cost.kv_bytes_per_token(dtype), cost.state_bytes(dtype), windows)
        return cls(name, cost.total_params, cost.active_params, cost.weight_bytes(dtype), *kept)

    def cache_bytes(self, tokens: int) -> int:
        """KV cache and states of one sequence of that many tokens."""
        windows = sum(tokens_kept(tokens, window) * each for window, each in self.windows)
        return tokens * self.kv_bytes_per_token + windows + self.state_bytes


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, (int, kind)) and not isinstance(value, bool)


def _name(characters: Sequence[str]) -> str:
    more = "" if len(characters) <= 5 else " and others"
    return ", ".join(f"U+{ord(c):04X}" for c in islice(characters, 5)) + more
