"""Live switching: one set of weights, many sizes.

A submodel's live form is a stock model of its config whose parameters are views of the loaded ones. Switching exchanges the children and
the config for those of the budget, so what runs afterwards is the stock code of a stock model of that size; nothing is copied, and nothing
is looked up per token. Who may switch when others use the family is in [`hf_elastic.sharing`].
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from .adapters import attached
from .architectures import Architecture
from .budgets import Budget
from .configuration_elastic import ElasticConfig
from .errors import BusyError, ElasticConfigError, HFElasticError
from .generation.caches import claim
from .members import Member
from .sharing import Users, shadow
from .sized import Share, own
from .slicing import bind_views, build_meta, use_eager_experts_if_misaligned
from .stencils import CutHead, Unit, install, make_units, uninstall
from .submodel import Submodel


class SwitchingMixin:
    """`set_budget`, `at`, `sized`, `budget`, `budgets` for a stock model class."""

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
        self._exposing = False  # the modules of the budget, to those who go through them, too
        self._users = Users()

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
        return self.elastic_config.name_of(self.submodel)

    @property
    def submodel(self) -> Submodel:
        """Sizes of the active budget: that of the `at` block that this thread or task is in, if it is in one."""
        block = self._users.own()
        return self._active if block is None else block.submodel

    def set_budget(self, budget: Budget | Submodel) -> None:
        """Run at another budget from now on.

        The first time, a stock model of that size is made whose weights are views of this model's (heads cut per group and fused
        matrices need a copy, which is kept). After that nothing is copied, unless weights were changed meanwhile: those copies are made
        again here, and what was changed in copies while their budget was active is written back. While a smaller budget is active,
        `config`, `state_dict()` and attributes (`model.lm_head`) are those of the submodel; `parameters()`, `modules()` and `children()`
        stay the family's, which is what optimizers and wrappers need: training reaches it whether they are made before or after.
        `save_pretrained` still saves everything that is loaded.

        In training mode the parent's own modules stay, with their parameters, hooks and gradients; they compute only what the budget keeps
        (see [`hf_elastic.stencils`]). Backward has to run before the next switch if gradient checkpointing is on.

        Args:
            budget: See [`hf_elastic.budgets`]; `None` is everything that is loaded.

        Raises:
            `UnknownBudgetError`, `ElasticConfigError`: the budget does not exist here, weights have no storage, or what was exchanged at the
                active budget has no place in the family. The active budget stays as it was. Weights that accelerate offloaded are fetched
                for every budget as for the parent, but not in training mode.
            `BusyError`: another thread is running the family, or is inside `at`.
        """
        submodel = self.elastic_config.resolve(budget, self.dtype)  # type: ignore[attr-defined]
        with self._users.lock:
            block = self._users.own()
            if block is not None and block.beside:
                self._member(submodel)
            else:
                if submodel != self._active:
                    self._users.refuse_others("switching")
                self._switch(submodel)
            if block is not None:
                block.submodel = submodel
            else:
                self._users.note_set(submodel)

    @contextmanager
    def at(self, budget: Budget | Submodel) -> Iterator[Any]:
        """Run at another budget inside a `with` block, and go back afterwards whatever happens.

        The block counts for the thread (or asyncio task) that opens it. Several threads may be in blocks of different budgets at a time; a
        thread that opened none gets a [`BusyError`] meanwhile, as nobody can tell which budget it means: give it a size of its own, see
        `sized`. In evaluation mode only; in training mode a family has one user.
        """
        submodel = self.elastic_config.resolve(budget, self.dtype)  # type: ignore[attr-defined]
        users = self._users
        with users.lock:
            beside = bool(users.others()) or (submodel != self._active and users.runs_elsewhere)
            if beside and self._trains:
                users.refuse_others("switching in training mode")
            before = self._active
            if beside:
                self._member(submodel)  # refused now, if it cannot be
            else:
                self._switch(submodel)
            block = users.open(submodel, before, beside)
        try:
            yield self
        finally:
            with users.lock:
                if (back := users.close(block)) is not None:
                    self._switch(back)

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
        submodel = self.elastic_config.resolve(budget, self.dtype)  # type: ignore[attr-defined]
        users = self._users
        with users.lock:
            users.refuse_others("saving it, or training it at a budget,")
            before, computing, exposing = self._active, self._computing, self._exposing
            self._switch(self._full)
            self._settle()
            self._members[self._full] = self._current()
            self._computing, self._exposing = switch == self._train_at, switch == self._view_at
            block = users.open(submodel, before)
        try:
            switch(submodel)
            yield
        finally:
            with users.lock:
                back = users.close(block)
                switch(self._full)
                self._computing, self._exposing = computing, exposing
                self._switch(back or before)

    def forget_budgets(self) -> None:
        """Drop the views and copies made for budgets, and go back to everything that is loaded.

        What was changed at a budget and has a place in the family is kept; modules that were exchanged at a budget are dropped with it.
        """
        with self._users.lock:
            self._users.refuse_others("forgetting budgets")
            try:
                self._forget()
            except ElasticConfigError:
                if not self._trains:
                    self._place(self._members[self._full], self._full)
                self._members, self._stencils = {}, {}

    def _forget(self) -> None:
        self._switch(self._full)
        self._settle()
        self._members, self._stencils = {}, {}

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`; the active budget stays active, in the other mode's way."""
        active = self.__dict__.get("_active")
        if active is None or active == self._full or mode == self.training or self._computing:
            return super().train(mode)  # type: ignore[misc]
        before = self.training
        with self._users.lock:
            self._users.refuse_others("changing between training and evaluation mode")
            self._switch(self._full)
            super().train(mode)  # type: ignore[misc]
            try:
                self._switch(active)
            except BaseException:  # adapters, which do not follow in evaluation mode
                super().train(before)  # type: ignore[misc]
                self._switch(active)
                raise
        return self

    # -- running -------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock model's, at the budget of this thread. A cache goes on at the budget that wrote it; at another one it is refused."""
        users = self.__dict__.get("_users")
        if users is None or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        if users.runs_here:  # inside generate, which has seen to everything else
            self._claim(kwargs.get("past_key_values"))
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with self._in_use() as model:
            model._claim(kwargs.get("past_key_values"))
            if self._trains:
                kwargs |= self._training_cache(self.config.use_cache and not _recomputes(self), kwargs)
            return super(SwitchingMixin, model).__call__(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _in_use(self) -> Iterator[Any]:
        """What to run at the budget of this thread: the family itself, which nobody switches meanwhile, or a shadow of it.

        Raises:
            `BusyError`: other threads are inside `at`, and this one is in no block; or another one has set the budget.
        """
        users = self._users
        with users.lock:
            block = users.own()
            if block is None and not users.runs_here:
                settled = users.settled(self._active)
                if foreign := [other for other in users.others() if other.submodel != settled]:
                    raise BusyError(
                        f"thread {foreign[0].thread!r} is inside at() of this family, and this thread is not, so it is not known at which budget it "
                        "should run. Open a block here, too, or take a model of its own for the size: small = family.sized('small')."
                    )
                if users.was_set_elsewhere(settled):
                    raise BusyError(
                        "another thread has called set_budget() of this family since this one did, so it is not known at which budget to run. "
                        "Call it again, use at(), or take a model of its own for the size: small = family.sized('small')."
                    )
            submodel = self._active if block is None else block.submodel
            model = self if submodel == self._active else self._shadow(submodel)
            if model is self and not users.runs_here and not self._trains:
                self._follow()
            model._users.begin()
        try:
            yield model
        finally:
            model._users.end()

    def _follow(self) -> None:
        """Before a call: what runs is what the family's weights are now."""
        if (share := self.__dict__.get("_shares")) is not None:
            share.follow()
        if (member := self._members.get(self._active)) is not None:
            member.refresh()

    @property
    def _trains(self) -> bool:
        return self.training or bool(self.__dict__.get("_computing"))

    def _shadow(self, submodel: Submodel) -> Any:
        """A model of a submodel over the same tensors, in evaluation mode, that runs whatever the family is switched to."""
        with self._users.lock:
            member = self._member(submodel)

            def change(twin: nn.Module) -> None:
                if isinstance(twin, SwitchingMixin):
                    own = {"_active": submodel, "_members": {}, "_stencils": {}, "_users": Users(), "_exposing": True}
                    twin.__dict__.update({**member.numbers, **own, "config": member.config})

            return shadow(self, member.modules, change)  # type: ignore[arg-type]

    def sized(self, budget: Budget | Submodel) -> Any:
        """A live size as a model of its own: it stays at its size whatever this family is set to, and runs in a thread of its own.

        It is what `from_pretrained(..., budget=)` gives, on this family's memory: its weights are views of the family's and the copies that
        `set_budget` would make, so it costs no memory, and follows when the family's weights are changed in place. Its modules, config and
        generation config are its own. It nests the smaller budgets, and saves and exports itself.

        Args:
            budget: See [`hf_elastic.budgets`]; `None` is everything that is loaded.

        Returns:
            [`ElasticPreTrainedModel`]: In evaluation mode, for inference. Once the family's weights are moved, cast or exchanged, it refuses to
                run; take it again then.

        Raises:
            `UnknownBudgetError`, `ElasticConfigError`: as for `set_budget`.
            `HFElasticError`: the family is in training mode.
        """
        submodel = self.elastic_config.resolve(budget, self.dtype)  # type: ignore[attr-defined]
        if self._trains:
            raise HFElasticError("sized() is for inference; call eval() first, or train the family with set_budget().")
        with self._users.lock:
            model = self._shadow(submodel)
            member = self._members[submodel]
            places = own(model, member, self.elastic_config.name_of(submodel) or str(submodel.to_dict()))
        elastic = self.elastic_config.restrict(submodel)
        if submodel != self._full:
            elastic.cut_from = self._cut_from(submodel)  # type: ignore[attr-defined]
        if (generation := getattr(self, "generation_config", None)) is not None:
            model.generation_config = copy.deepcopy(generation)
        elastic.name_or_path = model.name_or_path
        model._adopt(elastic, self.router if submodel == self._full else None)  # type: ignore[attr-defined]
        model.__dict__["_shares"] = Share(weakref.ref(self), member, places)
        return model

    def _running_at(self, submodel: Submodel) -> Any:
        """What runs a submodel from now on, whatever others do: in training mode the family itself, which is switched for it."""
        if not self._trains:
            return self._shadow(submodel)
        self.set_budget(submodel)
        return self

    def _training_cache(self, wanted: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What to add to a call in training mode: an empty cache of the active budget. Upstream would make one of the parent's layers."""
        wanted = kwargs["use_cache"] if kwargs.get("use_cache") is not None else wanted
        if self._active == self._full or not self._trains or not wanted or kwargs.get("past_key_values") is not None:
            return {}
        return {"past_key_values": DynamicCache(config=self.elastic_config.stock_config(self._active))}

    def _claim(self, cache: Any) -> None:
        """Refuse a cache that another budget wrote."""
        if isinstance(cache, Cache):
            claim(cache, self.architecture, self.elastic_config.parent_config, self._active)

    # -- how -----------------------------------------------------------------------------------------------------------

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
        if {submodel, self._active} != {self._full} and attached(self):  # type: ignore[arg-type]
            raise ElasticConfigError(
                "adapters are attached, and they do not follow a budget in evaluation mode. Call merge_and_unload() first, or stay in training "
                "mode."
            )
        full, member = self._whole_member(), self._members.get(submodel)
        if submodel == self._full:
            return full
        if member is not None and member.settle():
            member = None
        if member is None or not member.is_current(full):
            member = self._members[submodel] = self._bind(submodel)
        member.follow(full)
        return member

    def _whole_member(self) -> Member:
        """What runs everything that is loaded."""
        if self._active == self._full:
            self._members[self._full] = self._current()
        return self._members[self._full]

    def _view_at(self, submodel: Submodel) -> None:
        self._leave()
        self._place(self._member(submodel), submodel)

    def _leave(self) -> None:
        """Carry over what was changed at the active budget."""
        member = self._members.get(self._active)
        if self._active == self._full or member is None or member.tree is None:
            return
        for name, module in member.modules.items():
            if self._modules.get(name) is not module:
                raise ElasticConfigError(
                    f"{name} was exchanged while a budget was active, and the family cannot take that over. Put it back, or call forget_budgets(), "
                    "which drops the change; to change the family itself, call set_budget(None) first."
                )
        if member.settle():
            del self._members[self._active]

    def _settle(self) -> None:
        """Carry over what was changed at any budget."""
        for submodel, member in list(self._members.items()):
            if member.settle():
                del self._members[submodel]

    def _place(self, member: Member, submodel: Submodel) -> None:
        for name, module in member.modules.items():
            self._modules[name] = module
            if module.training != self.training:
                module.train(self.training)
        self.config = member.config
        self.__dict__.update(member.numbers)
        self._active = submodel

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

    def named_modules(self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        """As `nn.Module.named_modules`, of the family at every budget; so are `modules`, `parameters` and `buffers`."""
        if (tree := self._family_tree) is None:
            yield from super().named_modules(memo, prefix, remove_duplicate)  # type: ignore[misc]
            return
        for name, module in tree.named_modules(memo, prefix, remove_duplicate):
            yield name, self if module is tree else module

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As `nn.Module.named_children`, of the family at every budget."""
        tree = self._family_tree
        yield from super().named_children() if tree is None else tree.named_children()  # type: ignore[misc]

    def num_parameters(self, *args: Any, **kwargs: Any) -> int:
        """As `PreTrainedModel.num_parameters`, of the active budget."""
        submodel = self.submodel
        if submodel == self._active and self._family_tree is None:
            return super().num_parameters(*args, **kwargs)  # type: ignore[misc]
        tree = self._members[submodel].tree
        return (self._shadow(submodel) if tree is None else tree).num_parameters(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # Moving or casting the views one by one would tear them off the shared storage: do it to the parent, then view again.
        with self._whole("moving or casting it"):
            before = [parameter.data_ptr() for parameter in self.parameters()]  # type: ignore[attr-defined]
            super()._apply(fn, recurse)  # type: ignore[misc]
            if before != [parameter.data_ptr() for parameter in self.parameters()]:  # type: ignore[attr-defined]
                self.__dict__.pop("_shares", None)  # a size that has memory of its own from now on
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As `nn.Module.requires_grad_`, for every budget."""
        with self._whole("freezing it"):
            super().requires_grad_(requires_grad)  # type: ignore[misc]
        return self

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.set_attn_implementation`, for every budget."""
        with self._whole("changing how it runs"):
            super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]

    def set_experts_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.set_experts_implementation`, for every budget."""
        with self._whole("changing how it runs"):
            super().set_experts_implementation(*args, **kwargs)  # type: ignore[misc]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """As upstream, of everything that is loaded; refused while a smaller budget is active."""
        self._require_full("set_input_embeddings")
        super().set_input_embeddings(value)  # type: ignore[misc]

    def set_output_embeddings(self, value: nn.Module) -> None:
        """As upstream, of everything that is loaded; refused while a smaller budget is active."""
        self._require_full("set_output_embeddings")
        super().set_output_embeddings(value)  # type: ignore[misc]

    def get_output_embeddings(self) -> Any:
        """As upstream; at a budget in training mode the head's `weight` is what the budget keeps of it."""
        head = super().get_output_embeddings()  # type: ignore[misc]
        units = self.__dict__.get("_stencils", {}).get(self.__dict__.get("_active"), []) if self._trains else []
        return next((CutHead(unit) for unit in units if unit.module is head), head)

    @contextmanager
    def _whole(self, what: str) -> Iterator[None]:
        """Change everything that is loaded; what was made for budgets is made anew afterwards."""
        with self._users.lock:
            self._users.refuse_others(what)
            active = self._active
            self._forget()
            try:
                yield
            finally:
                self._switch(active)

    def __getstate__(self) -> dict[str, Any]:
        with self._whole("copying it"):
            state = {**self.__dict__, "_modules": dict(self._modules)}
            del state["_users"]
            state.pop("_shares", None)
        state["_active_when_saved"] = self._active
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        active = state.pop("_active_when_saved", None)
        super().__setstate__(state)  # type: ignore[misc]
        self.__dict__["_users"] = Users()
        if active is not None:
            self.set_budget(active)

    def _require_full(self, action: str) -> None:
        if self.__dict__.get("_active") != self.__dict__.get("_full"):
            raise HFElasticError(f"{action} needs everything that is loaded; call set_budget(None) first.")


def _recomputes(model: Any) -> bool:
    """Whether layers are checkpointed, which leave caches out."""
    return any(getattr(layer, "gradient_checkpointing", False) for layer in model.architecture.layers_of(model))
