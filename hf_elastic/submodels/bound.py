"""A tensor of a live budget: where it lies in the family, and how a change on one side reaches the other.

A view is the family's memory, so nothing has to be done for it. A copy (heads cut per group, fused matrices) has a value of its own: it is
made again when the family's tensor was changed, and written back when it was changed itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..architectures.axes import Run, places_of, take
from ..errors import ElasticConfigError, HFElasticError


class _Watched:
    """For tensors of which copies exist, and these copies: whoever takes `.data` may change it, and torch does not count that as a change."""

    @property
    def data(self) -> torch.Tensor:
        _look(self)
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        _look(self)
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def _plain(self) -> torch.Tensor:
        """One of torch's own class, over the same memory: copies, pickles and files know nothing of this one."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return memo.setdefault(id(self), copy.deepcopy(self._plain(), memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)


class WatchedParameter(_Watched, nn.Parameter):
    """A parameter of a live budget that is a copy, or one of the family that was copied."""

    def _plain(self) -> torch.Tensor:
        return nn.Parameter(self.detach(), self.requires_grad)


class WatchedBuffer(_Watched, torch.Tensor):
    """As [`WatchedParameter`], for buffers."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors, as of a parameter

    def _plain(self) -> torch.Tensor:
        return self.detach()


def _look(tensor: Any) -> None:
    for seen in (tensor, tensor.__dict__.get("original")):  # a size of its own shows the family's copy
        if seen is not None:
            seen.__dict__["looks"] = seen.__dict__.get("looks", 0) + 1


def watch(tensor: torch.Tensor) -> torch.Tensor:
    """Notice from now on who takes the `.data` of a tensor; tensors of other classes than torch's own are left alone."""
    if tensor.is_inference():
        return tensor
    if type(tensor) is nn.Parameter:
        tensor.__class__ = WatchedParameter
    elif type(tensor) is torch.Tensor:
        tensor.__class__ = WatchedBuffer
    return tensor


def view_parameter(view: torch.Tensor, requires_grad: bool, name: str, instead: str) -> nn.Parameter:
    """A parameter of a live submodel.

    It asks for gradients where the parent's does: with one that does not, torch multiplies three-dimensional activations that are not
    contiguous (the last position, when a prompt is read) by a copy of the whole matrix, a third of the time of a prompt in bfloat16. But
    a gradient would end in the view and the parent would never see it, so computing one is an error.

    Args:
        name (`str`): What it is called in errors.
        instead (`str`): What to do to train it.
    """
    # A model loaded in inference mode has no gradients to ask for.
    requires_grad = requires_grad and not view.is_inference()
    parameter = nn.Parameter(view, requires_grad=requires_grad)
    if requires_grad:

        def refuse(gradient: torch.Tensor) -> None:
            raise HFElasticError(
                f"a gradient for {name} at a budget in evaluation mode would not reach the weights of the whole family; {instead}."
            )

        parameter.register_hook(refuse)
    return parameter


