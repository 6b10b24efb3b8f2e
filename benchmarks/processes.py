"""Actions in processes of their own: wall time from a clean start, peak anonymous memory, and files out of the page cache."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np

import hf_elastic

_LIBC = ctypes.CDLL(None, use_errno=True)
SAMPLING_SECONDS = 0.005
_KEPT_APART = (
    1 << 18
)  # pages that lie together here mostly do so in the machine's memory, too; an eighth of a block to be sure
PRELOADED = ["hf_elastic"]  # imported once in the server that the children are forked from: seconds less per child


@dataclass(frozen=True)
class ChildRun:
    """One action in a process of its own.

    Args:
        result (`Any`): What the action returned.
        seconds (`float`): Wall time of the action, without the start of the process and the imports.
        peak_anonymous_bytes (`int`):
            Highest anonymous resident memory meanwhile, above what the process had just before. Mapped files are not in it.
    """

    result: Any
    seconds: float
    peak_anonymous_bytes: int


def in_child(
    action: Callable[..., Any],
    *args: Any,
    before: Callable[[], Any] | None = None,
    timeout: float = 1800,
) -> ChildRun:
    """Run `action(*args)` in a fresh process, in which the action's module is imported already.

    Memory is sampled from this process, so that neither the sampling nor Python's global lock slows the action down or hides a
    peak.

    Args:
        action (`Callable`): Top-level function of the script or of a module.
        before (`Callable`, *optional*): Called here when the child is ready, just before the action starts.
        timeout (`float`, *optional*): Seconds after which the child is given up.

    Raises:
        `RuntimeError`: the action failed, and how.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    here, there = context.Pipe()
    child = context.Process(target=_serve, args=(there, action, args), daemon=True)
    child.start()
    there.close()  # the child's end is the only one left, so that its death ends `recv`
    try:
        theirs = here.recv()
        if theirs != hf_elastic.__file__:  # the server looks into the current folder first
            raise RuntimeError(f"the child would measure {theirs}, not {hf_elastic.__file__}; run from another folder")
        if before is not None:
            before()
        baseline = peak = anonymous_bytes(child.pid)
        here.send("go")
        deadline = perf_counter() + timeout
        while not here.poll(SAMPLING_SECONDS):
            peak = max(peak, anonymous_bytes(child.pid))
            if perf_counter() > deadline:
                raise RuntimeError(f"{action.__name__} took more than {timeout:.0f} s")
        ok, result, seconds = here.recv()
        child.join()
    except EOFError as error:
        raise RuntimeError(f"the process of {action.__name__} died") from error
    finally:
        child.kill()
        here.close()
    if not ok:
        raise RuntimeError(f"{action.__name__} failed:\n{result}")
    return ChildRun(result, seconds, peak - baseline)


def _serve(connection: Connection, action: Callable[..., Any], args: tuple[Any, ...]) -> None:
    connection.send(hf_elastic.__file__)
    connection.recv()
    start = perf_counter()
    try:
        result, ok = action(*args), True
    except Exception:
        result, ok = traceback.format_exc(), False
    connection.send((ok, result, perf_counter() - start))


def anonymous_bytes(pid: int | None = None) -> int:
    """Anonymous resident memory of a process (this one by default); 0 once it is gone. Linux only."""
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def drop_page_cache(files: Sequence[Path], tries: int = 20) -> None:
    """Write files back and drop them from the page cache, so that the next reader reads them from the disk.

    Raises:
        `RuntimeError`: more than 2 % of the pages stayed, so this would be no cold run; some process may still map them.
    """
    for _ in range(tries):
        for file in files:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if (share := cached_share(files)) <= 0.02:
            return
        sleep(0.1)  # the kernel keeps pages that other cores have only just let go of
    raise RuntimeError(f"{share:.0%} of the files stayed in the page cache, so this would be no cold run")


@contextmanager
def backed_memory(size: int) -> Iterator[None]:
    """So many bytes of free memory stay with this machine meanwhile, and are what is taken first.

    A virtual machine returns free memory to its host (`PAGE_REPORTING` in Linux's sources), and getting it again takes seconds per GB: on
    the next who needs much. Only whole free blocks of 2 MB or more are returned, so that a page that is kept in each keeps the rest.
    """
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        view = np.frombuffer(memory, np.uint8)
        view[:: mmap.PAGESIZE] = 1
        del view  # it would keep the memory
        for start in range(0, size - _KEPT_APART, _KEPT_APART):
            memory.madvise(mmap.MADV_DONTNEED, start + mmap.PAGESIZE, _KEPT_APART - mmap.PAGESIZE)
        yield


def cached_share(files: Sequence[Path]) -> float:
    """Share of the pages of the files that lie in the page cache. Looking brings none in, as reading without waiting would."""
    cached = pages = 0
    for file in files:
        if not file.stat().st_size:
            continue
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            found = np.empty(-(-len(view) // mmap.PAGESIZE), np.uint8)
            if _LIBC.mincore(
                ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view)), ctypes.c_void_p(found.ctypes.data)
            ):
                raise OSError(ctypes.get_errno(), f"mincore: {os.strerror(ctypes.get_errno())}")
            del view  # it would keep the mapping open
        cached, pages = cached + int((found & 1).sum()), pages + len(found)
    return cached / max(1, pages)
