"""The submodels that the kit cuts out of a model: made from its table alone, as far as the stock config can say them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from ..architectures import Architecture
from ..architectures.submodel import LAYERS, Submodel
from ..errors import ElasticConfigError
from .blocks import Blocks


@dataclass(frozen=True)
class Case:
    """A submodel of the model that is checked."""

    name: str
    sizes: dict[str, Any]
    submodel: Submodel


@dataclass
class Cases:
    """What can be cut, and what the stock config cannot say.

    Args:
        said (`list[Case]`): The whole, every axis alone, per layer, all together, fewer layers, both.
        unsaid (`list[str]`): What was tried without success, with the reason.
        blocks (`Blocks`, *optional*): Only sizes that leave whole blocks of these weights.
    """

    said: list[Case] = field(default_factory=list)
    unsaid: list[str] = field(default_factory=list)
    blocks: Blocks | None = None

    def named(self, *beginnings: str) -> list[Case]:
        return [case for case in self.said if case.name.startswith(beginnings)]


def cases_of(
    architecture: Architecture, config: PreTrainedConfig, each_axis: bool = True, blocks: Blocks | None = None
) -> Cases:
    """The cases of a config.

    Args:
        each_axis (`bool`, *optional*, defaults to `True`): Also every axis by itself, which says where something is wrong.
        blocks (`Blocks`, *optional*): Only sizes that leave whole blocks of these weights; an axis without any is among what is not said.

    Raises:
        `ElasticConfigError`: an axis that nothing can be cut from, so that nobody could check it.
    """
    found, full = Cases(blocks=blocks), architecture.full(config)
    smaller_of = {axis: _smaller(found, architecture, config, full, axis) for axis, _ in full.items}
    _add(found, architecture, config, "whole", [{}])
    if each_axis:
        for axis, smaller in smaller_of.items():
            if blocks is not None and not smaller:
                found.unsaid.append(f"{axis}: no smaller size leaves whole blocks")
            elif not _add(found, architecture, config, axis, ({axis: size} for size in smaller)):
                _add_with_others(found, architecture, config, axis, smaller_of)
    _add_per_layer(found, architecture, config, full, smaller_of)
    together = [dict(sizes) for sizes in _together(smaller_of)]
    _add(found, architecture, config, "all axes", together)
    depths = list(_depths(architecture, config, full.depth))
    _add(found, architecture, config, "fewer layers", ({LAYERS: kept} for kept in depths))
    both = ({**sizes, LAYERS: kept} for sizes in together for kept in depths[:6])
    _add(found, architecture, config, "all axes and fewer layers", both)
    return found


def _smaller(
    found: Cases, architecture: Architecture, config: PreTrainedConfig, full: Submodel, axis: str
) -> list[int]:
    sizes = smaller_sizes(architecture, config, full, axis)
    return [size for size in sizes if found.blocks is None or found.blocks.leaves_whole(axis, size)]


def _checked(found: Cases, architecture: Architecture, config: PreTrainedConfig, sizes: Any, name: str) -> Submodel:
    submodel = architecture.submodel(config, sizes, name)
    if found.blocks is not None:
        found.blocks.refuse(submodel)
    return submodel


def _add_per_layer(
    found: Cases,
    architecture: Architecture,
    config: PreTrainedConfig,
    full: Submodel,
    smaller_of: dict[str, list[int]],
) -> None:
    """Other sizes in other layers: of all axes that the stock config can say it of together, and the others by themselves."""
    joined: dict[str, Any] = {}
    for axis, whole in full.items:
        if isinstance(whole, int):
            continue
        tries = list(_per_layer(architecture, config, full, axis, smaller_of[axis]))
        for sizes in tries:
            try:
                _checked(found, architecture, config, joined | sizes, "the submodel")
            except ElasticConfigError:
                continue
            joined |= sizes
            break
        else:
            _add(found, architecture, config, f"{axis} per layer", tries)
    if joined:
        _add(found, architecture, config, "sizes per layer", [joined])


def _add(found: Cases, architecture: Architecture, config: PreTrainedConfig, name: str, tries: Any) -> bool:
    """Add the first of these that the stock config can say."""
    reason = "nothing to try"
    for sizes in tries:
        try:
            submodel = _checked(found, architecture, config, sizes, name)
        except ElasticConfigError as error:
            reason = str(error)
        else:
            found.said.append(Case(name, sizes, submodel))
            return True
    found.unsaid.append(f"{name}: {reason}")
    return False


def _add_with_others(
    found: Cases,
    architecture: Architecture,
    config: PreTrainedConfig,
    axis: str,
    smaller_of: dict[str, list[int]],
) -> None:
    """An axis that the stock config ties to another one: cut both."""
    tries = (
        {axis: size, other: also}
        for other, others in smaller_of.items()
        if other != axis
        for size in smaller_of[axis]
        for also in others
    )
    if not _add(found, architecture, config, f"{axis} with another", tries) and found.blocks is None:
        raise ElasticConfigError(
            f"{architecture.model_type}: nothing can be cut from axis {axis!r} in this config, so it cannot be checked; give a config that leaves "
            "room, or leave the axis out."
        )


def smaller_sizes(architecture: Architecture, config: PreTrainedConfig, full: Submodel, axis: str) -> Iterator[int]:
    """Smaller sizes of an axis, from around half to near the whole and to small ones; multiples of its groups."""
    declared, whole = architecture.axis(axis), largest(full[axis])
    layer = 0 if declared.part is None else architecture.layers_with(config, declared)[0]
    groups = int(getattr(config.per_layer_config[layer], declared.groups)) if declared.groups else 1
    count = whole // groups
    order = sorted(range(1, count), key=lambda k: (k * 4 % 4 != 0, abs(k - 0.6 * count)))
    aligned = [k for k in order if k * groups % 4 == 0]
    for k in [*aligned, *(k for k in order if k not in aligned)]:
        yield k * groups


def _per_layer(
    architecture: Architecture, config: PreTrainedConfig, full: Submodel, axis: str, smaller: list[int]
) -> Iterator[dict[str, Any]]:
    """Other sizes in other layers, or blocks that layers share: the first that has it the whole, the next ones different smaller ones."""
    having = [i for i, size in enumerate(full[axis]) if size is not None]  # type: ignore[arg-type]
    shared = architecture.axis(axis).shared
    blocks = dict.fromkeys(architecture.sharers(config, i) if shared else (i,) for i in having)
    for start in range(min(3, len(smaller))):
        choices = [largest(full[axis]), *smaller[start:], *smaller[:start]]
        picked = {block: choices[(k + (len(blocks) == 1)) % len(choices)] for k, block in enumerate(blocks)}
        yield {axis: {layer: size for block, size in picked.items() for layer in block}}


def _together(choices: dict[str, list[int]]) -> Iterator[dict[str, int]]:
    """All axes smaller at once: the first choices that go together, axis by axis."""
    draw = random.Random(0)
    for attempt in range(300):
        width = 1 + attempt // 20
        yield {axis: draw.choice(sizes[:width]) for axis, sizes in choices.items() if sizes}


def _depths(architecture: Architecture, config: PreTrainedConfig, depth: int) -> Iterator[list[int]]:
    """Fewer layers: without the first, without one in the middle, without the last, and smaller ones."""
    for gone in (0, *range(1, depth)):
        yield [layer for layer in range(depth) if layer != gone]
    for start in range(depth):
        for stop in range(depth, start, -1):
            if (start, stop) != (0, depth):
                yield list(range(start, stop))


def largest(size: int | tuple[int | None, ...]) -> int:
    return size if isinstance(size, int) else max(s for s in size if s is not None)
