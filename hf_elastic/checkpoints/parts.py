"""The parts of tensors in the nested layout: what every budget adds to those before it, and how it is named.

A tensor of the parent is cut into *parts*: the smallest budget's region of it, and for every larger budget what its region has more.
Regions are products of ranges along the dimensions, nested in each other, so the rest of one without the other is at most one block per
dimension: new rows over all columns, then new columns of the old rows. Parts do not overlap, so together they are as large as the parent.

In the smallest budget's files tensors have the names that they have in a stock checkpoint of that size, and what is several tensors there (one
per expert, one per segment) is so here. Elsewhere they are one tensor, as in the live model (thousands of small parts would take longer to read
than what is in them), and the name is the parent's with `.level1.dim0` behind it: what the first larger budget adds along dimension 0;
`.level1` alone where nothing smaller has the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from ..architectures import Architecture
from ..architectures.axes import Run, TensorRule, shape_of, without
from ..architectures.encodings import Encoding
from ..architectures.pieces import Piece, stored_pieces
from ..architectures.submodel import Submodel
from .names import Names, apart_names, stored_names

Region = list[list[Run]]
"""Per dimension the ranges that are kept of a tensor of the parent."""


@dataclass(frozen=True)
class Part:
    """A block of a tensor of the parent that is stored as a tensor, or as several.

    Args:
        level (`int`): Which budget's files hold it, 0 for the smallest.
        names (`list[tuple[str, ...]]`): Its name there, or one entry per expert, with one name or those of its segments.
        region (`list[list[tuple[int, int]]]`): What it holds.
        apart (`list[tuple[int, ...]]`, *optional*): If it is several tensors, the shape of each name of an entry.
    """

    level: int
    names: list[Names]
    region: Region
    apart: list[tuple[int, ...]] | None = None

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Of every tensor."""
        shapes = [shape_of(self.region)] if self.apart is None else self.apart
        return [pair for names in self.names for pair in zip(names, shapes, strict=True)]


@dataclass(frozen=True)
class Stored:
    """A tensor of the parent, and the parts that hold it in the nested layout.

    Args:
        rule (`TensorRule`): The tensor.
        sources (`list[tuple[str, ...]]`): Its names in the parent's stock checkpoint, as those of a part.
        parts (`list[Part]`): In the order of their levels.
    """

    rule: TensorRule
    sources: list[Names]
    parts: list[Part]


def split(name: str, first: str, regions: Sequence[Region | None]) -> Iterator[Part]:
    """Cut a tensor into the parts that every budget adds.

    Args:
        name (`str`): Its name in the parent.
        first (`str`): Its name in the smallest budget.
        regions (`list`): What every budget keeps of it, smallest first; `None` where it keeps nothing.
    """
    old: Region | None = None
    for level, region in enumerate(regions):
        if region is None:
            continue
        if old is None:
            yield Part(level, [(first if level == 0 else f"{name}.level{level}",)], region)
        else:
            for i, runs in enumerate(region):
                if added := without(runs, old[i]):
                    yield Part(level, [(f"{name}.level{level}.dim{i}",)], [*old[:i], added, *region[i + 1 :]])
        old = region


def common(runs: Sequence[Run], others: Sequence[Run]) -> Iterator[tuple[Run, Run]]:
    """The indices in both, as ranges of positions: in what `runs` keeps, and in what `others` keep."""
    at = 0
    for start, stop in runs:
        other_at = 0
        for first, last in others:
            low, high = max(start, first), min(stop, last)
            if low < high:
                yield (at + low - start, at + high - start), (other_at + low - first, other_at + high - first)
            other_at += last - first
        at += stop - start


def layouts(rule: TensorRule, levels: Sequence[Piece | None], architecture: Architecture) -> Iterator[Stored]:
    """The ways in which a tensor may be stored: under each of the names it can have, and as one or as several.

    Args:
        rule (`TensorRule`): Tensor of the parent.
        levels (`list[Piece | None]`): What every budget keeps of it, smallest first.
    """
    regions = [None if piece is None else piece.runs for piece in levels]
    target = rule if levels[0] is None else levels[0].target
    names, firsts = stored_names(rule, architecture), stored_names(target, architecture)
    whole = [list(split(name, first, regions)) for name, first in zip(names, firsts, strict=True)]
    if rule.apart:
        full = rule.shape(next(piece.full for piece in levels if piece is not None))
        sources = apart_names(rule, architecture, full[0])
        kept = apart_names(target, architecture, levels[0].shape[0] if levels[0] is not None else 0)
        shapes = None if levels[0] is None else target.stored_shapes(levels[0].kept)
        for here, first, parts in zip(sources, kept or sources, whole, strict=False):
            yield Stored(
                rule, here, [replace(part, names=first, apart=shapes) if part.level == 0 else part for part in parts]
            )
    for name, parts in zip(names, whole, strict=True):
        yield Stored(rule, [(name,)], parts)


def tensors(
    architecture: Architecture,
    config: PreTrainedConfig,
    levels: Sequence[Submodel],
    fits: Callable[[Stored], bool],
    encodings: Mapping[str, Encoding],
) -> Iterator[Stored]:
    """Every stored tensor, in the first layout that `fits`; in the Hub's where none does.

    Args:
        levels (`list[Submodel]`): Nested budgets, smallest first.
        encodings (`dict[str, Encoding]`): Of weights that are stored in few bits, by their names in the live parent.
    """
    stored = (stored_pieces(architecture, config, level, encodings) for level in levels)
    kept = [{piece.rule.stored.name: piece for piece in level if not piece.copy_of} for level in stored]
    for name, largest in kept[-1].items():
        here, rule = [level.get(name) for level in kept], largest.rule.stored
        found = (tensor for tensor in layouts(rule, here, architecture) if fits(tensor))
        yield next(found, None) or next(layouts(rule, here, architecture))
