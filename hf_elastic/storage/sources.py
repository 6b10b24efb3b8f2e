"""What a user means by a source: a folder, which has to be there, or a repository of the Hub, which has to be within reach."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ResolvedRevision, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionResolutionError
from huggingface_hub.utils import validate_repo_id
from transformers.utils.hub import hf_api

from ..errors import CheckpointError, UnreachableError
from .retries import TRIES, never_connected, persistently


def refuse_missing_folder(repo: str | os.PathLike[str], what: str = "folder") -> None:
    """Refuse, before anybody is asked, a path with nothing at it that can be no repository of the Hub.

    Raises:
        `CheckpointError`: with the nearest folder that is there.
    """
    name = os.fspath(repo)
    if os.path.exists(name):
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise CheckpointError(f"there is no {what} {name or repr(name)}.{_nearest(name)}") from error


def pinned(
    repo: str | os.PathLike[str], hub: Mapping[str, Any], *, kind: str = "model", what: str = "folder"
) -> dict[str, Any]:
    """`hub` with the commit that its revision is now, so that all files of one load are of one commit.

    If it cannot be found out, `hub` as it is: what is fetched next says why, or is in the cache.

    Args:
        kind (`str`, *optional*, defaults to `"model"`): Of repository, or `"dataset"`.

    Raises:
        `CheckpointError`: a path with nothing at it.
        `UnreachableError`: no such folder, and no connection to ask the Hub for a repository that the cache does not have.
    """
    if os.path.exists(repo):
        return dict(hub)
    refuse_missing_folder(repo, what)
    where = {key: hub.get(key) for key in ("revision", "token", "cache_dir")}
    name, offline = str(repo), is_offline(hub)
    # Where the first part is a folder, or there is only one, a folder is what is likely meant: asked once, for those who do mean a repository.
    tries = 1 if "/" not in name or os.path.isdir(name.partition("/")[0]) else TRIES
    try:
        revision = persistently(
            lambda: hf_api().resolve_revision(name, repo_type=kind, local_files_only=offline, **where), tries
        )
    except Exception as error:  # the client lets errors of its HTTP library through
        unresolved = isinstance(error, RevisionResolutionError) and not isinstance(error.__cause__, HfHubHTTPError)
        if not offline and (unresolved or never_connected(error)):
            why = error.__cause__ or error
            raise UnreachableError(
                f"{name} is no {what} here, and whether it is a repository cannot be asked, because the connection to the Hub failed "
                f"({type(why).__name__}: {why}). If a {what} is meant, correct the path.{_nearest(name)} If a repository is meant, try again; it is not "
                "in the cache."
            ) from error
        return dict(hub)
    return {**hub, "revision": revision}


def is_offline(hub: Mapping[str, Any]) -> bool:
    """Whether the Hub shall not be asked."""
    return bool(hub.get("local_files_only")) or is_offline_mode()


def commit_of(hub: Mapping[str, Any]) -> str | None:
    """The commit that `revision` is known to be."""
    revision = hub.get("revision")
    revision = revision.resolved if isinstance(revision, ResolvedRevision) else revision
    return revision if revision and re.fullmatch("[0-9a-f]{40}", revision) else None


def _nearest(name: str) -> str:
    """Return ` Did you mean 'x'?` for a folder or file that is there and called nearly so, part by part; or an empty string."""
    found = Path()
    for part in Path(name).expanduser().parts:
        if not (found / part).exists():
            try:
                there = [entry.name for entry in found.iterdir() if not entry.name.startswith(".")]
            except OSError:
                return ""
            part = next(iter(difflib.get_close_matches(part, there, n=1, cutoff=0.7)), "")
            if not part:
                return ""
        found /= part
    return f" Did you mean {str(found)!r}?" if name else ""
