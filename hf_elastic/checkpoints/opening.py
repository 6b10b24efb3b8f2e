"""Opening a checkpoint in either layout, here or on the Hub, with as much of its files as a submodel needs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from ..architectures.submodel import Submodel
from ..configuration_elastic import ElasticConfig
from ..errors import CheckpointError
from ..storage.checksums import CHECKSUMS_NAME, Checksums, read_checksums, verify_files
from ..storage.exchanging import refuse_interrupted
from ..storage.fetching import MOSTLY, PartialFile, RangesRefused
from ..storage.files import (
    INDEX_NAME,
    SINGLE_NAME,
    commit_of,
    fetched,
    find_cached,
    find_file,
    find_files,
    find_nested_files,
    no_weights,
    shard_names,
    with_variant,
)
from .checkpoint import Checkpoint
from .nested import NestedCheckpoint, levels_for

logger = logging.getLogger(__name__)


def open_checkpoint(
    repo: str | os.PathLike[str],
    elastic: ElasticConfig,
    submodel: Submodel,
    variant: str | None = None,
    *,
    head: bool = True,
    ignored: Iterable[str] = (),
    verify: bool = False,
    **hub: Any,
) -> Checkpoint:
    """Open and check the files that a submodel needs.

    Args:
        repo (`str` or `os.PathLike`): Folder or repository id.
        elastic (`ElasticConfig`): Its config.
        head, ignored: As `Checkpoint.check` takes them.
        verify (`bool`, *optional*, defaults to `False`): Compare all that is opened with checksums, the Hub's or those that a save wrote.
        hub: As `find_files` takes them.

    Raises:
        `CheckpointError`: files are missing, damaged, or disagree with the config.
    """

    refuse_interrupted(repo, hub.get("subfolder"))  # with a config that was given, weights alone would do
    checkpoint = _opened(repo, elastic, submodel, variant, head, ignored, verify, hub)
    checkpoint.check_scales(elastic.architecture, elastic.parent_config, submodel, head=head)
    return checkpoint


def _opened(
    repo: str | os.PathLike[str],
    elastic: ElasticConfig,
    submodel: Submodel,
    variant: str | None,
    head: bool,
    ignored: Iterable[str],
    verify: bool,
    hub: dict[str, Any],
) -> Checkpoint:
    def check(checkpoint: Checkpoint) -> Checkpoint:
        checkpoint.check(elastic.architecture, elastic.parent_config, head=head, ignored=ignored)
        return checkpoint

    if "files" in elastic.elastic:
        levels = levels_for(elastic, submodel)
        files = find_nested_files(
            repo, [elastic.elastic["files"][name] for name in levels], variant, verify=verify, **hub
        )
        if verify and os.path.isdir(repo):
            verify_files(Path(repo, hub.get("subfolder") or ""), files)
        members = list(levels.values())
        return check(NestedCheckpoint(files, elastic.architecture, elastic.parent_config, members, elastic.encodings))
    if os.path.isdir(repo) or hub.get("force_download") or commit_of(hub) is None:
        files = find_files(repo, variant, verify=verify, **hub)
        if verify and os.path.isdir(repo):
            verify_files(Path(repo, hub.get("subfolder") or ""), files, variant)
        return check(Checkpoint(files, elastic.encodings))

    def needs(checkpoint: Checkpoint) -> dict[Path, list[tuple[int, int]]]:
        return check(checkpoint).extents(elastic.architecture, elastic.parent_config, submodel, head=head)

    try:
        return check(Checkpoint(_fetch_parts(str(repo), variant, needs, elastic, hub, verify), elastic.encodings))
    except RangesRefused as refusal:
        logger.warning("whole files are fetched: %s", refusal)
        return check(Checkpoint(find_files(repo, variant, verify=verify, **hub), elastic.encodings))


def open_headers(repo: str | os.PathLike[str], variant: str | None = None, **hub: Any) -> Checkpoint:
    """The files of a checkpoint in the stock layout, of which only names, types and shapes are to be read: no more of them is fetched from the Hub.

    Raises:
        `CheckpointError`: there are none, or one is damaged.
    """
    if os.path.isdir(repo) or hub.get("force_download") or commit_of(hub) is None:
        return Checkpoint(find_files(repo, variant, **hub))
    try:
        files = _parts(str(repo), variant, hub, verify=False)
    except RangesRefused as refusal:
        logger.warning("whole files are fetched: %s", refusal)
        return Checkpoint(find_files(repo, variant, **hub))
    return Checkpoint([file.path if isinstance(file, PartialFile) else file for file in files.values()])


def _fetch_parts(
    repo: str,
    variant: str | None,
    needs: Callable[[Checkpoint], dict[Path, list[tuple[int, int]]]],
    elastic: ElasticConfig,
    hub: dict[str, Any],
    verify: bool,
) -> list[Path]:
    """The files of a Hub repository in the stock layout, with at least what is needed of them.

    Args:
        needs: Gives per file the ranges of bytes that are needed, from headers alone.
    """
    index = with_variant(INDEX_NAME, variant)
    files = _parts(repo, variant, hub, verify)
    paths = {name: file.path if isinstance(file, PartialFile) else file for name, file in files.items()}
    extents = needs(Checkpoint(list(paths.values()), elastic.encodings))
    for name, file in files.items():
        if isinstance(file, PartialFile):
            ranges = extents.get(file.path, [])
            if file.missing(ranges) > MOSTLY * file.size:
                paths[name] = fetched(repo, name, index, hub)
            else:
                file.fetch(ranges)
    return list(paths.values())


def _parts(repo: str, variant: str | None, hub: dict[str, Any], verify: bool) -> dict[str, Path | PartialFile]:
    """The files of a Hub repository in the stock layout by name: those that are in the ordinary cache, and parts of the others, at first their headers."""
    single, index = with_variant(SINGLE_NAME, variant), with_variant(INDEX_NAME, variant)

    @cache
    def checksums() -> dict[str, Checksums] | None:
        """Of all files; asked for when the first is not in the ordinary cache."""
        path = find_file(repo, with_variant(CHECKSUMS_NAME, variant), hub)
        return None if path is None else read_checksums(path)

    def part(name: str) -> Path | PartialFile:
        if (path := find_cached(repo, name, hub)) is not None:
            return path if not verify else fetched(repo, name, index, hub, verify=True)
        known = checksums()
        file = PartialFile(repo, name, hub, (known or {}).get(name), verify=verify)  # which says so if there is none
        if name not in (known or {}) and (verify or known is not None):
            raise RangesRefused(f"{repo} has no checksums of parts of {name}.")
        return file

    try:
        return {single: part(single)}  # first, as upstream does where a repository holds both
    except FileNotFoundError:
        listing = find_file(repo, index, hub)
        if listing is None:
            raise no_weights(repo, hub) from None
        files: dict[str, Path | PartialFile] = {}
        for name in shard_names(listing):
            try:
                files[name] = part(name)
            except FileNotFoundError as error:
                raise CheckpointError(f"{error} {index} lists it; the checkpoint is incomplete.") from error
        return files
