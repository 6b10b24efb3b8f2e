"""A submodel: one size for every axis, per layer where the axis belongs to a layer, and the layers that are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ElasticConfigError

LAYERS = "layers"
"""The depth axis. Its size is the set of kept layers."""

PerLayer = tuple[int | None, ...]


@dataclass(frozen=True)
class Submodel:
    """Sizes of every axis, in the parent's layer numbering. Build it with `Architecture.submodel`, which checks it.

    Args:
        items (`tuple[tuple[str, int | tuple[int | None, ...]], ...]`):
            Per axis one size (global axes), or one entry per layer of the *parent*: `None` where the layer does not have the axis
            or is dropped.
        layers (`tuple[int, ...]`): Indices of the kept layers, ascending.
        depth (`int`): Number of layers of the parent.
    """

    items: tuple[tuple[str, int | PerLayer], ...]
    layers: tuple[int, ...]
    depth: int

    def __getitem__(self, axis: str) -> int | PerLayer:
        return dict(self.items)[axis]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.items)

    def at(self, layer: int | None) -> dict[str, int]:
        """Sizes in one layer, those of global axes included; only the global ones for `None`."""
        sizes: dict[str, int] = {}
        for name, value in self.items:
            if isinstance(value, int):
                sizes[name] = value
            elif layer is not None and (here := value[layer]) is not None:
                sizes[name] = here
        return sizes

    def values(self, axis: str) -> list[int]:
        """The sizes of an axis in the layers that have it."""
        value = self[axis]
        return [value] if isinstance(value, int) else [v for v in value if v is not None]

    def size(self, axis: str) -> int | None:
        """The size of an axis if all layers agree, otherwise `None`."""
        values = set(self.values(axis))
        return values.pop() if len(values) == 1 else None

    @property
    def is_homogeneous(self) -> bool:
        """Whether every axis has one size in all layers that have it. Dropping layers does not matter."""
        return all(len(set(self.values(axis))) <= 1 for axis in self)

    def nests_in(self, other: Submodel) -> bool:
        """Whether every size is at most the other's and every kept layer is kept there too."""
        if self.depth != other.depth or not set(self.layers) <= set(other.layers):
            return False
        for layer in (None, *self.layers):
            mine, theirs = self.at(layer), other.at(layer)
            if mine.keys() != theirs.keys() or any(mine[axis] > theirs[axis] for axis in mine):
                return False
        return True

    def cuts(self, full: Submodel) -> list[str]:
        """The axes along which this submodel is smaller than the whole parent, in any kept layer."""
        names = [
            axis
            for axis in self
            if any(self.at(layer).get(axis) != full.at(layer).get(axis) for layer in (None, *self.layers))
        ]
        return names + [LAYERS] * (len(self.layers) < self.depth)

    def within(self, layers: tuple[int, ...]) -> Submodel:
        """The same submodel counted in the layers of a parent that only has `layers`."""
        items = tuple(
            (name, value if isinstance(value, int) else tuple(value[i] for i in layers)) for name, value in self.items
        )
        return Submodel(items, tuple(layers.index(i) for i in self.layers), len(layers))

    def of(self, outer: Submodel) -> Submodel:
        """The same submodel counted in the layers of the parent that `outer`, which this one is a submodel of, was cut out of."""

        def spread(values: PerLayer) -> PerLayer:
            there = dict(zip(outer.layers, values, strict=True))
            return tuple(there.get(layer) for layer in range(outer.depth))

        items = tuple((name, value if isinstance(value, int) else spread(value)) for name, value in self.items)
        return Submodel(items, tuple(outer.layers[i] for i in self.layers), outer.depth)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: one number where all layers agree, a list per layer (`null` where absent) otherwise.

        `layers` lists the kept layers and is left out if all are kept.
        """
        sizes: dict[str, Any] = {}
        for name, value in self.items:
            if isinstance(value, int):
                sizes[name] = value
            elif self.values(name):
                size = self.size(name)
                sizes[name] = size if size is not None else list(value)
        if len(self.layers) < self.depth:
            sizes[LAYERS] = list(self.layers)
        return sizes

    def differs(self, other: Submodel) -> Mapping[str, Any]:
        """The entries of `to_dict` that the other submodel has differently; what a table of budgets shows."""
        theirs = other.to_dict()
        return {name: value for name, value in self.to_dict().items() if theirs.get(name) != value}


def first_layers(ranking: Sequence[int], count: int, where: str) -> list[int]:
    """The `count` most important layers, ascending.

    Raises:
        `ElasticConfigError`: there are not that many; `where` says what was written.
    """
    if not 1 <= count <= len(ranking):
        raise ElasticConfigError(f"{where} is out of range: the parent has {len(ranking)}, give 1..{len(ranking)}.")
    return sorted(ranking[:count])
