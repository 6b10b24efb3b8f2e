"""The sizes of released families whose weights are sorted already, as data.

A released family is a plain checkpoint of its parent; which sizes it nests is said beside it, or not at all. Sizes that nobody published are
worked out from the published parameter counts and marked `reconstructed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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
