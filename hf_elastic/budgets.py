"""What a user may write for a budget, and what it means.

| written | means |
|---|---|
| `None`, `"full"` | the whole parent |
| `"12b"` | the budget of that name (names win over every other reading) |
| `12.5e9`, `"12.5B"`, `"12.5B total"` | the largest submodel with at most that many parameters |
| `"2.1B active"` | ... with at most that many active parameters |
| `"24GB"`, `"22.5GiB"` | ... whose weights take at most that many bytes at the load dtype |
| `{"hidden": 1920, "expert_ffn": 960}` | exactly these sizes, the parent's elsewhere |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .cost import Cost
from .errors import ElasticConfigError

FULL = "full"
Budget = str | int | float | Mapping[str, Any] | None
Quantity = Literal["total", "active", "bytes"]

_COUNT = re.compile(
    r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmbt]?)\s*(?:params?|parameters)?\s*(total|active)?\s*", re.IGNORECASE
)
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt])(i?)b\s*", re.IGNORECASE)
_COUNT_UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Limit:
    """An upper limit on one quantity of a submodel."""

    quantity: Quantity
    value: float

    def measure(self, cost: Cost, dtype: torch.dtype) -> int:
        """The quantity of a cost that the limit is about."""
        if self.quantity == "bytes":
            return cost.weight_bytes(dtype)
        return cost.total_params if self.quantity == "total" else cost.active_params

    def __str__(self) -> str:
        if self.quantity == "bytes":
            return format_bytes(self.value)
        return f"{format_count(self.value)} {'active ' if self.quantity == 'active' else ''}parameters"


def parse_limit(budget: str | int | float) -> Limit | None:
    """Read a number, a count or an amount of memory; `None` if the text is none of them.

    Raises:
        `ElasticConfigError`: a number that is not positive and finite.
    """
    if isinstance(budget, str):
        if match := _BYTES.fullmatch(budget):
            power = "kmgt".index(match[2].lower()) + 1
            limit = Limit("bytes", float(match[1]) * (1024 if match[3] else 1000) ** power)
        elif match := _COUNT.fullmatch(budget):
            limit = Limit("active" if match[3] and match[3].lower() == "active" else "total", 0.0)
            limit = Limit(limit.quantity, float(match[1]) * _COUNT_UNITS[match[2].lower()])
        else:
            return None
    else:
        limit = Limit("total", float(budget))
    if not 0 < limit.value < float("inf"):
        raise ElasticConfigError(f"budget {budget!r} must be a positive number of parameters or bytes.")
    return limit


def format_count(count: float) -> str:
    """`31_577_937_344` as `31.58B`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return f"{count:.0f}"


def format_bytes(count: float) -> str:
    """Bytes in decimal units, as disks and model cards count them."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"
