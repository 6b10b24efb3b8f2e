"""JSON files from elsewhere: read whole, as far as they are sound, or refused with an error that names the file.

What Python's reader lets through and nobody means is refused here: a file of hundreds of megabytes, thousands of levels, a key that occurs twice
(the last one would win), numbers beyond 64 bits.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, shown

LARGEST_CONFIG = 4 << 20
"""Bytes. A config with every size in every layer of a hundred submodels has about a million."""
LARGEST_INDEX = 32 << 20
"""Bytes; an index has about a hundred per tensor."""
_DEEPEST = 50  # levels; a config has six
_MOST = 100_000  # objects and lists; empty ones take twenty times as much memory as in the text


def read_json(
    path: str | os.PathLike[str], largest: int = LARGEST_CONFIG, most: int = _MOST, *, wide: bool = False
) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path (`str` or `os.PathLike`): The file.
        largest (`int`, *optional*): Bytes that it may have.
        most (`int`, *optional*): Objects and lists that it may have.
        wide (`bool`, *optional*, defaults to `False`): Whether numbers beyond 64 bits are meant, too.

    Raises:
        `CheckpointError`: it is missing, no file, too large, no JSON in UTF-8, or holds something other than an object.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is no file.")
        size = path.stat().st_size
        if size > largest:
            raise CheckpointError(f"{path} has {size:,} bytes; at most {largest:,} are read. It is damaged.")
        value = parse_json(path.read_bytes(), most, wide=wide)
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: permission denied.") from error
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read as JSON, it is damaged or incomplete ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {json_words(value)}, it must hold a JSON object.")
    return value


def parse_json(data: bytes, most: int = _MOST, *, wide: bool = False) -> Any:
    """The value of a JSON text.

    Raises:
        `ValueError`: it is none, or one that nobody means.
        `RecursionError`: it has more levels than Python reads.
    """
    if (count := data.count(b"[") + data.count(b"{")) > most:
        raise ValueError(f"{count:,} objects and lists, at most {most:,} are read")
    value = json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_int=int if wide else _integer)
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _inner(outer)]
        if not level:
            return value
    raise ValueError(f"more than {_DEEPEST} levels")


def json_words(value: Any) -> str:
    """A value that is no object, as JSON calls it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kind = "a list" if isinstance(value, list) else "a text" if isinstance(value, str) else "the number"
    return f"{kind} {shown(value)}" if kind == "the number" else f"{kind}, {shown(value)}"


def _inner(value: Any) -> Any:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (inner for inner in values if isinstance(inner, (dict, list)))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{shown(twice)} occurs twice")
    return made


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (number := int(text)) < 2**64:
        raise ValueError(f"{text[:30]}{'...' if len(text) > 30 else ''} is beyond 64 bits")
    return number
