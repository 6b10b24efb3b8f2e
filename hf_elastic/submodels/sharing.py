"""One family, several users: who runs it at which budget in which thread, and models of a size that run beside it.

A family has one active budget. `at` is a matter of the context (thread or asyncio task) that opened it: what this context runs is at that
budget, whatever others do. Where the family itself is in use elsewhere, it runs on a *shadow*: module objects of its own over the same
tensors. What nobody can decide (a thread that opened no block, while others have theirs open) is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, update_wrapper
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..architectures.submodel import Submodel
from ..errors import BusyError


@dataclass(eq=False)
class Block:
    """A `with` block that runs a family at a budget.

    Args:
        users (`Users`): Of which family.
        submodel (`Submodel`): The budget.
        beside (`bool`): Whether what the block runs are shadows; if not, the family itself is switched.
        thread (`str`): Who opened it, for errors.
    """

    users: Users
    submodel: Submodel
    beside: bool
    thread: str


_OPEN: ContextVar[tuple[Block, ...]] = ContextVar("hf_elastic_open", default=())
_SET: ContextVar[WeakKeyDictionary[Users, tuple[int, Submodel]] | None] = ContextVar("hf_elastic_set", default=None)


class Users:
    """Who uses a family at the moment. All of it is read and changed under `lock`."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.saver = threading.RLock()
        self._running: dict[int, int] = {}  # calls of the family itself, per thread
        self.blocks: list[Block] = []
        self.base: Submodel | None = None  # what the family goes back to when all blocks that switched it are left
        self.pending: Submodel | None = None  # the same, when the calls of other threads that run it have ended

    def own(self) -> Block | None:
        """The innermost open block of this context."""
        return next((block for block in reversed(_OPEN.get()) if block.users is self and block in self.blocks), None)

    def others(self) -> list[Block]:
        """The open blocks of other contexts."""
        mine = _OPEN.get()
        return [block for block in self.blocks if block not in mine]

    @property
    def runs_elsewhere(self) -> bool:
        """Whether another thread is inside a call of the family itself."""
        return any(thread != threading.get_ident() for thread in self._running)

    @property
    def runs_here(self) -> bool:
        """Whether this thread is inside a call of the family itself."""
        return threading.get_ident() in self._running

    def begin(self) -> None:
        """A call of the family itself."""
        with self.lock:
            thread = threading.get_ident()
            self._running[thread] = self._running.get(thread, 0) + 1

    def end(self) -> Submodel | None:
        """Its end; returns what the family has to go back to now."""
        with self.lock:
            thread = threading.get_ident()
            self._running[thread] -= 1
            if not self._running[thread]:
                del self._running[thread]
            if self._running:
                return None
            back, self.pending = self.pending, None
            return back

    def open(self, submodel: Submodel, active: Submodel, beside: bool = False) -> Block:
        """A block of this context.

        Args:
            active (`Submodel`): What the family was at before.
        """
        if not beside and all(block.beside for block in self.blocks):
            self.base = active
        block = Block(self, submodel, beside, threading.current_thread().name)
        self.blocks.append(block)
        _OPEN.set((*(other for other in _OPEN.get() if other in other.users.blocks), block))
        return block

    def close(self, block: Block) -> Submodel | None:
        """Its end, in whatever context: a generator may be closed in another one.

        Returns:
            `Submodel`: What the family has to go back to now; `None` for a block beside it, and while another thread is inside a call of the
                family, whose end then sees to it.
        """
        self.blocks.remove(block)
        _OPEN.set(tuple(other for other in _OPEN.get() if other is not block))
        if block.beside:
            return None
        back = next((other.submodel for other in reversed(self.blocks) if not other.beside), self.base)
        self.pending = back if self.runs_elsewhere else None
        return None if self.runs_elsewhere else back

    def settled(self, active: Submodel) -> Submodel:
        """What the family, which is at `active` now, is at for those who are in no block."""
        if self.pending is not None:
            return self.pending
        return active if self.base is None or all(block.beside for block in self.blocks) else self.base

    def note_set(self, submodel: Submodel) -> None:
        """This thread has said at which budget the family runs."""
        _SET.set(WeakKeyDictionary({**(_SET.get() or {}), self: (threading.get_ident(), submodel)}))

    def was_set_elsewhere(self, settled: Submodel) -> bool:
        """Whether another thread has set another budget since this one set it."""
        said = (_SET.get() or WeakKeyDictionary()).get(self)
        return said is not None and said[0] == threading.get_ident() and said[1] != settled

    def refuse_others(self, what: str) -> None:
        """Raise [`BusyError`] if another thread is using the family, so that `what` would change it under its hands."""
        if others := self.others():
            raise BusyError(
                f"{what} is not possible now: thread {others[0].thread!r} is inside at() of this family. {_INSTEAD}"
            )
        if self.runs_elsewhere:
            raise BusyError(f"{what} is not possible now: another thread is running this family. {_INSTEAD}")


_INSTEAD = "Wait for it, or take a model of its own for the size, small = family.sized('small'), which runs in its own thread whatever the family does."


COMPILED = ("_compiled_call_impl", "_compiled_call", "_last_compile_config")
"""What `compile` and the stock `generate` keep on a module; it leads back to that very module."""


def shadow(
    module: nn.Module, children: Mapping[str, nn.Module | None], change: Callable[[nn.Module], None]
) -> nn.Module:
    """A module tree of its own over the same tensors: what is set on its modules is not seen by the other one's.

    Forwards that were put on a module (accelerate's hooks, kernels) are put on its twin; those that lead back to the module itself are
    left out, as the class's own is what they lead to.

    Args:
        children (`dict[str, nn.Module]`): What `module` has for children in its twin.
        change (`Callable`): Called for every twin while its children are still those of its module.
    """
    made: dict[int, nn.Module] = {}

    def twin_of(module: nn.Module, children: Mapping[str, nn.Module | None]) -> nn.Module:
        if id(module) in made:
            return made[id(module)]
        twin = made[id(module)] = object.__new__(type(module))
        for key, value in module.__dict__.items():
            if key in COMPILED:
                continue
            own = isinstance(value, (dict, set)) and key.startswith("_")  # parameters, buffers, hooks
            twin.__dict__[key] = value.copy() if own else value
        for key in ("forward", "_old_forward"):
            if key in twin.__dict__:
                forward = _rebound(twin.__dict__.pop(key), module, twin)
                twin.__dict__.update({} if forward is None else {key: forward})
        change(twin)
        twin.__dict__["_modules"] = {
            key: None if child is None else twin_of(child, child._modules) for key, child in children.items()
        }
        return twin

    return twin_of(module, children)


def _rebound(forward: Any, module: nn.Module, twin: nn.Module) -> Any:
    """A forward of a module, for its twin; `None` if it leads back to the module's own."""
    if isinstance(forward, partial) and forward.args[:1] == (module,):
        made = partial(forward.func, twin, *forward.args[1:], **forward.keywords)
        return update_wrapper(made, getattr(forward, "__wrapped__", type(module).forward))
    if isinstance(forward, MethodType) and forward.__self__ is module:
        cells = (cell.cell_contents for cell in getattr(forward.__func__, "__closure__", None) or ())
        leads_back = any(getattr(content, "__self__", None) is module for content in cells)
        return None if leads_back else MethodType(forward.__func__, twin)
    raise BusyError(
        f"the forward of {type(module).__name__} was exchanged for {type(forward).__name__}, which runs on this very module; sizes of the "
        "family cannot run beside it. Put the forward back first."
    )
