"""Rows of tensors in files, and memory filled with them.

From a mapped file the kernel reads far ahead, across what is left out, and whoever copies from it waits for the disk page by page.
Here memory is filled in bands that stay in the cache of a core. What belongs to the bands that come next is announced, so that the
disk works ahead; whole rows are read to where they belong, and of others the columns are cut on the way, so that nothing is held twice.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np

from .tensor_file import Segments, TensorFile, populate

_BAND_BYTES = 1 << 20  # filled at a time
_ROW_BYTES = 2 << 20  # larger rows, such as experts, are filled in bands themselves; smaller ones are not worth it
_AHEAD_BYTES = 32 << 20  # announced at a time
_CUT_BYTES = 512 << 10  # read at a time where columns are cut, so that they are still in the cache of a core then
_LONG_ROW_BYTES = 256  # from here on the bytes of a row are copied as such, not as one element
_scratch = threading.local()
_Pairs = Sequence[tuple[slice, slice]]
"""The ranges of one dimension, and where each belongs."""
_Index = tuple[slice, ...]


@dataclass(frozen=True)
class Kept:
    """What is kept of every row along its own dimensions, and where that belongs: worked out once for all bands.

    Args:
        pairs (`list`): Per dimension.
    """

    pairs: Sequence[_Pairs]

    @cached_property
    def inner(self) -> Kept:
        """Along all dimensions but the first."""
        return Kept(self.pairs[1:])

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


class Rows(NamedTuple):
    """Rows that follow each other in a file, and where they belong in an array in memory.

    Args:
        file (`TensorFile`): Where they are.
        offset (`int`): Where the first starts.
        shape (`tuple[int, ...]`): Their number and the shape of one, in bytes along the last dimension.
        place (`int`): Index in memory of the first.
        kept (`Kept`): What is kept of each.
    """

    file: TensorFile
    offset: int
    shape: tuple[int, ...]
    place: int
    kept: Kept

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:])

    def within(self, start: int, stop: int) -> Rows:
        """Those that belong between two indices, with places counted from the first of these."""
        low, high = max(start, self.place), min(stop, self.place + self.shape[0])
        offset = self.offset + (low - self.place) * self.row_bytes
        return Rows(self.file, offset, (high - low, *self.shape[1:]), low - start, self.kept)

    def open(self) -> list[Rows]:
        """The first of them, an array itself."""
        (_, _, *shape), inner = self.shape, self.kept.inner
        size = math.prod(shape)
        return [
            Rows(self.file, self.offset + run.start * size, (run.stop - run.start, *shape), place.start, inner)
            for run, place in self.kept.pairs[0]
        ]

    def trimmed(self) -> list[Rows]:
        """Of the only one, an array itself, the rows that are kept: one expert is stored as a matrix."""
        return [
            part._replace(
                shape=(1, *part.shape),
                place=self.place,
                kept=Kept([[(slice(0, part.shape[0]), place)], *part.kept.pairs]),
            )
            for part, (_, place) in zip(self.open(), self.kept.pairs[0], strict=True)
        ]

    def announce(self) -> None:
        self.file.announce(self.offset, math.prod(self.shape))


class _Filling:
    """Rows and the memory that they belong to: worked out once, filled band by band.

    Args:
        rows (`Rows`): What is read.
        array (`np.ndarray`): Bytes; of its rows those at the rows' places are filled.
    """

    def __init__(self, rows: Rows, array: np.ndarray):
        self.rows, self.size = rows, rows.row_bytes
        self.first, self.last = rows.place, rows.place + rows.shape[0]
        self.target = array[self.first : self.last]
        self.whole: np.ndarray | None = None
        self.segments: Segments | None = None
        if rows.kept.shape == rows.shape[1:]:
            if rows.shape[1:] == self.target.shape[1:]:
                self.whole = self.target.reshape(-1)
            else:
                ((_, place, _),) = rows.kept.cuts
                self.segments = Segments.of(self.target[place])

    def fill(self, start: int, stop: int) -> None:
        """Those that belong between two indices of the array."""
        low, high = max(start, self.first) - self.first, min(stop, self.last) - self.first
        if low >= high:
            return
        file, offset = self.rows.file, self.rows.offset + low * self.size
        if self.whole is not None:
            file.read_into(self.whole[low * self.size : high * self.size], offset)
        elif self.segments is None or not file.scatter_into(self.segments, low, high, offset):
            self._cut(low, high)

    def _cut(self, low: int, high: int) -> None:
        step = max(1, _CUT_BYTES // self.size)
        for start in range(low, high, step):
            stop = min(start + step, high)
            read = _scratch_array((stop - start) * self.size)
            self.rows.file.read_into(read, self.rows.offset + start * self.size)
            rows, into = read.reshape(stop - start, *self.rows.shape[1:]), self.target[start:stop]
            for source, place, element in self.rows.kept.cuts:
                np.copyto(into[place].view(element), rows[source].view(element))


_Band = tuple[np.ndarray, Sequence[Rows]]
"""An array in memory, and what belongs there."""


def fill(target: np.ndarray, rows: Sequence[Rows]) -> None:
    """Fill an array.

    Args:
        target (`np.ndarray`): Bytes along the last of two or more dimensions; contiguous.
        rows (`list[Rows]`): What belongs there, each byte once.
    """
    for region, inside in _announced(_bands(target, rows, _AHEAD_BYTES)):
        for array, here in _opened(region, inside, _ROW_BYTES):
            fillings = [_Filling(part, array) for part in here]
            step = max(1, _BAND_BYTES // _longest(array, here))
            for start in range(0, len(array), step):
                populate(array[start : start + step])
                for filling in fillings:
                    filling.fill(start, start + step)


def _bands(target: np.ndarray, rows: Sequence[Rows], size: int) -> Iterator[_Band]:
    """What is to be filled in bands of at most so many bytes, in order, each with what belongs there."""
    for array, here in _opened(target, rows, size):
        yield from _steps(array, here, max(1, size // _longest(array, here)))


def _opened(target: np.ndarray, rows: Sequence[Rows], size: int) -> Iterator[_Band]:
    """The array, or where one of its rows takes more bytes than this, as experts do, each of them as an array."""
    if target.ndim > 2 and _longest(target, rows) > size:
        for row, here in _steps(target, rows, 1):
            yield from _opened(row[0], [inner for part in here for inner in part.open()], size)
    else:
        yield target, rows


def _longest(target: np.ndarray, rows: Sequence[Rows]) -> int:
    """The bytes of a row, in memory or where it is read from."""
    return max(target[0].nbytes, *(part.row_bytes for part in rows))


def _steps(target: np.ndarray, rows: Sequence[Rows], step: int) -> Iterator[_Band]:
    """An array, so many rows at a time, each with what belongs there."""
    coming = deque(sorted(rows, key=lambda part: part.place))
    current: list[Rows] = []
    for start in range(0, len(target), step):
        stop = min(start + step, len(target))
        while coming and coming[0].place < stop:
            current.append(coming.popleft())
        yield target[start:stop], [part.within(start, stop) for part in current]
        current = [part for part in current if part.place + part.shape[0] > stop]


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
