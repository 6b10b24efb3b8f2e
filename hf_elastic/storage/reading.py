"""Parts of tensors in safetensors files, read when they are indexed: the rows that are kept and no others, straight to where they belong."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..architectures.axes import Run, places_of, shape_of
from .rows import Kept, Rows, fill
from .tensor_file import TensorFile

Places = Sequence[list[Run] | None]
"""Per dimension where its ranges belong; one after the other where `None`."""


class Readable(ABC):
    """A tensor that is read when it is indexed, which is all the stock loader asks of a lazy tensor."""

    dtype: torch.dtype

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @abstractmethod
    def leaves(self) -> Iterator[Block]:
        """The parts of files that it is read from."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        # As bytes along the last dimension: numpy has no bfloat16, and unlike torch's its copies start no threads of their own.
        target = (tensor if tensor.ndim > 1 else tensor.unsqueeze(-1)).view(torch.uint8).numpy()
        fill(target, [rows for block in self.leaves() for rows in block.rows()])
        return tensor[index]


@dataclass(frozen=True)
class Block(Readable):
    """A part of a tensor in a file.

    Args:
        file (`TensorFile`): Where the tensor is.
        key (`str`): Its name there.
        full (`tuple[int, ...]`): Its shape there, or with dimensions of one element before it.
        dtype (`torch.dtype`): Its type there.
        runs (`list[list[tuple[int, int]]]`): What is kept along each dimension.
        places (`list[list[tuple[int, int]]]`, *optional*):
            Where every run of every dimension belongs in the tensor that is read into; one after the other where not given.
    """

    file: TensorFile
    key: str
    full: tuple[int, ...]
    dtype: torch.dtype
    runs: list[list[Run]]
    places: Places | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.runs)

    def leaves(self) -> Iterator[Block]:
        yield self

    @property
    def extent(self) -> list[Run]:
        """The ranges of bytes in the file that hold the kept rows."""
        return [(rows.offset, rows.offset + math.prod(rows.shape)) for rows in self.rows()]

    def rows(self) -> list[Rows]:
        """The ranges of rows that it is read from."""
        size = self.dtype.itemsize
        pairs = [_pairs(runs, self.places[i] if self.places else None) for i, runs in enumerate(self.runs)]
        shape = self.full
        if len(shape) == 1:
            pairs, shape = [*pairs, [(slice(0, 1), slice(0, 1))]], (*shape, 1)
        pairs[-1] = [(_scaled(run, size), _scaled(place, size)) for run, place in pairs[-1]]
        whole = (1, *shape[:-1], shape[-1] * size)
        rows = Rows(self.file, self.file.offsets[self.key], whole, 0, Kept(pairs)).open()
        return [part for row in rows for part in row.trimmed()] if len(shape) > 2 and shape[0] == 1 else rows


@dataclass(frozen=True)
class Joined(Readable):
    """Blocks of one tensor that lie in several places, in several files.

    Args:
        size (`tuple[int, ...]`): Shape of the tensor.
        blocks (`list[Block]`): With places that cover it, each element once.
    """

    size: tuple[int, ...]
    blocks: list[Block]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.blocks[0].dtype

    def leaves(self) -> Iterator[Block]:
        yield from self.blocks


def _pairs(runs: list[Run], places: list[Run] | None) -> list[tuple[slice, slice]]:
    if not places:
        return list(places_of(runs))
    return [(slice(*run), slice(*place)) for run, place in zip(runs, places, strict=True)]


def _scaled(run: slice, size: int) -> slice:
    return slice(run.start * size, run.stop * size)
