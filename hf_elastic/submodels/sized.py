"""A live size as a model of its own: what it shares with the family, and how it notices that the family has left it behind."""

from __future__ import annotations

import copy
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..errors import HFElasticError
from .bound import view_parameter, watch
from .members import Member, is_unchanged, structure_of

Place = tuple[nn.Module, str, torch.Tensor, int]
"""A module of the family, the name of a tensor of its own, the tensor, and its address."""


@dataclass
class Share:
    """What a size has of its family.

    Args:
        family (`weakref.ref`): The whole model.
        member (`Member`): The family's own form of this size.
        whole (`Member`): What ran everything that is loaded.
        places (`list[Place]`): The tensors that were taken over.
        outer (`Share`, *optional*): What the family has of a family of its own.
    """

    family: weakref.ref[Any]
    member: Member
    whole: Member
    places: list[Place]
    outer: Share | None = None

    def __post_init__(self) -> None:
        self._structure = structure_of(self.whole.modules)

    def follow(self) -> None:
        """Take over what was changed in the family, and what is changed in this size's copies into the family.

        Raises:
            `HFElasticError`: the family's weights lie elsewhere now.
        """
        family = self.family()
        if self.outer is not None:  # the family is itself a size of another one
            self.outer.follow()
        with nullcontext() if family is None else family._users.lock:
            modules = self.whole.modules
            if family is not None:
                family._sync()
                modules = family._whole_children()
            here = is_unchanged(self._structure) and all(
                module._parameters.get(leaf) is tensor and tensor.data_ptr() == address
                for module, leaf, tensor, address in self.places
            )
            bound = self.member.tree is None or self.member.lies_in(modules)
            if not (here and bound and modules == self.whole.modules):
                raise HFElasticError(
                    "the weights of the family were moved, cast or exchanged since this size was taken from it with sized(), and it would run on "
                    "the old ones; take it again."
                )
            self.member.write_back()
            self.member.refresh()


def own(model: Any, member: Member, name: str) -> list[Place]:
    """Give a shadow parameters, config and settings of its own; the parameters are views.

    Args:
        model: Shadow of the family at `member`.
        name (`str`): What the size is called in errors.

    Returns:
        `list[Place]`: Where the tensors are from.
    """
    config = copy.deepcopy(member.config)
    places: list[Place] = []
    made: dict[int, nn.Parameter] = {}
    theirs = {
        path: module for key, child in member.modules.items() for path, module in child.named_modules(prefix=key)
    }
    for path, module in model.named_modules():
        if isinstance(module.__dict__.get("config"), PreTrainedConfig) and module.config is member.config:
            module.config = config
        for leaf, tensor in module._parameters.items():
            if tensor is None:
                continue
            if id(tensor) not in made:
                if not tensor.is_meta:  # those are exchanged for every forward pass
                    places.append((theirs[path], leaf, tensor, tensor.data_ptr()))
                made[id(tensor)] = _view(tensor, f"{path}.{leaf} of sized({name!r})")
            module._parameters[leaf] = made[id(tensor)]
    return places


def _view(tensor: torch.Tensor, name: str) -> nn.Parameter:
    if tensor.is_meta:  # fetched by accelerate for every forward pass
        return nn.Parameter(tensor.detach(), requires_grad=False)
    view = view_parameter(tensor.detach(), tensor.requires_grad, name, "train the family instead, at this budget")
    watch(view)
    view.__dict__["original"] = tensor
    return view
