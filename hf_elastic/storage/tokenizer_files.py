"""The files of a tokenizer beside a checkpoint: checked where they are copied or pushed, so that a damaged one does not travel on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnreachableError
from .files import find_file
from .json_files import read_json
from .sources import pinned

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_LARGEST = 256 << 20  # bytes; those of large vocabularies have tens of millions
_MOST = 8_000_000  # lists and objects: two per token, and one per merge


def read_tokenizer_file(path: Path) -> dict[str, Any]:
    """What a JSON file of a tokenizer holds.

    Raises:
        `CheckpointError`: it is damaged.
    """
    return read_json(path, _LARGEST, _MOST, wide=True)  # 10^30 as the largest length is how upstream writes none


def tokenizer_files(source: str | os.PathLike[str], hub: Mapping[str, Any]) -> dict[str, Path]:
    """The tokenizer files that a folder or Hub repository has, by their names.

    Raises:
        `CheckpointError`: one is damaged.
        `UnreachableError`: the Hub could not be asked.
    """
    hub = pinned(source, hub)
    found = ((name, find_file(source, name, hub)) for name in TOKENIZER_FILES)
    files = {name: path for name, path in found if path is not None}
    for path in files.values():
        if path.suffix == ".json":
            read_tokenizer_file(path)
    return files


def optional_tokenizer(source: str) -> Any:
    """The tokenizer beside a checkpoint; `None` if there is none.

    Raises:
        `CheckpointError`: its files are there, and it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        files = tokenizer_files(source, {})
    except UnreachableError:  # the cache may have all that it needs
        files = {}
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # of many kinds, for what is missing or damaged
        if not files and isinstance(error, (OSError, ValueError)):
            return None
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"the tokenizer of {source} ({', '.join(files) or 'its files'}) cannot be loaded: {why}. Save it there again with "
            "tokenizer.save_pretrained; without its files the checkpoint is taken without a tokenizer."
        ) from error
