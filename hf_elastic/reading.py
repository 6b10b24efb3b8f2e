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
from collections.abc import Sequence
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
    """Positions of the tensors in a safetensors file that was checked already, and reads at a position.

    Args:
        path (`Path`): The file. It is closed when nothing refers to this object any more.
    """

    def __init__(self, path: Path):
        self._path = path
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
                raise CheckpointError(f"{self._path} ended while it was read; fetch or save it again.")
            done += count

    def _read(self, target: np.ndarray, offset: int) -> int:
        if hasattr(os, "preadv"):  # several threads at once
            return os.preadv(self._descriptor, [target.data], offset)
        with self._lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            data = os.read(self._descriptor, target.nbytes)
        target[: len(data)] = np.frombuffer(data, np.uint8)
        return len(data)


@dataclass(frozen=True)
class Block:
    """A part of a tensor in a file. Indexing it reads that part, which is all the stock loader asks of a lazy tensor.

    Args:
        file (`TensorFile`): Where the tensor is.
        key (`str`): Its name there.
        full (`tuple[int, ...]`): Its shape there.
        dtype (`torch.dtype`): Its type there.
        runs (`list[list[tuple[int, int]]]`): What is kept along each dimension.
    """

    file: TensorFile
    key: str
    full: tuple[int, ...]
    dtype: torch.dtype
    runs: list[list[Run]]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(sum(stop - start for start, stop in runs) for runs in self.runs)

    @property
    def is_whole(self) -> bool:
        return self.shape == self.full

    def __getitem__(self, index: Any) -> torch.Tensor:
        self.announce()
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(tensor)
        return tensor[index]

    def announce(self) -> None:
        for start, stop in self.runs[0]:
            self.file.announce(self._row(start), (stop - start) * self._row_bytes)

    def read_into(self, tensor: torch.Tensor) -> None:
        """Fill a contiguous tensor of this shape."""
        # As bytes along the last dimension: numpy has no bfloat16, and unlike torch's its copies start no threads of their own.
        size = self.dtype.itemsize
        *inner, last = [*self.runs[1:], [(0, 1)]] if len(self.full) == 1 else self.runs[1:]
        kept = [*inner, [(start * size, stop * size) for start, stop in last]]
        shape = (*self.full[1:-1], self.full[-1] * size) if len(self.full) > 1 else (size,)
        target = tensor.view(*tensor.shape, 1).flatten(len(kept)).view(torch.uint8).numpy()
        whole = all(runs == [(0, n)] for runs, n in zip(kept, shape, strict=True))
        step = max(1, _CHUNK_BYTES // self._row_bytes)
        done = 0
        for start, stop in self.runs[0]:
            if whole:
                self.file.read_into(target[done : done + stop - start].reshape(-1), self._row(start))
                done += stop - start
                continue
            for first in range(start, stop, step):
                count = min(step, stop - first)
                chunk = _chunk(count * self._row_bytes)
                self.file.read_into(chunk, self._row(first))
                _cut(chunk.reshape(count, *shape), kept, target[done : done + count])
                done += count

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.full[1:]) * self.dtype.itemsize

    def _row(self, index: int) -> int:
        return self.file.offsets[self.key] + index * self._row_bytes


@dataclass(frozen=True)
class Stack:
    """Blocks of one shape as one tensor, along a new first dimension: experts that are stored one by one.

    Merging them here rather than in the stock loader spares it thousands of names, and every expert is read to its place at once.
    """

    blocks: list[Block]

    def __getitem__(self, index: Any) -> torch.Tensor:
        for block in self.blocks:
            block.announce()
        tensor = torch.empty((len(self.blocks), *self.blocks[0].shape), dtype=self.blocks[0].dtype)
        for part, block in zip(tensor, self.blocks, strict=True):
            block.read_into(part)
        return tensor[index]


def _chunk(size: int) -> np.ndarray:
    """Scratch memory of this thread."""
    if not hasattr(_chunks, "buffer") or _chunks.buffer.nbytes < size:
        _chunks.buffer = np.empty(max(size, _CHUNK_BYTES), np.uint8)
    return _chunks.buffer[:size]


def _cut(source: np.ndarray, runs: Sequence[Sequence[Run]], target: np.ndarray) -> None:
    """Copy what is kept along every dimension but the first."""
    for pairs in product(*(list(places_of(ranges)) for ranges in runs)):
        kept, place = zip(*pairs, strict=True)
        np.copyto(target[(slice(None), *place)], source[(slice(None), *kept)])
