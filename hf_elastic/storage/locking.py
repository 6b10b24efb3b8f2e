"""One writer per folder. The lock is a file that the system unlocks when its process ends, however it ends."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK = ".saving-lock"
"""In a folder that is written to; a killed process leaves it, empty and unlocked, and the next one removes it."""

DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)

_mine: set[tuple[int, str]] = set()


@contextmanager
def only_writer(folder: Path) -> Iterator[bool]:
    """Be the only one who writes into a folder, which is made if need be; another thread or process is waited for.

    Yields:
        `bool`: `False` where files cannot be locked: then there may be others.

    Raises:
        `CheckpointError`: the same thread writes into it already, and would wait for itself; or this user may not write there.
    """
    mine = (threading.get_ident(), os.path.realpath(folder))
    if mine in _mine:
        raise CheckpointError(f"{folder} is being saved into by this thread already; save into it when that is done.")
    descriptor = _acquired(folder / LOCK)
    _mine.add(mine)
    try:
        yield descriptor is not None
    finally:
        _mine.discard(mine)
        if descriptor is not None:
            with suppress(OSError):
                os.unlink(folder / LOCK)  # before it is unlocked: who waits sees that it is gone, and makes a new one
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for processes that were forked meanwhile
            os.close(descriptor)


def _acquired(path: Path) -> int | None:
    """The locked file; `None` where there are no locks, or no file can be made: whatever is wrong, writing will say it."""
    while fcntl is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # who was waited for may have removed what it had made
        except OSError as error:
            if error.errno in DENIED:
                raise not_allowed(path.parent, error) from error
            raise
        try:
            descriptor = _opened(path)
        except OSError as error:
            if error.errno in DENIED:
                raise not_allowed(path.parent, error) from error
            return None
        locked = kept = False
        try:
            locked = _locked(descriptor, path)
            kept = locked and os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            pass  # it was removed while it was waited for
        finally:
            if not kept:
                os.close(descriptor)
            if not locked:
                with suppress(OSError):
                    os.unlink(path)  # where there are no locks, it means nothing
        if kept or not locked:
            return descriptor if kept else None
    return None


def not_allowed(path: Path | str, error: OSError) -> CheckpointError:
    """What to say to a user who may not write there."""
    made = CheckpointError(
        f"{path} cannot be written to: {error.strerror}. What it holds is as it was. Let a user do it who may write there, or save into "
        "another folder."
    )
    made.errno = error.errno
    return made


def _opened(path: Path) -> int:
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY | flags)  # another user made it; that is enough to wait for who saves


def _locked(descriptor: int, path: Path) -> bool:
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another thread or process saves into %s; waiting for it.", path.parent)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        return False
    return True
