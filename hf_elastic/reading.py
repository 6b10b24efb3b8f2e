"""Reading parts of tensors from safetensors files: the rows that are kept and no others, straight to where they belong.

From a mapped file the kernel reads far ahead, across what is left out, and whoever copies from it waits for the disk page by page.
Here the rows are announced first, so that the disk works ahead, and read into the final tensor; columns are cut on the way, a
little at a time, so that nothing is held twice.
"""

from __future__ import annotations

import json
import math
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .axes import Run, places_of
from .errors import CheckpointError

_CHUNK_BYTES = 1 << 20  # stays in a core's cache between being read and being cut
_chunks = threading.local()


class TensorFile:
    """Positions, shapes and types of the tensors in a safetensors file that was checked already, and reads at a position.

    Args:
        path (`Path`): The file. It is closed when nothing refers to this object any more.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        self._lock = threading.Lock()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # reads end where they are told to
        length = np.empty(8, np.uint8)
        self.read_into(length, 0)
        header = np.empty(int(length.view("<u8")[0]), np.uint8)
        self.read_into(header, 8)
        entries = json.loads(header.tobytes())
        entries.pop("__metadata__", None)
        self.offsets = {key: 8 + header.nbytes + entry["data_offsets"][0] for key, entry in entries.items()}
        self.shapes = {key: tuple(entry["shape"]) for key, entry in entries.items()}
        self.dtypes = {key: str(entry["dtype"]) for key, entry in entries.items()}

    def announce(self, offset: int, size: int) -> None:
        """Let the kernel fetch a range in the background, where it can."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def read_into(self, target: np.ndarray, offset: int) -> None:
        """Fill a contiguous array of bytes."""
        done = 0
        while done < target.nbytes:
            count = self._read(target[done:], offset + done)
            if count == 0:
                raise CheckpointError(f"{self.path} ended while it was read; fetch or save it again.")
            done += count

    def _read(self, target: np.ndarray, offset: int) -> int:
        if hasattr(os, "preadv"):  # several threads at once
            return os.preadv(self._descriptor, [target.data], offset)
        with self._lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            data = os.read(self._descriptor, target.nbytes)
        target[: len(data)] = np.frombuffer(data, np.uint8)
        return len(data)


class Readable(ABC):
    """A tensor that is read when it is indexed, which is all the stock loader asks of a lazy tensor."""

    dtype: torch.dtype

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @abstractmethod
    def leaves(self) -> Iterator[Block]:
        """The parts of files that it is read from."""

    @abstractmethod
    def read_into(self, tensor: torch.Tensor) -> None:
        """Fill a contiguous tensor of this shape."""

    def announce(self) -> None:
        """Let the kernel fetch it in the background."""
        for block in self.leaves():
            block.announce()

    def __getitem__(self, index: Any) -> torch.Tensor:
        self.announce()
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(tensor)
        return tensor[index]


@dataclass(frozen=True)
class Block(Readable):
    """A part of a tensor in a file.

    Args:
        file (`TensorFile`): Where the tensor is.
        key (`str`): Its name there.
        full (`tuple[int, ...]`): Its shape there.
        dtype (`torch.dtype`): Its type there.
        runs (`list[list[tuple[int, int]]]`): What is kept along each dimension.
        places (`list[list[tuple[int, int]]]`, *optional*):
            Where every run of every dimension belongs in the tensor that is read into; one after the other if not given.
    """

    file: TensorFile
    key: str
    full: tuple[int, ...]
    dtype: torch.dtype
    runs: list[list[Run]]
    places: list[list[Run]] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(sum(stop - start for start, stop in runs) for runs in self.runs)

    @property
    def is_whole(self) -> bool:
        return self.shape == self.full

    def leaves(self) -> Iterator[Block]:
        yield self

    def announce(self) -> None:
        for start, stop in self.runs[0]:
            self.file.announce(self._row(start), (stop - start) * self._row_bytes)

    @property
    def extent(self) -> list[Run]:
        """The ranges of bytes in the file that hold the kept rows."""
        return [(self._row(start), self._row(stop)) for start, stop in self.runs[0]]

    def read_into(self, tensor: torch.Tensor) -> None:
        """Fill a contiguous tensor: all of one of this shape, or the places of a larger one."""
        # As bytes along the last dimension: numpy has no bfloat16, and unlike torch's its copies start no threads of their own.
        size = self.dtype.itemsize
        pairs = [_pairs(runs, self.places[i] if self.places else None) for i, runs in enumerate(self.runs)]
        rows, *inner = [*pairs, [(slice(0, 1), slice(0, 1))]] if len(self.full) == 1 else pairs
        inner[-1] = [(_scaled(run, size), _scaled(place, size)) for run, place in inner[-1]]
        shape = (*self.full[1:-1], self.full[-1] * size) if len(self.full) > 1 else (size,)
        target = tensor.view(*tensor.shape, 1).flatten(len(inner)).view(torch.uint8).numpy()
        whole = target.shape[1:] == shape and all(
            along == [(slice(0, n), slice(0, n))] for along, n in zip(inner, shape, strict=True)
        )
        step = max(1, _CHUNK_BYTES // self._row_bytes)
        for run, place in rows:
            if whole:
                self.file.read_into(target[place].reshape(-1), self._row(run.start))
                continue
            for done in range(0, run.stop - run.start, step):
                count = min(step, run.stop - run.start - done)
                chunk = _chunk(count * self._row_bytes)
                self.file.read_into(chunk, self._row(run.start + done))
                _cut(chunk.reshape(count, *shape), inner, target[place.start + done : place.start + done + count])

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.full[1:]) * self.dtype.itemsize

    def _row(self, index: int) -> int:
        return self.file.offsets[self.key] + index * self._row_bytes


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

    def read_into(self, tensor: torch.Tensor) -> None:
        for block in self.blocks:
            block.read_into(tensor)


@dataclass(frozen=True)
class Stack(Readable):
    """Tensors of one shape as one tensor, along a new first dimension: experts that are stored one by one.

    Merging them here rather than in the stock loader spares it thousands of names, and every expert is read to its place at once.
    """

    blocks: Sequence[Block | Joined]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.blocks), *self.blocks[0].shape)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.blocks[0].dtype

    def leaves(self) -> Iterator[Block]:
        for block in self.blocks:
            yield from block.leaves()

    def read_into(self, tensor: torch.Tensor) -> None:
        for part, block in zip(tensor, self.blocks, strict=True):
            block.read_into(part)


def _chunk(size: int) -> np.ndarray:
    """Scratch memory of this thread."""
    if not hasattr(_chunks, "buffer") or _chunks.buffer.nbytes < size:
        _chunks.buffer = np.empty(max(size, _CHUNK_BYTES), np.uint8)
    return _chunks.buffer[:size]


def _pairs(runs: Sequence[Run], places: Sequence[Run] | None) -> list[tuple[slice, slice]]:
    """Every range of one dimension, and where it belongs."""
    if not places:
        return list(places_of(runs))
    return [(slice(*run), slice(*place)) for run, place in zip(runs, places, strict=True)]


def _scaled(run: slice, size: int) -> slice:
    return slice(run.start * size, run.stop * size)


def _cut(source: np.ndarray, pairs: Sequence[Sequence[tuple[slice, slice]]], target: np.ndarray) -> None:
    """Copy what is kept along every dimension but the first."""
    for chosen in product(*pairs):
        kept, place = zip(*chosen, strict=True)
        np.copyto(target[(slice(None), *place)], source[(slice(None), *kept)])
