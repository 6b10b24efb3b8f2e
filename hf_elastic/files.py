"""Where the files of a checkpoint are: in a folder, or in the Hub's cache, into which they are fetched.

An index or a config says which files there are. What it names has to lie in the checkpoint's folder; anything else is not opened.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ResolvedRevision, try_to_load_from_cache
from transformers.utils import cached_file, resolve_revision

from .errors import CheckpointError, reason, shown
from .json_files import LARGEST_INDEX, read_json
from .section import is_inner_path

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def find_files(repo: str | os.PathLike[str], variant: str | None = None, **hub: Any) -> list[Path]:
    """The safetensors files of a folder or Hub repository in the stock layout, fetched into the cache if they are remote.

    Args:
        repo (`str` or `os.PathLike`): Folder or repository id.
        variant (`str`, *optional*): As in `from_pretrained`.
        hub: `cache_dir`, `revision`, `token`, `subfolder`, ... as `transformers.utils.cached_file` takes them.

    Raises:
        `CheckpointError`: there are none. Pickled weights (`.bin`) are named, but never loaded.
    """

    single = find_file(
        repo, with_variant(SINGLE_NAME, variant), hub
    )  # first, as upstream does where a folder holds both
    if single is not None:
        return [single]
    index = find_file(repo, with_variant(INDEX_NAME, variant), hub)
    if index is None:
        raise no_weights(repo, hub)
    return [_listed(repo, name, index.name, hub) for name in shard_names(index)]


def with_variant(name: str, variant: str | None) -> str:
    """Before the last ending, as upstream writes it: `model.safetensors.index.fp16.json`."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}" if variant else name


def no_weights(repo: str | os.PathLike[str], hub: Mapping[str, Any]) -> CheckpointError:
    """What to say to a folder or repository without weights that are read; of a repository, also why, as it may only be out of reach."""
    reason = ""
    if not os.path.isdir(repo):
        try:
            cached_file(repo, SINGLE_NAME, **hub)
        except Exception as error:  # the client lets errors of its HTTP library through
            reason = f" ({error})"
    return CheckpointError(
        f"{repo} holds neither {SINGLE_NAME} nor {INDEX_NAME}{reason}. Elastic checkpoints are read from safetensors only; pickled "
        "weights (.bin) are not loaded, convert them with the stock model's save_pretrained."
    )


def find_nested_files(
    repo: str | os.PathLike[str], files: Iterable[Mapping[str, int]], variant: str | None = None, **hub: Any
) -> list[Path]:
    """The files of some budgets in the nested layout, fetched into the cache if they are remote.

    Args:
        files (`Iterable[dict[str, int]]`): Per budget its files and their bytes.

    Raises:
        `CheckpointError`: one is missing, or has another size.
    """
    if variant:
        raise CheckpointError(f"variant={variant!r}: {repo} is in the nested layout, which has no variants.")
    found = []
    for name, size in ((name, size) for entry in files for name, size in entry.items()):
        path = _listed(repo, name, "config.json", hub)
        if (there := path.stat().st_size) != size:
            raise CheckpointError(
                f"{path} has {there:,} bytes, config.json says {size:,}: it was not completely written or uploaded, or belongs to "
                "another save. Fetch or save it again."
            )
        found.append(path)
    return found


def pinned(repo: str | os.PathLike[str], hub: Mapping[str, Any]) -> dict[str, Any]:
    """`hub` with the commit that its revision is now, so that all files of one load are of one commit."""
    where = {key: hub.get(key) for key in ("revision", "token", "cache_dir")}
    revision = resolve_revision(repo, local_files_only=bool(hub.get("local_files_only")), **where)
    return dict(hub) if revision is None else {**hub, "revision": revision}


def find_file(repo: str | os.PathLike[str], name: str, hub: Mapping[str, Any]) -> Path | None:
    """A file of a folder or Hub repository, `None` if there is none of that name."""
    path = cached_file(repo, name, _raise_exceptions_for_missing_entries=False, **hub)
    if path is None and os.path.isdir(repo):
        place = Path(repo, hub.get("subfolder") or "", name)
        if os.path.lexists(place):  # not the same as none: what it stands for would be left out without a word
            raise CheckpointError(f"{place} is no file that can be read.")
    return Path(path) if path else None


def shard_names(index: Path) -> list[str]:
    """The files that an index of the stock layout lists.

    Raises:
        `CheckpointError`: it is none, or names something that is not a safetensors file beside it.
    """
    try:
        names = sorted(set(read_json(index, LARGEST_INDEX)["weight_map"].values()))
        if not names:
            raise ValueError("no files")
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of safetensors files ({reason(error)}).") from error
    for name in names:
        if not is_inner_path(name) or "/" in name:
            raise CheckpointError(
                f"{index} names {shown(name)}, which is not a safetensors file beside it; it is not opened."
            )
    return names


def _listed(repo: str | os.PathLike[str], name: str, listing: str, hub: Mapping[str, Any]) -> Path:
    """A file that has to be there, because `listing` says so."""
    if not os.path.isdir(repo):
        return fetched(repo, name, listing, hub)
    path = find_file(repo, name, hub)
    if path is None:
        raise CheckpointError(f"{name} is missing, though {listing} lists it; the checkpoint is incomplete.")
    _refuse_outside(Path(repo), path)
    return path


def fetched(repo: str | os.PathLike[str], name: str, listing: str, hub: Mapping[str, Any]) -> Path:
    """A file of a Hub repository. What was just downloaded has to have the contents that the Hub says it has."""
    known = find_cached(repo, name, hub)
    try:
        path = Path(str(cached_file(repo, name, **hub)))
    except Exception as error:  # the client lets errors of its HTTP library through
        raise CheckpointError(f"{name}, which {listing} of {repo} lists, cannot be fetched: {error}") from error
    blob = path.resolve()
    fresh = known is None or bool(hub.get("force_download"))
    if fresh and re.fullmatch(r"[0-9a-f]{64}", blob.name) and sha256(blob) != blob.name:
        path.unlink()
        blob.unlink()
        raise CheckpointError(
            f"{name} of {repo} arrived with other contents than the Hub says it has, and was removed from the cache; fetch it again."
        )
    return path


def find_cached(repo: str | os.PathLike[str], name: str, hub: Mapping[str, Any]) -> Path | None:
    """A file of a Hub repository if it is in the ordinary cache already."""
    revision = hub.get("revision")
    revision = revision.resolved if isinstance(revision, ResolvedRevision) else revision
    full = f"{hub['subfolder']}/{name}" if hub.get("subfolder") else name
    path = try_to_load_from_cache(str(repo), full, cache_dir=hub.get("cache_dir"), revision=revision)
    return Path(path) if isinstance(path, str) else None


def sha256(path: Path) -> str:
    """Digest of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _refuse_outside(folder: Path, path: Path) -> None:
    """Refuse a link out of a folder; a folder of the Hub's cache links to its blobs."""
    folder = folder.resolve()
    inside = [folder]
    if (snapshots := next((parent for parent in folder.parents if parent.name == "snapshots"), None)) is not None:
        inside.append(snapshots.parent / "blobs")
    if not any(path.resolve().is_relative_to(place) for place in inside):
        raise CheckpointError(
            f"{path} is a link out of {folder}, to {path.resolve()}; it is not opened. Put the file itself there, or a hard link."
        )
