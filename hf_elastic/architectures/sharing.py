"""Blocks that several layers share: their tensors, the layers that may be dropped, and rankings of layers.

```
layer    0      1      2      3      4        stock classes count the layers that have a shared block, and take the blocks in turn;
block    A      B      A      B      A        without layer 1 they would take A, B, A, B for what is A, A, B, A
```
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from ..errors import ElasticConfigError
from .axes import TensorRule
from .base import Architecture
from .submodel import Submodel


class SharedInTurn(Architecture):
    """A table of a stock class that counts the layers with a shared block, and takes the blocks in turn."""

    @abstractmethod
    def users(self, config: PreTrainedConfig) -> Sequence[int]:
        """The layers that have a shared block."""

    @abstractmethod
    def blocks(self, config: PreTrainedConfig) -> int:
        """How many there are."""

    def sharers(self, config: PreTrainedConfig, layer: int) -> tuple[int, ...]:
        users, count = self.users(config), self.blocks(config)
        return tuple(users[users.index(layer) % count :: count]) if layer in users else (layer,)

    def kept_blocks(self, config: PreTrainedConfig, kept: Sequence[int]) -> list[int]:
        """Of the kept layers that have a shared block, which one each of them has, named by the first layer that has it."""
        return [self.sharers(config, layer)[0] for layer in kept if layer in self.users(config)]

    def per_use(self, config: PreTrainedConfig, layer: int, rules: Iterable[TensorRule]) -> Iterator[TensorRule]:
        """Rules of a layer's tensors of which its block has one for every use, in lists; `{use}` in their names says of which."""
        sharers, rules = self.sharers(config, layer), list(rules)
        for user in sharers:
            use = self.users(config).index(user)
            yield from (replace(rule, shared_by=sharers, user=user, use=use) for rule in rules)

    def shared(self, config: PreTrainedConfig, layer: int, rules: Iterable[TensorRule]) -> Iterator[TensorRule]:
        """Rules of a layer's tensors that are those of its block."""
        return (replace(rule, shared_by=self.sharers(config, layer)) for rule in rules)

    def layer_fields(self, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
        return super().layer_fields(config, kept) | self.use_fields(
            [new for new, layer in enumerate(kept) if layer in self.users(config)],
            len(set(self.kept_blocks(config, kept))),
        )

    @abstractmethod
    def use_fields(self, users: list[int], blocks: int) -> dict[str, Any]:
        """The config fields that list the layers with a shared block and count the blocks, in a submodel."""

    def check(self, config: PreTrainedConfig, submodel: Submodel, name: str = "the submodel") -> None:
        if not in_turn(blocks := self.kept_blocks(config, submodel.layers)):
            layers = [layer for layer in submodel.layers if layer in self.users(config)]
            raise ElasticConfigError(
                f"{name}: of the layers that share blocks, layers={layers} are kept, which have the blocks {blocks} (named by their first layers). The "
                "stock class takes blocks in turn, so another order would give layers the wrong one. Keep such layers from one to another without a "
                "gap, or all layers of one block alone, or drop as many in a row as there are blocks."
            )
        super().check(config, submodel, name)

    def keepable_ranking(self, config: PreTrainedConfig, ranking: Sequence[int]) -> list[int]:
        blocks = {layer: self.sharers(config, layer)[0] for layer in self.users(config)}
        return super().keepable_ranking(config, ranking_in_turn(ranking, blocks))


def in_turn(blocks: Sequence[int]) -> bool:
    """Whether blocks come in turn: all of them once, in some order, and then in that order again."""
    return all(block == blocks[i % len(set(blocks))] for i, block in enumerate(blocks))


def ranking_in_turn(ranking: Sequence[int], blocks: Mapping[int, int]) -> list[int]:
    """A ranking of layers of which every prefix has its blocks in turn: layers that share some go from either end, the less important one first.

    Args:
        blocks (`dict[int, int]`): In order, the layers that share blocks, and which block each of them has.
    """
    if len(set(blocks.values())) < 2:
        return list(ranking)
    importance = {layer: -i for i, layer in enumerate(ranking)}
    left, gone = [layer for layer in blocks if layer in importance], []
    while left:
        gone.append(left.pop(0 if importance[left[0]] < importance[left[-1]] else -1))
    return [gone.pop() if layer in blocks else layer for layer in ranking]
