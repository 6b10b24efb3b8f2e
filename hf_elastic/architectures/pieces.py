"""What a submodel keeps of its parent's tensors, as a list of pieces.

It is read by everything that touches weights: slices from disk, slices from memory, live views, masks and counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedConfig

from .axes import Run, Sizes, TensorRule, take
from .base import Architecture
from .submodel import Submodel


@dataclass(frozen=True)
class Piece:
    """One tensor of a submodel: where it comes from in the parent, and what is kept of it."""

    rule: TensorRule
    target: TensorRule
    full: Sizes
    kept: Sizes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rule.shape(self.kept)

    @cached_property
    def runs(self) -> list[list[Run]]:
        return self.rule.runs(self.full, self.kept)

    @property
    def is_view(self) -> bool:
        return all(len(runs) == 1 for runs in self.runs)

    def narrow(self, tensor: torch.Tensor) -> torch.Tensor:
        return take(tensor, self.runs)


def pieces(architecture: Architecture, config: PreTrainedConfig, submodel: Submodel) -> Iterator[Piece]:
    """Every tensor of the submodel, in the order of the table.

    Args:
        architecture (`Architecture`): Table of the parent.
        config (`PreTrainedConfig`): The parent's stock config.
        submodel (`Submodel`): Checked sizes.
    """
    full = architecture.full(config)
    position = {layer: new for new, layer in enumerate(submodel.layers)}
    for rule in architecture.rules(config):
        if rule.layer is None:
            yield Piece(rule, rule, full.at(None), submodel.at(None))
        elif rule.layer in position:
            target = rule.at_layer(position[rule.layer])
            yield Piece(rule, target, full.at(rule.layer), submodel.at(rule.layer))
