"""Training at a budget: the parent's own modules and parameters, but only the arithmetic of the submodel.

Each unit of the parent (embeddings, every layer, final norm, head) gets a *stencil*: the stock module of the submodel, without storage.
The unit's forward narrows its own live parameters and runs the stencil on them. Because the unit itself is called, everything that hangs
on it still works: autograd reaches the parent's parameters, gradient checkpointing recomputes the same thing, FSDP gathers before and
reduces after. A dropped layer is the identity. LoRA adapters of a unit follow the budget ([`hf_elastic.submodels.adapters`]).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..architectures import Architecture
from ..architectures.axes import places_of
from ..architectures.pieces import Piece, pieces
from ..architectures.submodel import Submodel
from ..errors import ElasticConfigError
from .adapters import factor_rules, factors, follow, is_tuner, refuse_unsupported, wrappers
from .buffers import share_constant_buffers
from .rounding import Rounding
from .slicing import local_names


@dataclass
class Unit:
    """A module of the parent and the module of the submodel that takes its place.

    Args:
        module (`nn.Module`): Of the parent; owns the parameters.
        stencil (`nn.Module`, *optional*): Stock module without storage; `None` if the layer is dropped.
        parts (`list[tuple[str, Piece]]`): Tensors, by their name inside the parent's module.
        names (`dict[str, str]`): What the stencil calls them, where that is another name.
        index (`tuple[int, int]`, *optional*): The argument that tells a layer its own index, and what it is in the submodel.
        tuners (`list[tuple[nn.Module, nn.Module]]`): Adapter layers of the module, and those that the stencil carries for them.
        rounding (`Rounding`, *optional*): What the parent's weights are rounded to before they are cut.
    """

    module: nn.Module
    stencil: nn.Module | None
    passed: Callable[[torch.Tensor], Any] = staticmethod(lambda hidden: hidden)
    parts: list[tuple[str, Piece]] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    index: tuple[int, int] | None = None
    tuners: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)
    rounding: Rounding | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the parent's module computes at this budget."""
        if self.stencil is None:
            return self.passed(args[0] if args else kwargs["hidden_states"])
        self.follow()
        tensors = self.tensors()
        live = {self.names.get(name, name): cut(tensors[name], piece) for name, piece in self.parts}
        if self.index is not None:
            args, kwargs = _with_index(*self.index, args, kwargs)
        return torch.func.functional_call(self.stencil, live, args, kwargs)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The parent's tensors by their names in its module, as they are computed with."""
        found = {name: attribute(self.module, name) for name, _ in self.parts}
        return found if self.rounding is None else self.rounding(self.parts, found)

    def follow(self) -> None:
        """Bring the stencil into the mode of the parent's module, and its adapters into the state of the parent's."""
        if self.stencil is not None and self.stencil.training != self.module.training:
            self.stencil.train(self.module.training)
        for own, carried in self.tuners:
            follow(own, carried)


def make_units(
    model: nn.Module, architecture: Architecture, config: PreTrainedConfig, tree: PreTrainedModel, submodel: Submodel
) -> list[Unit]:
    """Stencils of a submodel for all units of the parent.

    Args:
        model (`nn.Module`): The parent, causal or base.
        config (`PreTrainedConfig`): The parent's stock config.
        tree (`PreTrainedModel`): Stock model of the submodel's config on `meta`; its modules become the stencils.

    Raises:
        `ElasticConfigError`: adapters are attached that cannot follow a budget.
    """
    refuse_unsupported(model, architecture, config)
    layers, thin = architecture.layers_of(model), architecture.layers_of(tree)
    position = {layer: new for new, layer in enumerate(submodel.layers)}
    units = {
        id(layer): Unit(layer, thin[position[i]] if i in position else None, architecture.passed)
        for i, layer in enumerate(layers)
    }
    if (argument := architecture.index_argument) is not None:
        for layer, new in position.items():
            units[id(layers[layer])].index = (argument, new)
    available = tree.state_dict()
    for piece in pieces(architecture, config, submodel):
        target, source = local_names(piece, architecture, available)
        if target is None:
            continue
        if piece.rule.layer is not None:
            inside = source.partition(f"layers.{piece.rule.layer}.")[2]
            unit = units[id(layers[piece.rule.layer])]
            unit.parts.append((inside, piece))
            if piece.rule.use != piece.target.use:
                unit.names[inside] = target.partition(f"layers.{piece.target.layer}.")[2]
        else:
            owner, _, leaf = source.rpartition(".")
            module = model.get_submodule(owner)
            unit = units.setdefault(id(module), Unit(module, tree.get_submodule(target.rpartition(".")[0])))
            unit.parts.append((leaf, piece))
    share_constant_buffers(tree, model)
    for unit in units.values():
        carry(unit)
    return list(units.values())


