"""Tensors of a parent that its stock class does not load, such as the multi-token-prediction block: said, and noted in `config.json`.

No size can carry them, because nothing here runs them. `config.json` lists them under `left_out`, which stock classes keep and do not use.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import users_level
from ..storage.files import INDEX_NAME, SINGLE_NAME, find_file

LEFT_OUT = "left_out"


def ignored_names(names: Iterable[str], patterns: Iterable[str] | None) -> list[str]:
    """Those that the stock class ignores by name (`_keys_to_ignore_on_load_unexpected`)."""
    return sorted(name for name in names if any(re.search(pattern, name) for pattern in patterns or ()))


def ignored_beside(model: PreTrainedModel) -> list[str]:
    """Names in the files that a stock model was loaded from, if they are on this machine, or what its config says of them."""
    patterns, repo = model._keys_to_ignore_on_load_unexpected, model.name_or_path
    if not patterns:
        return []
    try:
        found = ignored_names(_names(repo) if repo else (), patterns)
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError):  # it was not loaded from there
        found = []
    promised = getattr(model.config, "num_nextn_predict_layers", 0) or 0
    return found or [f"mtp.layers.{i}" for i in range(promised)]


def _names(repo: str) -> Iterable[str]:
    local = {"local_files_only": True}
    if (single := find_file(repo, SINGLE_NAME, local)) is not None:
        with safe_open(single, framework="pt") as file:
            return list(file.keys())
    index = find_file(repo, INDEX_NAME, local)
    return () if index is None else json.loads(index.read_text(encoding="utf-8"))["weight_map"].keys()


def note_left_out(config: PreTrainedConfig, names: list[str], repo: Any) -> None:
    """Warn of tensors that are not loaded, and have the config say so from now on."""
    if not names:
        return
    groups = sorted({_group(name) for name in names})
    setattr(config, LEFT_OUT, groups)
    warnings.warn(
        f"left out of {repo or 'the parent'}: {', '.join(groups)}. Its stock class does not load them, so no size has them; programs that "
        "speculate with them need the parent itself.",
        UserWarning,
        stacklevel=users_level(),
    )


def _group(name: str) -> str:
    """A tensor's layer: `mtp.layers.0.*`."""
    found = re.match(r".*?\.\d+(?=\.|$)", name)
    return f"{found.group()}.*" if found else name


def left_out(config: Any) -> list[str]:
    """What a config says was left out of the checkpoint, or of the one that it was made from."""
    for where in (config, getattr(config, "parent_config", None)):
        if isinstance(groups := getattr(where, LEFT_OUT, None), list):
            return [str(group) for group in groups]
    return []
