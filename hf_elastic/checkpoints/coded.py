"""A size as other programs want it in few bits: codes and scales as they are stored, cut, under the names of a layout.

Nothing is decoded. Where two layouts say the same in other words, the words are changed: compressed-tensors divides by the global scale, modelopt
multiplies by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from ..architectures import Architecture
from ..architectures.axes import TensorRule
from ..architectures.encodings import Companion, Encoding
from ..architectures.pieces import Piece, companions, pieces
from ..architectures.submodel import Submodel
from ..configuration_elastic import ElasticConfig
from ..errors import ExportError
from ..quantization.codec import decode
from ..quantization.layouts import CodedLayout, in_layout, relabelled
from ..quantization.recipes import fused_groups
from ..storage.reading import Readable
from .encoding import Computed, Latest, Matrix, Source, experts_of, plain, segments_of
from .names import is_base, stored_names


def coded_content(
    source: Source,
    elastic: ElasticConfig,
    submodel: Submodel,
    layout: CodedLayout,
    *,
    head: bool = True,
) -> dict[str, Readable]:
    """Everything that a size is stored as in a layout, by the Hub's names.

    Args:
        source ([`Source`]): The parent's tensors.
        elastic (`ElasticConfig`): Its config.
        submodel (`Submodel`): The size.
        layout (`str`): `"compressed-tensors"` or `"modelopt"`.
        head (`bool`, *optional*, defaults to `True`): `False` leaves out what only the causal model has.

    Raises:
        `ExportError`: the layout does not hold the same numbers. Only global scales were read.
    """
    content: dict[str, Readable] = {}
    architecture = elastic.architecture
    for piece, encoding in _kept(source, elastic, submodel, head):
        if encoding is None:
            content |= plain(piece, architecture, source.matrices(piece, architecture))
            continue
        written, rule = in_layout(encoding, layout), coded_rule(piece.target)
        for mine, theirs in zip(encoding.companions, written.companions, strict=True):
            part = replace(piece, rule=mine.rule(piece.rule), target=theirs.rule(rule))
            if mine.rows == mine.columns == 0:
                change = None if written == encoding else partial(relabelled, source=encoding)
                content |= _global_scales(part, theirs, architecture, source.matrices(part, architecture), change)
            else:
                content |= plain(part, architecture, source.matrices(part, architecture))
    return content


def decoded_content(
    source: Source,
    elastic: ElasticConfig,
    submodel: Submodel,
    dtype: torch.dtype,
    *,
    head: bool = True,
) -> dict[str, Readable]:
    """Everything that a size is stored as when it is not quantised, decoded when it is read; arguments are those of `coded_content`."""
    content: dict[str, Readable] = {}
    architecture = elastic.architecture
    for piece, encoding in _kept(source, elastic, submodel, head):
        if encoding is None:
            content |= plain(piece, architecture, source.matrices(piece, architecture))
        else:
            content |= _decoded(piece, encoding, architecture, source, dtype)
    return content


def coded_rule(rule: TensorRule) -> TensorRule:
    """The rule of a weight, under the names that other programs want where it is quantised."""
    return rule if rule.coded is None else replace(rule, disk=rule.coded)


def unequal_scales(source: Source, elastic: ElasticConfig, submodel: Submodel) -> list[str]:
    """Names of weights in few bits that other programs make one matrix of, and whose global scales differ, so that no scale is that of all."""
    scales: dict[str, torch.Tensor] = {}
    kept = {}
    for piece, encoding in _kept(source, elastic, submodel, True):
        if encoding is not None and encoding.format == "nvfp4":
            *_, last = companions(piece, encoding)
            kept[piece.target.name] = piece.target
            scales[piece.target.name] = source.matrices(last, elastic.architecture)()[...]
    odd = [name for name, scale in scales.items() if scale.dim() > 1 and not (scale == scale[:, :1]).all()]
    for group in fused_groups(kept.values()):
        names = [rule.name for rule in group]
        if any(not torch.equal(scales[name].flatten(), scales[names[0]].flatten()) for name in names[1:]):
            odd += names
    return odd


def _kept(
    source: Source, elastic: ElasticConfig, submodel: Submodel, head: bool
) -> Iterator[tuple[Piece, Encoding | None]]:
    architecture = elastic.architecture
    for piece in pieces(architecture, elastic.parent_config, submodel):
        if not piece.copy_of and (head or is_base(piece.rule.name, architecture)):
            yield piece, source.encodings.get(piece.rule.stored.name)


def _global_scales(
    piece: Piece,
    companion: Companion,
    architecture: Architecture,
    matrix: Matrix,
    change: Callable[[torch.Tensor], torch.Tensor | None] | None,
) -> dict[str, Readable]:
    """The global scales of a weight: one per matrix that is stored, also where several in memory have one."""
    content: dict[str, Readable] = {}
    along = piece.rule.dims[-1].size(piece.full)  # how many there are, of an expert
    bare = companion.suffix == "weight_scale_2"
    for new, expert in experts_of(piece):
        for i, (segment, _, shape) in enumerate(segments_of(piece.target, piece.kept)):
            rows = [(i, i + 1)] if along > 1 else [(0, 1)]
            read = matrix(expert, rows if piece.target.apart else None)
            name = stored_names(piece.target, architecture, new, segment)[0]
            scale = read[...] if change is None else change(read[...])
            if scale is None:
                raise ExportError(
                    f"{name}: the other layout has no number in float32 that means what {read[...].flatten().tolist()} means here without changing a weight by one rounding in "
                    "bfloat16. Export it in the layout that it is in."
                )
            shape = () if bare and scale.numel() == 1 else shape
            content[name] = Computed(shape, scale.dtype, _given(scale.reshape(shape)), (read,))
    return content


def _given(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def _decoded(
    piece: Piece, encoding: Encoding, architecture: Architecture, source: Source, dtype: torch.dtype
) -> dict[str, Readable]:
    rule, latest = piece.target, Latest()
    parts = [source.matrices(part, architecture) for part in companions(piece, encoding)]
    rows = [shape[0] for shape in rule.stored_shapes(piece.kept)] if rule.parted else [piece.shape[-2]]
    content: dict[str, Readable] = {}

    def whole(expert: int | None) -> list[torch.Tensor]:
        read = [part(expert)[...] for part in parts]
        inner = read if expert is None else [part.squeeze(0) for part in read]
        return [decode(inner, encoding.name, dtype, segments=rows)]

    for new, expert in experts_of(piece):
        for segment, (start, stop), shape in segments_of(rule, piece.kept):

            def make(expert: int | None = expert, start: int = start, stop: int = stop) -> torch.Tensor:
                (weight,) = latest((rule.name, expert), lambda: whole(expert))
                return weight if rule.segments == (None,) else weight[start:stop]

            content[stored_names(rule, architecture, new, segment)[0]] = Computed(shape, dtype, make, ())
    return content
