"""Plain checkpoints whose weights are sorted already: the sizes of released families, and families that a user describes.

A released family is a plain checkpoint of its parent; which sizes it nests is said beside it, or not at all. Sizes that nobody published are
worked out from the published parameter counts and marked `reconstructed`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from ..configuration_elastic import ElasticConfig, read_config
from ..errors import ElasticConfigError, did_you_mean, shown

logger = logging.getLogger(__name__)

AUTO = "auto"


@dataclass(frozen=True)
class KnownFamily:
    """The sizes of a released checkpoint.

    Args:
        parent (`dict[str, int]`): Sizes that its config has to have, by axis, so that the table is not used on another model.
        budgets (`dict[str, dict[str, int]]`): Sizes per name, those of the parent left out.
        reconstructed (`bool`): Whether the sizes were worked out and not published.
        source (`str`): Where they are from.
    """

    parent: Mapping[str, int]
    budgets: Mapping[str, Mapping[str, int]]
    reconstructed: bool
    source: str


KNOWN: Mapping[str, KnownFamily] = {
    "nvidia/NVIDIA-Nemotron-Labs-3-Elastic-30B-A3B-BF16": KnownFamily(
        parent={
            "hidden": 2688,
            "expert_ffn": 1856,
            "experts": 128,
            "experts_per_token": 6,
            "mamba_heads": 64,
            "mamba_head_dim": 64,
            "attention_heads": 32,
            "shared_expert_ffn": 3712,
        },
        budgets={"30b": {}, "23b": {"hidden": 2016}, "12b": {"hidden": 1920, "expert_ffn": 960}},
        reconstructed=True,
        source=(
            "reports of arXiv 2605.07182 give 30B, 23B and 12B with 3.6B, 2.8B and 2.0B active; these sizes have 31.58B, 23.68B and 12.43B with "
            "3.58B, 2.69B and 2.08B, and so may others. Compare a slice with what was released before relying on it"
        ),
    ),
}


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
    parent = own.parent_config
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
