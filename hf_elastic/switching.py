"""Live switching: every budget of a loaded parent is a stock model whose weights are views of the parent's storage.

Switching exchanges the model's children and config for those of the budget, so what runs afterwards is the stock code of a stock
model of that size; nothing is copied, and nothing is looked up per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .adapters import attached
from .architectures import Architecture
from .budgets import Budget
from .configuration_elastic import ElasticConfig
from .errors import ElasticConfigError, HFElasticError
from .loaded_from import name_at
from .offloading import Offloaded
from .slicing import Bound, bind_views, build_meta, use_eager_experts_if_misaligned
from .stencils import Unit, install, make_units, uninstall
from .submodel import Submodel


@dataclass
class Member:
    """What has to be exchanged to run one submodel.

    Args:
        modules (`dict[str, nn.Module]`): Children of the model (`model`, `lm_head`, ...).
        config (`PreTrainedConfig`): Stock config of the submodel.
        numbers (`dict[str, int]`): Sizes that the stock class keeps beside its config (`num_experts_per_tok`).
        bound (`list[Bound]`): Its tensors and where they lie in the parent.
        parents (`tuple[dict, dict]`): The parent's children and the fields of its config when it was bound.
    """

    modules: dict[str, nn.Module]
    config: PreTrainedConfig
    numbers: dict[str, int]
    bound: list[Bound | Offloaded] = field(default_factory=list)
    parents: tuple[dict[str, Any], dict[str, Any]] = field(default_factory=lambda: ({}, {}))

    def is_current(self, full: Member) -> bool:
        """Whether the parent still has the same modules, parameters and memory as when this was bound."""
        return self.parents[0] == full.modules and all(bound.is_current for bound in self.bound)

    def follow(self, full: Member) -> None:
        """Take over what was changed in the parent since: fields of its config, and values of tensors that are copies."""
        theirs = full.config.__dict__
        for key, value in theirs.items():
            if key not in self.parents[1] or self.parents[1][key] != value:
                self.config.__dict__[key] = value
        self.parents = (self.parents[0], dict(theirs))
        with torch.inference_mode(False), torch.no_grad():
            for bound in self.bound:
                bound.refresh()


class SwitchingMixin:
    """`set_budget`, `at`, `budget`, `budgets` for a stock model class."""

    elastic_config: ElasticConfig
    config: PreTrainedConfig
    training: bool
    _modules: dict[str, nn.Module]

    def _init_switching(self, elastic_config: ElasticConfig) -> None:
        self.elastic_config = elastic_config
        self._full = elastic_config.architecture.full(elastic_config.parent_config)
        self._active = self._full
        self._members: dict[Submodel, Member] = {}
        self._stencils: dict[Submodel, list[Unit]] = {}
        self._adapters: tuple[Any, ...] = ()
        self._computing = False  # on the parent's own modules in evaluation mode, too

    @property
    def architecture(self) -> Architecture:
        """Table of the parent's `model_type`."""
        return self.elastic_config.architecture

    @property
    def budgets(self) -> dict[str, dict[str, Any]]:
        """Named budgets that this model nests, largest first."""
        return self.elastic_config.budgets

    @property
    def budget(self) -> str | None:
        """Name of the active budget (`"full"` for everything that is loaded); `None` if its sizes have no name."""
        return self.elastic_config.name_of(self._active)

    @property
    def submodel(self) -> Submodel:
        """Sizes of the active budget."""
        return self._active

    def set_budget(self, budget: Budget | Submodel) -> None:
        """Run at another budget from now on.

        The first time, a stock model of that size is made whose weights are views of this model's (heads cut per group and fused
        matrices need a copy, which is kept). After that nothing is copied, unless the loaded weights were changed in place, in which
        case those copies are refreshed here (changes through `parameter.data` do not count as changes: call `forget_budgets` after
        them). While a smaller budget is active, `config`, `state_dict()`, `parameters()` and the
        module tree are those of the submodel; `save_pretrained` still saves everything that is loaded.

        In training mode the parent's own modules stay, with their parameters, hooks and gradients; they compute only what the budget keeps
        (see [`hf_elastic.stencils`]). Backward has to run before the next switch if gradient checkpointing is on.

        Args:
            budget: See [`hf_elastic.budgets`]; `None` is everything that is loaded.

        Raises:
            `UnknownBudgetError`, `ElasticConfigError`: the budget does not exist here, or weights have no storage. The active budget stays as
                it was. Weights that accelerate offloaded are fetched for every budget as for the parent, but not in training mode.
        """
        submodel = self.elastic_config.resolve(budget, self.dtype)  # type: ignore[attr-defined]
        trains = self.training or self._computing
        if submodel == self._active and (trains or submodel == self._full):
            return
        if self._active == self._full:
            self._members[self._full] = self._current()
        if trains:
            self._train_at(submodel)
        else:
            self._view_at(submodel)

    @contextmanager
    def at(self, budget: Budget | Submodel) -> Iterator[Any]:
        """Run at another budget inside a `with` block, and go back afterwards whatever happens."""
        before = self._active
        self.set_budget(budget)
        try:
            yield self
        finally:
            self.set_budget(before)

    @contextmanager
    def exposed(self, budget: Budget | Submodel) -> Iterator[Any]:
        """Have the module tree and state dict of a budget inside a `with` block, in training mode too; for saving.

        Raises:
            `ElasticConfigError`: adapters are attached; checkpoints of the family have no place for them.
        """
        if attached(self):  # type: ignore[arg-type]
            raise ElasticConfigError(
                "adapters are attached, and checkpoints of a family have no place for them. Call merge_and_unload() first, or save the "
                "adapter alone: save_pretrained() of the PeftModel."
            )
        with self._by(self._view_at, budget):
            yield self

    @contextmanager
    def computing(self, budget: Budget | Submodel) -> Iterator[Any]:
        """Compute at a budget on the parent's own modules inside a `with` block, in evaluation mode too; for trainers, whose wrappers
        and shards hold on to these modules."""
        with self._by(self._train_at, budget):
            yield self

    @contextmanager
    def _by(self, switch: Callable[[Submodel], None], budget: Budget | Submodel) -> Iterator[None]:
        before, submodel = self._active, self.elastic_config.resolve(budget, self.dtype)  # type: ignore[attr-defined]
        self.set_budget(None)
        self._members[self._full] = self._current()
        computing, self._computing = self._computing, switch == self._train_at
        try:
            switch(submodel)
            yield
        finally:
            switch(self._full)
            self._computing = computing
            self.set_budget(before)

    def forget_budgets(self) -> None:
        """Drop the views and copies made for budgets, and go back to everything that is loaded."""
        self.set_budget(None)
        self._members = {}
        self._stencils = {}

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`; the active budget stays active, in the other mode's way."""
        active = self.__dict__.get("_active")
        if active is None or active == self._full or mode == self.training or self._computing:
            return super().train(mode)  # type: ignore[misc]
        before = self.training
        self.set_budget(None)
        super().train(mode)  # type: ignore[misc]
        try:
            self.set_budget(active)
        except BaseException:  # adapters, which do not follow in evaluation mode
            super().train(before)  # type: ignore[misc]
            self.set_budget(active)
            raise
        return self

    # -- how -----------------------------------------------------------------------------------------------------------

    def _view_at(self, submodel: Submodel) -> None:
        if {submodel, self._active} != {self._full} and attached(self):  # type: ignore[arg-type]
            raise ElasticConfigError(
                "adapters are attached, and they do not follow a budget in evaluation mode. Call merge_and_unload() first, or stay in training "
                "mode."
            )
        full, member = self._members[self._full], self._members.get(submodel)
        if member is None or not (member is full or member.is_current(full)):
            member = self._members[submodel] = self._bind(submodel)
        if member is not full:
            member.follow(full)
        for name, module in member.modules.items():
            self._modules[name] = module
            module.train(self.training)
        self.config = member.config
        self.__dict__.update(member.numbers)
        self._active = submodel
        self._rename()

    def _train_at(self, submodel: Submodel) -> None:
        adapters = attached(self)  # type: ignore[arg-type]
        stencils = self._stencils if adapters == self._adapters else {}
        if submodel != self._full and submodel not in stencils:
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
        install(stencils.get(submodel, []))
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
        return Member(modules, tree.config, numbers, bound, (dict(full.modules), dict(full.config.__dict__)))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # Moving or casting the views one by one would tear them off the shared storage: do it to the parent, then view again.
        with self._whole():
            super()._apply(fn, recurse)  # type: ignore[misc]
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As `nn.Module.requires_grad_`, for every budget."""
        with self._whole():
            super().requires_grad_(requires_grad)  # type: ignore[misc]
        return self

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.set_attn_implementation`, for every budget."""
        with self._whole():
            super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]

    def set_experts_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.set_experts_implementation`, for every budget."""
        with self._whole():
            super().set_experts_implementation(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Change everything that is loaded; what was made for budgets is made anew afterwards."""
        active = self._active
        self.forget_budgets()
        try:
            yield
        finally:
            self.set_budget(active)

    def __getstate__(self) -> dict[str, Any]:
        active = self._active
        self.forget_budgets()
        state = {**self.__dict__, "_modules": dict(self._modules), "_active_when_saved": active}
        self.set_budget(active)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        active = state.pop("_active_when_saved", None)
        super().__setstate__(state)  # type: ignore[misc]
        if active is not None:
            self.set_budget(active)

    def _require_full(self, action: str) -> None:
        if self._active != self._full:
            raise HFElasticError(f"{action} needs everything that is loaded; call set_budget(None) first.")
