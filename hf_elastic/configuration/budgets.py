"""What a user may write for a budget, and what it means.

| written | means |
|---|---|
| `None`, `"full"` | the whole parent |
| `"12b"` | the budget of that name (names win over every other reading) |
| `12.5e9`, `"12.5B"`, `"12.5B total"` | the largest submodel with at most that many parameters |
| `"2.1B active"` | ... with at most that many active parameters |
| `0.5`, `"0.5"`, `"50%"` | ... with at most that share of the parent's parameters; a number of 1 or more counts parameters |
| `"50% active"` | ... with at most that share of the parent's active parameters |
| `"24GB"`, `"22.5GiB"` | ... whose weights take at most that many bytes at the load dtype |
| `{"memory": "24GB", "context_length": 32768, "batch_size": 4}` | ... whose weights and caches together do |
| `"auto"`, `{"memory": "auto", "context_length": 32768}` | ... do so in the memory that is free where the model is loaded (`from_pretrained` only) |
| `{"hidden": 1920, "expert_ffn": 960}` | exactly these sizes, the parent's elsewhere |

The parent is everything that is loaded: in a slice, the slice. A limit selects among the budgets of the checkpoint and, where a router
decided them, the submodels that it interpolates between them. What it finds may be far from it, which is said (`BudgetWarning`), except of
memory. Weights that are stored in few bits count as what they are in memory: decoded in the load dtype, or as stored in a packed model.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

import torch

from ..architectures.cost import WEIGHT_DTYPES, Cost
from ..errors import BudgetWarning, ElasticConfigError, did_you_mean, shown, users_level

FULL = "full"
AUTO = "auto"
Budget = str | int | float | Mapping[str, Any] | None
Quantity = Literal["total", "active", "bytes"]

_COUNT = re.compile(
    r"\s*((?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)\s*([kmbt%]?)\s*(?:params?|parameters)?\s*(total|active)?\s*(?:params?|parameters)?\s*",
    re.IGNORECASE,
)
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt])(i?)b\s*", re.IGNORECASE)
_COUNT_UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_FAR = 0.1
"""Part of a limit that what was found may be below it, or the limit above the whole parent, before that is said."""

_MEMORY_KEYS = ("memory", "context_length", "batch_size", "dtype", "cache_dtype")
DTYPES = {
    **WEIGHT_DTYPES,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Types of weights by the names that budgets and commands take, besides those of torch."""


@dataclass(frozen=True)
class Limit:
    """An upper limit on one quantity of a submodel.

    Args:
        quantity (`str`): `"total"` or `"active"` parameters, or `"bytes"` of memory.
        value (`float`): Of that quantity.
        dtype (`torch.dtype`, *optional*): Of the weights in memory; the load dtype if not given. What has to stay in float32 stays so.
        context_length (`int`, *optional*): Tokens per sequence in the caches; only the weights are counted if not given.
        batch_size (`int`, *optional*, defaults to 1): Sequences in the caches.
        cache_dtype (`torch.dtype`, *optional*): Of KV cache and convolution states, defaults to that of the weights. SSM states are float32.
        share (`float`, *optional*): The part of the parent's quantity that was asked for, if it was written so; `value` is what that comes to.
    """

    quantity: Quantity
    value: float
    dtype: torch.dtype | None = None
    context_length: int | None = None
    batch_size: int = 1
    cache_dtype: torch.dtype | None = None
    share: float | None = None

    def of(self, value: float) -> Limit:
        """Another amount of the same quantity, to be shown."""
        return replace(self, value=value, share=None)

    def measure(self, cost: Cost, dtype: torch.dtype, packed: bool = False) -> int:
        """The quantity of a cost that the limit is about.

        Args:
            dtype (`torch.dtype`): The load dtype.
            packed (`bool`, *optional*, defaults to `False`): Weights that are stored as codes are held so; otherwise they are decoded.
        """
        if self.quantity != "bytes":
            return cost.total_params if self.quantity == "total" else cost.active_params
        weights = self.dtype or dtype
        held = cost.stored_bytes(weights) if packed else cost.weight_bytes(weights)
        if self.context_length is None:
            return held
        return held + cost.cache_bytes(self.context_length, self.batch_size, self.cache_dtype or weights)

    def __str__(self) -> str:
        if self.share is not None:
            return f"{100 * self.share:.4g}% of the parent, {self.of(self.value)}"
        if self.quantity != "bytes":
            return f"{format_count(self.value)} {'active ' if self.quantity == 'active' else ''}parameters"
        if self.context_length is None:
            return format_bytes(self.value)
        return f"{format_bytes(self.value)} with the caches of {self.batch_size} x {self.context_length} tokens"


