"""Safetensors files of an elastic checkpoint: find them, check them against the table, read only what a submodel keeps.

Files are checked by their headers before a byte of weights is read; pickle files are never opened.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from .architectures import Architecture
from .axes import Run
from .errors import CheckpointError
from .reading import Block, Stack, TensorFile
from .slicing import Piece, pieces
from .submodel import Submodel

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_ROTARY = r"rotary_emb\.inv_freq$"  # computed, but saved by old versions


class Checkpoint:
    """The safetensors files of one repository or folder, opened.

    Args:
        files (`list[Path]`): The files; every tensor name must occur in one of them.

    Raises:
        `CheckpointError`: a file is missing, truncated or no safetensors file, or two files hold one name.
    """

    def __init__(self, files: list[Path]):
        self._where: dict[str, tuple[Any, TensorFile]] = {}
        for file in files:
            try:
                handle, positions = safe_open(file, framework="pt"), TensorFile(file)
            except FileNotFoundError as error:
                raise CheckpointError(f"{file} is missing.") from error
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file} cannot be read as safetensors, it is damaged or incomplete ({error}); fetch or save it again."
                ) from error
            for key in handle.keys():  # noqa: SIM118 - a safetensors file is no dict
                if key in self._where:
                    raise CheckpointError(f"{key} occurs in two files of the checkpoint, one of them {file}.")
                self._where[key] = handle, positions

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._where[key][0].get_slice(key).get_shape())

    def dtype(self) -> torch.dtype:
        """Type of the first floating-point tensor."""
        for key in self._where:
            if (dtype := self._stored_dtype(key)) in _DTYPES:
                return _DTYPES[dtype]
        raise CheckpointError("the checkpoint holds no floating-point tensor.")

    def _stored_dtype(self, key: str) -> str:
        return str(self._where[key][0].get_slice(key).get_dtype())

    def check(
        self,
        architecture: Architecture,
        config: PreTrainedConfig,
        *,
        head: bool = True,
        ignored: Iterable[str] = (),
    ) -> None:
        """Compare the headers of the files with what the config says: every tensor there, of its shape, and no other.

        Args:
            architecture (`Architecture`): Table of the parent.
            config (`PreTrainedConfig`): The parent's stock config.
            head (`bool`, *optional*, defaults to `True`): `False` if what only the causal model has may be missing.
            ignored (`Iterable[str]`, *optional*):
                Patterns of further names that may be there, as the stock class's `_keys_to_ignore_on_load_unexpected`.

        Raises:
            `CheckpointError`: names the first tensors that are missing, unknown, of another shape or not floating point.
        """
        problems: list[str] = []
        known: set[str] = set()
        for piece in pieces(architecture, config, architecture.full(config)):
            sources = self._sources(piece, architecture)
            known.update(sources)
            if piece.rule.tied or not (head or piece.rule.name.startswith(_base(architecture))):
                continue
            shape = piece.shape[1:] if _is_split(sources, piece) else piece.shape
            for source in sources:
                if source not in self:
                    problems.append(f"{source} is missing")
                elif self.shape(source) != shape:
                    problems.append(f"{source} is {self.shape(source)} in the file, the config says {shape}")
                elif self._stored_dtype(source) not in _DTYPES:
                    problems.append(f"{source} is stored as {self._stored_dtype(source)}, not as {', '.join(_DTYPES)}")
        patterns = [re.compile(pattern) for pattern in (*ignored, _ROTARY)]
        unknown = sorted(key for key in self._where.keys() - known if not any(p.search(key) for p in patterns))
        problems += [f"{key} belongs to no part of this {architecture.model_type}" for key in unknown]
        if problems:
            raise CheckpointError(
                f"the weights do not fit the config ({len(problems)} of the tensors): {'; '.join(problems[:5])}"
                + (" ..." if len(problems) > 5 else "")
                + ". Nothing was loaded; the checkpoint is incomplete or its config.json belongs to other weights."
            )

    def lazy_slice(
        self, architecture: Architecture, config: PreTrainedConfig, submodel: Submodel, *, head: bool = True
    ) -> dict[str, Block | Stack | torch.Tensor]:
        """The submodel as a state dict of unread tensors under the live model's names. Call `check` first.

        Args:
            architecture (`Architecture`): Table of the parent.
            config (`PreTrainedConfig`): The parent's stock config.
            submodel (`Submodel`): What to keep.
            head (`bool`, *optional*, defaults to `True`): `False` leaves out what only the causal model has.
        """
        lazy: dict[str, Block | Stack | torch.Tensor] = {}
        for piece in pieces(architecture, config, submodel):
            if piece.rule.tied or not (head or piece.rule.name.startswith(_base(architecture))):
                continue
            sources, runs = self._sources(piece, architecture), piece.runs
            if _is_split(sources, piece):
                kept = [expert for start, stop in runs[0] for expert in range(start, stop)]
                lazy[piece.target.name] = Stack([self._block(sources[expert], runs[1:]) for expert in kept])
            else:
                block = self._block(sources[0], runs)
                # A whole tensor is mapped, as the stock loader maps it: its pages are read when they are used.
                lazy[piece.target.name] = (
                    self._where[sources[0]][0].get_tensor(sources[0]) if block.is_whole else block
                )
        return lazy

    def _block(self, key: str, runs: list[list[Run]]) -> Block:
        return Block(self._where[key][1], key, self.shape(key), _DTYPES[self._stored_dtype(key)], runs)

    def _sources(self, piece: Piece, architecture: Architecture) -> list[str]:
        """Names under which a tensor of the parent is stored, whichever experts are kept: one, or one per expert."""
        rule = piece.rule
        if not rule.stacked or rule.name in self:  # stacked experts were saved with save_original_format=False
            return [self._present(rule.name, rule.disk_name() if not rule.stacked else rule.name, architecture)]
        names = [rule.disk_name(expert) for expert in range(rule.shape(piece.full)[0])]
        return [self._present(_live_prefix(name, architecture), name, architecture) for name in names]

    def _present(self, live: str, disk: str, architecture: Architecture) -> str:
        """The name under which a tensor is stored: Hub layout, live layout, or a base model's without the prefix."""
        for name in (disk, live, disk.removeprefix(architecture.disk_prefix), live.removeprefix(_base(architecture))):
            if name in self:
                return name
        return disk


