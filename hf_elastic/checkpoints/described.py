"""Plain checkpoints whose weights are sorted already: families that are known, and families that a user describes (`elastic_config=`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from ..configuration.known import KNOWN
from ..configuration_elastic import ElasticConfig, read_config
from ..errors import ElasticConfigError, did_you_mean, shown

logger = logging.getLogger(__name__)

AUTO = "auto"


def described_config(repo: Any, described: Any, **hub: Any) -> ElasticConfig:
    """The elastic config of a plain checkpoint whose weights are sorted, from what `elastic_config=` says.

    Args:
        repo (`str` or `os.PathLike`): Where the plain checkpoint is.
        described:
            `"auto"` looks the repository up in `KNOWN`, and a name from there says that it is a copy of that one; an [`ElasticConfig`] or its
            `elastic` section (`{"axes": ..., "budgets": ...}`), or only the budgets, `{"half": {"hidden": 960}}`, describe any other.

    Raises:
        `ElasticConfigError`: nothing is known of the repository, the description does not fit its config, or it has budgets of its own.
    """
    own = read_config(repo, plain=True, **hub)
    if own.budgets:
        raise ElasticConfigError(
            f"{repo} is an elastic checkpoint and says itself what it nests; leave out elastic_config=."
        )
    made = _described(repo, described, own.parent_config)
    if own.host is not None:
        made.host_config = own.host_config
    return made


def _described(repo: Any, described: Any, parent: PreTrainedConfig) -> ElasticConfig:
    if isinstance(described, ElasticConfig):
        return ElasticConfig(parent_config=parent, elastic=described.elastic)
    if isinstance(described, Mapping):
        if "axes" in described:
            return ElasticConfig(parent_config=parent, elastic=described)
        return ElasticConfig.from_parent(parent, described)
    if not isinstance(described, str):
        raise ElasticConfigError(
            f"elastic_config={shown(described)} must be 'auto', the name of a known family, an ElasticConfig, its section, or budgets as a dict."
        )
    name = str(repo) if described == AUTO else described
    if name not in KNOWN:
        raise ElasticConfigError(
            f"elastic_config={shown(described)}: no sizes of {name} are known; known are {', '.join(KNOWN)}.{did_you_mean(name, KNOWN)} Describe the "
            "family yourself, elastic_config={'half': {'hidden': 960}}, if its weights are sorted by importance; hf_elastic.elastify() sorts any "
            "other."
        )
    return _known_config(name, parent)


def _known_config(name: str, parent: PreTrainedConfig) -> ElasticConfig:
    known = KNOWN[name]
    elastic = ElasticConfig.from_parent(parent, {})
    full = elastic.architecture.full(parent)
    wrong = [axis for axis, size in known.parent.items() if axis not in full or set(full.values(axis)) != {size}]
    if wrong:
        there = set(full.values(wrong[0])) if wrong[0] in full else "none"
        raise ElasticConfigError(
            f"this is not {name}: that has {wrong[0]}={known.parent[wrong[0]]}, its config says {there}; describe the family yourself."
        )
    if known.reconstructed:
        logger.warning("the sizes of %s are reconstructed, not published: %s.", name, known.source)
    return ElasticConfig.from_parent(parent, known.budgets)
