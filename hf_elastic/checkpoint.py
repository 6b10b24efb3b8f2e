"""Safetensors files of an elastic checkpoint: find them, check them against the table, read only what a submodel keeps.

Files are checked by their headers before a byte of weights is read; pickle files are never opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from .architectures import Architecture
from .axes import take
from .errors import CheckpointError
from .slicing import Piece, pieces
from .submodel import Submodel

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class Block:
    """A part of a tensor in a file. Indexing it reads that part, which is all the stock loader asks of a lazy tensor.

    Args:
        handle: Open safetensors file.
        key (`str`): Name in the file.
        runs (`list[list[tuple[int, int]]]`): What is kept along each dimension.
        compact (`bool`):
            Copy the part, so that the file's pages can go. Parts that the loader merges anyway (experts) are left as views.
    """

    handle: Any
    key: str
    runs: list[list[tuple[int, int]]]
    compact: bool

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = take(self.handle.get_tensor(self.key), self.runs)
        return (tensor.contiguous() if self.compact else tensor)[index]


class Checkpoint:
    """The safetensors files of one repository or folder, opened.

    Args:
        files (`list[Path]`): The files; every tensor name must occur in one of them.

    Raises:
        `CheckpointError`: a file is missing, truncated or no safetensors file, or two files hold one name.
    """

    def __init__(self, files: list[Path]):
        self._where: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except FileNotFoundError as error:
                raise CheckpointError(f"{file} is missing.") from error
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file} cannot be read as safetensors, it is damaged or incomplete ({error}); fetch or save it again."
                ) from error
            for key in handle.keys():  # noqa: SIM118 - a safetensors file is no dict
                if key in self._where:
                    raise CheckpointError(f"{key} occurs in two files of the checkpoint, one of them {file}.")
                self._where[key] = handle

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._where[key].get_slice(key).get_shape())

    def dtype(self) -> torch.dtype:
        """Type of the first floating-point tensor."""
        for key, handle in self._where.items():
            name = handle.get_slice(key).get_dtype()
            if name in _DTYPES:
                return _DTYPES[name]
        raise CheckpointError("the checkpoint holds no floating-point tensor.")

    def lazy_slice(
        self, architecture: Architecture, config: PreTrainedConfig, submodel: Submodel, *, head: bool = True
    ) -> dict[str, Block]:
        """The submodel as a state dict of unread blocks under the names of the parent's Hub layout.

        Args:
            architecture (`Architecture`): Table of the parent.
            config (`PreTrainedConfig`): The parent's stock config; what the files must agree with.
            submodel (`Submodel`): What to keep.
            head (`bool`, *optional*, defaults to `True`): `False` leaves out what only the causal model has.

        Raises:
            `CheckpointError`: a tensor is missing or has another shape than the config says; all are checked before any is read.
        """
        lazy: dict[str, Block] = {}
        problems: list[str] = []
        base = architecture.layers_path.partition(".")[0] + "."
        for piece in pieces(architecture, config, submodel):
            if piece.rule.tied or not (head or piece.rule.name.startswith(base)):
                continue
            for source, target, runs, shape in _disk_parts(piece, self, architecture):
                if source not in self:
                    problems.append(f"{source} is missing")
                elif self.shape(source) != shape:
                    problems.append(f"{source} is {self.shape(source)} in the file, the config says {shape}")
                else:
                    compact = not (piece.rule.stacked and len(runs) < len(piece.rule.dims))
                    lazy[target] = Block(self._where[source], source, runs, compact)
        if problems:
            raise CheckpointError(
                f"the weights do not fit the config ({len(problems)} of the tensors): {'; '.join(problems[:5])}"
                + (" ..." if len(problems) > 5 else "")
                + ". Nothing was loaded; the checkpoint is incomplete or its config.json belongs to other weights."
            )
        return lazy


def _disk_parts(
    piece: Piece, checkpoint: Checkpoint, architecture: Architecture
) -> list[tuple[str, str, list[list[tuple[int, int]]], tuple[int, ...]]]:
    """(name in the file, name in the slice, runs, full shape) of the tensors on disk that a piece is made of."""
    runs, shape = piece.runs, piece.rule.shape(piece.full)
    if piece.rule.stacked and piece.rule.name in checkpoint:  # saved with save_original_format=False
        return [(piece.rule.name, piece.target.name, runs, shape)]
    # The loader remembers which of the Hub's names it met, and saving writes those again: always give it the Hub's.
    if not piece.rule.stacked:
        source = _present(piece.rule.name, piece.rule.disk_name(), checkpoint, architecture)
        return [(source, piece.target.disk_name(), runs, shape)]
    kept = [expert for start, stop in runs[0] for expert in range(start, stop)]
    parts = []
    for new, expert in enumerate(kept):
        disk = piece.rule.disk_name(expert)
        source = _present(_live_prefix(disk, architecture), disk, checkpoint, architecture)
        parts.append((source, piece.target.disk_name(new), runs[1:], shape[1:]))
    return parts


def _live_prefix(disk: str, architecture: Architecture) -> str:
    """A name of the Hub layout under the live model's prefix, which stock models made from a config save."""
    base = architecture.layers_path.partition(".")[0] + "."
    return base + disk.removeprefix(architecture.disk_prefix) if disk.startswith(architecture.disk_prefix) else disk