def _base(architecture: Architecture) -> str:
    """Prefix of the base model's tensors in the live causal model."""
    return architecture.layers_path.partition(".")[0] + "."


def _is_split(sources: list[str], piece: Piece) -> bool:
    """Whether the tensor is stored as one per expert."""
    return piece.rule.stacked and sources != [piece.rule.name]


def _live_prefix(disk: str, architecture: Architecture) -> str:
    """A name of the Hub layout under the live model's prefix."""
    prefix = architecture.disk_prefix
    return _base(architecture) + disk.removeprefix(prefix) if disk.startswith(prefix) else disk


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
        if variant:  # before the last ending, as upstream writes it: model.safetensors.index.fp16.json
            stem, _, ending = name.rpartition(".")
            name = f"{stem}.{variant}.{ending}"
        path = cached_file(repo, name, _raise_exceptions_for_missing_entries=False, **hub)
        return Path(path) if path else None

    single = get(SINGLE_NAME)  # first, as upstream does where a folder holds both
    if single is not None:
        return [single]
    index = get(INDEX_NAME)
    if index is None:
        raise CheckpointError(
            f"{repo} holds neither {SINGLE_NAME} nor {INDEX_NAME}. Elastic checkpoints are read from safetensors only; pickled "
            "weights (.bin) are not loaded, convert them with the stock model's save_pretrained."
        )
    return [_shard(repo, index, name, hub) for name in _shard_names(index)]


def _shard_names(index: Path) -> list[str]:
    try:
        weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        if not names:
            raise ValueError("no files")
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
