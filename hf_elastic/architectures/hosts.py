"""Larger models that a parent is a part of, such as the vision-language model around a text model, and what of them goes along with a size."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from .axes import Cut, Sizes, TensorRule, dim


@dataclass(frozen=True)
class Host:
    """A stock model that holds a parent, and beside it *passengers*: tensors that no size runs, and that are kept for every size.

    Args:
        model_type (`str`): What its `config.json` says.
        whole_class (`type[PreTrainedModel]`): Its stock class with all heads.
        prefix (`str`): What names of the parent's base model begin with in its files.
        passengers (`tuple[str, ...]`): What the names of all other tensors begin with.
        along (`dict[str, dict[int, str]]`):
            Passengers that the parent reads from or writes to: per name the dimensions that run along one of its global axes. They are sorted and
            cut with it, so that what they give the parent is what the whole model would, as far as the size has it.
        sizes (`dict[str, str]`): Fields of its config, with dots, that hold the size of an axis.
        section (`str`, *optional*, defaults to `"text_config"`): Field with the parent's config.
    """

    model_type: str
    whole_class: type[PreTrainedModel]
    prefix: str
    passengers: tuple[str, ...]
    along: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
    section: str = "text_config"

    def carries(self, name: str) -> bool:
        """Whether a tensor of its files is a passenger."""
        return name.startswith(self.passengers)

    def rule(self, name: str, shape: tuple[int, ...]) -> TensorRule:
        """What runs along a passenger of this shape."""
        axes = self.along.get(name, {})
        return TensorRule(name, tuple(dim(Cut(axes[i])) if i in axes else dim(size) for i, size in enumerate(shape)))

    def fields_at(self, fields: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        """Its config, without the parent's section, at the sizes of global axes."""
        made = copy.deepcopy(dict(fields))
        for path, axis in self.sizes.items():
            *outer, last = path.split(".")
            at = made
            for key in outer:
                at = at.setdefault(key, {})
            at[last] = sizes[axis]
        return made
