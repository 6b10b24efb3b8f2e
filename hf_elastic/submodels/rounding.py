"""Quantisation-aware training: units compute with the weights that a quantised checkpoint of the parent as it is now would hold.

`w + (rounded(w) - w).detach()`: the parent's weight is rounded as a whole, with scales made from what it is now, before a budget cuts it; so every budget
sees the codes that it would be cut from (arXiv 2511.16664 trains so). Gradients pass as if nothing was rounded (straight-through estimator, arXiv
1308.3432). Nothing is observed and nothing is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..architectures.encodings import Encoding
from ..architectures.pieces import Piece
from ..quantization.codec import global_scale_of, rounded
from ..quantization.recipes import fused_groups


@dataclass(frozen=True)
class Rounding:
    """What weights are rounded to.

    Args:
        encodings (`dict[str, Encoding]`): By the name of the weight in the live parent; others stay as they are.
    """

    encodings: Mapping[str, Encoding]

    def __call__(
        self, parts: Sequence[tuple[str, Piece]], tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The parent's tensors of a unit, rounded.

        Args:
            parts (`list[tuple[str, Piece]]`): Names inside the unit, and what is known of the tensors.
            tensors (`dict[str, torch.Tensor]`): The whole tensors, by those names.
        """
        found = dict(tensors)
        formats = {
            name: self.encodings[piece.rule.stored.name].format
            for name, piece in parts
            if piece.rule.stored.name in self.encodings
        }
        names = {piece.rule.name: name for name, piece in parts}
        scales: dict[str, torch.Tensor] = {}
        for group in fused_groups(piece.rule for name, piece in parts if formats.get(name) == "nvfp4"):
            beside = [names[rule.name] for rule in group]
            scales |= dict.fromkeys(beside, global_scale_of(*(tensors[name] for name in beside)))
        for name, format in formats.items():
            found[name] = _StraightThrough.apply(tensors[name], format, scales.get(name))  # type: ignore[no-untyped-call]
        return found


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, format: str, global_scale: torch.Tensor | None) -> torch.Tensor:
        return rounded(weight, format, global_scale=global_scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient, None, None