def _present(live: str, disk: str, checkpoint: Checkpoint, architecture: Architecture) -> str:
    """The name under which a tensor is stored: Hub layout, live layout, or a base model's without the prefix."""
    base = architecture.layers_path.partition(".")[0] + "."
    for name in (disk, live, disk.removeprefix(architecture.disk_prefix), live.removeprefix(base)):
        if name in checkpoint:
            return name
    return disk


def find_files(repo: str | os.PathLike[str], variant: str | None = None, **hub: Any) -> list[Path]:
    """The safetensors files of a folder or Hub repository, fetched into the cache if they are remote.

    Args:
        repo (`str` or `os.PathLike`): Folder or repository id.
        variant (`str`, *optional*): As in `from_pretrained`.
        hub: `cache_dir`, `revision`, `token`, `subfolder`, ... as `transformers.utils.cached_file` takes them.

    Raises:
        `CheckpointError`: there are none. Pickled weights (`.bin`) are named, but never loaded.
    """

    def get(name: str) -> Path | None:
        if variant:
            stem, _, rest = name.partition(".safetensors")
            name = f"{stem}.{variant}.safetensors{rest}"
        path = cached_file(repo, name, _raise_exceptions_for_missing_entries=False, **hub)
        return Path(path) if path else None

    index = get(INDEX_NAME)
    if index is not None:
        names = _shard_names(index)
        return [_shard(repo, index, name, hub) for name in names]
    single = get(SINGLE_NAME)
    if single is None:
        raise CheckpointError(
            f"{repo} holds neither {SINGLE_NAME} nor {INDEX_NAME}. Elastic checkpoints are read from safetensors only; pickled "
            "weights (.bin) are not loaded, convert them with the stock model's save_pretrained."
        )
    return [single]


def _shard_names(index: Path) -> list[str]:
    try:
        weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of safetensors files ({error!r}).") from error
    for name in names:
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise CheckpointError(
                f"{index} names {name!r}, which is not a safetensors file beside it; it is not opened."
            )
    return names


def _shard(repo: str | os.PathLike[str], index: Path, name: str, hub: Mapping[str, Any]) -> Path:
    beside = index.parent / name
    if beside.exists():
        return beside
    path = cached_file(repo, name, _raise_exceptions_for_missing_entries=False, **hub)
    if path is None:
        raise CheckpointError(f"{name} is missing, though {index.name} lists it; the checkpoint is incomplete.")
    return Path(path)


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
