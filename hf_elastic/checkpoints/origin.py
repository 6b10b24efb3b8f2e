"""Where a slice is from. Its `config.json` says so under `cut_from`, which stock classes keep and do not use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..architectures.submodel import Submodel
from ..configuration.budgets import FULL
from ..configuration.section import CUT_FROM
from ..configuration_elastic import ElasticConfig
from ..errors import ElasticConfigError
from ..storage.fetching import commit_of
from .nested import FOLDER


def cut_from(elastic: ElasticConfig, submodel: Submodel, repo: Any, hub: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of where a submodel is from.

    Args:
        elastic (`ElasticConfig`): What it is cut out of.
        repo (`str` or `os.PathLike`): Where that was loaded from.
        hub: With its `revision`, if that is known.

    Returns:
        `dict`: `family` (a Hub repository, and only that: folders have names that are nobody's business) and its `commit`, both left out if they
        are not known; `budget`, or `sizes` where these have no name. Of a slice of a slice, the first family.
    """
    before = getattr(elastic, CUT_FROM, None)
    if before is not None and submodel == elastic.architecture.full(elastic.parent_config):
        return dict(before)
    known = before or _family(str(repo), hub)
    where = {key: known[key] for key in ("family", "commit") if key in known}
    name = elastic.name_of(submodel)
    return {**where, **({"sizes": submodel.to_dict()} if name is None else {"budget": name})}


def _family(repo: str, hub: Mapping[str, Any]) -> dict[str, str]:
    if not is_repo_id(repo) or "/" not in repo or os.path.exists(repo):
        return {}
    commit = commit_of(hub)
    return {"family": repo, **({"commit": commit} if commit else {})}


def loaded_from(repo: Any, hub: Mapping[str, Any]) -> str | None:
    """The folder that a checkpoint was loaded from, however it is called later; `None` if it is no folder."""
    folder = os.path.join(os.fspath(repo), hub.get("subfolder") or "")
    return os.path.realpath(folder) if os.path.isdir(folder) else None


def refuse_loss(source: str | None, target: str | os.PathLike[str], saved: ElasticConfig | None = None) -> None:
    """Raise for a save that would destroy the family that it is from.

    Args:
        source (`str`, *optional*): Folder that the model was loaded from.
        target (`str` or `os.PathLike`): Where to save.
        saved (`ElasticConfig`, *optional*): What is saved; nothing for a plain checkpoint.

    Raises:
        `ElasticConfigError`: `target` is that folder and holds a family that is larger, or is inside of its files per budget.
    """
    folder = os.path.realpath(target)
    if source is None or not os.path.isfile(os.path.join(source, "config.json")):
        return
    if Path(folder).is_relative_to(Path(source, FOLDER)):
        raise ElasticConfigError(
            f"{target} belongs to the checkpoint that this model was loaded from; give another folder."
        )
    if folder != source:
        return
    try:
        there = ElasticConfig.from_pretrained(source)
    except (ValueError, OSError):  # it holds no family any more
        return
    if saved is None:
        raise ElasticConfigError(
            f"{target} is the family that this model was loaded from, and would be replaced by a plain checkpoint of one size; give another "
            "folder."
        )
    if _is_smaller(saved, there):
        raise ElasticConfigError(
            f"{target} is the family that this model was loaded from, and would be replaced by a smaller one, without its larger sizes; give "
            "another folder."
        )


def _is_smaller(elastic: ElasticConfig, other: ElasticConfig) -> bool:
    mine, theirs = (config.architecture.full(config.parent_config) for config in (elastic, other))
    return mine.depth < theirs.depth or any(sum(mine.values(a)) < sum(theirs.values(a)) for a in theirs if a in mine)


def is_repo_id(text: str) -> bool:
    """Whether a repository of the Hub can have this name."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def named(origin: Mapping[str, Any]) -> str:
    """The budget that a slice was cut at, in words."""
    return str(
        origin.get("budget") or " ".join(f"{axis}={size}" for axis, size in origin.get("sizes", {}).items()) or FULL
    )
