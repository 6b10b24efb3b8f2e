"""Running a family in the thread or task that asks, at the budget that is meant there, and sizes that run beside it."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig

from ..architectures.submodel import Submodel
from ..configuration.budgets import Budget
from ..errors import BusyError, HFElasticError
from ..generation.caches import claim
from .live import LiveMixin
from .loaded_from import taken_from
from .members import Member
from .sharing import Users, shadow
from .sized import Share, own
from .stencils import CutHead


class RunningMixin(LiveMixin):
    """`__call__` and `sized`, and what generation runs on."""

    _users: Users

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock model's, at the budget of this thread. A cache goes on at the budget that wrote it; at another one it is refused."""
        if self.__dict__.get("_packed") and torch.is_grad_enabled():
            with torch.no_grad():  # what gradients are computed with would be every decoded weight
                return self(*args, **kwargs)
        if torch.compiler.is_compiling():
            another = self._before_compiled()
            run = super().__call__ if another is None else another  # type: ignore[misc]
            return run(*args, **kwargs)
        users = self.__dict__.get("_users")
        if users is None or (users.runs_here and self._is_meant()):  # generate has seen to everything else
            self._claim(kwargs.get("past_key_values"))
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with self._in_use() as model:
            model._claim(kwargs.get("past_key_values"))
            if self._trains:
                kwargs |= self._training_cache(self.config.use_cache and not _recomputes(self), kwargs)
            outputs = super(RunningMixin, model).__call__(*args, **kwargs)  # type: ignore[misc]
            if kwargs.get("past_key_values") is None:
                given = outputs if isinstance(outputs, tuple) else (getattr(outputs, "past_key_values", None),)
                for cache in given:
                    model._claim(cache)
            return outputs

    @torch.compiler.disable
    def _before_compiled(self) -> Any:
        """What a compiled call runs instead of the family itself, if it does. Not part of what is compiled, as it depends on what other threads do."""
        if self._users.runs_here and self._is_meant():
            return None
        with self._in_use() as model:
            return None if model is self else model

    def _is_meant(self) -> bool:
        """Whether the family itself is at the budget of this context."""
        block = self._users.own()
        return block is None or block.submodel == self._active

    @contextmanager
    def _in_use(self) -> Iterator[Any]:
        """What to run at the budget of this thread: the family itself, which nobody switches meanwhile, or a shadow of it.

        Raises:
            `BusyError`: other threads are inside `at`, and this one is in no block; or another one has set the budget.
        """
        users = self._users
        with users.lock:
            block, settled = users.own(), users.settled(self._active)
            if block is None and not users.runs_here:
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
            resting = self._active if users.runs_here else settled
            submodel = resting if block is None else block.submodel
            if not users.runs_here and not self._trains:
                self._follow()
            model = self if submodel == self._active else self._shadow(submodel)
            model._users.begin()
        try:
            yield model
        finally:
            with model._users.lock:
                if (back := model._users.end()) is not None:
                    model._switch(back)

    def _follow(self) -> None:
        """Let what was changed in the family, here or in a size of it, reach what runs here."""
        with self._users.lock:
            if (share := self.__dict__.get("_shares")) is not None:
                share.follow()
            if (beside := self.__dict__.get("_beside")) is not None:
                beside()
            self._sync()

    def _refuse_beside(self, what: str) -> None:
        """Refuse what would be of the budget that another thread has switched the family to."""
        block = self.__dict__["_users"].own() if "_users" in self.__dict__ else None
        if block is not None and block.beside and block.submodel != self._active:
            raise BusyError(
                f"{what} is that of the family, which another thread runs at another budget now; this at() block can call it and generate. Take a "
                "model of its own for the size: small = family.sized('small')."
            )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream, of the active budget."""
        self._refuse_beside("state_dict()")
        if "_users" in self.__dict__ and not self._trains:
            self._follow()
        return super().state_dict(*args, **kwargs)  # type: ignore[misc]

    def get_input_embeddings(self) -> Any:
        """As upstream, of the active budget."""
        self._refuse_beside("get_input_embeddings()")
        return super().get_input_embeddings()  # type: ignore[misc]

    def _shadow(self, submodel: Submodel) -> Any:
        """A model of a submodel over the same tensors, in evaluation mode, that runs whatever the family is switched to."""
        with self._users.lock:
            member = self._member(submodel)

            def change(twin: nn.Module) -> None:
                if isinstance(twin, RunningMixin):
                    twin.__dict__.update(
                        member.numbers, config=member.config, name_or_path=member.config._name_or_path
                    )
                    twin.__dict__.update(_active=submodel, _exposing=True, _members={}, _stencils={}, _users=Users())
                    twin.__dict__.update(_shares=None, _beside=partial(self._keep_up, submodel, member))

            return shadow(self, member.modules, change)  # type: ignore[arg-type]

    def _keep_up(self, submodel: Submodel, member: Member) -> None:
        """Let what was changed in the family reach a shadow of it."""
        with self._users.lock:
            if (share := self.__dict__.get("_shares")) is not None:
                share.follow()
            self._write_back()
            if submodel != self._full and not member.lies_in(self._whole_children()):
                raise HFElasticError(
                    "the weights of the family were moved, cast or exchanged while a size of it was generating; generate again."
                )
            member.refresh()

    def sized(self, budget: Budget | Submodel) -> Any:
        """A live size as a model of its own: it stays at its size whatever this family is set to, and runs in a thread of its own.

        It is what `from_pretrained(..., budget=)` gives, on this family's memory: its weights are views of the family's and the copies that
        `set_budget` would make, so it costs no memory, and follows when the family's weights are changed in place. Its modules, config and
        generation config are its own. It nests the smaller budgets, and saves and exports itself.

        Args:
            budget: See [`hf_elastic.configuration.budgets`]; `None` is everything that is loaded.

        Returns:
            [`ElasticPreTrainedModel`]: In evaluation mode, for inference. Once the family's weights are moved, cast or exchanged, it refuses to
                run; take it again then.

        Raises:
            `UnknownBudgetError`, `ElasticConfigError`: as for `set_budget`.
            `HFElasticError`: the family is in training mode.
        """
        submodel = self._resolved(budget)
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
        elastic._name_or_path = model.name_or_path = model.config._name_or_path = taken_from(model.name_or_path)
        model._adopt(elastic, self.router if submodel == self._full else None)  # type: ignore[attr-defined]
        model.__dict__["_taken_as"] = submodel
        model.__dict__["_beside"] = None
        model.__dict__["_passengers"] = self.__dict__.get("_passengers")
        outer = self.__dict__.get("_shares")
        model.__dict__["_shares"] = Share(weakref.ref(self), member, self._members[self._full], places, outer)
        return model

    def _running_at(self, submodel: Submodel) -> Any:
        """What runs a submodel from now on, whatever others do: in training mode the family itself, which is switched for it."""
        if not self._trains:
            return self._shadow(submodel)
        self.set_budget(submodel)  # type: ignore[attr-defined]
        return self

    def _training_cache(self, wanted: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What to add to a call in training mode: an empty cache of the active budget. Upstream would make one of the parent's layers."""
        wanted = kwargs["use_cache"] if kwargs.get("use_cache") is not None else wanted
        if self._active == self._full or not self._trains or not wanted or kwargs.get("past_key_values") is not None:
            return {}
        patched: Any = self.__dict__.get("forward")  # by trainers, whose losses take what they take
        if patched is not None and "past_key_values" not in inspect.signature(patched).parameters:
            return {}
        return {"past_key_values": DynamicCache(config=self._running_config)}

    @property
    def _running_config(self) -> PreTrainedConfig:
        """The stock config of what runs. In training mode `config` is the parent's."""
        trains = self._trains and self._active != self._full
        return self.elastic_config.stock_config(self._active) if trains else self.config

    def _claim(self, cache: Any) -> None:
        """Refuse a cache that another budget wrote."""
        if isinstance(cache, Cache):
            taken = self.__dict__.get("_taken_as")  # as the family counts the layers that a size of it has
            writer = self._active if taken is None or self._active != self._full else taken
            claim(cache, self.architecture, self.elastic_config.parent_config, self._active, writer)

    def get_output_embeddings(self) -> Any:
        """As upstream; at a budget in training mode the head's `weight` is what the budget keeps of it."""
        self._refuse_beside("get_output_embeddings()")
        head = super().get_output_embeddings()  # type: ignore[misc]
        units = self.__dict__.get("_stencils", {}).get(self.__dict__.get("_active"), []) if self._trains else []
        return next((CutHead(unit) for unit in units if unit.module is head), head)


def _recomputes(model: Any) -> bool:
    """Whether layers are checkpointed, which leave caches out."""
    return any(getattr(layer, "gradient_checkpointing", False) for layer in model.architecture.layers_of(model))
