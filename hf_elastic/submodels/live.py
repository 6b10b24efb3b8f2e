"""What runs a size of a family: a stock model of that size on the family's memory in evaluation mode, its stencils in training mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..architectures import Architecture
from ..architectures.cost import CostModel
from ..architectures.submodel import Submodel
from ..configuration.budgets import Budget
from ..configuration_elastic import ElasticConfig
from ..errors import ElasticConfigError
from .adapters import attached
from .loaded_from import name_at
from .members import Member
from .packed import is_packed
from .rounding import Rounding
from .slicing import bind_views, build_meta, use_eager_experts_if_misaligned
from .stencils import Unit, install, make_units, uninstall


class LiveMixin:
    """Exchanges what runs; it does not ask who may. See [`hf_elastic.submodels.switching`]."""

    elastic_config: ElasticConfig
    config: PreTrainedConfig
    training: bool
    _modules: dict[str, nn.Module]
    _full: Submodel
    _active: Submodel
    _members: dict[Submodel, Member]
    _stencils: dict[Submodel, list[Unit]]
    _adapters: tuple[Any, ...]
    _exposing: bool
    _computing: bool

    @property
    def architecture(self) -> Architecture:
        """Table of the parent's `model_type`."""
        return self.elastic_config.architecture

    def _resolved(self, budget: Budget | Submodel) -> Submodel:
        """The sizes of a budget, counted by what this model holds in memory."""
        return self.elastic_config.resolve(budget, self.dtype, packed=is_packed(self))  # type: ignore[attr-defined, arg-type]

    @property
    def _trains(self) -> bool:
        return self.training or bool(self.__dict__.get("_computing"))

    def _switch(self, submodel: Submodel) -> None:
        """Exchange what runs; the caller holds the lock and has seen that nobody else runs it."""
        if submodel == self._active and (self._trains or submodel == self._full):
            return
        if self._active == self._full:
            self._members[self._full] = self._current()
        if self._trains:
            self._train_at(submodel)
        else:
            self._view_at(submodel)

    def _member(self, submodel: Submodel) -> Member:
        """What runs a submodel, bound to the weights as they are now."""
        if {submodel, self._active} != {self._full}:
            self._refuse_adapters()
        full, member = self._whole_member(), self._members.get(submodel)
        if submodel == self._full:
            return full
        if member is not None and member.settle():
            member = None
        if member is None or not member.is_current(full.modules):
            member = self._members[submodel] = self._bind(submodel)
        member.follow(full)
        return member

    def _whole_member(self) -> Member:
        """What runs everything that is loaded."""
        if self._active == self._full:
            self._members[self._full] = self._current()
        return self._members[self._full]

    def _refuse_adapters(self) -> None:
        if attached(self):  # type: ignore[arg-type]
            raise ElasticConfigError(
                "adapters are attached, and they do not follow a budget in evaluation mode. Call merge_and_unload() first, or stay in training "
                "mode."
            )

    def _view_at(self, submodel: Submodel) -> None:
        self._leave()
        self._place(self._member(submodel), submodel)

    def _leave(self) -> None:
        """Carry over what was changed at the active budget."""
        member = self._members.get(self._active)
        if self._active == self._full or member is None or member.tree is None:
            return
        try:
            self._check_children(member)
            anew = member.settle()
        except ElasticConfigError:
            self._refuse_adapters()  # they are what was exchanged, and have words of their own
            raise
        if anew:
            del self._members[self._active]

    def _check_children(self, member: Member) -> None:
        for name, module in member.modules.items():
            if self._modules.get(name) is not module:
                raise ElasticConfigError(
                    f"{name} was exchanged while a budget was active, and the family cannot take that over. Put it back, or call forget_budgets(), "
                    "which drops the change; to change the family itself, call set_budget(None) first."
                )

    def _whole_children(self) -> dict[str, nn.Module]:
        """The children of everything that is loaded."""
        return self._modules if self._active == self._full else self._members[self._full].modules

    def _write_back(self) -> None:
        for member in self._members.values():
            member.write_back()

    def _sync(self) -> None:
        """Let what was changed anywhere reach what runs: copies that were changed are written back, others made again."""
        self._write_back()
        member = self._members.get(self._active)
        if self._trains or member is None or member.tree is None:
            return
        self._check_children(member)
        if member.lies_in(self._whole_children()):
            member.refresh()
        else:
            self._place(self._member(self._active), self._active)

    def _settle(self) -> None:
        """Carry over what was changed at any budget."""
        for submodel, member in list(self._members.items()):
            if member.settle():
                del self._members[submodel]

    def _place(self, member: Member, submodel: Submodel) -> None:
        self._active = submodel
        for name, module in member.modules.items():
            self._modules[name] = module
            if module.training != self.training:
                module.train(self.training)
        self.config = member.config
        self.__dict__.update(member.numbers)
        self._rename()

    def _train_at(self, submodel: Submodel) -> None:
        adapters = attached(self)  # type: ignore[arg-type]
        stencils = self._stencils if adapters == self._adapters else {}
        rounding: Rounding | None = self.__dict__.get("_rounding") if self._computing else None
        if (submodel != self._full or rounding is not None) and submodel not in stencils:
            if any(parameter.is_meta for parameter in self.parameters()):  # type: ignore[attr-defined]
                raise ElasticConfigError(
                    "weights are offloaded, and a budget in training mode computes on the parent's own; load it without offloading, or call "
                    "eval()."
                )
            tree = self._meta_tree(submodel)
            config = self.elastic_config.parent_config
            stencils[submodel] = make_units(self, self.architecture, config, tree, submodel)  # type: ignore[arg-type]
        uninstall(self._stencils.get(self._active, []))
        if adapters != self._adapters:  # peft merges them in a way that copies made before do not notice
            self._stencils, self._adapters = stencils, adapters
            self._members = {self._full: self._members[self._full]}
        if submodel != self._full or rounding is not None:
            install(stencils[submodel], rounding)
        self._active = submodel
        self._rename()

    def _rename(self) -> None:
        """Let the name say which size runs, for whoever loads the model again by its name."""
        self.name_or_path = self.config._name_or_path = name_at(self.config._name_or_path, self._active, self._full)

    def _current(self) -> Member:
        numbers = {name: value for name, value in self.__dict__.items() if type(value) is int}
        return Member(dict(self._modules), self.config, numbers)

    def _meta_tree(self, submodel: Submodel) -> PreTrainedModel:
        """A stock model of the submodel without storage, that runs as this one does."""
        full = self._members[self._full]
        if getattr(self, "hf_quantizer", None) is not None:
            raise ElasticConfigError(
                "a quantised model cannot switch budgets; load the budget you need with budget=...."
            )
        config = self.elastic_config.stock_config(submodel)
        config._name_or_path = name_at(full.config._name_or_path, submodel, self._full)
        config._attn_implementation = full.config._attn_implementation
        config._experts_implementation = full.config._experts_implementation
        use_eager_experts_if_misaligned(config, self.architecture, self.dtype)  # type: ignore[attr-defined]
        return build_meta(self.architecture, config, type(self))  # type: ignore[arg-type]

    def _bind(self, submodel: Submodel) -> Member:
        full, tree = self._members[self._full], self._meta_tree(submodel)
        parent = nn.Module()
        parent._modules.update(full.modules)  # type: ignore[arg-type]
        # Tensors made in inference mode could not be refreshed outside it.
        with torch.inference_mode(False), torch.no_grad():
            bound = bind_views(tree, parent, self.architecture, self.elastic_config.parent_config, submodel)
        numbers = {
            name: value
            for name, value in tree.__dict__.items()
            if type(value) is int and full.numbers.get(name, value) != value
        }
        for name, value in numbers.items():  # so that switching back restores them
            full.numbers.setdefault(name, value)
        modules = {name: module for name, module in tree._modules.items() if module is not None}
        return Member(modules, tree.config, numbers, bound, (dict(full.modules), dict(full.config.__dict__)), tree)

    @property
    def _family_tree(self) -> nn.Module | None:
        """The family's modules, while those of a budget are in their place."""
        here = self.__dict__
        if here.get("_active") == here.get("_full") or self._trains or self._exposing:
            return None
        tree = nn.Module()
        tree._modules.update(self._members[self._full].modules)
        return tree

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As `nn.Module.named_parameters`, of the family at every budget, so that whoever trains them trains the family."""
        tree: Any = self._family_tree
        named = super().named_parameters if tree is None else tree.named_parameters  # type: ignore[misc]
        yield from named(prefix, recurse, remove_duplicate)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As `nn.Module.named_children`, of the family at every budget: trainers find the names of parameters by it."""
        tree = self._family_tree
        yield from super().named_children() if tree is None else tree.named_children()  # type: ignore[misc]

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """As `PreTrainedModel.get_memory_footprint`: of everything that is loaded, codes included, whatever budget is active."""
        tree: Any = self._family_tree
        held: Any = self if tree is None else tree
        tensors = [*held.parameters(), *(held.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in tensors)

    def num_parameters(self, *args: Any, **kwargs: Any) -> int:
        """As `PreTrainedModel.num_parameters`, of the active budget; codes count as the weights that they stand for."""
        submodel: Submodel = self.submodel  # type: ignore[attr-defined]
        if is_packed(self) and not any((*args, *kwargs.values())):  # type: ignore[arg-type]
            return CostModel(self.elastic_config.parent_config)(submodel).total_params
        if submodel == self._active and self._family_tree is None:
            return super().num_parameters(*args, **kwargs)  # type: ignore[misc]
        tree = self._members[submodel].tree
        counted: Any = self._shadow(submodel) if tree is None else tree  # type: ignore[attr-defined]
        return counted.num_parameters(*args, **kwargs)
