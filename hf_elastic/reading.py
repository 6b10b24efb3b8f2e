"""Reading parts of tensors from safetensors files: the rows that are kept and no others, straight to where they belong.

From a mapped file the kernel reads far ahead, across what is left out, and whoever copies from it waits for the disk page by page.
Here a tensor is filled in bands that stay in the cache of a core. What belongs to the bands that come next is announced, so that the
disk works ahead; whole rows are read to where they belong, and of others the columns are cut on the way, so that nothing is held twice.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch

from .axes import Run, places_of, shape_of
from .tensor_file import TensorFile, populate

_BAND_BYTES = 2 << 20  # filled at a time
_AHEAD_BYTES = 32 << 20  # announced at a time
_CUT_BYTES = 512 << 10  # read at a time where columns are cut, so that they are still in the cache of a core then
_LONG_ROW_BYTES = 256  # from here on the bytes of a row are copied as such, not as one element
_scratch = threading.local()
Places = Sequence[list[Run] | None]
"""Per dimension where its ranges belong; one after the other where `None`."""
_Pairs = Sequence[tuple[slice, slice]]
"""The ranges of one dimension, and where each belongs."""
_Index = tuple[slice, ...]


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
        rows = [rows for block in self.leaves() for rows in block.rows()]
        for region, inside in _announced(_bands(target, rows, _AHEAD_BYTES)):
            for band, here in _bands(region, inside, _BAND_BYTES):
                populate(band)
                for part in here:
                    part.read_into(band)
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

    def rows(self) -> list[_Rows]:
        """The ranges of rows that it is read from."""
        size = self.dtype.itemsize
        pairs = [_pairs(runs, self.places[i] if self.places else None) for i, runs in enumerate(self.runs)]
        shape = self.full
        if len(shape) == 1:
            pairs, shape = [*pairs, [(slice(0, 1), slice(0, 1))]], (*shape, 1)
        pairs[-1] = [(_scaled(run, size), _scaled(place, size)) for run, place in pairs[-1]]
        whole = (1, *shape[:-1], shape[-1] * size)
        rows = _Rows(self.file, self.file.offsets[self.key], whole, 0, _Kept(pairs)).open()
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


@dataclass(frozen=True)
class _Kept:
    """What is kept of every row along its own dimensions, and where that belongs: worked out once for all bands.

    Args:
        pairs (`list`): Per dimension.
    """

    pairs: Sequence[_Pairs]

    @cached_property
    def inner(self) -> _Kept:
        """Along all dimensions but the first."""
        return _Kept(self.pairs[1:])

    @cached_property
    def shape(self) -> tuple[int, ...] | None:
        """Of the rows that are kept as one block; `None` where they are kept in several."""
        if any(len(along) > 1 for along in self.pairs):
            return None
        return tuple(along[0][0].stop - along[0][0].start for along in self.pairs)

    @cached_property
    def cuts(self) -> list[tuple[_Index, _Index, str]]:
        """The blocks of many rows: indices in what is read, indices of where it belongs, and what is copied at once."""
        cuts = []
        for chosen in product(*self.pairs):
            kept, place = zip(*chosen, strict=True)
            size = kept[-1].stop - kept[-1].start
            # Short rows are one element each, and cost one step; of long ones the bytes are the elements, because numpy lets other
            # threads go on only while it copies more than 500 elements.
            element = f"V{size}" if size < _LONG_ROW_BYTES else "u1"
            cuts.append(((slice(None), *kept), (slice(None), *place), element))
        return cuts


class _Rows(NamedTuple):
    """Rows that follow each other in a file, and where they belong in an array in memory.

    Args:
        file (`TensorFile`): Where they are.
        offset (`int`): Where the first starts.
        shape (`tuple[int, ...]`): Their number and the shape of one, in bytes along the last dimension.
        place (`int`): Index in memory of the first.
        kept (`_Kept`): What is kept of each.
    """

    file: TensorFile
    offset: int
    shape: tuple[int, ...]
    place: int
    kept: _Kept

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:])

    def within(self, start: int, stop: int) -> _Rows:
        """Those that belong between two indices, with places counted from the first of these."""
        low, high = max(start, self.place), min(stop, self.place + self.shape[0])
        offset = self.offset + (low - self.place) * self.row_bytes
        return _Rows(self.file, offset, (high - low, *self.shape[1:]), low - start, self.kept)

    def open(self) -> list[_Rows]:
        """The first of them, an array itself."""
        (_, _, *shape), inner = self.shape, self.kept.inner
        size = math.prod(shape)
        return [
            _Rows(self.file, self.offset + run.start * size, (run.stop - run.start, *shape), place.start, inner)
            for run, place in self.kept.pairs[0]
        ]

    def trimmed(self) -> list[_Rows]:
        """Of the only one, an array itself, the rows that are kept: one expert is stored as a matrix."""
        return [
            part._replace(
                shape=(1, *part.shape),
                place=self.place,
                kept=_Kept([[(slice(0, part.shape[0]), place)], *part.kept.pairs]),
            )
            for part, (_, place) in zip(self.open(), self.kept.pairs[0], strict=True)
        ]

    def announce(self) -> None:
        self.file.announce(self.offset, math.prod(self.shape))

    def read_into(self, array: np.ndarray) -> None:
        target = array[self.place : self.place + self.shape[0]]
        if self.kept.shape == self.shape[1:]:
            if self.shape[1:] == target.shape[1:]:
                self.file.read_into(target.reshape(-1), self.offset)
                return
            ((_, place, _),) = self.kept.cuts
            if self.file.scatter_into(target[place], self.offset):
                return
        self._cut_into(target)

    def _cut_into(self, target: np.ndarray) -> None:
        count, step = self.shape[0], max(1, _CUT_BYTES // self.row_bytes)
        for start in range(0, count, step):
            shape = (min(step, count - start), *self.shape[1:])
            read = _scratch_array(math.prod(shape))
            self.file.read_into(read, self.offset + start * self.row_bytes)
            rows, into = read.reshape(shape), target[start : start + step]
            for source, place, element in self.kept.cuts:
                np.copyto(into[place].view(element), rows[source].view(element))


_Band = tuple[np.ndarray, list[_Rows]]
"""Successive rows of an array in memory, and what belongs there."""


def _bands(target: np.ndarray, rows: Iterable[_Rows], size: int) -> Iterator[_Band]:
    """What is to be filled in bands of at most so many bytes, in order, each with what belongs there."""
    coming = deque(sorted(rows, key=lambda part: part.place))
    row = max(target[0].nbytes, *(part.row_bytes for part in coming))
    step = max(1, size // row)
    current: list[_Rows] = []
    for start in range(0, len(target), step):
        band = target[start : start + step]
        stop = start + len(band)
        while coming and coming[0].place < stop:
            current.append(coming.popleft())
        here = [part.within(start, stop) for part in current]
        current = [part for part in current if part.place + part.shape[0] > stop]
        if row > size and target.ndim > 2:  # such as experts
            yield from _bands(band[0], [inner for part in here for inner in part.open()], size)
        else:
            yield band, here


def _announced(bands: Iterable[_Band]) -> Iterator[_Band]:
    """Let the kernel fetch the next band in the background while one is read."""
    last: _Band | None = None
    for band in bands:
        for part in band[1]:
            part.announce()
        if last:
            yield last
        last = band
    if last:
        yield last


def _scratch_array(size: int) -> np.ndarray:
    """Scratch memory of this thread."""
    if not hasattr(_scratch, "buffer") or _scratch.buffer.nbytes < size:
        _scratch.buffer = np.empty(max(size, _BAND_BYTES), np.uint8)
    return _scratch.buffer[:size]


def _pairs(runs: list[Run], places: list[Run] | None) -> list[tuple[slice, slice]]:
    if not places:
        return list(places_of(runs))
    return [(slice(*run), slice(*place)) for run, place in zip(runs, places, strict=True)]


def _scaled(run: slice, size: int) -> slice:
    return slice(run.start * size, run.stop * size)
