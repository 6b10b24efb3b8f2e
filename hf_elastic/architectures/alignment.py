"""Which sizes of an axis keep to the blocks of a format: its multiples of a number, read off the table.

```
out_proj.weight   [ hidden , groups * heads per group * head_dim ]     blocks of 16 along the columns
head_dim=64: any number of heads ends at a block          head_dim itself: multiples of 16          hidden: multiples of 16, as in_proj has it in its columns
```
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from transformers import PreTrainedConfig

from ..errors import ElasticConfigError
from .axes import Dim, Sizes
from .base import Architecture


def block_steps(
    architecture: Architecture, config: PreTrainedConfig, names: Collection[str], block: int
) -> dict[str, int]:
    """Per axis the number whose multiples are the sizes that can be cut.

    Args:
        architecture (`Architecture`): Table of the parent.
        config (`PreTrainedConfig`): The parent's stock config.
        names (`Collection[str]`): Live names of the weights that are stored in blocks.
        block (`int`): Elements of a row that are stored together, a power of 2.

    Returns:
        `dict[str, int]`: Of the axes that are not free; a whole axis fits, too.

    Raises:
        `ElasticConfigError`: a weight of the parent itself is no whole number of blocks.
    """
    full = architecture.full(config)
    steps: dict[str, int] = {}
    seen: set[object] = set()
    for rule in architecture.rules(config):
        if rule.stored.name not in names:
            continue
        sizes, along = full.at(rule.layer), replace(rule.dims[-1], per=block)
        fact = (along, tuple(sizes.items()))
        if fact in seen:
            continue
        seen.add(fact)
        try:
            along.size(sizes)
        except ElasticConfigError as error:
            raise ElasticConfigError(f"{rule.name} of the parent: {error}") from error
        for axis, step in _steps(along, sizes, block):
            steps[axis] = max(step, steps.get(axis, 1))  # both are the groups, times a power of 2
    return steps


def _steps(along: Dim, full: Sizes, block: int) -> Iterator[tuple[str, int]]:
    for cut in along.cuts:
        for axis in cut.axes:
            groups = cut.groups if axis == cut.axis else 1
            powers = (groups * (1 << i) for i in range(block.bit_length()))
            step = next((step for step in powers if _fits(along, full, axis, step)), full[axis])
            if step > groups:  # others are free, as far as groups let them
                yield axis, step


def _fits(along: Dim, full: Sizes, axis: str, step: int) -> bool:
    """Whether the multiples of a step can be cut: the first of them and one that is no power of 2 tell."""
    tried = [size for size in (step, 3 * step) if size < full[axis]]
    return all(_on_blocks(along, full, {**full, axis: size}) for size in tried)


def _on_blocks(along: Dim, full: Sizes, kept: Mapping[str, int]) -> bool:
    try:
        along.runs(full, kept)
    except ElasticConfigError:
        return False
    return True
