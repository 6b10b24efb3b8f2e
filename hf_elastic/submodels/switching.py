"""Live switching: one set of weights, many sizes.

A submodel's live form is a stock model of its config whose parameters are views of the loaded ones. Switching exchanges the children and
the config for those of the budget, so what runs afterwards is the stock code of a stock model of that size; nothing is copied, and nothing
is looked up per token. Who may switch when others use the family is in [`hf_elastic.submodels.sharing`].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..architectures.encodings import Encoding
from ..architectures.submodel import Submodel
from ..configuration.budgets import FULL, Budget
from ..configuration.section import CUT_FROM
from ..configuration_elastic import ElasticConfig
from ..errors import BusyError, CheckpointError, ElasticConfigError, HFElasticError, shown
from .adapters import attached
from .packed import refuse_packed
from .rounding import Rounding
from .running import RunningMixin
from .sharing import COMPILED, Users


class SwitchingMixin(RunningMixin):
    """`set_budget`, `at`, `sized`, `budget`, `budgets` for a stock model class."""

    def _init_switching(self, elastic_config: ElasticConfig) -> None:
        self.elastic_config = elastic_config
        self._full = elastic_config.architecture.full(elastic_config.parent_config)
        self._active = self._full
        self._members, self._stencils, self._adapters = {}, {}, ()
        self._computing = False  # on the parent's own modules in evaluation mode, too
        self._exposing = False  # the modules of the budget, to those who go through them, too
        self._users = Users()
        self.__dict__.setdefault("_packed", False)

    @property
    def budgets(self) -> dict[str, dict[str, Any]]:
        """Named budgets that this model nests, largest first; they print as a table."""
        return self.elastic_config.budgets

    @property
    def budget(self) -> str | None:
        """Name of the active budget, however it was asked for (`"full"` for the whole parent); `None` for sizes without a name, loaded or set."""
        name = self.elastic_config.name_of(self.submodel)
        # A slice is a parent to what it nests; in its family its own sizes may have no name.
        return None if name == FULL and "sizes" in getattr(self.elastic_config, CUT_FROM, {}) else name

    @budget.setter
    def budget(self, budget: Budget | Submodel) -> None:
        raise AttributeError(
            f"budget is only read here: call set_budget({shown(budget)}), or: with model.at({shown(budget)}): ..."
        )

    def _sizes_shown(self) -> str:
        """What `print(model)` says before the modules; nothing while the model is being made."""
        if "elastic_config" not in self.__dict__:
            return ""
        try:
            active = self.elastic_config.name_of(self.submodel) or str(self.submodel.differs(self._full))
        except BusyError:  # which size runs depends on the thread
            active = "not known here"
        return f"{type(self).__name__} at {active}, with the sizes\n{self.elastic_config.sizes_shown(active)}\n"

    @property
    def submodel(self) -> Submodel:
        """Sizes of the active budget: that of the `at` block that this thread or task is in, if it is in one."""
        block = self._users.own()
        return self._users.settled(self._active) if block is None else block.submodel

    def set_budget(self, budget: Budget | Submodel) -> None:
        """Run at another budget from now on.

        The first time, a stock model of that size is made whose weights are views of this model's (heads cut per group and fused
        matrices need a copy, which is kept). After that nothing is copied, unless weights were changed meanwhile: those copies are made
        again here, and what was changed in copies while their budget was active is written back. While a smaller budget is active,
        `config`, `state_dict()`, `modules()` and attributes (`model.lm_head`) are those of the submodel; `parameters()` and `children()` stay the
        family's, which is what optimizers need: training reaches it whether they are made before or after.
        `save_pretrained` still saves everything that is loaded.

        In training mode the parent's own modules stay, with their parameters, hooks and gradients; they compute only what the budget keeps
        (see [`hf_elastic.submodels.stencils`]). Backward has to run before the next switch if gradient checkpointing is on.

        Args:
            budget: See [`hf_elastic.configuration.budgets`]; `None` is everything that is loaded.

        Raises:
            `UnknownBudgetError`, `ElasticConfigError`: the budget does not exist here, weights have no storage, or what was exchanged at the
                active budget has no place in the family. The active budget stays as it was. Weights that accelerate offloaded are fetched
                for every budget as for the parent, but not in training mode.
            `BusyError`: another thread is running the family, or is inside `at`.
        """
        submodel = self._resolved(budget)
        with self._users.lock:
            block = self._users.own()
            if block is not None and block.beside:
                self._member(submodel)
            else:
                if submodel != self._active or self._users.others():
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
        submodel = self._resolved(budget)
        users = self._users
        with users.lock:
            beside = bool(users.others() or users.pending) or (submodel != self._active and users.runs_elsewhere)
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
        with self._users.saver, self._by(self._view_at, budget):  # several threads that save wait for each other
            yield self

    @contextmanager
    def computing(self, budget: Budget | Submodel) -> Iterator[Any]:
        """Compute at a budget on the parent's own modules inside a `with` block, in evaluation mode too; for trainers, whose wrappers
        and shards hold on to these modules."""
        refuse_packed(self, "computing on the parent's own modules, as trainers do,")  # type: ignore[arg-type]
        with self._by(self._train_at, budget):
            yield self

    def round_weights(self, encodings: Mapping[str, Encoding] | None) -> None:
        """From now on, let `computing`, which trainers use, compute with the weights that a checkpoint quantised at that moment would hold, at every
        budget and in the whole parent; see [`hf_elastic.submodels.rounding`]. Nothing that is stored changes.

        Args:
            encodings (`dict[str, Encoding]`, *optional*): By the name of the weight in the live parent; `None` computes with the weights as they are.
        """
        with self._users.lock:
            self._users.refuse_others("rounding its weights")
            self.__dict__["_rounding"] = None if encodings is None else Rounding(dict(encodings))

    @contextmanager
    def _by(self, switch: Callable[[Submodel], None], budget: Budget | Submodel) -> Iterator[None]:
        submodel = self._resolved(budget)
        users = self._users
        with users.lock:
            users.refuse_others("saving it, or training it at a budget,")
            before, computing, exposing = self._active, self._computing, self._exposing
            if not self._trains:
                self._follow()
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
                self._computing = computing  # what is rounded is so only in between
                switch(self._full)
                self._exposing = exposing
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
        if mode:
            refuse_packed(self, "training")  # type: ignore[arg-type]
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

    def load_state_dict(
        self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """As upstream, into the active budget; the state dict of everything that is loaded is taken at a smaller one, too.

        Raises:
            `CheckpointError`: at a smaller budget, names or shapes that are neither the budget's nor the family's. Nothing was changed.
            `ElasticConfigError`: at a smaller budget of a model that was made in inference mode, whose changes torch does not count.
        """
        self._refuse_beside("load_state_dict()")
        if self._active == self._full or self._trains:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)  # type: ignore[misc]
        given = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        here = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        if any(tensor.is_inference() for tensor in self.parameters()):  # type: ignore[attr-defined]
            raise ElasticConfigError(
                "this model was made in inference mode, where changes are not counted: call set_budget(None), load the weights, then set_budget()."
            )
        if given.items() <= here.items():
            return super().load_state_dict(state_dict, strict=strict, assign=assign)  # type: ignore[misc]
        with self._whole("loading weights"):
            whole = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
            if given.items() <= whole.items():
                return super().load_state_dict(state_dict, strict=strict, assign=assign)  # type: ignore[misc]
        wrong = next((name for name in given if given[name] != whole.get(name)), next(iter(given)))
        raise CheckpointError(
            f"the state dict is neither that of the active budget nor that of the family: {wrong} {given[wrong]} is {here.get(wrong)} at the budget "
            f"and {whole.get(wrong)} in the family. Take it from a model of the same budget, or call set_budget(None) first."
        )

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

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """As upstream, of everything that is loaded."""
        with self._whole("checkpointing it"):
            super()._set_gradient_checkpointing(*args, **kwargs)  # type: ignore[misc]

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The older name, which peft and trl ask for; upstream would warn of it as if the user had."""
        return bool(self.is_activation_checkpointing)  # type: ignore[attr-defined]

    def enable_input_require_grads(self) -> None:
        """As upstream, of everything that is loaded."""
        with self._whole("hooking it"):
            super().enable_input_require_grads()  # type: ignore[misc]

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> Any:
        """What DDP asks for first. It would hold on to tensors of a budget in evaluation mode, which training passes by."""
        if self._family_tree is not None:
            raise HFElasticError(
                "DistributedDataParallel around a family at a smaller budget in evaluation mode would not see its gradients: call train() first, or "
                "set_budget(None) and set the budget afterwards."
            )
        if "_ddp_ignored" in self.__dict__:
            return self.__dict__["_ddp_ignored"]
        raise AttributeError("_ddp_params_and_buffers_to_ignore")

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: Any) -> None:
        self.__dict__["_ddp_ignored"] = names

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.set_attn_implementation`, for every budget."""
        with self._whole("changing how it runs"):
            super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]

    def set_experts_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.set_experts_implementation`, for every budget."""
        if (*args, *kwargs.values()) != ("eager",):
            refuse_packed(self, "an experts_implementation other than 'eager'")  # type: ignore[arg-type]
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

    @contextmanager
    def _whole(self, what: str) -> Iterator[None]:
        """Change everything that is loaded; what was made for budgets is made anew afterwards."""
        with self._users.lock:
            self._users.refuse_others(what)
            active = self._active
            if not self._trains:
                self._follow()
            self._forget()
            try:
                yield
            finally:
                self._switch(active)

    def __getstate__(self) -> dict[str, Any]:
        with self._whole("copying it"):
            state = {**self.__dict__, "_modules": dict(self._modules), "_members": {}, "_stencils": {}}
            for key in ("_users", "_shares", "_beside", *COMPILED):
                state.pop(key, None)
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
