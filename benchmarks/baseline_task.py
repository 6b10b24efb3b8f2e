"""The lab's tasks as `baselines.py` sees them: a parent, sizes, rows to train on and problems to solve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from hf_elastic.lab import book
from hf_elastic.lab.family import BETWEEN, FAMILY, ROUTER_CHOICES, ROUTER_TARGETS
from hf_elastic.lab.parent import load_parent


@dataclass(frozen=True)
class Task:
    """A task of the lab.

    Args:
        name (`str`): As in `--task`.
        module (`ModuleType`): Has `build_tokenizer`, `problems`, `training_dataset`, `calibration_dataset`, `evaluate`, `EOS` and `THINK_START`.
        load_parent (`Callable`): Gives the parent in the package, and its tokenizer.
        sizes (`dict[str, dict]`): The family's sizes, largest first, without the whole parent.
        length (`Any`): How long the problems are that are solved, as `problems` takes it; `quick_length` in a quick run.
        short (`int`): Tokens of a row in the first of two stages.
        between (`dict[str, Any]`, *optional*): A size between two of them, which the family's run never draws.
        router_targets (`dict[str, Any]`, *optional*): What a router's sizes may cost.
        router_choices (`dict[str, list[int]]`, *optional*): What it chooses among.
        keyword (`str`, *optional*): What `evaluate` calls the length.
    """

    name: str
    module: ModuleType
    load_parent: Callable[[], tuple[Any, Any]]
    sizes: Mapping[str, Mapping[str, Any]]
    length: Any
    quick_length: Any
    short: int
    between: Mapping[str, Any] = field(default_factory=dict)
    router_targets: Mapping[str, Any] = field(default_factory=dict)
    router_choices: Mapping[str, Any] = field(default_factory=dict)
    keyword: str | None = None


BOOK = Task(
    "book",
    book,
    load_parent,
    FAMILY,
    length=12,
    quick_length=2,
    short=80,
    between=BETWEEN,
    router_targets=ROUTER_TARGETS,
    router_choices=ROUTER_CHOICES,
    keyword="letters",
)
TASKS = {task.name: task for task in (BOOK,)}
