"""What an architecture has to say for itself: its axes, its tensors, and the names of its size fields."""

from __future__ import annotations

import copy
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ElasticConfigError, did_you_mean, shown
from .axes import Cut, Dim, Sizes, TensorRule
from .hosts import Host
from .obstacles import Obstacle
from .remembered import Remembered
from .submodel import LAYERS, Submodel


@dataclass(frozen=True)
class Axis:
    """One dimension of the parent that can shrink.

    Args:
        name (`str`): Name users call it by, the same for all architectures.
        field (`str`): Field of the stock config that holds its size.
        part (`str`, *optional*): Part of a layer it belongs to (`Architecture.parts`); `None` if it is global.
        groups (`str`, *optional*):
            Field with the number of groups its size counts over; every group keeps the same share, and a prefix of its own.
        channels (`str`, *optional*):
            Axis of the channels inside every one of its entries. Both are scored by the second moments of the channels: a channel by its sum over
            the entries, an entry by the channels that the smallest budget keeps (arXiv 2511.16664, eq. A 3 and A 4).
        among (`str`, *optional*):
            Axis of experts of which so many are used for a token. Nothing is cut along it and nothing is scored: the router ranks them itself.
        counts (`bool`, *optional*, defaults to `False`):
            It counts whole things such as heads, of which any number will do; other sizes are rounded to multiples that are fast. Axes with `groups`
            or `among`, and those of experts, count.
        shared (`bool`, *optional*, defaults to `False`):
            It is of a block that several layers share (`Architecture.sharers`): one size, and one order, in all of them.
    """

    name: str
    field: str
    part: str | None = None
    groups: str | None = None
    channels: str | None = None
    among: str | None = None
    counts: bool = False
    shared: bool = False

    @property
    def policy(self) -> str:
        """How a smaller size is taken out; written into the config so that no reader has to guess."""
        return f"prefix per group of {self.groups}" if self.groups else "prefix"


@dataclass(frozen=True)
class StateRule:
    """One tensor that generation keeps for a layer, as `TensorRule` is one of its weights.

    Args:
        kind (`str`): `"keys"` or `"values"` (per token), `"conv"` or `"ssm"` (per sequence; `"ssm"` in float32).
        dims (`tuple[Dim, ...]`): What runs along its dimensions, without those of sequences and tokens.
        degree (`float`):
            A submodel with k of the N hidden channels writes it about `(k / N) ** degree` times as large as the parent, because its norms
            run over fewer channels: 1/2 for what is linear in the normalised hidden state, 1 for products of two such.
        slot (`int`, *optional*, defaults to 0): Which of several `"conv"` or `"ssm"` states of the layer, upstream's `state_idx`.
        window (`int`, *optional*): Attention sees so many tokens, the newest included; of keys and values no more than the others are kept.
    """

    kind: Literal["keys", "values", "conv", "ssm"]
    dims: tuple[Dim, ...]
    degree: float
    slot: int = 0
    window: int | None = None

    @property
    def key(self) -> str:
        """What tells it from the other states of a layer."""
        return state_key(self.kind, self.slot)

    def count(self, sizes: Sizes) -> int:
        """Number of elements for these sizes, per token for keys and values."""
        return math.prod(dim.size(sizes) for dim in self.dims)


def tokens_kept(tokens: int, window: int | None) -> int:
    """Of how many tokens a layer keeps keys and values when it has read so many, as upstream's cache does it."""
    return tokens if window is None else min(tokens, window - 1 or tokens)


def state_key(kind: str, slot: int) -> str:
    """`"conv"`, and `"conv.1"` for the next one of that kind."""
    return f"{kind}.{slot}" if slot else kind


_BUILDABLE = Remembered(512)
"""Submodels whose stock config was built already."""


