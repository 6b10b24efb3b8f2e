"""What a table says of other programs: which of them do not run a size, and what they do instead.

Tried in November 2026 with llama.cpp (b11434 and its converter), vLLM 0.32, mistral.rs 0.9 and SGLang 0.5 (its code was only read).
"""

from __future__ import annotations

from typing import NamedTuple

SILENT = "computes wrong results without an error"
REFUSES = "does not load it"
EVERY = "every program without hf_elastic"


class Obstacle(NamedTuple):
    """Why another program does not run a size as transformers does.

    Args:
        program (`str`): Its name.
        does (`str`): What it does instead.
        why (`str`): What of the size it cannot hold.
    """

    program: str
    does: str
    why: str
