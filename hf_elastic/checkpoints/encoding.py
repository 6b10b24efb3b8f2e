"""Weights of a checkpoint as they are stored when they are quantised: encoded when they are read, one matrix at a time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..architectures import Architecture
from ..architectures.axes import Run, Sizes, TensorRule, indices_of
from ..architectures.encodings import Encoding
from ..architectures.pieces import Piece, companions, pieces
from ..architectures.submodel import Submodel
from ..configuration_elastic import ElasticConfig
from ..errors import CheckpointError, ElasticConfigError
from ..quantization.codec import encode, global_scale_of
from ..quantization.recipes import fused_groups
from ..storage.reading import Block, Readable
from .names import is_base, stored_names
from .nested import between

Matrix = Callable[..., Readable]
"""Gives a matrix of a weight, not read yet: [`Checkpoint.matrices`]."""

_TYPES = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}


class Source(Protocol):
    """Where weights come from: a [`hf_elastic.checkpoints.checkpoint.Checkpoint`], or a packed model."""

    encodings: dict[str, Encoding]

    def matrices(self, piece: Piece, architecture: Architecture) -> Matrix: ...


@dataclass(frozen=True)
class Computed(Readable):
    """A tensor that is made when it is read.

    Args:
        size (`tuple[int, ...]`): Its shape.
        dtype (`torch.dtype`): Its type.
        make (`Callable`): Makes it.
        sources (`tuple[Readable, ...]`): What it is made of.
    """

    size: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]
    sources: tuple[Readable, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    def leaves(self) -> Iterator[Block]:
        for source in self.sources:
            yield from source.leaves()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.make()[index]


class Latest:
    """What was made last is kept: companions of a weight are written one after the other, and made together."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._made: list[torch.Tensor] = []

    def __call__(self, key: Hashable, make: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        if key != self._key:
            self._key, self._made = None, []  # before the next one is made
            self._made, self._key = make(), key
        return self._made


def encoded_content(
    source: Source,
    elastic: ElasticConfig,
    submodel: Submodel,
    encodings: Mapping[str, Encoding],
    *,
    head: bool = True,
) -> dict[str, Readable]:
    """Everything that a size is stored as in the stock layout, by the Hub's names. What the source stores as codes and scales stays as it is.

    Args:
        source ([`Source`]): The parent's weights.
        elastic (`ElasticConfig`): Its config.
        submodel (`Submodel`): The size.
        encodings (`dict[str, Encoding]`): What its weights become, by their names in the live model of that size.
        head (`bool`, *optional*, defaults to `True`): `False` leaves out what only the causal model has.
    """
    architecture, latest = elastic.architecture, Latest()
    kept = [
        piece
        for piece in pieces(architecture, elastic.parent_config, submodel)
        if not piece.copy_of and (head or is_base(piece.rule.name, architecture))
    ]
    weights = {piece.target.name: source.matrices(piece, architecture) for piece in kept}
    groups = fused_groups(piece.target for piece in kept if piece.target.name in encodings)
    fused = {
        rule.name: [weights[other.name] for other in group if other is not rule] for group in groups for rule in group
    }
    content: dict[str, Readable] = {}
    for piece in kept:
        name = piece.target.name
        if (coded := source.encodings.get(piece.rule.stored.name)) is not None:
            for part in companions(piece, coded):
                content |= plain(part, architecture, source.matrices(part, architecture))
        elif (encoding := encodings.get(name)) is None:
            content |= plain(piece, architecture, weights[name])
        else:
            made = Making(piece, encoding, weights[name], fused[name])
            content |= _encoded(made, architecture, latest)
    return content


def plain(piece: Piece, architecture: Architecture, matrix: Matrix) -> dict[str, Readable]:
    """A tensor that stays as it is."""
    rule = piece.target
    if not rule.apart:
        return {stored_names(rule, architecture)[0]: matrix()}
    content: dict[str, Readable] = {}
    along = piece.runs[int(rule.stacked)]
    for new, expert in experts_of(piece):
        for segment, (start, stop), shape in segments_of(rule, piece.kept):
            name = stored_names(rule, architecture, new, segment)[0]
            content[name] = _shaped(matrix(expert, between(along, start, stop)), shape)
    return content


def _shaped(part: Readable, shape: tuple[int, ...]) -> Readable:
    """One expert of a stack, without the dimension of the experts."""
    if part.shape == shape:
        return part
    return Computed(shape, part.dtype, lambda: part[...].view(shape), (part,))


def experts_of(piece: Piece) -> list[tuple[int | None, int | None]]:
    """Those that are stored by themselves: their numbers here and in the parent."""
    return list(enumerate(indices_of(piece.runs[0]))) if piece.target.stacked else [(None, None)]


def segments_of(rule: TensorRule, sizes: Sizes) -> list[tuple[str | None, Run, tuple[int, ...]]]:
    """What a tensor, or one expert of it, is stored as: names, which rows, and shapes."""
    along = rule.dims[int(rule.stacked)]
    spans = [(0, along.size(sizes)) if name is None else along.span(name, sizes) for name in rule.segments]
    return list(zip(rule.segments, spans, rule.stored_shapes(sizes), strict=True))


@dataclass(frozen=True)
class Making:
    """A weight on its way to its companions.

    Args:
        piece (`Piece`): The weight.
        encoding (`Encoding`): What it becomes.
        matrix (`Callable`): Gives its matrices.
        fused (`list[Callable]`): The same of the weights with which it has one global scale.
    """

    piece: Piece
    encoding: Encoding
    matrix: Matrix
    fused: Sequence[Matrix]

    def companions(self, expert: int | None) -> list[torch.Tensor]:
        """The companions of one expert of the parent, or (`None`) of all that is there, in the shapes that they have in the live model."""
        stack = len(self.piece.shape) == 3
        rules = [companion.rule(self.piece.target) for companion in self.encoding.companions]
        shapes = [rule.shape(self.piece.kept)[int(stack and expert is not None) :] for rule in rules]
        made = [torch.empty(shape, dtype=_TYPES[rule.dtypes[0]]) for shape, rule in zip(shapes, rules, strict=True)]
        experts = [expert] if expert is not None or not stack else list(indices_of(self.piece.runs[0]))
        for i, number in enumerate(experts):
            for whole, part in zip(made, self._encoded(number), strict=True):
                (whole[i] if stack and expert is None else whole).copy_(part)
        return made

    def _encoded(self, expert: int | None) -> tuple[torch.Tensor, ...]:
        weight = _read(self.matrix, expert)
        try:
            if self.encoding.format != "nvfp4" or not self.fused:
                return encode(weight, self.encoding.format)
            largest = [_largest(weight), *(_largest(_read(other, expert)) for other in self.fused)]
            return encode(weight, self.encoding.format, global_scale=global_scale_of(*largest))
        except ElasticConfigError as error:
            which = "" if expert is None else f", expert {expert},"
            raise CheckpointError(
                f"{self.piece.rule.name}{which} cannot be quantised: {error} Nothing was written."
            ) from error


def _read(matrix: Matrix, expert: int | None) -> torch.Tensor:
    read = matrix(expert)[...]
    return read if expert is None else read.squeeze(0)


def _largest(weight: torch.Tensor) -> torch.Tensor:
    """All that a global scale depends on, as a matrix of one element."""
    return weight.abs().amax().view(1, 1)


def _encoded(made: Making, architecture: Architecture, latest: Latest) -> dict[str, Readable]:
    """The companions of a weight, by the names that they have on disk."""
    piece = made.piece
    content: dict[str, Readable] = {}
    for new, expert in experts_of(piece):
        source = (made.matrix(expert),)
        for i, companion in enumerate(made.encoding.companions):
            rule = companion.rule(piece.target)
            dtype = _TYPES[rule.dtypes[0]]
            for segment, (start, stop), shape in segments_of(rule, piece.kept):

                def make(
                    expert: int | None = expert, i: int = i, start: int = start, stop: int = stop
                ) -> torch.Tensor:
                    companions = latest((piece.target.name, expert), lambda: made.companions(expert))
                    return companions[i] if piece.target.segments == (None,) else companions[i][start:stop]

                names = stored_names(rule, architecture, new, segment)
                content[names[0]] = Computed(shape, dtype, make, source)
    return content
