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

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import cached_file
from transformers.utils.hub import hf_api

from ..errors import CheckpointError, UnreachableError, reason, shown
from .json_files import LARGEST_INDEX, read_json
from .retries import passes, persistently
from .sources import commit_of, is_offline, pinned

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLED_INDEX = "pytorch_model.bin.index.json"
HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder", "force_download", "proxies", "token")
"""What `from_pretrained` passes on to what finds its files."""
_SMALL = 10_000_000  # bytes of a file that costs nothing to compare at every load


def find_files(
    repo: str | os.PathLike[str], variant: str | None = None, *, verify: bool = False, **hub: Any
) -> list[Path]:
    """The safetensors files of a folder or Hub repository in the stock layout, fetched into the cache if they are remote.

    Args:
        repo (`str` or `os.PathLike`): Folder or repository id.
        variant (`str`, *optional*): As in `from_pretrained`.
        verify (`bool`, *optional*, defaults to `False`): Compare with the Hub's sha256 also what is in the cache already.
        hub: `cache_dir`, `revision`, `token`, `subfolder`, ... as `transformers.utils.cached_file` takes them.

    Raises:
        `CheckpointError`: there are none. Pickled weights (`.bin`) are named, but never loaded.
    """

    single = find_file(
        repo, with_variant(SINGLE_NAME, variant), hub, verify=verify
    )  # first, as upstream does where a folder holds both
    if single is not None:
        return [single]
    index = find_file(repo, with_variant(INDEX_NAME, variant), hub)
    if index is None:
        raise no_weights(repo, hub)
    return [_listed(repo, name, index.name, hub, verify) for name in shard_names(index)]


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
    repo: str | os.PathLike[str],
    files: Iterable[Mapping[str, int]],
    variant: str | None = None,
    *,
    verify: bool = False,
    **hub: Any,
) -> list[Path]:
    """The files of some budgets in the nested layout, fetched into the cache if they are remote.

    Args:
        files (`Iterable[dict[str, int]]`): Per budget its files and their bytes.
        verify (`bool`, *optional*, defaults to `False`): As in `find_files`.

    Raises:
        `CheckpointError`: one is missing, or has another size.
    """
    if variant:
        raise CheckpointError(f"variant={variant!r}: {repo} is in the nested layout, which has no variants.")
    found = []
    for name, size in ((name, size) for entry in files for name, size in entry.items()):
        path = _listed(repo, name, "config.json", hub, verify)
        if (there := path.stat().st_size) != size:
            raise CheckpointError(
                f"{path} has {there:,} bytes, config.json says {size:,}: it was not completely written or uploaded, or belongs to "
                "another save. Fetch or save it again."
            )
        found.append(path)
    return found


def find_file(repo: str | os.PathLike[str], name: str, hub: Mapping[str, Any], *, verify: bool = False) -> Path | None:
    """A file of a folder or Hub repository, `None` if there is none of that name; offline also if it is not in the cache.

    Errors that pass are tried again. What was just downloaded has to have the contents that the Hub says it has; small files always have
    to, and with `verify` all do.

    Raises:
        `UnreachableError`: the Hub could not be asked, or the connection failed for good.
        `CheckpointError`: no such repository or revision, or the contents are damaged and stay so.
    """
    if os.path.isdir(repo):
        path = Path(repo, hub.get("subfolder") or "", name)
        if not path.is_file() and os.path.lexists(
            path
        ):  # not the same as none: what it stands for would be left out without a word
            raise CheckpointError(f"{path} is no file that can be read.")
        return path if path.is_file() else None
    repo = str(repo)
    there = None if hub.get("force_download") else _cached(repo, name, hub)
    if commit_of(hub) and there is not None:
        if not isinstance(there, str):
            return None  # the Hub said so at an earlier load
        if _is_sound(Path(there), repo, name, hub, fresh=False, verify=verify):
            return Path(there)
        _discard(Path(there))
    for _ in range(2):
        try:
            path = Path(persistently(lambda: _download(repo, name, hub)))
            if _is_sound(path, repo, name, hub, fresh=str(path) != there, verify=verify):
                return path
        except RemoteEntryNotFoundError:
            return None
        except Exception as error:  # the client lets errors of its HTTP library through
            if is_offline(hub) and isinstance(error, LocalEntryNotFoundError):
                return None
            if isinstance(there, str) and passes(error):  # the cache has it, of a revision that could not be asked for
                return Path(there)
            raise _refusal(repo, name, hub, error) from error
        _discard(path)
    raise CheckpointError(
        f"{name} of {repo} arrived with other contents than the Hub says it has, twice, and was removed from the cache; fetch it again."
    )


