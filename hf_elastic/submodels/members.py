"""The sizes of a family that have been made: their modules, and their bond with the family's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ElasticConfigError
from .bound import Bound
from .offloading import Offloaded


@dataclass
class Member:
    """What has to be exchanged to run one submodel.

    Args:
        modules (`dict[str, nn.Module]`): Children of the model (`model`, `lm_head`, ...).
        config (`PreTrainedConfig`): Stock config of the submodel.
        numbers (`dict[str, int]`): Sizes that the stock class keeps beside its config (`num_experts_per_tok`).
        bound (`list[Bound]`): Its tensors and where they lie in the parent.
        parents (`tuple[dict, dict]`): The parent's children and the fields of its config when it was bound.
        tree (`PreTrainedModel`, *optional*): The model whose children `modules` are; `None` for the parent.
    """

    modules: dict[str, nn.Module]
    config: PreTrainedConfig
    numbers: dict[str, int]
    bound: list[Bound | Offloaded] = field(default_factory=list)
    parents: tuple[dict[str, Any], dict[str, Any]] = field(default_factory=lambda: ({}, {}))
    tree: PreTrainedModel | None = None

    def __post_init__(self) -> None:
        self._structure = structure_of({} if self.tree is None else self.modules)
        self._theirs = structure_of(self.parents[0])
        self._shared = _shared(self.tree)
        self._copies = [bound for bound in self.bound if isinstance(bound, Bound) and bound.copied]

    def lies_in(self, modules: Mapping[str, nn.Module | None]) -> bool:
        """Whether the parent, whose children are given, has the same modules, parameters and memory as when this was bound."""
        return self._has(modules) and all(bound.lies_there for bound in self.bound)

    def is_current(self, modules: Mapping[str, nn.Module | None]) -> bool:
        """The same, and what was frozen is frozen still, and no more."""
        return self._has(modules) and all(bound.is_current for bound in self.bound)

    def _has(self, modules: Mapping[str, nn.Module | None]) -> bool:
        return self.parents[0] == modules and is_unchanged(self._theirs)

    def follow(self, full: Member) -> None:
        """Take over what was changed in the parent since: fields of its config, and values of tensors that are copies."""
        theirs = full.config.__dict__
        for key, value in theirs.items():
            if key not in self.parents[1] or self.parents[1][key] != value:
                self.config.__dict__[key] = value
        self.parents = (self.parents[0], dict(theirs))
        self.refresh()

    def refresh(self) -> None:
        """Make copies again of what was changed in the parent."""
        if self._copies:
            with torch.inference_mode(False), torch.no_grad():
                for bound in self._copies:
                    bound.refresh()

    def write_back(self) -> None:
        """Carry over to the parent what was changed in copies."""
        for bound in self._copies:
            bound.write_back()

    def settle(self) -> bool:
        """Carry over to the parent what was changed at this budget: values, exchanged tensors, and what was frozen.

        Returns:
            `bool`: Whether it has to be bound anew.

        Raises:
            `ElasticConfigError`: what was changed has no place in the parent.
        """
        for name, module, key, child in self._structure:
            if (now := module._modules.get(key)) is not child:
                raise ElasticConfigError(
                    f"{name}.{key} was exchanged for a {type(now).__name__} while a budget was active, and the family cannot take that over. Put it "
                    "back, or call forget_budgets(), which drops the change; to change the family itself, call set_budget(None) first."
                )
        for (one, leaf), (other, key) in self._shared:
            mine, theirs = one._parameters.get(leaf), other._parameters.get(key)
            if mine is not theirs and (mine is None or theirs is None or not torch.equal(mine, theirs)):
                raise ElasticConfigError(
                    f"{leaf} of {type(one).__name__} and {key} of {type(other).__name__} are one tensor of the family, and were given different "
                    "values while a budget was active; give both the same one, or call forget_budgets(), which drops the change."
                )
        anew = [bound.settle() for bound in self.bound]  # all of them, whatever the first says
        return any(anew)


Structure = list[tuple[str, nn.Module, str, nn.Module]]
"""Every child of every module: the module's name, the module, and the child's name and itself."""


def is_unchanged(structure: Structure) -> bool:
    """Whether every module still has these children."""
    return all(module._modules.get(key) is child for _, module, key, child in structure)


def structure_of(modules: dict[str, nn.Module]) -> Structure:
    """The children of these modules, of their children, and so on."""
    return [
        (name, module, key, child)
        for first, one in modules.items()
        for name, module in one.named_modules(prefix=first)
        for key, child in module._modules.items()
        if child is not None
    ]


def _shared(tree: PreTrainedModel | None) -> list[tuple[tuple[nn.Module, str], tuple[nn.Module, str]]]:
    """Pairs of places that hold one and the same parameter."""
    first: dict[int, tuple[nn.Module, str]] = {}
    pairs = []
    for module in () if tree is None else tree.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and first.setdefault(id(parameter), (module, leaf)) != (module, leaf):
                pairs.append((first[id(parameter)], (module, leaf)))
    return pairs