def _with_index(
    place: int, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer's call with another index for the layer."""
    if place < len(args):
        return (*args[:place], index, *args[place + 1 :]), kwargs
    return args, {**kwargs, "layer_idx": index} if "layer_idx" in kwargs else kwargs


def carry(unit: Unit) -> None:
    """Put the adapters of a unit's module into its stencil, and their factors among its parts."""
    if unit.stencil is None:
        return
    around = ""
    for path, layer in list(unit.module.named_modules()):
        if is_tuner(layer) and not (around and path.startswith(f"{around}.")):
            around = path
            _carry(unit, path, layer)


def _carry(unit: Unit, path: str, layer: Any) -> None:
    """Put the adapter layers around the module at `path` around that of the stencil."""
    stencil: Any = unit.stencil
    # A copy without storage: it stops at the module, which the stencil's replaces, and at the factors.
    memo: dict[int, Any] = {id(layer.get_base_layer()): stencil.get_submodule(path)}
    memo |= {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in factors(layer)}
    carried = copy.deepcopy(layer, memo)
    owner, _, leaf = path.rpartition(".")
    setattr(stencil.get_submodule(owner), leaf, carried)
    unit.tuners += zip(wrappers(layer), wrappers(carried), strict=True)

    own, parts, added = {}, [], []
    inside = path + ".base_layer" * len(list(wrappers(layer)))
    for name, piece in unit.parts:
        owner, _, leaf = name.rpartition(".")
        parts.append((f"{inside}.{leaf}" if owner == path else name, piece))
        if owner == path:
            own[leaf] = piece
    for depth, (wrapper, thin) in enumerate(zip(wrappers(layer), wrappers(carried), strict=True)):
        piece = own[getattr(wrapper, "parameter_name", "weight")]
        if len(piece.shape) == 3:
            thin.num_experts = piece.shape[0]
        for adapter, rank in wrapper.r.items():
            for kind, rule in zip("AB", factor_rules(piece.rule, rank), strict=True):
                name = f"{path}{'.base_layer' * depth}.lora_{kind}.{adapter}.weight"
                added.append((name, Piece(rule, rule, piece.full, piece.kept)))
    unit.parts = parts + added


class CutHead:
    """A module at a budget in training mode, for who uses its tensors beside its forward (trl multiplies by the head's weight).

    Args:
        unit (`Unit`): The module's.
    """

    def __init__(self, unit: Unit):
        self.module, self._pieces = unit.module, dict(unit.parts)

    def __getattr__(self, name: str) -> Any:
        if name not in self._pieces:
            return getattr(self.module, name)
        tensor = attribute(self.module, name)
        # A shard knows nothing of the rows that others hold.
        return cut(tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor, self._pieces[name])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class StandIn(partial):
    """A forward that stands in for the one of a parent's module."""


def install(units: list[Unit], rounding: Rounding | None = None) -> None:
    """Let the parent's modules compute what the submodel computes."""
    for unit in units:
        unit.rounding = rounding
        unit.module.forward = StandIn(checkpointed, unit.module, unit.forward)  # type: ignore[method-assign]


def uninstall(units: list[Unit]) -> None:
    """Give the parent's modules their own forward back."""
    for unit in units:
        unit.module.__dict__.pop("forward", None)


@contextmanager
def uninstalled(model: nn.Module) -> Iterator[None]:
    """Run the whole parent inside a `with` block, whatever is installed, and put that back afterwards."""
    modules = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), StandIn)]
    forwards = [module.__dict__.pop("forward") for module in modules]
    try:
        yield
    finally:
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward


def checkpointed(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a forward that stands in for the one of a parent's module, checkpointed if the module is.

    Upstream checkpoints inside the class's `forward`, which the stand-in replaces; as there, hooks of the module stay outside, and caches,
    which would be written twice, are left out.
    """
    if not (module.training and getattr(module, "gradient_checkpointing", False)):
        return forward(*args, **kwargs)
    kwargs.update({key: None for key in ("past_key_values", "layer_past") if key in kwargs})
    kwargs.update({"use_cache": False} if "use_cache" in kwargs else {})
    recompute: Any = module._gradient_checkpointing_func
    return recompute(partial(forward, **kwargs), *args)


class _Cut(torch.autograd.Function):
    """`Piece.narrow` whose gradient is written once, into one tensor of the parent's shape. Narrowing one dimension after the other
    would make such a tensor for each, which at small budgets took as long as a quarter of the step."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
        ctx.shape, ctx.runs = tensor.shape, piece.runs
        return piece.narrow(tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        whole = gradient.new_zeros(ctx.shape)
        for places in product(*(places_of(runs) for runs in ctx.runs)):
            kept, place = zip(*places, strict=True)
            whole[kept] = gradient[place]
        return whole, None


def cut(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """A tensor of the parent as the submodel has it; gradients reach the parent's, with zeros where nothing is kept."""
    if tensor.shape == piece.shape:
        return tensor
    return _Cut.apply(tensor, piece)  # type: ignore[no-untyped-call]


def attribute(module: nn.Module, name: str) -> torch.Tensor:
    """A tensor of a module by its dotted name.

    Raises:
        `ElasticConfigError`: an adapter was attached to its module after the stencil was made, which computes without it.
    """
    owner, _, leaf = name.rpartition(".")
    holder = module.get_submodule(owner)
    if is_tuner(holder):
        raise ElasticConfigError(
            f"adapters were attached to {owner} while a budget was active, and it computes without them; call set_budget(None), then "
            "set_budget() again."
        )
    return getattr(holder, leaf)