def is_limit(budget: Any) -> bool:
    """Whether a budget is written as a limit or a name, and not as a dict of sizes."""
    return not isinstance(budget, Mapping) or "memory" in budget


def parse_limit(budget: str | float | Real | Mapping[str, Any], full: Cost | None = None) -> Limit | None:
    """Read a number, a count, a share or an amount of memory; `None` if the text is none of them.

    Args:
        full (`Cost`, *optional*): Of the whole parent, which shares are taken of.

    Raises:
        `ElasticConfigError`: a number that is not positive and finite, a share above 100 % or of no parent, or a dict whose entries are not what
            they should be.
    """
    if isinstance(budget, Mapping):
        limit: Limit | None = _parse_memory(budget)
    elif isinstance(budget, str):
        limit = _parse_text(budget)
    else:
        limit = _number("total", budget)
    if limit is None:
        return None
    if not 0 < limit.value < float("inf"):
        raise ElasticConfigError(
            f"budget {shown(budget)} must be a positive number of parameters or bytes, or a share of the parent (0.5 or '50%')."
        )
    return limit if limit.share is None else _of_parent(limit, budget, full)


def _parse_text(text: str) -> Limit | None:
    if text.strip().lower() == AUTO:
        raise auto_error(text)
    if match := _BYTES.fullmatch(text):
        power = "kmgt".index(match[2].lower()) + 1
        return Limit("bytes", float(match[1]) * (1024 if match[3] else 1000) ** power)
    if not (match := _COUNT.fullmatch(text)):
        return None
    quantity: Quantity = "active" if match[3] and match[3].lower() == "active" else "total"
    number, unit = float(match[1]), match[2].lower()
    if unit == "%":
        return Limit(quantity, number / 100, share=number / 100)
    return Limit(quantity, number * _COUNT_UNITS[unit]) if unit else _number(quantity, number)


def _number(quantity: Quantity, number: Any) -> Limit:
    """A number without a unit: below 1 a share of the parent, otherwise a count."""
    try:
        value = float(number)
    except OverflowError:
        value = float("inf")
    return Limit(quantity, value, share=value if 0 < value < 1 else None)


def _of_parent(limit: Limit, budget: Any, full: Cost | None) -> Limit:
    """A share, as the number of parameters that it comes to."""
    share: float = limit.share  # type: ignore[assignment]
    if share > 1:
        raise ElasticConfigError(
            f"budget {shown(budget)} is more than the whole parent; a share is above 0 and at most 100%, such as '50%' or 0.5."
        )
    if full is None:
        raise ElasticConfigError(
            f"budget {shown(budget)} is a share, and nothing here says of what; give an amount, such as '12B' or '24GB'."
        )
    return replace(limit, value=share * (full.total_params if limit.quantity == "total" else full.active_params))


def unit_hint(limit: Limit) -> str:
    """What may have been meant by a small number of parameters, for an error that says that nothing is so small."""
    if limit.quantity == "bytes" or limit.share is not None or not 1 <= limit.value <= 1000:
        return ""
    share = "the whole parent '100%'" if limit.value == 1 else "a share 0.5 or '50%'"
    return f" A number of 1 or more counts parameters: billions are written '{limit.value:g}B', {share}."


