"""Budgets of a family that accelerate spread over devices, or left in files: their modules move inputs and fetch weights as the parent's do.

accelerate places hooks around the parent's modules. A budget has modules of its own, so it gets hooks of the same kind; where weights are
fetched for the time of a forward pass, these cut what is fetched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from torch import nn

from ..architectures import Architecture
from ..architectures.pieces import Piece
from ..architectures.submodel import Submodel


@dataclass
class Offloaded:
    """A tensor of a submodel that is fetched when it is needed. It stands beside the [`hf_elastic.submodels.bound.Bound`] ones."""

    owner: nn.Module
    leaf: str

    @property
    def is_current(self) -> bool:
        """Whether the parent's tensor is still fetched, too."""
        return getattr(self.owner, self.leaf).is_meta

    @property
    def lies_there(self) -> bool:
        """The same: there is nothing to freeze."""
        return self.is_current

    def refresh(self) -> None:
        """Nothing is kept."""

    def settle(self) -> bool:
        """Nothing is kept that could have been changed."""
        return False


class CutWeights(Mapping[str, torch.Tensor]):
    """What is fetched for a module of a submodel: the weights of the parent's module, cut.

    Args:
        weights (`Mapping[str, torch.Tensor]`): Of the parent's module, by names inside it.
        pieces (`dict[str, Piece]`): By names in the submodel.
        module (`str`): Name of the module in the submodel.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], pieces: Mapping[str, Piece], module: str):
        self.weights, self.pieces, self.module = weights, pieces, module

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.pieces[f"{self.module}.{name}"].narrow(self.weights[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


class BudgetHook(AlignDevicesHook):
    """accelerate's hook for a module whose tensors are where they belong already."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        return module


def is_fetched(module: nn.Module) -> bool:
    """Whether accelerate fetches the tensors of a module for its forward pass."""
    return any(hook.offload for hook in _hooks(module))


def follow_hooks(
    tree: nn.Module,
    parent: nn.Module,
    architecture: Architecture,
    submodel: Submodel,
    pieces: Mapping[str, Piece],
    homes: Mapping[str, str],
) -> None:
    """Put hooks around the modules of a budget where the parent's have them.

    Args:
        tree (`nn.Module`): Model of the budget.
        parent (`nn.Module`): The whole parent (causal or base model, as `tree`).
        pieces (`dict[str, Piece]`): The budget's tensors by name.
        homes (`dict[str, str]`): The parent's module for every module of the budget that has tensors.
    """
    theirs = dict(parent.named_modules())
    layer = re.compile(
        rf"((?:{re.escape(architecture.layers_path)}|{architecture.layers_path.rpartition('.')[2]})\.)(\d+)"
    )
    for name, module in tree.named_modules():
        source = homes.get(name) or layer.sub(
            lambda found: f"{found[1]}{submodel.layers[int(found[2])]}", name, count=1
        )
        for hook in _hooks(theirs[source]):
            weights = None if hook.weights_map is None else CutWeights(hook.weights_map, pieces, name)
            made = BudgetHook(
                execution_device=hook.execution_device,
                offload=hook.offload,
                io_same_device=hook.io_same_device,
                weights_map=weights,
                offload_buffers=hook.offload_buffers,
                place_submodules=hook.place_submodules,
                skip_keys=hook.skip_keys,
            )
            add_hook_to_module(module, made, append=True)


def _hooks(module: nn.Module) -> list[AlignDevicesHook]:
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [each for each in hooks if isinstance(each, AlignDevicesHook)]
