"""What a submodel keeps of its parent's tensors, as a list of pieces.

It is read by everything that touches weights: slices from disk, slices from memory, live views, masks and counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from transformers import PreTrainedConfig

from .axes import Run, Sizes, TensorRule, take
from .base import Architecture
from .encodings import Encoding
from .submodel import Submodel


@dataclass(frozen=True)
class Piece:
    """One tensor of a submodel: where it comes from in the parent, and what is kept of it.

    Args:
        rule (`TensorRule`): Of the parent's tensor.
        target (`TensorRule`): The same in the submodel.
        full (`Sizes`): The parent's sizes there.
        kept (`Sizes`): The submodel's.
    """

    rule: TensorRule
    target: TensorRule
    full: Sizes
    kept: Sizes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rule.shape(self.kept)

    @property
    def copy_of(self) -> str | None:
        """Name of the submodel's tensor that this one is the same as; `None` if it is stored itself (`TensorRule.copy_of`)."""
        return self.target.copy_of

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
    rules = architecture.rules(config)
    users = sorted({rule.user for rule in rules if rule.user in position})
    uses = {layer: use for use, layer in enumerate(users)}
    for rule in rules:
        target = rule.within(position, uses)
        if target is not None:
            yield Piece(rule, target, full.at(rule.layer), submodel.at(rule.layer))


def stored_pieces(
    architecture: Architecture, config: PreTrainedConfig, submodel: Submodel, encodings: Mapping[str, Encoding]
) -> Iterator[Piece]:
    """Every tensor of the submodel as it is stored: as `pieces`, with companions in the place of encoded weights.

    Args:
        encodings (`dict[str, Encoding]`): By the name of the weight in the live parent.
    """
    for piece in pieces(architecture, config, submodel):
        yield from companions(piece, encodings.get(piece.rule.stored.name))


def companions(piece: Piece, encoding: Encoding | None) -> Iterator[Piece]:
    """What a piece is stored as: itself, or the companions of its encoding."""
    if encoding is None:
        yield piece
        return
    for companion in encoding.companions:
        yield replace(piece, rule=companion.rule(piece.rule), target=companion.rule(piece.target))
