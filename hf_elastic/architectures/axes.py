"""The algebra of elastic tensors: what runs along each dimension of a tensor, and what follows from it.

A *dimension* is a concatenation of named *segments*, a segment is a product of *factors*, a factor is a constant or a
[`Cut`] by an axis:

```
in_proj.weight   [ z | x | B | C | dt ,  hidden ]     z = x = groups * heads per group * head_dim     B = C = groups * state
```

From that one description follow all verbs: `shape` and `count` for a choice of sizes, the `runs` of rows and columns that a
smaller choice keeps, `narrow` (cut a tensor, without a copy where every dimension is one run), `mask` and `permute` (sort by
importance). Nothing in here knows of modules, files or training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from ..errors import ElasticConfigError

Sizes = Mapping[str, int]
"""Size of every axis in one layer, as users count it: `mamba_heads` counts the heads of all groups together."""

Run = tuple[int, int]
"""A half-open range `(start, stop)` of indices along one dimension."""


@dataclass(frozen=True)
class Cut:
    """A factor that an axis cuts: the smaller submodel keeps its first entries.

    Args:
        axis (`str`): Name of the axis.
        groups (`int`, *optional*, defaults to 1):
            The axis counts over this many groups and this factor is the share of one group. It has to follow a constant
            factor of that size, so that every group keeps a prefix of its own (the Mamba and KV grouping).
        within (`str`, *optional*):
            The entries are sorted separately for every index of this axis, which runs along dimension 0 (the neurons of one
            expert). Cutting is not affected.
        gated (`bool`, *optional*, defaults to `False`):
            While the size of the axis is not decided, its entries are weighted here. Each axis is weighted once on every path through the
            model; where it is not, a hard choice still gives exactly the submodel, because what is weighted with 0 stays 0 from there on.
        times (`int`, *optional*, defaults to 1): There are this many entries per entry of the axis (a shared expert as wide as several).
        by (`str`, *optional*): Another axis that the size is multiplied with (channels per hidden one); the one with fewer entries.
        order (`str`, *optional*):
            Where only the size follows the axis, and which entries are kept is free: the name under which they are scored and sorted by themselves.
    """

    axis: str
    groups: int = 1
    within: str | None = None
    gated: bool = False
    times: int = 1
    by: str | None = None
    order: str | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that its size follows."""
        return (self.axis,) if self.by is None else (self.axis, self.by)

    @property
    def sorted_by(self) -> str:
        """What its entries are sorted by: the axis, or an order of their own."""
        return self.order or self.axis

    def size(self, sizes: Sizes) -> int:
        size = math.prod(sizes[axis] for axis in self.axes) * self.times
        return size // self.groups if isinstance(size, int) else size / self.groups  # expected sizes are no integers

    def weights(self, full: Sizes, weights: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """How much of every entry is kept while its axes are undecided, `(size,)`; `None` if they are decided.

        Entry `j` is among the first `h * e` where `j // e` is among the first `h`, so with `by` it counts `sum_e P(e) w_(j // e)`.
        """
        undecided = [axis for axis in self.axes if axis in weights]
        if not undecided:
            return None
        like = weights[undecided[0]]
        along = weights.get(self.axis, like.new_ones(full[self.axis] // self.groups))
        if self.by is not None:
            most = full[self.by]
            kept = weights.get(self.by, like.new_ones(most))
            odds = kept - torch.cat([kept[1:], kept.new_zeros(1)])  # that exactly so many are kept
            count = torch.arange(1, most + 1, device=like.device)
            entry = torch.arange(len(along) * most, device=like.device) // count[:, None]
            along = odds @ torch.cat([along, along.new_zeros(1)])[entry.clamp(max=len(along))]
        return along.repeat_interleave(self.times) if self.times > 1 else along


Factor: TypeAlias = "int | Cut | Dim"
Segment: TypeAlias = tuple[Factor, ...]


def _factor_size(factor: Factor, sizes: Sizes) -> int:
    return factor if isinstance(factor, int) else factor.size(sizes)


def _factor_runs(factor: Factor, full: Sizes, kept: Sizes) -> list[Run]:
    return factor.runs(full, kept) if isinstance(factor, Dim) else [(0, _factor_size(factor, kept))]


def _segment_size(segment: Segment, sizes: Sizes) -> int:
    return math.prod(_factor_size(factor, sizes) for factor in segment)


def _segment_runs(segment: Segment, full: Sizes, kept: Sizes) -> list[Run]:
    """Runs of a row-major product of prefixes, relative to the start of the segment."""
    runs: list[Run] = [(0, 1)]
    inner = 1
    for factor in reversed(segment):
        size, own = _factor_size(factor, full), _factor_runs(factor, full, kept)
        if runs == [(0, inner)]:
            runs = [(start * inner, stop * inner) for start, stop in own]
        else:
            each = [i for first, last in own for i in range(first, last)]
            runs = [(i * inner + start, i * inner + stop) for i in each for start, stop in runs]
        inner *= size
    return runs


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor: named segments, in the order in which they are stored.

    Args:
        segments (`tuple[tuple[str, tuple[int | Cut | Dim, ...]], ...]`): Name and factors of each.
        per (`int`, *optional*, defaults to 1):
            So many elements of the weight are one here: codes that share a byte, elements that share a scale. What is kept has to start and to end
            at multiples of it.
    """

    segments: tuple[tuple[str, Segment], ...]
    per: int = 1

    @property
    def cuts(self) -> tuple[Cut, ...]:
        found: list[Cut] = []
        for _, segment in self.segments:
            for factor in segment:
                found += factor.cuts if isinstance(factor, Dim) else [factor] if isinstance(factor, Cut) else []
        return tuple(found)

    def size(self, sizes: Sizes) -> int:
        """Length of the dimension for these sizes.

        Raises:
            `ElasticConfigError`: it is no whole number of blocks (`per`).
        """
        size = sum(_segment_size(segment, sizes) for _, segment in self.segments)
        return size if self.per == 1 else self._blocks([(0, size)])[0][1]

    def runs(self, full: Sizes, kept: Sizes) -> list[Run]:
        """The ranges that `kept` takes out of a dimension of `full` sizes, in order, adjacent ones merged.

        Raises:
            `ElasticConfigError`: one does not start and end at a block (`per`).
        """
        runs: list[Run] = []
        offset = 0
        for _, segment in self.segments:
            for start, stop in _segment_runs(segment, full, kept):
                if runs and runs[-1][1] == offset + start:
                    runs[-1] = (runs[-1][0], offset + stop)
                else:
                    runs.append((offset + start, offset + stop))
            offset += _segment_size(segment, full)
        return runs if self.per == 1 else self._blocks(runs)

    def _blocks(self, runs: list[Run]) -> list[Run]:
        """Ranges of elements of the weight as ranges of what is stored."""
        for start, stop in runs:
            if start % self.per or stop % self.per:
                axes = ", ".join(dict.fromkeys(axis for cut in self.cuts for axis in cut.axes)) or "none"
                raise ElasticConfigError(
                    f"elements {start}..{stop} are no whole blocks of {self.per}, which are stored together; they are cut by the axes: {axes}. "
                    f"Choose sizes with which these start and end at multiples of {self.per}."
                )
        return [(start // self.per, stop // self.per) for start, stop in runs]

    def span(self, name: str, sizes: Sizes) -> Run:
        """Where the segment called `name` lies."""
        offset = 0
        for segment_name, segment in self.segments:
            size = _segment_size(segment, sizes)
            if segment_name == name:
                return offset, offset + size
            offset += size
        raise KeyError(f"no segment {name!r} among {[name for name, _ in self.segments]}")

    def gates(self, full: Sizes, weights: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """How much of every entry is kept while sizes are undecided, or `None` if nothing along it is weighted.

        Args:
            full (`Sizes`): Sizes of the tensor.
            weights (`dict[str, torch.Tensor]`): Per axis the weight of every entry of one group, of shape `(size per group,)`.

        Returns:
            `torch.Tensor`: Of shape `(size,)`, differentiable in the weights.
        """
        gated = [axis for cut in self.cuts if cut.gated for axis in cut.axes if axis in weights]
        if not gated:
            return None
        like = weights[gated[0]]
        parts = []
        for _, segment in self.segments:
            part = like.new_ones(1)
            for factor in segment:
                own = factor.weights(full, weights) if isinstance(factor, Cut) and factor.gated else None
                if isinstance(factor, Dim):
                    own = factor.gates(full, weights)
                along = like.new_ones(_factor_size(factor, full)) if own is None else own
                part = (part[:, None] * along).reshape(-1)
            parts.append(part)
        return torch.cat(parts)

    def order(self, full: Sizes, orders: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """The index that sorts this dimension, or `None` if nothing along it is sorted.

        Args:
            full (`Sizes`): Sizes of the tensor.
            orders (`dict[str, torch.Tensor]`):
                Per axis or order (`Cut.sorted_by`) the old index of every new position, of shape `(groups, size per group)`.

        Returns:
            `torch.Tensor`: int64 of shape `(size,)`, the old index of every new position.
        """
        if not any(cut.sorted_by in orders and cut.within is None for cut in self.cuts):
            return None
        return self.order_in(torch.zeros(1, dtype=torch.int64), full, orders)[0]

    def order_in(self, group: torch.Tensor, full: Sizes, orders: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The index that sorts this dimension inside each of some groups, `(len(group), size)`."""
        parts, offset = [], 0
        for _, segment in self.segments:
            parts.append(_segment_order(segment, group, full, orders) + offset)
            offset += _segment_size(segment, full)
        return torch.cat(parts, dim=1)


def _segment_order(
    segment: Segment, group: torch.Tensor, full: Sizes, orders: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    rows, group = len(group), group[:, None]  # group each entry of `index` lies in: the last constant factor
    index = torch.zeros_like(group)
    for factor in segment:
        size = _factor_size(factor, full)
        if isinstance(factor, Dim):
            step = factor.order_in(group.reshape(-1), full, orders).view(*group.shape, size)
        elif isinstance(factor, Cut) and factor.sorted_by in orders and factor.within is None:
            order = orders[factor.sorted_by]
            step = order[group] if factor.groups > 1 else order[0].expand(*group.shape, -1)
        else:
            step = torch.arange(size).expand(*group.shape, -1)
        group = step.reshape(rows, -1) if isinstance(factor, int) else group.repeat_interleave(size, dim=1)
        index = (index[..., None] * size + step).reshape(rows, -1)
    return index


@dataclass(frozen=True)
class Norm:
    """The weight of an RMSNorm, which divides by the root mean square of *all* entries it runs over, also of those that a mask has set to zero.

    Norms along what no axis cuts (of the queries of one head) need not say so. A LayerNorm, which subtracts a mean as well, cannot be said:
    no weight and no epsilon make up for the entries that are zero.

    Args:
        centre (`float`, *optional*, defaults to 0): What it adds to its weight before it multiplies by it; 1 where weights are stored around 0.
        beside (`tuple[str, ...]`, *optional*):
            Axes that count norms which lie side by side in one weight (one per head, or per group), instead of entries of a norm. Groups that
            all axes cut alike need nothing: each keeps the same share.
        epsilon (`str`, *optional*): What the stock module calls its epsilon, if none of the usual names.
    """

    centre: float = 0.0
    beside: tuple[str, ...] = ()
    epsilon: str | None = None


@dataclass(frozen=True)
class TensorRule:
    """What runs along the dimensions of one tensor of the parent.

    Args:
        template (`str`): Name in the live model, with `{layer}` where the tensor belongs to a layer, and `{use}` where it is an entry of a list.
        dims (`tuple[Dim, ...]`): One entry per dimension.
        layer (`int`, *optional*): Index of the layer it belongs to; `None` for embeddings, head and final norm.
        disk (`str`, *optional*):
            Name in the parent's Hub repository, if different. With `{expert}` in it, dimension 0 is stored as one tensor per index; with
            `{segment}`, what is stored is one tensor per segment of its first dimension, named as the segments are.
        norm (`bool` or `Norm`, *optional*, defaults to `False`): The weight of an RMSNorm; masking has to correct it. `True` is `Norm()`.
        scale (`Callable[[Sizes], float]`, *optional*):
            What the output of the module is multiplied by and depends on a size, other than by its tensors: a model whose embeddings are multiplied
            by the root of the width has `lambda sizes: sizes["hidden"] ** 0.5`. Only masks and mixtures need it; a model of a size has its own.
        buffer (`bool`, *optional*, defaults to `False`): A persistent buffer: stored, but not counted as a parameter.
        fp32 (`bool`, *optional*, defaults to `False`): Kept in float32 whatever the load dtype.
        routed (`bool`, *optional*, defaults to `False`): Experts along dimension 0, of which a token uses only some (`Axis.among`).
        routes (`bool`, *optional*, defaults to `False`): The weight of the router that chooses among them, `[experts, hidden]`.
        measured (`str`, *optional*):
            Segment of dimension 0 by whose values the axes along it are scored, instead of by the input of the matrix that leads back to
            the residual stream.
        passed_by_kernels (`bool`, *optional*, defaults to `False`):
            Some stock code reads it beside its module and never calls that, so an adapter of the module would have no effect.
        tied (`str`, *optional*): Name of the tensor it shares its storage with; it is neither stored nor counted.
        shared_by (`tuple[int, ...]`, *optional*):
            Layers that have one tensor for all of them, each under a name of its own. It is stored and counted once, under that of the first of
            them, in a submodel the first that is kept.
        user (`int`, *optional*):
            In a list with one entry for every use of a block that layers share, the layer whose use it serves; it goes when that layer goes.
        use (`int`, *optional*): Which entry of that list it is: uses are counted through the layers, in a submodel through those that are kept.
        kind (`str`, *optional*):
            What it is for a recipe of quantisation: the weight of a linear layer of `"attention"`, `"linear_attention"`, `"mamba"`,
            `"short_convolution"`, `"mlp"`, `"experts"` or `"shared_experts"`. Weights without a kind are never quantised.
        fused (`str`, *optional*):
            Name of the one matrix that other programs make of it and its neighbours in the module that owns theirs (`"qkv_proj"`); quantised,
            they have one global scale.
        dtypes (`tuple[str, ...]`, *optional*): Types in which a companion of a quantised weight can be stored, by the names of safetensors.
        coded (`str`, *optional*):
            As `disk`, in exports in which it is quantised, if other programs want it under other names there: experts one by one that are stacked
            in the parent's repository.
    """

    template: str
    dims: tuple[Dim, ...]
    layer: int | None = None
    disk: str | None = None
    norm: Norm | bool = False
    scale: Callable[[Sizes], float] | None = None
    buffer: bool = False
    fp32: bool = False
    routed: bool = False
    routes: bool = False
    measured: str | None = None
    passed_by_kernels: bool = False
    tied: str | None = None
    shared_by: tuple[int, ...] = ()
    user: int | None = None
    use: int | None = None
    kind: str | None = None
    fused: str | None = None
    dtypes: tuple[str, ...] = ()
    coded: str | None = None

    def __post_init__(self) -> None:
        if self.norm is True:
            object.__setattr__(self, "norm", Norm())

    @property
    def name(self) -> str:
        """Name in the live model."""
        return self.template.format(layer=self.layer, use=self.use)

    @property
    def stored(self) -> TensorRule:
        """The rule of the same tensor under the name that is stored, if layers share it; else this one."""
        return replace(self, layer=self.shared_by[0]) if self.shared_by else self

    @property
    def copy_of(self) -> str | None:
        """Name of the tensor that is stored in place of this one, which then is neither stored nor counted; `None` if it is stored itself."""
        if not self.shared_by or self.layer == self.shared_by[0]:
            return self.tied
        return self.template.format(layer=self.shared_by[0], use=self.use)

    @property
    def module(self) -> str:
        """Name of the module that owns the tensor."""
        return self.name.rpartition(".")[0]

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that cut it."""
        return tuple(dict.fromkeys(axis for dim in self.dims for cut in dim.cuts for axis in cut.axes))

    @property
    def stacked(self) -> bool:
        """Whether dimension 0 is one tensor per index on disk."""
        return self.disk is not None and "{expert}" in self.disk

    @property
    def experts(self) -> str:
        """Name of the axis along dimension 0, of experts or of the router that chooses among them."""
        (cut,) = self.dims[0].cuts
        return cut.axis

    @property
    def parted(self) -> bool:
        """Whether the segments of a dimension are one tensor each on disk: of dimension 0, or of 1 where 0 is one per index already."""
        return self.disk is not None and "{segment}" in self.disk

    @property
    def apart(self) -> bool:
        """Whether one live tensor is several on disk."""
        return self.stacked or self.parted

    @property
    def segments(self) -> tuple[str | None, ...]:
        """Names of the segments that are stored as one tensor each; `(None,)` where the tensor, or one index of it, is stored whole."""
        return tuple(name for name, _ in self.dims[int(self.stacked)].segments) if self.parted else (None,)

    def stored_shapes(self, sizes: Sizes) -> list[tuple[int, ...]]:
        """Shapes of the tensors on disk, one per entry of `segments`, and without dimension 0 where that is one tensor per index."""
        shape = self.shape(sizes)[int(self.stacked) :]
        if not self.parted:
            return [shape]
        spans = [self.dims[int(self.stacked)].span(name, sizes) for name in self.segments if name is not None]
        return [(stop - start, *shape[1:]) for start, stop in spans]

    def disk_name(self, expert: int | None = None, segment: str | None = None) -> str:
        """Name in the parent's Hub layout."""
        return (self.disk or self.template).format(layer=self.layer, use=self.use, expert=expert, segment=segment)

    def within(self, layers: Mapping[int, int], uses: Mapping[int, int]) -> TensorRule | None:
        """The same rule in a submodel with fewer layers; `None` if it has none.

        Args:
            layers (`dict[int, int]`): The kept layers, and where each of them is in the submodel.
            uses (`dict[int, int]`): Of these the ones that use a shared block, and how many do before each.
        """
        if self.layer is None:
            return self
        if self.layer not in layers or (self.user is not None and self.user not in layers):
            return None
        here = replace(
            self, layer=layers[self.layer], shared_by=tuple(layers[i] for i in self.shared_by if i in layers)
        )
        return here if self.user is None else replace(here, user=layers[self.user], use=uses[self.user])

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(dim.size(sizes) for dim in self.dims)

    def count(self, sizes: Sizes) -> int:
        """Number of elements for these sizes."""
        return math.prod(self.shape(sizes))

    def alive(self, full: Sizes, kept: Sizes) -> float:
        """The share of the entries a norm runs over that `kept` keeps."""
        beside = self.norm.beside if isinstance(self.norm, Norm) else ()
        return self.count({**kept, **{axis: full[axis] for axis in beside}}) / self.count(full)

    def runs(self, full: Sizes, kept: Sizes) -> list[list[Run]]:
        """Per dimension the ranges that `kept` takes out of a tensor of `full` sizes."""
        return [dim.runs(full, kept) for dim in self.dims]

    def narrow(self, tensor: torch.Tensor, full: Sizes, kept: Sizes) -> torch.Tensor:
        """Cut `tensor` of `full` sizes to `kept`: a view where every dimension keeps one run, otherwise a copy."""
        return take(tensor, self.runs(full, kept))

    def is_view(self, full: Sizes, kept: Sizes) -> bool:
        """Whether `narrow` copies nothing."""
        return all(len(runs) == 1 for runs in self.runs(full, kept))

    def mask(self, full: Sizes, kept: Sizes) -> torch.Tensor:
        """1.0 where `kept` keeps an element and 0.0 elsewhere: the outer product of the dimensions' masks."""
        mask = torch.ones(())
        for dim, runs in zip(self.dims, self.runs(full, kept), strict=True):
            along = torch.zeros(dim.size(full))
            for start, stop in runs:
                along[start:stop] = 1.0
            mask = mask[..., None] * along
        return mask

    def gate(self, tensor: torch.Tensor, full: Sizes, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Weight the entries of undecided axes, where this tensor is the place for it (`Cut.gated`)."""
        for i, dim in enumerate(self.dims):
            gates = dim.gates(full, weights)
            if gates is not None:
                view = [1] * tensor.dim()
                view[i] = -1
                tensor = tensor * gates.to(tensor.dtype).view(view)
        return tensor

    def permute(self, tensor: torch.Tensor, full: Sizes, orders: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sort `tensor` by the orders of its axes (`Dim.order`); a new tensor if anything moves.

        An axis sorted `within` another one has an order of shape `(size of that axis, size)`: row e belongs to the *old*
        index e, so it is applied first.
        """
        for i, dim in enumerate(self.dims):
            for cut in dim.cuts:
                if cut.within is not None and cut.axis in orders:
                    index = torch.cat([orders[cut.axis] + k * cut.size(full) for k in range(len(dim.segments))], dim=1)
                    view = [len(index)] + [1] * (tensor.dim() - 1)
                    view[i] = index.shape[1]
                    tensor = torch.take_along_dim(tensor, index.view(view).to(tensor.device), dim=i)
                    break  # all segments of the dimension were sorted at once
        for i, dim in enumerate(self.dims):
            order = dim.order(full, orders)
            if order is not None:
                tensor = tensor.index_select(i, order.to(tensor.device))
        return tensor


def take(tensor: torch.Tensor, runs: Sequence[Sequence[Run]]) -> torch.Tensor:
    """Keep the given ranges of every dimension; a view if each dimension has one."""
    for i, ranges in enumerate(runs):
        parts = [tensor.narrow(i, start, stop - start) for start, stop in ranges]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim=i)
    return tensor


def without(runs: Sequence[Run], taken: Sequence[Run]) -> list[Run]:
    """The indices of `runs` that are not in `taken`, both in order."""
    left: list[Run] = []
    for start, stop in runs:
        for first, last in taken:
            if first < stop and last > start:
                if start < first:
                    left.append((start, first))
                start = max(start, last)
        if start < stop:
            left.append((start, stop))
    return left


def places_of(runs: Sequence[Run]) -> Iterator[tuple[slice, slice]]:
    """Every range of one dimension, and where it lies when they are joined."""
    done = 0
    for start, stop in runs:
        yield slice(start, stop), slice(done, done + stop - start)
        done += stop - start


def shape_of(region: Sequence[Sequence[Run]]) -> tuple[int, ...]:
    """Shape of what lies in the ranges of every dimension."""
    return tuple(sum(stop - start for start, stop in runs) for runs in region)


def indices_of(runs: Sequence[Run]) -> Iterator[int]:
    """The indices in the ranges of one dimension."""
    return (i for start, stop in runs for i in range(start, stop))


def dim(*segment: Factor, **segments: Segment) -> Dim:
    """Build a [`Dim`]: `dim(8, Cut("heads"))` for one segment, `dim(gate=(...), up=(...))` for a concatenation."""
    if bool(segment) == bool(segments):
        raise TypeError("give either the factors of one segment or named segments")
    return Dim((("", segment),) if segment else tuple(segments.items()))
