"""Writing into a folder whole or not at all: everything is written beside the target first, then exchanged with what is there."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..configuration.remote_code import MODULE
from ..errors import CheckpointError, HFElasticError
from ..routing.router import ROUTER_FILE
from ..storage.checksums import CHECKSUMS_NAME
from ..storage.exchanging import JOURNAL, NEW, SCRATCH, Exchange, clean
from ..storage.locking import DENIED, not_allowed, only_writer
from .nested import FOLDER
from .passengers import PASSENGERS

_CHECKPOINT_FILE = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
    rf"|{re.escape(ROUTER_FILE)}|{re.escape(PASSENGERS)}|{re.escape(CHECKSUMS_NAME)}|{MODULE}\.py"
    rf"|{FOLDER}/[^/]+/((model|added)(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?|(generation_)?config\.json)"
)
_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


@contextmanager
def replacing(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty folder; when the block ends well, its files replace those of the same name in `directory`.

    If the block fails (a full disk, an error, an interrupt), `directory` is as it was; if the process is killed, it is as it was, as it should
    be, or without its `config.json`, see [`hf_elastic.storage.exchanging`]. Weight files of an older save that the new one does not overwrite are removed
    at the end, so that no stale shard stays beside the new ones. Links are replaced, never what they lead to. Who else writes into `directory`
    with this function is waited for.

    Raises:
        `CheckpointError`: something is in the way, this user may not write there, or the disk is full.
    """
    target = checked_target(directory)
    made = [folder for folder in (target, *target.parents) if not folder.exists()]  # innermost first
    try:
        with only_writer(target) as locked:
            target.mkdir(parents=True, exist_ok=True)
            clean(target, locked)
            with _scratch(target) as scratch:
                yield scratch / NEW
                names = _exchange(scratch)
            clean(target, locked, superseded=_CHECKPOINT_FILE if "config.json" in names else None)
    except BaseException:
        for folder in made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        raise


@contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a file to write; when the block ends well, it takes the place of `path`, and if it does not, that is as it was.

    Raises:
        `CheckpointError`: the disk is full.
    """
    path = Path(os.path.realpath(path))
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    except Exception as error:
        if (explained := write_error(error, path)) is not None:
            raise explained from error
        raise
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def checked_target(directory: str | os.PathLike[str]) -> Path:
    """The folder to write into, if it can be one."""
    if not os.fspath(directory):
        raise CheckpointError("the folder to save into is '', which names none; for the current folder give '.'.")
    target = Path(directory)
    try:
        target.exists()
    except PermissionError as error:  # a folder above it may not be looked into
        raise not_allowed(target, error) from error
    if target.is_symlink() and not target.exists():
        raise CheckpointError(
            f"{target} is a link to {os.readlink(target)}, which does not exist; give a folder to save into."
        )
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; give a folder to save into.")
    return target


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A scratch folder, which stays only if files were moved into it that could not be put back."""
    scratch = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=target))
        (scratch / NEW).mkdir()
        yield scratch
    except Exception as error:
        if (explained := write_error(error, target, None if scratch is None else scratch / NEW)) is not None:
            raise explained from error
        raise
    finally:
        if scratch is not None and not (scratch / JOURNAL).exists():
            shutil.rmtree(scratch, ignore_errors=True)


def _exchange(scratch: Path) -> list[str]:
    """Move the new files to where they belong, all of them or none; returns their names."""
    target, fresh = scratch.parent, scratch / NEW
    names = sorted(file.relative_to(fresh).as_posix() for file in fresh.rglob("*") if not _is_folder(file))
    stale = set()
    if any(_CHECKPOINT_FILE.fullmatch(name) for name in names):
        folders = [target]
        if _is_folder(target / FOLDER):
            folders += [folder for folder in (target / FOLDER).iterdir() if _is_folder(folder)]
        there = [file.relative_to(target).as_posix() for f in folders for file in f.iterdir() if not _is_folder(file)]
        stale = {name for name in there if _CHECKPOINT_FILE.fullmatch(name)}
    exchange = Exchange(scratch, names, sorted(n for n in {*names, *stale} if os.path.lexists(target / n)))
    exchange.check()
    exchange.begin()
    try:
        exchange.finish()
    except BaseException as error:
        try:
            exchange.undo()
        except OSError as second:
            raise CheckpointError(
                f"the files in {target} could neither be replaced ({error}) nor put back ({second}). All of them, old and new, are in "
                f"{scratch}; hf_elastic.recover({str(target)!r}) finishes what was begun."
            ) from error
        raise
    return names


def write_error(error: Exception, target: Path, fresh: Path | None = None) -> CheckpointError | None:
    """What to say if something could not be written, where what was raised does not say which file; `None` for any other error.

    Args:
        target (`Path`): Folder or file that was to be written.
        fresh (`Path`, *optional*): Folder that was written into instead.
    """
    if isinstance(error, HFElasticError):
        return None
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, OSError) and number in DENIED:
        named = Path(str(error.filename or ""))
        if not named.is_relative_to(target):
            return None  # something that was read
        return not_allowed(
            target if named.parent == target and named.name.startswith(SCRATCH) else _outside(named), error
        )
    if found := re.search(r"os error (\d+)", str(error)):  # from Rust: safetensors, tokenizers
        number = int(found[1])
    silent = isinstance(error, SafetensorError) or "inline_container.cc" in str(error)  # the latter is `torch.save`
    if number not in _FULL and not silent:
        return None
    place = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    made = CheckpointError(
        f"{_outside(_file_of(error, fresh) or target)} cannot be written: {error} ({shutil.disk_usage(place).free:,} bytes are free there, and "
        f"new files are written beside the old ones first)."
        f"{f' What {_outside(target)} held before is untouched.' if _held(Path(_outside(target))) else ''}"
    )
    made.errno = number
    return made


def _file_of(error: Exception, fresh: Path | None) -> Path | None:
    """The file that could not be written: safetensors does not say which, but was told; of anything else the last one that was begun."""
    named = getattr(error, "filename", None)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        named = frame.f_locals.get("filename", named) if isinstance(error, SafetensorError) else named
    if named is not None:
        return Path(named)
    files = [file for file in fresh.rglob("*") if file.is_file()] if fresh is not None else []
    return max(files, key=lambda file: file.stat().st_mtime_ns, default=None)


def _held(path: Path) -> bool:
    """Whether there was something before it was to be written."""
    if path.is_dir():
        return any(not name.startswith(".saving-") for name in os.listdir(path))
    return path.exists()


def _outside(path: Path) -> str:
    """A path as it is when everything is in its place."""
    return re.sub(rf"[/\\]{re.escape(SCRATCH)}[^/\\]+[/\\]{NEW}\b", "", str(path))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
