"""Targets of a router: what its budgets may cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..architectures.cost import Cost
from ..configuration.budgets import FULL, Limit, parse_limit
from ..configuration.section import check_name
from ..errors import ElasticConfigError

Target = str | int | float | Mapping[str, Any]
"""A limit as in [`hf_elastic.configuration.budgets`]: `0.5`, `"50% active"`, `"12B"`, `"24GB"`."""


def pinned_targets(targets: Mapping[str, Target], full: Cost, dtype: torch.dtype) -> dict[str, Target]:
    """The targets in the form of JSON; memory is that of one dtype from now on, whatever the checkpoint is saved or loaded in.

    Texts with shares become what older versions read as well: a share as a number, one of active parameters as what it comes to.
    """
    if not isinstance(targets, Mapping):
        raise ElasticConfigError(f"router targets {targets!r} must be a dict from budget to target.")
    pinned: dict[str, Target] = {}
    for name, target in targets.items():
        limit = parse_limit(target, full) if isinstance(target, (str, Mapping)) else None
        if limit is not None and limit.share is not None and limit.share < 1:
            pinned[name] = limit.share if limit.quantity == "total" else f"{int(limit.value)} active"
        elif limit is not None and limit.quantity == "bytes":
            memory: dict[str, Any] = {
                "dtype": dtype,
                **(target if isinstance(target, Mapping) else {"memory": target}),
            }
            for key in memory.keys() & {"dtype", "cache_dtype"}:
                memory[key] = str(memory[key]).removeprefix("torch.")
            pinned[name] = memory
        else:
            pinned[name] = target
    return pinned


def limits_of(targets: Mapping[str, Target], full: Cost, dtype: torch.dtype) -> dict[str, Limit]:
    """The limit of every target.

    Raises:
        `ElasticConfigError`: no targets, or one that is no target or not below the parent's cost.
    """
    limits = {}
    for name, target in targets.items():
        check_name(name, f"router target {name!r}")
        limit: Limit | None = None
        if isinstance(target, (str, int, float, Mapping)) and not isinstance(target, bool):
            limit = parse_limit(target, full)
        if limit is None or name.lower() == FULL:
            raise ElasticConfigError(
                f"router target {name!r}={target!r} must be a share of the parent (0.5 or '50%'), or '12B', '2.1B active', '24GB', or a memory with "
                "caches ({'memory': '24GB', 'context_length': 32768}); 'full' is implied."
            )
        whole = limit.measure(full, dtype)
        if limit.value >= whole:
            raise ElasticConfigError(f"router target {name!r}={target!r} is not below the parent's {limit.of(whole)}.")
        limits[name] = limit
    if not limits:
        raise ElasticConfigError("the router needs at least one target.")
    return limits