def refuse_damaged(repo: str | os.PathLike[str], name: str, hub: Mapping[str, Any]) -> None:
    """Raise [`CheckpointError`] for a small file that somebody else fetched and read, if it is not what the Hub says it is."""
    there = None if os.path.isdir(repo) else _cached(str(repo), name, hub)
    if isinstance(there, str) and not _is_sound(Path(there), str(repo), name, hub, fresh=False, verify=False):
        _discard(Path(there))
        raise CheckpointError(f"{name} of {repo} was damaged, and was removed from the cache; load it again.")


def refuse_out_of_reach(repo: str | os.PathLike[str], hub: Mapping[str, Any]) -> None:
    """Raise for a folder that is not there, and for a repository that the cache does not have while nobody can be asked for it."""
    if not os.path.exists(repo) and _cached(str(repo), "config.json", hub) is None:
        pinned(repo, hub)


def _download(repo: str, name: str, hub: Mapping[str, Any]) -> str:
    taken = {key: hub[key] for key in ("revision", "cache_dir", "token", "force_download") if key in hub}
    subfolder = hub.get("subfolder") or None
    return str(hf_api().hf_hub_download(repo, name, subfolder=subfolder, local_files_only=is_offline(hub), **taken))


def _refusal(repo: str, name: str, hub: Mapping[str, Any], error: Exception) -> CheckpointError:
    """What to say to a file that cannot be fetched."""
    if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
        try:
            cached_file(repo, name, **hub)
        except OSError as said:  # upstream has good words for these
            return CheckpointError(f"{name} of {repo} cannot be fetched: {said}")
    if isinstance(error, LocalEntryNotFoundError) or passes(error):
        reason = error.__cause__ or error
        return UnreachableError(
            f"{name} of {repo} could not be fetched, because the connection to the Hub failed ({type(reason).__name__}: {reason}). That says "
            "nothing about whether the repository has it; try again, or set HF_HUB_OFFLINE=1 to go on with what is in the cache."
        )
    return CheckpointError(f"{name} of {repo} cannot be fetched: {error}")


def shard_names(index: Path, ending: str = ".safetensors") -> list[str]:
    """The files that an index of the stock layout lists.

    Raises:
        `CheckpointError`: it is none, or names something that is not a file of weights beside it.
    """
    try:
        names = sorted(set(read_json(index, LARGEST_INDEX)["weight_map"].values()))
        if not names:
            raise ValueError("no files")
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of safetensors files ({reason(error)}).") from error
    for name in names:
        if not is_inner_path(name, ending) or "/" in name:
            raise CheckpointError(
                f"{index} names {shown(name)}, which is not a {ending.removeprefix('.')} file beside it; it is not opened."
            )
    return names


def is_inner_path(path: Any, ending: str = ".safetensors") -> bool:
    """Whether a text names a file of weights in a folder or below it, on every system."""
    if not isinstance(path, str) or not path.endswith(ending) or re.search(r'[\\:*?"<>|\x00-\x1f]', path):
        return False
    return all(part.strip(". ") for part in path.split("/"))


def _listed(repo: str | os.PathLike[str], name: str, listing: str, hub: Mapping[str, Any], verify: bool) -> Path:
    """A file that has to be there, because `listing` says so."""
    if not os.path.isdir(repo):
        return fetched(repo, name, listing, hub, verify=verify)
    path = find_file(repo, name, hub)
    if path is None:
        raise missing(name, listing)
    _refuse_outside(Path(repo), path)
    return path


def missing(name: str, listing: str) -> CheckpointError:
    """What to say to a folder without a file that `listing` says it has."""
    return CheckpointError(f"{name} is missing, though {listing} lists it; the checkpoint is incomplete.")