def warn_if_far(where: str, limit: Limit, found: float, whole: float, advice: str) -> None:
    """Warn where a limit on parameters is far above the whole parent, or what was found for it far below. Memory is whatever a machine has.

    Args:
        where (`str`): The budget, as the user wrote it.
        found (`float`): The quantity of what was found.
        whole (`float`): That of the whole parent.
        advice (`str`): What else there is, or what to do to come nearer.
    """
    if limit.quantity == "bytes" or found >= (1 - _FAR) * limit.value:
        return
    if found >= whole:
        told = f"{where} asks for {limit}, and the whole parent, which it gives, has {limit.of(whole)}. {advice}"
    else:
        told = f"{where} asks for {limit}; what was found within that has {limit.of(found)}, {found / limit.value:.0%} of it. {advice}"
    warnings.warn(told, BudgetWarning, stacklevel=users_level())


def auto_error(budget: Any) -> ElasticConfigError:
    """What to say to `"auto"` where nothing is loaded."""
    return ElasticConfigError(
        f"budget={shown(budget)} asks for the memory that is free where a model is loaded, so only from_pretrained takes it; give an amount here, "
        "such as '24GB'."
    )


def _parse_memory(budget: Mapping[str, Any]) -> Limit:
    where = f"budget {shown(dict(budget))}"
    for key in budget:
        if key not in _MEMORY_KEYS:
            raise ElasticConfigError(
                f"{where}: unknown key {key!r}; a memory budget takes {', '.join(_MEMORY_KEYS)}.{did_you_mean(key, _MEMORY_KEYS)}"
            )
    memory = budget.get("memory")
    if memory == AUTO:
        raise auto_error(dict(budget))
    limit = _parse_text(memory) if isinstance(memory, str) else None
    if isinstance(memory, (int, float)) and not isinstance(memory, bool):
        limit = Limit("bytes", _number("total", memory).value)
    if limit is None or limit.quantity != "bytes" or 0 < limit.value < 1:
        raise ElasticConfigError(f"{where}: memory={memory!r} must be a number of bytes, or a text such as '24GB'.")
    for key in ("context_length", "batch_size"):
        count = budget.get(key, 1)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ElasticConfigError(f"{where}: {key}={count!r} must be a whole number of at least 1.")
    if "context_length" not in budget and (stray := {"batch_size", "cache_dtype"} & budget.keys()):
        raise ElasticConfigError(f"{where}: {min(stray)} says how large caches are, which needs context_length too.")
    given: dict[str, Any] = {key: budget[key] for key in ("context_length", "batch_size") if key in budget}
    for key in ("dtype", "cache_dtype"):
        if key in budget:
            given[key] = _parse_dtype(budget[key], f"{where}: {key}")
    return replace(limit, **given)


def _parse_dtype(name: Any, where: str) -> torch.dtype:
    if isinstance(name, torch.dtype) and name in DTYPES.values():
        return name
    if not isinstance(name, str) or name not in DTYPES:
        raise ElasticConfigError(f"{where}={name!r} must be one of {', '.join(DTYPES)}.")
    return DTYPES[name]


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


class Sizes(dict[str, dict[str, Any]]):
    """Budgets by name, which print as a table; otherwise a plain dict."""

    def __repr__(self) -> str:
        rows = [(name, entry["total_params"], entry["active_params"]) for name, entry in self.items()]
        return size_lines(rows) or "{}"


def size_lines(sizes: Sequence[tuple[str, int, int]], active: str | None = None) -> str:
    """Names, parameters and active parameters in aligned lines.

    Args:
        sizes (`list[tuple]`): Name, parameters and active parameters.
        active (`str`, *optional*): The size that a model runs at, which is marked.
    """
    rows = [(name, f"{total:,} parameters", f"{used:,} active") for name, total, used in sizes]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    return "\n".join(
        f"  {name:<{widths[0]}}  {total:>{widths[1]}}  {used:>{widths[2]}}{'  <- runs' if name == active else ''}"
        for name, total, used in rows
    )
