"""Files of a folder are exchanged for others, so that no kill leaves a mixture: old, new, or nothing that a program loads.

The new files are written into a scratch folder inside the target. Then every step is one rename: the old files are moved away into the scratch
folder, and the new ones take their places. What readers need first goes first and comes last: `config.json`, then the lists of weight files,
then weights, then everything else. So until the last step there is nothing to start from, neither for this package nor for another one.

From before the first step until after the last one a journal lies in the scratch folder. While it is there, nothing is lost: the exchange can
be finished, or undone, from wherever it stopped. What a *process* left when it was killed is whole; nothing here waits for the disk, so a power
failure can still lose what the system had not written.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError
from .locking import only_writer

logger = logging.getLogger(__name__)

SCRATCH = ".saving-scratch-"
"""Before the name of a scratch folder of whoever has locked the folder it is in."""
_LEFTOVER = ".saving-*"  # older versions took no lock, and had other names
NEW, OLD, JOURNAL = "new", "old", "journal.json"
_QUIET = 600  # seconds in which whoever saves has changed something; counts only where there was no lock

_STARTS = ("config.json", "adapter_config.json")


def _place(name: str) -> tuple[int, str]:
    """In this order new files come in; old ones go out the other way round."""
    file = PurePosixPath(name).name
    if name in _STARTS:
        return 4, name
    if file in (*_STARTS, "tokenizer_config.json"):
        return 3, name
    if ".index." in file:
        return 2, name
    return int(bool(re.match(r"(model|pytorch_model|added|adapter_model)\b.*\.(safetensors|bin)$", file))), name


@dataclass(frozen=True)
class Exchange:
    """Files that take the places of others.

    Args:
        scratch (`Path`): Folder inside the target, with the new files in `new/`.
        new (`list[str]`): Names of the new files, relative to the target.
        old (`list[str]`): Names of the files that are moved away: those with a name of a new one, and those that belong to the old ones.
    """

    scratch: Path
    new: list[str]
    old: list[str]

    @property
    def target(self) -> Path:
        return self.scratch.parent

    def begin(self) -> None:
        """From now on it can be finished, whatever happens."""
        unfinished = self.scratch / f"{JOURNAL}.part"
        unfinished.write_text(json.dumps({"new": self.new, "old": self.old}) + "\n", encoding="utf-8")
        os.replace(unfinished, self.scratch / JOURNAL)

    def finish(self) -> None:
        """Make the moves that are not made yet."""
        self._make_folders()
        for name in sorted(self.old, key=_place, reverse=True):
            if not self._is_away(name) and os.path.lexists(self.target / name):
                os.replace(self.target / name, self.scratch / OLD / name)
        for name in sorted(self.new, key=_place):
            if not self._is_placed(name):
                os.replace(self.scratch / NEW / name, self.target / name)
        self._end()

    def undo(self) -> None:
        """Take back the moves that were made, the last one first."""
        self._make_folders()
        for name in sorted(self.new, key=_place, reverse=True):
            if self._is_placed(name):
                os.replace(self.target / name, self.scratch / NEW / name)
        for name in sorted(self.old, key=_place):
            if self._is_away(name):
                os.replace(self.scratch / OLD / name, self.target / name)
        self._end()

    @property
    def disturbed(self) -> bool:
        """Whether files were put where new ones still have to go: somebody has restored another checkpoint since."""
        waiting = (name for name in self.new if not self._is_placed(name))
        return any(
            os.path.lexists(self.target / name) for name in waiting if name not in self.old or self._is_away(name)
        )

    def give_up(self, checkpoint: re.Pattern[str]) -> None:
        """Place the new files beside the checkpoint that nobody has written since, such as those of a tokenizer; a whole checkpoint was."""
        self.check()
        self._make_folders()
        for name in self.new:
            if (
                not self._is_placed(name)
                and not checkpoint.fullmatch(name)
                and not os.path.lexists(self.target / name)
            ):
                os.replace(self.scratch / NEW / name, self.target / name)
        self._end()

    def check(self) -> None:
        """Refuse what is in the way, and what would move files outside of the folder."""
        for name in self.new:
            if (self.target / name).is_dir():
                raise CheckpointError(
                    f"{self.target / name} is a folder, and a file of that name has to be written; move it away."
                )
        for above in _folders([*self.new, *self.old]):
            folder = self.target / above
            if folder.is_symlink():
                raise CheckpointError(
                    f"{folder} is a link to {folder.resolve()}; what lies there is not touched. Remove the link, or save into another folder."
                )
            if folder.exists() and not folder.is_dir():
                raise CheckpointError(f"{folder} is a file, and a folder of that name has to be made; move it away.")

    @classmethod
    def read(cls, scratch: Path) -> Exchange:
        """What `begin` wrote.

        Raises:
            `CheckpointError`: it was changed since.
        """
        try:
            journal: Any = json.loads((scratch / JOURNAL).read_text(encoding="utf-8"))
            found = cls(scratch, list(journal["new"]), list(journal["old"]))
            if not all(_is_inner(name) for name in [*found.new, *found.old]):
                raise ValueError("it names files outside of the folder")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, PermissionError):
                raise _of_another_user(scratch) from error
            raise CheckpointError(
                f"{scratch / JOURNAL} is damaged ({error}). The files of an interrupted save are in {scratch}, in {NEW} and {OLD}; "
                "put back those you want, and delete the folder."
            ) from error
        return found

    def _is_away(self, name: str) -> bool:
        return os.path.lexists(self.scratch / OLD / name)

    def _is_placed(self, name: str) -> bool:
        return not os.path.lexists(self.scratch / NEW / name)

    def _make_folders(self) -> None:
        for root, names in ((self.target, [*self.new, *self.old]), (self.scratch / OLD, self.old)):
            for folder in (root, *(root / above for above in _folders(names))):
                folder.mkdir(exist_ok=True)

    def _end(self) -> None:
        for above in reversed(_folders([*self.new, *self.old])):
            if not any((self.target / above).iterdir()):
                (self.target / above).rmdir()
        (self.scratch / JOURNAL).unlink()


def recover(folder: str | os.PathLike[str]) -> bool:
    """Finish a save into a folder that was killed while it put the new files in the place of the old ones, and remove what killed saves left.

    A folder whose save was killed there has no `config.json`, so nothing loads it, and loading says so. The next save into it recovers it
    first. Who is saving into it right now is waited for; where files cannot be locked (some network file systems), nobody can be: call it when
    nobody is saving there.

    Args:
        folder (`str` or `os.PathLike`): Where was saved.

    Returns:
        `bool`: Whether there was a save to finish. If so, the folder holds the new checkpoint now; if not, what it held before.

    Raises:
        `CheckpointError`: there is no such folder, the save cannot be finished, or this user may not write there; says where its files are.
    """
    if not os.fspath(folder):
        raise CheckpointError("the folder to recover is '', which names none; for the current folder give '.'.")
    target = Path(folder)
    if not target.is_dir():
        raise CheckpointError(f"there is no folder {folder}.")
    if not _leftovers(target) and not os.access(target, os.W_OK):
        return False
    with only_writer(target):
        return clean(target, True, asked=True)


def clean(target: Path, locked: bool, *, superseded: re.Pattern[str] | None = None, asked: bool = False) -> bool:
    """Finish interrupted exchanges in a folder, and remove scratch folders that no living process needs; says whether any was finished.

    Args:
        locked (`bool`):
            Whether the folder is locked: then all scratch folders are those of dead processes. Those of older versions, which took no lock, and all
            where there are no locks, are dead if nothing in them has changed for ten minutes.
        superseded (`re.Pattern`, *optional*): A whole checkpoint was saved since; the names of the files that belong to one.
        asked (`bool`, *optional*, defaults to `False`): Whether a user asked for it: what cannot be looked into is an error.
    """
    finished = False
    for scratch in _leftovers(target):
        if not (locked and scratch.name.startswith(SCRATCH)) and not _is_quiet(scratch):
            continue
        try:
            interrupted = _has_journal(scratch)
        except PermissionError as error:
            if asked:
                raise _of_another_user(scratch) from error
            logger.warning("%s", _of_another_user(scratch))
            continue
        if interrupted:
            exchange = Exchange.read(scratch)
            if not exchange.disturbed:
                _finish(exchange)
                finished = True
            elif superseded is None:
                logger.warning(
                    "a save into %s was interrupted, and other files have been put in its place since; it is not finished. Its files are "
                    "in %s; delete them if you do not need them, the next save that goes well does it.",
                    target,
                    scratch,
                )
                continue
            elif not _given_up(exchange, superseded):
                continue
        elif any(scratch.glob(".old-*")) and not superseded:
            continue  # an older version was killed in its exchange: old files may be nowhere else
        shutil.rmtree(scratch, ignore_errors=True)
    return finished


def _finish(exchange: Exchange) -> None:
    exchange.check()
    try:
        exchange.finish()
    except OSError as error:
        raise CheckpointError(
            f"the interrupted save into {exchange.target} could not be finished: {error}. No file is lost: "
            f"hf_elastic.recover({str(exchange.target)!r}) goes on from there, for a user who may write there."
        ) from error
    logger.warning("a save into %s had been interrupted; it is finished now.", exchange.target)


def _given_up(exchange: Exchange, checkpoint: re.Pattern[str]) -> bool:
    try:
        exchange.give_up(checkpoint)
    except OSError as error:  # the save that came after it went well
        logger.warning("what an interrupted save left in %s stays there: %s", exchange.scratch, error)
        return False
    return True


def refuse_interrupted(repo: Any, subfolder: str | None = None, start: str = "config.json") -> None:
    """Raise [`CheckpointError`] for a folder without a config in which a save was interrupted; says how to finish it."""
    if not os.path.isdir(repo):
        return
    folder = Path(repo, subfolder or "")
    if (folder / start).exists():
        return
    whole = folder.absolute().parent.parent if folder.absolute().parent.name == "budgets" else folder
    for place in dict.fromkeys((Path(repo), folder, whole)):  # the stock folder of a size is exchanged with all others
        if any(_may_have_journal(scratch) for scratch in _leftovers(place)):
            raise CheckpointError(
                f"{folder} has no {start}: a save into it was interrupted, or is not done yet. hf_elastic.recover({str(place)!r}) finishes it; so "
                "does the next save into the folder. No file is lost."
            )


def _has_journal(scratch: Path) -> bool:
    try:
        os.lstat(scratch / JOURNAL)
    except FileNotFoundError:
        return False
    return True


def _may_have_journal(scratch: Path) -> bool:
    try:
        return _has_journal(scratch)
    except PermissionError:  # only who saved may look into it
        return True


def _of_another_user(scratch: Path) -> CheckpointError:
    return CheckpointError(
        f"{scratch} was left by a save of another user, and this one may not look into it. Let that user call "
        f"hf_elastic.recover({str(scratch.parent)!r})."
    )


def _leftovers(target: Path) -> list[Path]:
    return sorted(path for path in target.glob(_LEFTOVER) if path.is_dir() and not path.is_symlink())


def _is_quiet(scratch: Path) -> bool:
    times = [path.lstat().st_mtime for path in (scratch, *scratch.rglob("*")) if os.path.lexists(path)]
    return max(times, default=0.0) < time.time() - _QUIET


def _folders(names: list[str]) -> list[str]:
    """The folders that files are in, the outer ones first."""
    above = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    return sorted(above - {"."}, key=lambda folder: (folder.count("/"), folder))


def _is_inner(name: Any) -> bool:
    """Whether a name is one of a file in a folder or below it, on every system."""
    return isinstance(name, str) and not re.search(r"[\\:\x00]", name) and all(p.strip(". ") for p in name.split("/"))
