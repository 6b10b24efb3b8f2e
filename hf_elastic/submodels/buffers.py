"""Buffers that are not saved, such as rotary frequencies: a model has those of its own config, not what a loader left in memory.

No checkpoint holds them, so nothing that compares checkpoints notices if they are wrong. Here they are compared with those of modules that are
built anew, which costs nothing where a model has none, and else the building of these modules alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ..architectures import ARCHITECTURES
from ..errors import CheckpointError


def constant_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """Every buffer that is not saved: its name in the model, its module, its name there, and itself."""
    for path, module in model.named_modules():
        for leaf in sorted(module._non_persistent_buffers_set):
            if (buffer := module._buffers.get(leaf)) is not None:
                yield f"{path}.{leaf}".lstrip("."), module, leaf, buffer


def fresh_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The buffers that are not saved as a newly built model of the same class and config has them, on the CPU.

    Those of a layer are those of a layer that is built from the config of that layer (`Architecture.build_layer`), as sizes can differ per layer.
    """
    architecture = ARCHITECTURES.get(model.config.model_type)
    layers = {} if architecture is None else {layer: i for i, layer in enumerate(architecture.layers_of(model))}
    inside = {id(module): (i, path) for layer, i in layers.items() for path, module in layer.named_modules()}
    built: dict[int | None, nn.Module] = {}
    values: dict[str, torch.Tensor] = {}
    for name, module, leaf, _ in constant_buffers(model):
        layer, path = inside.get(id(module), (None, ""))
        if layer is not None and architecture is not None:
            if layer not in built:
                built[layer] = _without_weights(architecture.build_layer, model.config.per_layer_config[layer], layer)
            values[name] = built[layer].get_submodule(path).get_buffer(leaf)
        elif (made := _built(module)) is not None:
            values[name] = made.get_buffer(leaf)
        else:
            if None not in built:
                built[None] = _without_weights(type(model), model.config)
            values[name] = built[None].get_buffer(name)
    return values


def set_buffers(model: PreTrainedModel) -> None:
    """Give every buffer that is not saved the values of a newly built model, where and in which type it is.

    A loader makes a model without storage and fills in what files hold; upstream then computes the rest again in classes of its own only, and
    what a model puts on its layers from outside (Falcon-H1's multipliers) not even there.
    """
    fresh = fresh_buffers(model)
    for name, module, leaf, buffer in list(constant_buffers(model)):
        if not (buffer.is_meta or same_values(buffer, fresh[name], exact=True)):
            module._buffers[leaf] = fresh[name].to(buffer.device, buffer.dtype if buffer.is_floating_point() else None)


def check_buffers(model: PreTrainedModel, where: Any) -> None:
    """Compare the buffers that are not saved with those of a newly built model.

    Args:
        model (`PreTrainedModel`): On any device.
        where: What it is called in the message.

    Raises:
        `CheckpointError`: names the first that differ.
    """
    fresh = fresh_buffers(model)
    wrong = [
        name
        for name, _, _, buffer in constant_buffers(model)
        if not (buffer.is_meta or same_values(buffer, fresh[name]))
    ]
    if wrong:
        raise CheckpointError(
            f"{where} has other values in {', '.join(wrong[:5])} than a newly built model of its config. They are not saved but computed, so whoever "
            "loads it again would get others. Load it with from_pretrained, or set what the config says."
        )


def same_values(buffer: torch.Tensor, fresh: torch.Tensor, exact: bool = False) -> bool:
    """Whether a buffer holds what a newly made one holds, up to rounding in its dtype and on its device.

    Args:
        exact (`bool`, *optional*, defaults to `False`):
            In 16 bits bit by bit: there, two sizes can differ by one rounding alone (the roots of 1024 and 1016 in bfloat16).
    """
    if buffer.shape != fresh.shape:
        return False
    precise = buffer.dtype in (torch.float32, torch.float64)
    if not buffer.is_floating_point() or (exact and not precise):
        return torch.equal(buffer.cpu(), fresh.to(buffer.dtype))
    return torch.allclose(buffer.cpu().double(), fresh.double(), rtol=1e-5 if precise else 2**-7, atol=0)


def share_constant_buffers(tree: PreTrainedModel, parent: nn.Module) -> None:
    """Give a model without storage its buffers that are not saved: the parent's where they are the same, and else its own.

    Args:
        tree (`PreTrainedModel`): Stock model of a submodel's config.
        parent (`nn.Module`): The whole parent (causal or base model, as `tree`).
    """
    fresh = fresh_buffers(tree)
    theirs = dict(parent.named_buffers(remove_duplicate=False))
    device = next(iter(parent.parameters())).device
    for name, module, leaf, _ in list(constant_buffers(tree)):
        value, there = fresh[name], theirs.get(name)
        if there is None:
            module._buffers[leaf] = value.to("cpu" if device.type == "meta" else device)
        elif there.is_meta or same_values(there, value, exact=True):
            module._buffers[leaf] = there
        else:
            module._buffers[leaf] = value.to(there.device, there.dtype if there.is_floating_point() else None)


def _built(module: nn.Module) -> nn.Module | None:
    """A new module of the same class and config, if that is all it is built from."""
    parameters = list(inspect.signature(type(module)).parameters.values())
    simple = parameters and parameters[0].name == "config" and hasattr(module, "config")
    if not simple or any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters[1:]):
        return None
    return _without_weights(type(module), module.config)


def _without_weights(make: Callable[..., nn.Module], *args: Any) -> nn.Module:
    with torch.device("cpu"), init_empty_weights(include_buffers=False), no_init_weights():
        return make(*args)