@dataclass
class Bound:
    """A tensor of a submodel and where it lies in the parent: a view, or a copy where no view can give it.

    Args:
        name (`str`): Name in the parent.
        runs (`list`): Per dimension the ranges that are kept of it.
        owner (`nn.Module`): Module of the parent that holds the tensor, as `leaf`.
        source (`torch.Tensor`): The parent's tensor.
        holder (`nn.Module`): Module of the submodel that holds what is kept of it, as `leaf`.
        placed (`torch.Tensor`): What was put there.
        copied (`bool`): Whether that is a copy.
    """

    name: str
    runs: Sequence[Sequence[Run]]
    owner: nn.Module
    leaf: str
    source: torch.Tensor
    holder: nn.Module
    placed: torch.Tensor

    copied: bool

    def __post_init__(self) -> None:
        if self.copied:
            watch(self.source)
            watch(self.placed)
        self.held = next(
            (held for held in (self.owner._parameters, self.owner._buffers) if held.get(self.leaf) is self.source),
            self.owner.__dict__,
        )
        self.address, self.requires_grad = self.source.data_ptr(), self.source.requires_grad
        self.place, self.asks = self.placed.data_ptr(), self.placed.requires_grad
        self._note()

    def _note(self) -> None:
        self.seen = (_state(self.source, _steps), _state(self.placed))

    @property
    def lies_there(self) -> bool:
        """Whether the parent still holds the same memory, and not another tensor that was put in its place."""
        # Every call of a live budget asks this of every tensor: a lookup takes a third of what an attribute of a module does.
        return self.held.get(self.leaf) is self.source and self.source.data_ptr() == self.address

    @property
    def is_current(self) -> bool:
        """The same, and frozen or not as then."""
        return self.lies_there and self.source.requires_grad == self.requires_grad

    def refresh(self) -> None:
        """Copy again if the parent's tensor was changed since."""
        if not self.copied or (state := _state(self.source, _steps)) == self.seen[0] is not None:
            return
        values = take(self.source.detach(), self.runs)
        # Who took `.data` may only have looked.
        seen = self.seen[0]
        if state is None or seen is None or state.version != seen.version or not torch.equal(values, self.placed):
            with writable(self.placed):
                self.placed.copy_(values)
        self._note()

    def write_back(self) -> None:
        """Carry over to the parent what was changed in a copy; what was exchanged waits for `settle`."""
        if self.copied and self._was_changed(self.placed):
            self._write(self.placed)

    def settle(self) -> bool:
        """Carry over to the parent what was changed at the budget.

        Returns:
            `bool`: Whether the submodel has to be bound anew, as another tensor lies where this one was put.

        Raises:
            `ElasticConfigError`: what lies there does not fit into the parent.
        """
        now = (self.holder._parameters if self.leaf in self.holder._parameters else self.holder._buffers).get(
            self.leaf
        )
        exchanged = now is not self.placed or now.data_ptr() != self.place
        if exchanged:
            self._check(now)
        assert now is not None
        frozen = now.requires_grad != self.asks
        if frozen and self.source.is_leaf:
            self.source.requires_grad_(now.requires_grad)
        if exchanged or (self.copied and self._was_changed(now)):
            self._write(now)
        return exchanged or frozen

    def _write(self, now: torch.Tensor) -> None:
        values = now.detach()
        with writable(self.source):
            for places in product(*(places_of(runs) for runs in self.runs)):
                kept, place = zip(*places, strict=True) if places else ((), ())
                self.source[kept] = values[place]
        self._note()

    def _was_changed(self, now: torch.Tensor) -> bool:
        (source, seen), placed = self.seen, _state(now)
        if (
            placed is None or seen is None or placed == seen
        ):  # where changes are not counted, the parent's are what counts
            return False
        if placed.version != seen.version:
            return True
        # Who took `.data` may only have looked; and if the parent was changed as well, what it holds is newer.
        unchanged = source is not None and source == _state(self.source, _steps)
        return unchanged and not torch.equal(now, take(self.source.detach(), self.runs))

    def _check(self, now: Any) -> None:
        fits = type(now) in (nn.Parameter, torch.Tensor, WatchedParameter, WatchedBuffer)
        if not fits or now.is_meta or now.shape != self.placed.shape or now.dtype != self.source.dtype:
            found = "nothing" if now is None else f"a {type(now).__name__} {tuple(now.shape)} of {now.dtype}"
            raise ElasticConfigError(
                f"{self.name} was exchanged while a budget was active: {found} cannot become its part {tuple(self.placed.shape)} of "
                f"{self.source.dtype} of the family. Put a tensor of that kind there, or call forget_budgets(), which drops the change; to change "
                "the family itself, call set_budget(None) first."
            )


@contextmanager
def writable(tensor: torch.Tensor) -> Iterator[None]:
    """Change a tensor in place: without gradients, and in inference mode only if it was made there."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield


@dataclass(frozen=True)
class _State:
    """How often a tensor was changed in place, its `.data` taken, and any optimizer has made a step."""

    version: int
    looks: int
    steps: int


_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


# Fused optimizers change weights without counting it.
register_optimizer_step_post_hook(_count_step)


def _state(tensor: torch.Tensor, steps: int = 0) -> _State | None:
    """`None` for tensors made in inference mode, which do not count changes."""
    return None if tensor.is_inference() else _State(tensor._version, tensor.__dict__.get("looks", 0), steps)
