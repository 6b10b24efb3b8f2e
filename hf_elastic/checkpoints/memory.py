"""`budget="auto"`: the largest size whose weights and caches fit into the memory that is free where a model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import get_max_memory

from ..architectures.submodel import Submodel
from ..configuration.budgets import AUTO, Budget, Limit, format_bytes, parse_limit
from ..configuration_elastic import ElasticConfig
from ..errors import ElasticConfigError, UnknownBudgetError, shown

logger = logging.getLogger(__name__)

SHARE = 0.9
"""Of the free memory that weights and caches may take; the rest is for activations, logits and fragments."""
CONTEXT_LENGTH = 8192
"""Tokens that the caches have room for if nothing else is said, or as many as the parent was made for if those are fewer."""


def asks_for_free_memory(budget: Any, elastic: ElasticConfig) -> bool:
    """Whether a budget is `"auto"` or a memory budget of `"auto"`. A checkpoint may have a budget of that name, which then is meant."""
    if isinstance(budget, Mapping):
        return "memory" in budget and budget["memory"] == AUTO
    named = {name.lower() for name in elastic.budgets}
    return isinstance(budget, str) and budget.strip().lower() == AUTO and AUTO not in named


def resolve_for_loading(
    elastic: ElasticConfig,
    budget: Budget | Submodel,
    dtype: torch.dtype | None,
    device_map: Any = None,
    max_memory: Mapping[Any, Any] | None = None,
    packed: bool = False,
) -> Submodel:
    """As `ElasticConfig.resolve`, with the memory that is free for `"auto"`.

    `"auto"` stands for `{"memory": "auto"}`, where `context_length` (default: 8192, or the parent's `max_position_embeddings` if that is
    less), `batch_size` (default: 1), `dtype` and `cache_dtype` can be given, too. Nine tenths of the free memory are used.

    Args:
        device_map (*optional*): As in `from_pretrained`; says whose memory is meant, see `free_memory`.
        max_memory (`dict`, *optional*): As in `from_pretrained`: bytes per device instead of those that are free, used in full.
        packed (`bool`, *optional*, defaults to `False`): Weights that are stored in few bits stay so in memory.

    Raises:
        `UnknownBudgetError`: nothing fits; says what the smallest needs and what there is.
        `ElasticConfigError`: a `device_map` that places parts by hand.
    """
    if isinstance(budget, Submodel) or not asks_for_free_memory(budget, elastic):
        return elastic.resolve(budget, dtype, packed=packed)
    written, what = with_free_memory(budget, elastic, device_map, max_memory)
    try:
        submodel = elastic.resolve(written, dtype, packed=packed)
    except UnknownBudgetError as error:
        raise UnknownBudgetError(f"budget={shown(budget)} is {what}, and {error}") from error
    limit: Limit = parse_limit(written)  # type: ignore[assignment]
    needed = limit.measure(elastic.cost_model()(submodel), dtype or elastic.load_dtype, packed)
    logger.info(
        "budget=%r: %s, which is %s; chose %s, which needs %s.",
        budget,
        limit,
        what,
        elastic.name_of(submodel) or "a size between two budgets",
        format_bytes(needed),
    )
    return submodel


def with_free_memory(
    budget: Any, elastic: ElasticConfig, device_map: Any = None, max_memory: Mapping[Any, Any] | None = None
) -> tuple[dict[str, Any], str]:
    """A budget of `"auto"` memory as one of so many bytes, with room for caches; and how many these are, in words."""
    free, where = free_memory(device_map, max_memory)
    share = 1.0 if max_memory else SHARE
    longest = getattr(elastic.parent_config, "max_position_embeddings", None) or CONTEXT_LENGTH
    given = dict(budget) if isinstance(budget, Mapping) else {}
    written = {"context_length": min(longest, CONTEXT_LENGTH), **given, "memory": max(int(share * free), 1)}
    return written, f"{share:.0%} of the {format_bytes(free)} of {where}"


def free_memory(device_map: Any = None, max_memory: Mapping[Any, Any] | None = None) -> tuple[int, str]:
    """Free bytes of the device that a `device_map` names, and what that is called.

    Without `device_map` a model is loaded into main memory and mostly moved to the accelerator then, so it has to fit into the smaller of the two.
    `"auto"`, `"balanced"` and `"sequential"` take all accelerators together, or main memory where there is none.
    """
    memory: dict[Any, Any] = {**get_max_memory(dict(max_memory) if max_memory else None)}
    memory.pop("disk", None)
    accelerators = {key: size for key, size in memory.items() if key != "cpu"}
    if isinstance(device_map, Mapping):
        places = set(device_map.values())
        if len(places) != 1:
            raise ElasticConfigError(
                f"budget='auto' cannot tell what fits a device_map that places parts by hand ({len(places)} places); give one device, "
                "device_map='auto', or the memory yourself, such as budget='24GB'."
            )
        device_map = places.pop()
    if device_map is None:
        tightest = min(memory, key=lambda key: memory[key])
        return memory[tightest], _called(tightest)
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        together = accelerators or memory
        return sum(together.values()), " and ".join(_called(key) for key in together)
    device = torch.device(device_map) if not isinstance(device_map, int) else None
    key: Any = device_map if device is None else device.type
    if device is not None and device.type not in memory:  # accelerators are numbered
        key = device.index or 0
    if key not in memory:
        raise ElasticConfigError(
            f"budget='auto': nothing is known of the memory of device_map={device_map!r}; there are {', '.join(map(_called, memory))}."
        )
    return memory[key], _called(key)


def _called(key: Any) -> str:
    return "main memory" if key == "cpu" else f"device {key}"
