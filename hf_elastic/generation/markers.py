"""The markers around the thinking of a model, found in its chat template and its tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import PhasePlanError

START, END = "<think>", "</think>"
"""What most models use, and what is taken where nothing else is found."""

_MARKER = re.compile(r"[<\[◁]\S{0,40}(?:think|thought|reason)\S{0,40}[>\]▷]", re.IGNORECASE)


def find_markers(tokenizer: Any, start: str | None = None, end: str | None = None) -> tuple[str, str]:
    """The markers that open and close the thinking, each one token.

    Known are pairs such as `<think>` and `</think>`, `[THINK]` and `[/THINK]`, `<|START_THINKING|>` and `<|END_THINKING|>`. Those that the
    chat template names come first.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Of the model.
        start, end (`str`, *optional*): The one that is known already.

    Returns:
        `tuple[str, str]`: `<think>` and `</think>` where there is no such pair.

    Raises:
        `PhasePlanError`: the chat template names several pairs, so that it is not known which is meant.
    """
    pairs = [(a, b) for a, b in _pairs(tokenizer) if start in (None, a) and end in (None, b)]
    template = _template(tokenizer)
    named = [pair for pair in pairs if any(marker in template for marker in pair)]
    if (START, END) in named or not named:
        return (START, END) if (START, END) in pairs or len(pairs) != 1 else pairs[0]
    if len(named) > 1:
        texts = ", ".join(f"{a} ... {b}" for a, b in named)
        raise PhasePlanError(
            f"the chat template has several pairs of markers that may stand around the thinking: {texts}. Say which: PhasePlan(start=, end=), or "
            "--start and --end."
        )
    return named[0]


def _pairs(tokenizer: Any) -> list[tuple[str, str]]:
    """Tokens that look like the opening and the closing of a thinking."""
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    opening = sorted(token for token in vocabulary if isinstance(token, str) and _MARKER.fullmatch(token))
    return [(token, end) for token in opening if (end := next((e for e in _ends(token) if e in vocabulary), None))]


def _ends(start: str) -> list[str]:
    """How a marker may be closed: `</x>`, or `end` in place of `start` or `begin`."""
    ends = [re.sub(r"^(\W+)(?=\w)", r"\1/", start)] if "/" not in start else []
    for word in ("START", "BEGIN", "start", "begin"):
        if re.search(rf"(?<![a-zA-Z]){word}(?![a-zA-Z])", start):
            ends.append(start.replace(word, "END" if word.isupper() else "end"))
    return ends


def _template(tokenizer: Any) -> str:
    """All of the chat templates that a tokenizer has."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        return "\n".join(map(str, template.values()))
    return template if isinstance(template, str) else ""
