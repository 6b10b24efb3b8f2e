"""Where a slice is from. Its `config.json` says so under `cut_from`, which stock classes keep and do not use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from .budgets import FULL
from .configuration_elastic import ElasticConfig
from .fetching import commit_of
from .submodel import Submodel

CUT_FROM = "cut_from"


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
