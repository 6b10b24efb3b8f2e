"""Weights that are stored as codes and scales, decoded when they are read: expert by expert, so that the codes of one are in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..architectures.axes import indices_of
from ..architectures.encodings import Encoding
from ..architectures.pieces import Piece
from ..quantization.codec import decode
from ..storage.reading import Block, Readable


@dataclass(frozen=True)
class Decoded(Readable):
    """A weight that is stored as companions.

    Args:
        encoding (`Encoding`): Says what they are.
        size (`tuple[int, ...]`): Shape of the weight.
        dtype (`torch.dtype`): Its type.
        parts (`list[list[Readable]]`): Its companions; of a stack, those of every expert.
        segments (`tuple[int, ...]`): Rows of the parts of it (of one expert) that have a global scale each.
    """

    encoding: Encoding
    size: tuple[int, ...]
    dtype: torch.dtype
    parts: list[list[Readable]]
    segments: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    def leaves(self) -> Iterator[Block]:
        for part in self.parts:
            for companion in part:
                yield from companion.leaves()

    def __getitem__(self, index: Any) -> torch.Tensor:
        weight = torch.empty(self.size, dtype=self.dtype)
        stack = weight if len(self.size) == 3 else weight[None]
        for out, companions in zip(stack, self.parts, strict=True):
            read = [companion[...] for companion in companions]
            inner = tuple(part.squeeze(0) if len(self.size) == 3 else part for part in read)
            decode(inner, self.encoding.name, self.dtype, segments=self.segments, out=out)
        return weight[index]


def decoded(
    piece: Piece, encoding: Encoding, at: Callable[[int | None], list[Readable]], dtype: torch.dtype
) -> Decoded:
    """What is kept of a weight.

    Args:
        at: Gives the companions, of an expert of the parent or (`None`) of a single matrix.
    """
    stack = len(piece.shape) == 3
    parts = [at(expert) for expert in indices_of(piece.runs[0])] if stack else [at(None)]
    rule = piece.rule
    rows = [shape[0] for shape in rule.stored_shapes(piece.kept)] if rule.parted else [piece.shape[-2]]
    return Decoded(encoding, piece.shape, dtype, parts, tuple(rows))


def wrong_scales(scales: torch.Tensor) -> str | None:
    """What is wrong with scales; `None` if nothing is. A block of zeros may have the scale 0 in E4M3, whole matrices may not."""
    if scales.dtype == torch.float8_e4m3fn:  # as bytes: there are many of them
        codes = scales.view(torch.uint8).flatten(-2)
        if ((codes & 0x7F) == 0x7F).any():
            return "NaN"
        if (codes > 0x80).any():
            return "negative"
        return None if codes.any(-1).all() else "0 in a whole matrix"
    values = scales.float()
    if values.isnan().any():
        return "NaN"
    if values.isinf().any():
        return "infinite"
    return "0 or negative" if (values <= 0).any() else None