def fetched(
    repo: str | os.PathLike[str], name: str, listing: str, hub: Mapping[str, Any], *, verify: bool = False
) -> Path:
    """A file of a Hub repository that has to be there, because `listing` says so."""
    try:
        path = find_file(repo, name, hub, verify=verify)
    except CheckpointError as error:
        raise type(error)(f"{name}, which {listing} of {repo} lists, cannot be fetched: {error}") from error
    if path is None:
        why = "it is not in the cache, and this is offline" if is_offline(hub) else f"{repo} has no such file"
        raise CheckpointError(f"{name}, which {listing} of {repo} lists, cannot be fetched: {why}.")
    return path


def find_cached(repo: str | os.PathLike[str], name: str, hub: Mapping[str, Any]) -> Path | None:
    """A file of a Hub repository if it is in the ordinary cache already.

    Raises:
        `FileNotFoundError`: the cache knows that the repository has no such file.
    """
    path = _cached(str(repo), name, hub)
    if path is not None and not isinstance(path, str):
        raise FileNotFoundError(f"{repo} has no {name}.")
    return Path(path) if path else None


def _cached(repo: str, name: str, hub: Mapping[str, Any]) -> Any:
    """Path in the ordinary cache; `None` if nothing is known, something else if it is known that there is no such file."""
    full = f"{hub['subfolder']}/{name}" if hub.get("subfolder") else name
    revision = commit_of(hub) or hub.get("revision")
    return try_to_load_from_cache(repo, full, cache_dir=hub.get("cache_dir"), revision=revision)


def _is_sound(path: Path, repo: str, name: str, hub: Mapping[str, Any], *, fresh: bool, verify: bool) -> bool:
    """Whether a file of the cache is what the Hub says it is: of weights it gives the sha256, of other files the id that git has for them.

    Args:
        fresh (`bool`): It has just arrived. What was there before is compared if that costs next to nothing.
        verify (`bool`): Compare it in any case.
    """
    if path.is_symlink():  # to the blob, which is called after it; that may be a link itself
        if not (fresh or verify) and path.stat().st_size > _SMALL:
            return True
        etag = os.path.basename(os.readlink(path))
    elif (fresh or verify) and not is_offline(hub):  # a cache without links does not know it
        url = hf_hub_url(repo, name, subfolder=hub.get("subfolder"), revision=commit_of(hub) or hub.get("revision"))
        etag = get_hf_file_metadata(url, token=hub.get("token"), retry_on_errors=True).etag or ""
    elif verify:
        raise CheckpointError(
            f"{path} cannot be verified: only the Hub knows its checksum where a cache has no links, and this is offline."
        )
    else:
        return True
    if re.fullmatch(r"[0-9a-f]{64}", etag):
        return digest_of(path, hashlib.sha256()) == etag
    if re.fullmatch(r"[0-9a-f]{40}", etag):  # or the plain sha1 of some mirrors
        git = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        return etag in (digest_of(path, git), digest_of(path, hashlib.sha1()))
    return not verify


def _discard(path: Path) -> None:
    """Remove a damaged file from the cache, with its blob."""
    blob = path.parent / os.readlink(path) if path.is_symlink() else path
    try:
        path.unlink()
        for place in {blob, blob.resolve()}:
            place.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{path} is damaged, and cannot be removed from the cache to be fetched again ({error})."
        ) from error


def digest_of(path: Path, digest: Any) -> str:
    """A digest after the contents of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return str(digest.hexdigest())


def _refuse_outside(folder: Path, path: Path) -> None:
    """Refuse a link out of a folder; a folder of the Hub's cache links to its blobs."""
    folder = folder.resolve()
    inside = [folder]
    if (snapshots := next((parent for parent in folder.parents if parent.name == "snapshots"), None)) is not None:
        inside += [snapshots.parent / "blobs", snapshots.parent.parent / "blobs"]  # the repository's, and the cache's
    if not any(path.resolve().is_relative_to(place) for place in inside):
        raise CheckpointError(
            f"{path} is a link out of {folder}, to {path.resolve()}; it is not opened. Put the file itself there, or a hard link."
        )
