"""Reads of a safetensors file at a position, and the memory that they go to."""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError

_SCATTERED_BYTES = 512  # from here on rows that lie apart in memory are read there one by one, without a copy
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_MADV_POPULATE_WRITE = 23
_IOVEC_BYTES = 16
_madvise = _LIBC.madvise if _LIBC else None
if _madvise:
    _madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MOST_SEGMENTS = os.sysconf("SC_IOV_MAX") if _LIBC else 1
# Not `os.preadv`: making a buffer of every row takes longer than reading it, and Python's lock meanwhile.
_preadv = getattr(_LIBC, "preadv", None) if sys.maxsize > 2**32 else None
if _preadv:
    _preadv.restype = ctypes.c_ssize_t
    _preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]


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

    @classmethod
    def opened(cls, path: Path) -> TensorFile:
        """A file that is checked first.

        Raises:
            `CheckpointError`: it is missing, truncated or no safetensors file.
        """
        try:
            if path.exists() and not path.is_file():
                raise CheckpointError(f"{path} is no file.")
            os.close(os.open(path, os.O_RDONLY))  # of one that may not be read, safetensors says that there is none
            with safe_open(path, framework="pt"):  # refuses damaged files
                return cls(path)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing.") from error
        except PermissionError as error:
            raise CheckpointError(f"{path} cannot be read: permission denied.") from error
        except (SafetensorError, OSError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{path} cannot be read as safetensors, it is damaged or incomplete ({error}); fetch or save it again."
            ) from error

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

    def scatter_into(self, segments: Segments, low: int, high: int, offset: int) -> bool:
        """Fill the rows between two indices, which lie one after the other in the file; says whether it could."""
        if _preadv is None:
            return False
        first, last = low * segments.per_row, high * segments.per_row
        for start in range(first, last, _MOST_SEGMENTS):
            count = min(_MOST_SEGMENTS, last - start)
            at = offset + (start - first) * segments.width
            if _preadv(self._descriptor, segments.address + start * _IOVEC_BYTES, count, at) != count * segments.width:
                return False
        return True

    def _read(self, target: np.ndarray, offset: int) -> int:
        if hasattr(os, "preadv"):  # several threads at once
            return os.preadv(self._descriptor, [target.data], offset)
        with self._lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            data = os.read(self._descriptor, target.nbytes)
        target[: len(data)] = np.frombuffer(data, np.uint8)
        return len(data)


class Segments:
    """Rows of an array of bytes that lie apart in memory, as `preadv` takes them: the fields of `struct iovec`.

    Args:
        target (`np.ndarray`): The array; its last dimension is contiguous.
    """

    def __init__(self, target: np.ndarray):
        self.width = target.shape[-1]
        self.per_row = math.prod(target.shape[1:-1])
        starts: np.ndarray = np.array(target.ctypes.data, np.uint64)
        for count, stride in zip(target.shape[:-1], target.strides[:-1], strict=True):
            starts = starts[..., None] + np.arange(count, dtype=np.uint64) * np.uint64(stride)
        self._fields = np.empty((starts.size, 2), np.uint64)
        self._fields[:, 0], self._fields[:, 1] = starts.reshape(-1), self.width
        self._target = target  # must live as long as its addresses
        self.address = self._fields.ctypes.data

    @staticmethod
    def of(target: np.ndarray) -> Segments | None:
        """Of an array whose rows are long enough for it."""
        return None if target.shape[-1] < _SCATTERED_BYTES else Segments(target)


def populate(memory: np.ndarray) -> None:
    """Let the kernel provide all pages at once: missed one by one, while they are filled, they cost half as much again.

    Kernels before Linux 5.14 refuse, and go on as before.
    """
    if _madvise:
        address = memory.ctypes.data
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise(start, address + memory.nbytes - start, _MADV_POPULATE_WRITE)
