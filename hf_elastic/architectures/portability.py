"""Sizes that other programs cannot run, and keeping to those that they can.

An export is a plain checkpoint, but a program may still read something else from its `config.json` than transformers does. Each table says
where (`Architecture.obstacles`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from transformers import PreTrainedConfig

from ..errors import ElasticConfigError, PortabilityWarning, users_level
from . import Architecture
from .coded_programs import Coded, coded_obstacles
from .obstacles import EVERY, REFUSES, Obstacle
from .submodel import Submodel

_PLURAL = {"does": "do", "computes": "compute", "raises": "raise"}


def portability(
    architecture: Architecture,
    config: PreTrainedConfig,
    submodel: Submodel,
    dtype: torch.dtype | None = None,
    coded: Coded | None = None,
) -> list[Obstacle]:
    """The programs that do not run an export of a submodel, as far as they are known; empty if all do.

    Args:
        config (`PreTrainedConfig`): The parent's config.
        submodel (`Submodel`): Checked sizes.
        dtype (`torch.dtype`, *optional*): Of the export's weights; defaults to the config's.
        coded ([`Coded`], *optional*): Which of them are in few bits instead.
    """
    layered = architecture.differing(submodel)
    if layered:
        why = f"{' and '.join(layered)} {'differ' if len(layered) > 1 else 'differs'} from layer to layer"
        return [Obstacle(EVERY, REFUSES, why)]
    found = list(architecture.obstacles(config, submodel))
    if coded is not None:
        found += coded_obstacles(architecture, config, submodel, coded)
    dtype = dtype or config.dtype
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype()
    if misaligned := misaligned_experts(architecture, config, submodel, dtype):
        why = (
            f"expert widths {misaligned} are no multiples of {16 // dtype.itemsize}, which grouped_mm needs in "
            f"{str(dtype).removeprefix('torch.')}; give it experts_implementation='eager'"
        )
        found.append(Obstacle("plain transformers", "raises at the first forward pass", why))
    return found


def misaligned_experts(
    architecture: Architecture, config: PreTrainedConfig, submodel: Submodel, dtype: torch.dtype
) -> list[int]:
    """Widths of experts whose rows are no multiples of 16 bytes, which `grouped_mm` needs."""
    kept = set(submodel.layers)
    routed = [rule for rule in architecture.rules(config) if rule.routed and rule.layer in kept]
    widths = {width for rule in routed for width in rule.shape(submodel.at(rule.layer))[1:]}
    return sorted(width for width in widths if width * dtype.itemsize % 16)


def check_portable(
    architecture: Architecture, config: PreTrainedConfig, submodel: Submodel, dtype: torch.dtype | None, name: str
) -> None:
    """Raise [`ElasticConfigError`] if a program that runs the parent does not run a submodel."""
    whole = portability(architecture, config, architecture.full(config), dtype)
    before = {obstacle.program for obstacle in whole}
    lost = [
        obstacle for obstacle in portability(architecture, config, submodel, dtype) if obstacle.program not in before
    ]
    if lost:
        raise ElasticConfigError(f"{name} is not portable: {words(lost)}.{_hint(architecture, config, submodel)}")


def _hint(architecture: Architecture, config: PreTrainedConfig, submodel: Submodel) -> str:
    full = architecture.full(config)
    linked = [axis for axis in architecture.one_share if axis in full]
    sizes = [(submodel.size(axis), full.size(axis)) for axis in linked]
    shares = {Fraction(mine, whole) for mine, whole in sizes if mine is not None and whole is not None}
    return f" Cut {', '.join(linked)} by one and the same share." if len(shares) > 1 else ""


def portable_choices(
    architecture: Architecture, config: PreTrainedConfig, choices: Mapping[str, Sequence[int]], given: set[str]
) -> dict[str, list[int]]:
    """Choices with those of axes that go by one share (`Architecture.one_share`) made to agree, and missing ones of these added.

    Args:
        choices (`dict[str, list[int]]`): Per axis the sizes to choose from.
        given (`set[str]`): Axes whose sizes the user named; of the others all shares are taken that every axis can have.

    Raises:
        `ElasticConfigError`: no smaller size that was given is one that all of them can have.
    """
    full = architecture.full(config)
    linked = {axis: full.size(axis) for axis in architecture.one_share if axis in full}
    if not linked.keys() & choices.keys() or None in linked.values():
        return {axis: list(sizes) for axis, sizes in choices.items()}
    sizes: dict[str, int] = {axis: int(size) for axis, size in linked.items() if size is not None}
    steps = {}
    for axis in sizes:
        groups = architecture.axis(axis).groups
        steps[axis] = int(getattr(config, groups)) if groups else 1
    coarsest = min(sizes, key=lambda axis: sizes[axis] // steps[axis])
    shares = [Fraction(size, sizes[coarsest]) for size in range(sizes[coarsest], 0, -steps[coarsest])]
    possible = [s for s in shares if all((s * size) % steps[axis] == 0 for axis, size in sizes.items())]
    wanted = [
        share
        for share in possible
        if all(share * size in choices[axis] for axis, size in sizes.items() if axis in given)
    ]
    if wanted in ([], [1]) and possible != [1]:
        listed = "; ".join(f"{axis} {[int(share * size) for share in possible]}" for axis, size in sizes.items())
        raise ElasticConfigError(
            f"axes: portable=True cuts {', '.join(sizes)} by one and the same share, and no smaller choice is one that all of them can have. "
            f"These go together: {listed}."
        )
    agreed = {axis: [int(share * size) for share in wanted] for axis, size in sizes.items()}
    return {axis: list(values) for axis, values in choices.items() if axis not in agreed} | agreed


def words(obstacles: Sequence[Obstacle]) -> str:
    """Obstacles in a sentence: what a program does is said once, and programs of the same fault are named together."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for program, does, why in obstacles:
        reasons.setdefault((program, does), []).append(why)
    together: dict[tuple[str, str], list[str]] = {}
    for (program, does), whys in reasons.items():
        together.setdefault((does, " and ".join(dict.fromkeys(whys))), []).append(program)
    return "; ".join(f"{_clause(programs, does)} ({why})" for (does, why), programs in together.items())


def _clause(programs: list[str], does: str) -> str:
    if does == REFUSES and EVERY in programs:
        return f"{EVERY.replace('every', 'no')} loads it"
    first, _, rest = does.partition(" ")
    return f"{', '.join(programs)} {does if len(programs) == 1 else f'{_PLURAL.get(first, first)} {rest}'}"


def warn_if_not_portable(
    architecture: Architecture,
    config: PreTrainedConfig,
    submodel: Submodel,
    dtype: torch.dtype,
    what: str,
    coded: Coded | None = None,
) -> None:
    """Warn, at the user's line, of what other programs make of a size that is written for them; `what` says which one in words."""
    if obstacles := portability(architecture, config, submodel, dtype, coded):
        text = f"{what} is not for every program: {words(obstacles)}."
        warnings.warn(text, PortabilityWarning, stacklevel=users_level())
