"""Which device to compute on: the accelerator where there is one and the weights fit, or the one that was asked for."""

from __future__ import annotations

import copy
import logging
from itertools import chain
from typing import Any

import torch
from accelerate.utils import get_max_memory
from torch import nn
from transformers import PreTrainedModel

from ..configuration.budgets import format_bytes
from ..errors import ElasticConfigError, shown
from .memory import SHARE

logger = logging.getLogger(__name__)

AUTO = "auto"


def accelerator() -> torch.device | None:
    """The accelerator that torch computes on (`cuda`, `mps`, `xpu`, ...), if there is one."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def checked_device(device: Any, where: str = "device") -> torch.device:
    """The device that was asked for; `"auto"` and `None` are the accelerator if there is one, else the CPU.

    Args:
        where (`str`): What the argument is called in errors.

    Raises:
        `ElasticConfigError`: torch does not know it, or this machine does not have it.
    """
    if device is None or device == AUTO:
        return accelerator() or torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:  # unknown, not built in, not there
        raise ElasticConfigError(
            f"{where}={shown(device)} cannot be used: {str(error).splitlines()[0]} Allowed are auto (the accelerator, if there is one), cpu, "
            "and what torch has here."
        ) from error


def scoring_device(model: PreTrainedModel, device: Any = AUTO) -> torch.device:
    """Where to score a model. `"auto"` is where it lies if that is an accelerator, else the accelerator if its weights fit there.

    Raises:
        `ElasticConfigError`: a device that cannot be used, or another one than those that `device_map` spread the model over.
    """
    automatic = device is None or device == AUTO
    here, there = model.device, checked_device(device)
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:  # its own hooks move what it reads
        if automatic:
            return here
        raise ElasticConfigError(
            f"device={shown(device)}: device_map spread the parent over several devices, and it is scored there. Leave out device, or load the "
            "parent without device_map."
        )
    if here.type == there.type and (automatic or there.index in (None, here.index)):
        return here
    if not automatic:
        return there
    if here.type != "cpu":
        return here
    needed, free = sum(tensor.nbytes for tensor in _tensors(model)), _free(there)
    if free is not None and needed > SHARE * free:
        logger.warning(
            "scoring on the CPU, which is slow: the parent's weights take %s, and of %s only %s are free.",
            format_bytes(needed),
            there,
            format_bytes(free),
        )
        return here
    return there


def copied_to(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """A copy of a model on another device; ties stay ties. The model stays where it is, and nothing is copied beside it."""
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.detach().to(device), tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else tensor.to(device)
        for tensor in _tensors(model)
    }
    return copy.deepcopy(model, memo)


def _tensors(model: nn.Module) -> chain[torch.Tensor]:
    return chain(model.parameters(), model.buffers())


def _free(device: torch.device) -> int | None:
    """Free bytes of an accelerator, if accelerate knows them."""
    memory = get_max_memory()
    if device.type in memory:  # mps; others are numbered
        return memory[device.type]
    return memory.get(torch.accelerator.current_device_index() if device.index is None else device.index)
