"""Training at a budget: the parent's own modules and parameters, but only the arithmetic of the submodel.

Each unit of the parent (embeddings, every layer, final norm, head) gets a *stencil*: the stock module of the submodel, without storage.
The unit's forward narrows its own live parameters and runs the stencil on them. Because the unit itself is called, everything that hangs
on it still works: autograd reaches the parent's parameters, gradient checkpointing recomputes the same thing, FSDP gathers before and
reduces after. A dropped layer is the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .architectures import Architecture
from .errors import ElasticConfigError
from .slicing import Piece, local_names, pieces
from .submodel import Submodel


@dataclass
class Unit:
    """A module of the parent and the module of the submodel that takes its place.

    Args:
        module (`nn.Module`): Of the parent; owns the parameters.
        stencil (`nn.Module`, *optional*): Stock module without storage; `None` if the layer is dropped.
        parts (`list[tuple[str, Piece]]`): Tensors, by their name inside the unit (the same in both modules).
    """

    module: nn.Module
    stencil: nn.Module | None
    parts: list[tuple[str, Piece]] = field(default_factory=list)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the parent's module computes at this budget."""
        if self.stencil is None:
            return args[0] if args else kwargs["hidden_states"]
        if self.stencil.training != self.module.training:
            self.stencil.train(self.module.training)
        live = {name: piece.narrow(attribute(self.module, name)) for name, piece in self.parts}
        return torch.func.functional_call(self.stencil, live, args, kwargs)


def make_units(
    model: nn.Module, architecture: Architecture, config: PreTrainedConfig, tree: PreTrainedModel, submodel: Submodel
) -> list[Unit]:
    """Stencils of a submodel for all units of the parent.

    Args:
        model (`nn.Module`): The parent, causal or base.
        config (`PreTrainedConfig`): The parent's stock config.
        tree (`PreTrainedModel`): Stock model of the submodel's config on `meta`; its modules become the stencils.

    Raises:
        `ElasticConfigError`: adapters are attached; a stencil reads the weights under them and would compute without them.
    """
    _refuse_adapters(model)
    layers, thin = architecture.layers_of(model), architecture.layers_of(tree)
    position = {layer: new for new, layer in enumerate(submodel.layers)}
    units = {id(layer): Unit(layer, thin[position[i]] if i in position else None) for i, layer in enumerate(layers)}
    available = tree.state_dict()
    for piece in pieces(architecture, config, submodel):
        target, source = local_names(piece, architecture, available)
        if target is None:
            continue
        if piece.rule.layer is not None:
            inside = source.partition(f"layers.{piece.rule.layer}.")[2]
            units[id(layers[piece.rule.layer])].parts.append((inside, piece))
        else:
            owner, _, leaf = source.rpartition(".")
            module = model.get_submodule(owner)
            unit = units.setdefault(id(module), Unit(module, tree.get_submodule(target.rpartition(".")[0])))
            unit.parts.append((leaf, piece))
    return list(units.values())


def install(units: list[Unit]) -> None:
    """Let the parent's modules compute what the submodel computes.

    Raises:
        `ElasticConfigError`: adapters were attached after the stencils were made. No module has changed then.
    """
    for unit in units:
        _refuse_adapters(unit.module)
    for unit in units:
        unit.module.forward = partial(checkpointed, unit.module, unit.forward)  # type: ignore[method-assign]


def uninstall(units: list[Unit]) -> None:
    """Give the parent's modules their own forward back."""
    for unit in units:
        unit.module.__dict__.pop("forward", None)


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


def attribute(module: nn.Module, name: str) -> torch.Tensor:
    """A tensor of a module by its dotted name."""
    for part in name.split("."):
        module = getattr(module, part)
    return module  # type: ignore[return-value]


def _refuse_adapters(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if hasattr(part, "adapter_layer_names"):  # every tuner layer of peft has it
            raise ElasticConfigError(
                f"adapters are attached to {name or type(part).__name__}, and a budget would compute without them; merge or unload them "
                "before switching budgets."
            )