class Architecture(ABC):
    """Table of one `model_type`. Subclasses declare; the methods here only read what they declare."""

    model_type: ClassVar[str]
    causal_class: ClassVar[type[PreTrainedModel]]
    base_class: ClassVar[type[PreTrainedModel]]
    axes: ClassVar[tuple[Axis, ...]]
    disk_prefix: ClassVar[str] = "model."  # of the base model's tensors in the Hub repository
    layers_path: ClassVar[str] = "model.layers"
    one_share: ClassVar[tuple[str, ...]] = ()  # axes that other programs hold only if all are cut by the same share
    old_names: ClassVar[Mapping[str, str]] = {}  # how names end, and how they did in older files
    hosts: ClassVar[tuple[Host, ...]] = ()  # larger models whose repositories hold a parent
    layer_class: ClassVar[
        Callable[[PreTrainedConfig, int], nn.Module]
    ]  # builds a stock layer from the config of that layer
    layer_lists: ClassVar[tuple[str, ...]] = ()  # fields with one entry per layer
    hub_tags: ClassVar[tuple[str, ...]] = ("mamba", "moe")  # parts whose name is a tag of the model card
    index_argument: ClassVar[int | None] = (
        None  # which argument of a layer's call, from 0, is its own index (`layer_idx`)
    )
    reads_on: ClassVar[bool] = (
        True  # the stock model reads several tokens on top of a cache as it reads them one by one
    )
    layer_outputs: ClassVar[int] = 0  # a stock layer returns a tuple of so many, the hidden state first; 0: that alone

    # -- to be declared ------------------------------------------------------------------------------------------------

    @abstractmethod
    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        """The parts that a layer has; an axis exists in a layer that has its part."""

    @abstractmethod
    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        """One rule per tensor of the causal model with this config, per-layer sizes resolved by `Submodel.at`."""

    def layer_fields(self, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
        """The config fields that say how many layers there are and list them, for the layers that are kept."""
        lists = {name: getattr(config, name, None) for name in self.layer_lists}
        return {"num_hidden_layers": len(kept)} | {n: [v[i] for i in kept] for n, v in lists.items() if v is not None}

    def build_layer(self, config: PreTrainedConfig, layer: int) -> nn.Module:
        """A stock layer from the config of that layer."""
        return type(self).layer_class(config, layer)

    @abstractmethod
    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        """What generation keeps for this layer, whose own config is given."""

    def sharers(self, config: PreTrainedConfig, layer: int) -> tuple[int, ...]:
        """The layers that have a block in common with this one, itself included, in order; see `TensorRule.shared_by`."""
        return (layer,)

    def bias_router(self, router: Any, source: Any, bias: torch.Tensor, top_k: int) -> None:
        """Let `router`, of the full size, choose `top_k` experts with `bias` added to what it chooses by, in place.

        Args:
            router: Stock router that is changed; its weight may be exchanged afterwards.
            source: Stock router that owns the parent's tensors; may be the same.
            bias (`torch.Tensor`): `(experts,)`, `-inf` for experts that must not be chosen.
        """
        raise NotImplementedError(f"the table of {self.model_type} has a router and does not say how it is biased")

    def size(self, config: PreTrainedConfig, axis: Axis) -> int:
        """Size of an axis in the config of a model, or of one of its layers, where the stock class does not compute it from the field."""
        return _field(config, axis.field)

    def tied_fields(self, config: PreTrainedConfig, part: str, sizes: Sizes) -> dict[str, Any]:
        """Fields that follow from the sizes of a part of a layer because the stock config computes one from another."""
        return {}

    def unused_fields(self, config: PreTrainedConfig, parts: frozenset[str], sizes: Sizes) -> dict[str, Any]:
        """Fields of parts that no kept layer has, where the stock config checks them against global sizes all the same.

        Args:
            config (`PreTrainedConfig`): The parent's config.
            parts (`frozenset[str]`): What the kept layers have.
            sizes (`Sizes`): Of the global axes.
        """
        return {}

    def export_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        """What an exported `config.json` says otherwise than the stock class writes it, because other programs read it, too.

        The stock class reads both alike. `None` leaves an entry out.
        """
        return {}

    def obstacles(self, config: PreTrainedConfig, submodel: Submodel) -> Iterable[Obstacle]:
        """What keeps other programs from running a submodel with one size per axis; see `hf_elastic.architectures.portability`."""
        return ()

    def check_layer(self, config: PreTrainedConfig, sizes: Sizes, where: str) -> None:  # noqa: B027 - nothing to check by default
        """Raise [`ElasticConfigError`] if the stock model could not be built with these sizes."""

    # -- what follows --------------------------------------------------------------------------------------------------

    def host(self, model_type: Any) -> Host | None:
        """The larger model of this `model_type`, if parents are part of it."""
        return next((host for host in self.hosts if host.model_type == model_type), None)

    def ignored(self, stock: type[PreTrainedModel] | None = None) -> list[str]:
        """Patterns of names that may be in a parent's files beside its own: what the stock class ignores, and passengers of larger models.

        Args:
            stock (`type[PreTrainedModel]`, *optional*): The class that is loaded; defaults to the causal one.
        """
        patterns = list((stock or self.causal_class)._keys_to_ignore_on_load_unexpected or ())
        return patterns + [f"^{re.escape(prefix)}" for host in self.hosts for prefix in host.passengers]

    def axis(self, name: str) -> Axis:
        for axis in self.axes:
            if axis.name == name:
                return axis
        known = [axis.name for axis in self.axes] + [LAYERS]
        raise ElasticConfigError(
            f"unknown axis {name!r} for {self.model_type}: it has {', '.join(known)}.{did_you_mean(name, known)}"
        )

    @property
    def stream(self) -> str:
        """The axis of the residual stream, which belongs to no part."""
        return next(axis.name for axis in self.axes if axis.part is None)

    @property
    def per_token(self) -> dict[str, str]:
        """Per axis of experts the axis that says how many of them a token uses."""
        return {axis.among: axis.name for axis in self.axes if axis.among}

    def counts(self, name: str) -> bool:
        """Whether an axis counts whole things, of which any number will do (`Axis.counts`)."""
        axis = self.axis(name)
        return bool(axis.counts or axis.groups or axis.among or name in self.per_token)

    def heads_of(self, name: str) -> Axis | None:
        """The axis whose entries consist of the channels of an axis, or are them; `None` if an axis is scored alone."""
        return next((axis for axis in self.axes if axis.channels and name in (axis.name, axis.channels)), None)

    def orders(self, config: PreTrainedConfig) -> dict[tuple[str, int | None], Cut]:
        """What is sorted by itself though its size follows an axis (`Cut.order`), by name and layer."""
        cuts = ((cut, rule.layer) for rule in self.rules(config) for dim in rule.dims for cut in dim.cuts)
        return {(cut.order, layer): cut for cut, layer in cuts if cut.order}

    def depth(self, config: PreTrainedConfig) -> int:
        return int(config.num_hidden_layers)

    def layer_units(self, config: PreTrainedConfig) -> list[list[int]]:
        """Layers that can only be kept or dropped together, as the stock config says where kinds of layers are by a period; mostly each by itself."""
        return [[layer] for layer in range(self.depth(config))]

    def with_positions(self, config: PreTrainedConfig, layers: Iterable[int]) -> list[int]:
        """Those of the layers that keep keys and values of every token: attention."""
        return [i for i in layers if any(s.kind == "keys" for s in self.states(config.per_layer_config[i], i))]

    def layers_with(self, config: PreTrainedConfig, axis: Axis) -> list[int]:
        """Indices of the layers that have an axis."""
        return [i for i in range(self.depth(config)) if axis.part in self.parts(config, i)]

    def parts_of(self, config: PreTrainedConfig, layers: Iterable[int]) -> frozenset[str]:
        """What at least one of some layers has."""
        return frozenset[str]().union(*(self.parts(config, layer) for layer in layers))

    def available_axes(self, config: PreTrainedConfig) -> list[Axis]:
        """The axes that at least one layer of this config has."""
        return [axis for axis in self.axes if axis.part is None or self.layers_with(config, axis)]

    def full(self, config: PreTrainedConfig) -> Submodel:
        """The whole parent as a submodel of itself."""
        depth = self.depth(config)
        layers = [(config.per_layer_config[i], self.parts(config, i)) for i in range(depth)]
        for axis in self.axes:
            if axis.groups:
                for layer_config in (c for c, parts in layers if axis.part in parts):
                    _field(layer_config, axis.groups)
        items: list[tuple[str, int | tuple[int | None, ...]]] = []
        for axis in self.axes:
            if axis.part is None:
                items.append((axis.name, self.size(config, axis)))
            elif any(axis.part in parts for _, parts in layers):
                sizes = (self.size(c, axis) if axis.part in parts else None for c, parts in layers)
                items.append((axis.name, tuple(sizes)))
        return Submodel(tuple(items), tuple(range(depth)), depth)

    def submodel(self, config: PreTrainedConfig, sizes: Mapping[str, Any], name: str = "the submodel") -> Submodel:
        """Check sizes as users write them and complete them from the parent.

        Args:
            config (`PreTrainedConfig`): The parent's config.
            sizes (`dict[str, Any]`):
                Per axis an `int`, or per layer a list with one entry per parent layer (`None` where it does not apply) or a dict
                from layer index to size. `layers` takes the list of kept layers. Axes that are not named keep the parent's size.
            name (`str`, *optional*): How to call it in errors.

        Raises:
            `ElasticConfigError`: unknown axis, a size below 1 or above the parent's, a size its groups do not divide, more experts
                per token than experts, or sizes that the stock config cannot express together.
        """
        full = self.full(config)
        for axis_name in sizes:
            if axis_name != LAYERS:
                self.axis(axis_name)  # raises for an unknown one
                if axis_name not in full:
                    raise ElasticConfigError(
                        f"{name}: no layer of this {self.model_type} parent has axis {axis_name!r}."
                    )
        kept = _kept_layers(sizes.get(LAYERS), full.depth, name)
        items: list[tuple[str, int | tuple[int | None, ...]]] = []
        for axis_name, parent in full.items:
            value = sizes.get(axis_name, parent)
            if isinstance(parent, int):
                items.append((axis_name, _checked_size(value, parent, f"{name}: {axis_name}")))
            else:
                items.append((axis_name, _per_layer(value, parent, kept, f"{name}: {axis_name}")))
        result = Submodel(tuple(items), kept, full.depth)
        self.check(config, result, name)
        return result

    def keepable_ranking(self, config: PreTrainedConfig, ranking: Sequence[int]) -> list[int]:
        """A ranking of layers whose first `depths` can be built: units stay together, and the best one with attention comes first, see `check`."""
        place = {layer: i for i, layer in enumerate(ranking)}
        if place.keys() != set(range(self.depth(config))):
            return list(ranking)  # of another model, which whoever uses it refuses
        # What is left at the end of a period comes last, so that the same numbers of layers can be kept whatever the ranking says.
        units = sorted(
            self.layer_units(config), key=lambda unit: (-len(unit), sum(place[i] for i in unit) / len(unit))
        )
        first = next(([unit] for unit in units if self.with_positions(config, unit)), [])
        return [layer for unit in first + [unit for unit in units if unit not in first] for layer in unit]

    def depths(self, config: PreTrainedConfig, ranking: Sequence[int]) -> list[int]:
        """How many layers of such a ranking can be kept, smallest first."""
        unit_of = {layer: unit for unit in self.layer_units(config) for layer in unit}
        kept: set[int] = set()
        depths = []
        for layer in ranking:
            kept.add(layer)
            if all(kept.issuperset(unit_of[other]) for other in kept):
                depths.append(len(kept))
        return depths

    def check(self, config: PreTrainedConfig, submodel: Submodel, name: str = "the submodel") -> None:
        """Raise [`ElasticConfigError`] for sizes that groups do not divide or the stock model cannot have."""
        if len(submodel.layers) < submodel.depth and not self.with_positions(config, submodel.layers):
            attention = self.with_positions(config, range(submodel.depth))
            if attention:
                raise ElasticConfigError(
                    f"{name}: layers={list(submodel.layers)} drops every attention layer; the stock cache counts positions in one of them, "
                    f"so keep at least one of {attention}."
                )
        try:
            self.layer_fields(config, submodel.layers)
        except ElasticConfigError as error:
            raise ElasticConfigError(f"{name}: {error}") from error
        for layer in submodel.layers:
            sizes = submodel.at(layer)
            where = f"{name}, layer {layer}"
            layer_config = config.per_layer_config[layer]
            for axis in self.axes:
                groups = int(getattr(layer_config, axis.groups)) if axis.groups and axis.name in sizes else 1
                if axis.name in sizes and sizes[axis.name] % groups:
                    raise ElasticConfigError(
                        f"{where}: {axis.name}={sizes[axis.name]} does not divide into the {groups} {axis.groups} of the parent; "
                        f"every group keeps the same share, so give a multiple of {groups}."
                    )
            for experts, used in self.per_token.items():
                if experts in sizes and sizes[used] > sizes[experts]:
                    raise ElasticConfigError(
                        f"{where}: {used}={sizes[used]} is more than the {sizes[experts]} {experts} kept; lower {used} or keep more {experts}."
                    )
            self._check_shared(config, submodel, layer, name)
            self.check_layer(layer_config, sizes, where)
        self._check_config(config, submodel, name)

    def _check_shared(self, config: PreTrainedConfig, submodel: Submodel, layer: int, name: str) -> None:
        """Raise [`ElasticConfigError`] if layers that share a block would have it in several sizes."""
        together = [i for i in self.sharers(config, layer) if i in submodel.layers]
        for axis in (axis.name for axis in self.axes if axis.shared and axis.name in submodel.at(layer)):
            found = [submodel.at(i)[axis] for i in together]
            if len(set(found)) > 1:
                raise ElasticConfigError(
                    f"{name}: {axis}={found} in layers {together}, which share one block and so have one size of it; give all of them the same."
                )

    def _check_config(self, config: PreTrainedConfig, submodel: Submodel, name: str) -> None:
        """Raise [`ElasticConfigError`] if the stock config has a rule of its own against these sizes; it is built once to ask."""
        facts = (type(self), type(config), config.__dict__, submodel)
        _BUILDABLE(facts, lambda: self._build_config(config, submodel, name))

    def _build_config(self, config: PreTrainedConfig, submodel: Submodel, name: str) -> None:
        try:
            built = self.config_for(config, submodel)
            for layer in built._heterogeneity_spec.per_layer_overrides if built.is_heterogeneous else ():
                built.per_layer_config[layer].validate()
        except (StrictDataclassError, ValueError, TypeError, ArithmeticError) as error:
            sizes = submodel.differs(self.full(config)) or "the parent's own sizes"
            why = str(error.__cause__ or error).rstrip(".")
            raise ElasticConfigError(
                f"{name}: a stock {self.model_type} config cannot hold {sizes}: {why}. Choose others."
            ) from error
        wanted, read = submodel.within(submodel.layers), self.full(built)
        if read.to_dict() != wanted.to_dict():  # what it takes for other sizes, or for other kinds of layers
            raise ElasticConfigError(
                f"{name}: a stock {self.model_type} config cannot say {dict(wanted.differs(read))}; it is read as "
                f"{dict(read.differs(wanted))} then. Choose others."
            )

    def config_for(self, config: PreTrainedConfig, submodel: Submodel) -> PreTrainedConfig:
        """The stock config of a submodel. Global fields hold the sizes of the first layer of each kind, `per_layer_config` the rest.

        The result keeps everything else of the parent's config, its attention and experts implementations included.
        """
        fields = config.to_dict()
        fields.pop("per_layer_config", None)
        fields.update(self.layer_fields(config, submodel.layers))
        fields.update(self.unused_fields(config, self.parts_of(config, submodel.layers), submodel.at(None)))
        overrides: dict[int, dict[str, Any]] = {}
        sizes = {new: submodel.at(layer) for new, layer in enumerate(submodel.layers)}
        fields.update({axis.field: submodel.at(None)[axis.name] for axis in self.axes if axis.part is None})
        first: dict[str | None, int] = {}  # the layer whose sizes become the global fields, per part
        wanted: list[dict[str, Any]] = []
        for new, layer in enumerate(submodel.layers):
            layer_config = config.per_layer_config[layer]
            here = {axis.field: sizes[new][axis.name] for axis in self.axes if axis.part and axis.name in sizes[new]}
            for part in self.parts(config, layer):
                if part not in first:
                    first[part] = new
                    own = {axis.field for axis in self.axes if axis.part == part}
                    fields.update({field: size for field, size in here.items() if field in own})
                    fields.update(self.tied_fields(layer_config, part, sizes[new]))
            here |= {
                k: v
                for part in self.parts(config, layer)
                for k, v in self.tied_fields(layer_config, part, sizes[new]).items()
            }
            wanted.append(here)
        for new, here in enumerate(wanted):  # once all fields are known: two parts may share one
            different = {field: value for field, value in here.items() if value != fields[field]}
            if different:
                overrides[new] = different
        result = type(config)(**_stored(fields, config))
        if overrides:
            result.per_layer_config = {layer: _stored(different, config) for layer, different in overrides.items()}
        result._attn_implementation = config._attn_implementation
        result._experts_implementation = config._experts_implementation
        result.dtype = config.dtype
        result.architectures = copy.copy(config.architectures)
        return result

    def differing(self, submodel: Submodel) -> list[str]:
        """The axes whose field says something else in some layers than in others; two axes may share one."""
        sizes: dict[str, set[int]] = {}
        for name in submodel:
            sizes.setdefault(self.axis(name).field, set()).update(submodel.values(name))
        return [name for name in submodel if len(sizes[self.axis(name).field]) > 1]

    def passed(self, hidden: torch.Tensor) -> Any:
        """What a stock layer would return that changes nothing."""
        return (hidden, *[None] * (self.layer_outputs - 1)) if self.layer_outputs else hidden

    def layers_of(self, model: nn.Module) -> nn.ModuleList:
        """The stock model's list of layers, of a causal or a base model."""
        try:
            return model.get_submodule(self.layers_path)  # type: ignore[return-value]
        except AttributeError:
            return model.get_submodule(self.layers_path.partition(".")[2])  # type: ignore[return-value]


@contextmanager
def uniform(config: PreTrainedConfig) -> Iterator[None]:
    """Hide that sizes differ per layer: stock code that only knows global fields would raise on reading one that does."""
    differences = config.__dict__.pop("_heterogeneity_spec", None)
    try:
        yield
    finally:
        if differences is not None:
            config._heterogeneity_spec = differences


def _field(config: PreTrainedConfig, name: str) -> int:
    """A size or a number of groups in the parent's config."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ElasticConfigError(
            f"the parent's {name}={shown(value)} must be at least 1, and a whole number; its config was edited or damaged."
        )
    return value


def _stored(fields: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Fields under the names that `to_dict` has them under; both names of one field given, what stands under the other one counts."""
    other = config.attribute_map
    return {name: v for name, v in fields.items() if name not in other} | {
        other[name]: value for name, value in fields.items() if name in other
    }


def _kept_layers(value: Any, depth: int, name: str) -> tuple[int, ...]:
    if value is None:
        return tuple(range(depth))
    if isinstance(value, (str, int)) or not isinstance(value, Iterable):
        raise ElasticConfigError(
            f"{name}: layers={shown(value)} must list the indices of the kept layers, each in 0..{depth - 1}."
        )
    layers = tuple(value)
    bad = [i for i in layers if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < depth]
    if bad or len(set(layers)) != len(layers) or not layers:
        raise ElasticConfigError(
            f"{name}: layers={shown(list(layers))} must be different layer indices in 0..{depth - 1}, at least one"
            + (f"; {shown(bad)} is not." if bad else ".")
        )
    return tuple(sorted(layers))


def _checked_size(value: Any, parent: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ElasticConfigError(f"{where}={shown(value)} must be a whole number in 1..{parent}.")
    if not 1 <= value <= parent:
        raise ElasticConfigError(f"{where}={value} is out of range: the parent has {parent}, give 1..{parent}.")
    return value


def _per_layer(
    value: Any, parent: tuple[int | None, ...], kept: tuple[int, ...], where: str
) -> tuple[int | None, ...]:
    depth = len(parent)
    if isinstance(value, Mapping):
        stray = [
            i
            for i in value
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < depth or parent[i] is None
        ]
        if stray:
            having = [i for i, size in enumerate(parent) if size is not None]
            raise ElasticConfigError(
                f"{where} names layers {stray} that do not have the axis; layers {having} have it."
            )
        value = [value.get(i, parent[i]) for i in range(depth)]
    if isinstance(value, (list, tuple)):
        if len(value) != depth:
            raise ElasticConfigError(
                f"{where} has {len(value)} entries; give one per layer of the parent, that is {depth}."
            )
        for i, (size, full) in enumerate(zip(value, parent, strict=True)):
            if full is None and size is not None:
                raise ElasticConfigError(
                    f"{where}[{i}]={shown(size)}: layer {i} does not have the axis, give None there."
                )
            if full is not None and size is None and i in kept:
                raise ElasticConfigError(f"{where}[{i}] is missing: layer {i} has the axis, give 1..{full}.")
    else:
        value = [None if full is None else value for full in parent]
    return tuple(
        None if full is None or i not in kept else _checked_size(size, full, f"{where}[{i}]")
        for i, (size, full) in enumerate(zip(value, parent, strict=True))
    )
