"""Buffers that are not saved, such as rotary frequencies: a model has those of its own config, not what a loader left in memory.

No checkpoint holds them, so nothing that compares checkpoints notices if they are wrong. Here they are compared with those of modules that are
built anew, which costs nothing where a model has none, and else the building of these modules alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ..errors import CheckpointError


def constant_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """Every buffer that is not saved: its name in the model, its module, its name there, and itself."""
    for path, module in model.named_modules():
        for leaf in sorted(module._non_persistent_buffers_set):
            if (buffer := module._buffers.get(leaf)) is not None:
                yield f"{path}.{leaf}".lstrip("."), module, leaf, buffer


def fresh_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The buffers that are not saved as a newly built model of the same class and config has them, on the CPU."""
    whole: nn.Module | None = None
    values: dict[str, torch.Tensor] = {}
    for name, module, leaf, _ in constant_buffers(model):
        made = _built(module)
        if made is None:
            whole = whole or _without_weights(type(model), model.config)
            values[name] = whole.get_buffer(name)
        else:
            values[name] = made.get_buffer(leaf)
    return values


def check_buffers(model: PreTrainedModel, where: Any) -> None:
    """Compare the buffers that are not saved with those of a newly built model.

    Args:
        model (`PreTrainedModel`): On any device.
        where: What was loaded, for the message.

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
            f"loading {where} left other values in {', '.join(wrong[:5])} than a model of this config has. They are not saved but computed, so this "
            "is no fault of the files: the installed transformers builds this architecture in a way that hf_elastic does not know. Please report it."
        )


def same_values(buffer: torch.Tensor, fresh: torch.Tensor) -> bool:
    """Whether a buffer holds what a newly made one holds, up to rounding in its dtype and on its device."""
    if buffer.shape != fresh.shape:
        return False
    if not buffer.is_floating_point():
        return torch.equal(buffer.cpu(), fresh)
    precise = buffer.dtype in (torch.float32, torch.float64)
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
        elif there.is_meta or same_values(there, value):
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


def _without_weights(cls: Any, config: Any) -> nn.Module:
    with torch.device("cpu"), init_empty_weights(include_buffers=False), no_init_weights():
        made: nn.Module = cls(config)
    return made
