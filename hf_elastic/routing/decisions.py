"""From a trained router to budgets: submodels that meet the targets by the exact count, what lies between them, and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ..architectures.submodel import Submodel
from ..errors import ElasticConfigError
from .choosing import Chooser, Found, Search, build

DEAD_ZONE = 0.05
"""Relative distance from a target within which the resource loss is zero, and a decision meets it."""

_STEPS = 256  # between two budgets; more than most choices change
_APART = 0.01  # of the parent's parameters: nearer neighbours between budgets would only make config.json long


@dataclass(frozen=True)
class Decided:
    """What a router decided.

    Args:
        submodels (`dict[str, Submodel]`): Per target its submodel, largest first, each nested in the one before it.
        interpolated (`list[Submodel]`): The submodels between them (and between the parent and the first), one chain with them.
        report (`list[dict]`): Per target what was chosen and why, see [`render`].
    """

    submodels: dict[str, Submodel]
    interpolated: list[Submodel]
    report: list[dict[str, Any]]

    def section(self, axes: Mapping[str, Any], router: Mapping[str, Any]) -> dict[str, Any]:
        """The `elastic` section of a config with these budgets; `axes` and `router` as in it."""
        section: dict[str, Any] = {
            "axes": axes,
            "budgets": {name: {"sizes": submodel.to_dict()} for name, submodel in self.submodels.items()},
            "router": router,
        }
        if self.interpolated:
            section["interpolated"] = [{"sizes": submodel.to_dict()} for submodel in self.interpolated]
        return section


@torch.no_grad()
def decide(router: Chooser, within: float = DEAD_ZONE) -> Decided:
    """Submodels of all targets, from large to small, each nested in the one before it.

    Raises:
        `ElasticConfigError`: no choice is smaller than the budget before it.
    """
    submodels: dict[str, Submodel] = {}
    report = []
    larger = router.full
    for name in router.names[1:]:
        found = Search(router, name, larger, within).run()
        submodels[name] = larger = found.submodel
        report.append(_row(router, name, found, within))
    return Decided(submodels, interpolate(router, submodels), report)


@torch.no_grad()
def interpolate(router: Chooser, submodels: Mapping[str, Submodel]) -> list[Submodel]:
    """The different submodels on the way from each budget to the next smaller one, largest first.

    The one-hot budgets are mixed, from the larger to the smaller, and the router's likeliest choices taken; cut to lie between its two
    budgets and inside the one before it on the way, each is nested with all others. Sizes that cannot be built together, and those within
    1 % of the parent's parameters of a neighbour, are left out.
    """
    chain = []
    apart = _APART * router.count.full.total_params
    mix = torch.arange(1, _STEPS) / _STEPS
    for i, (outer, inner) in enumerate(pairwise([router.full, *submodels.values()])):
        weights = torch.zeros(len(mix), len(router.names))
        weights[:, i], weights[:, i + 1] = 1 - mix, mix
        picks = torch.stack([logits.argmax(-1) for logits in router.logits(weights).values()], 1).tolist()
        before: list[int] = []
        previous = outer
        for row in picks:
            if row == before:
                continue
            before = row
            sizes = {key: router.choices[key[0]][pick] for key, pick in zip(router.keys, row, strict=True)}
            try:
                submodel = build(router, sizes, previous, inner)
            except ElasticConfigError:
                continue
            totals = [router.count(member).total_params for member in (previous, submodel, inner)]
            if min(totals[0] - totals[1], totals[1] - totals[2]) >= apart:
                chain.append(submodel)
                previous = submodel
    return chain


def render(report: Sequence[Mapping[str, Any]]) -> str:
    """The report as text, a paragraph per budget."""
    lines = []
    for row in report:
        lines.append(
            f"budget {row['budget']}: target {row['target']}, {100 * row['miss']:+.1f} % off by the exact count"
        )
        lines.append(f"  because {row['why']}")
        for axis, size in row["sizes"].items():
            lines.append(f"  {axis} = {size}")
        for axis, probability in row["probabilities"].items():
            values = probability.values() if isinstance(probability, Mapping) else [probability]
            lines.append(f"  p({axis}) = {', '.join(f'{value:.2f}' for value in values)}")
    return "\n".join(lines)


def _row(router: Chooser, name: str, found: Found, within: float) -> dict[str, Any]:
    limit = router.limits[name]
    cost = router.measure(router.count(found.submodel), limit)
    probabilities: dict[str, Any] = {}
    for (axis, layer), probability in found.probabilities.items():
        if layer is None:
            probabilities[axis] = probability
        else:
            probabilities.setdefault(axis, {})[str(layer)] = probability
    return {
        "budget": name,
        "target": str(limit),
        "quantity": limit.quantity,
        "target_value": limit.value,
        "cost": cost,
        "miss": cost / limit.value - 1,
        "met": abs(cost / limit.value - 1) <= within,
        "sizes": {axis: found.submodel.to_dict().get(axis) for axis in found.submodel.cuts(router.full)},
        "probabilities": probabilities,
        "argmax_miss": found.argmax_miss,
        "changes": found.changes,
        "why": _why(found, within),
    }


def _why(found: Found, within: float) -> str:
    zone = f"{100 * within:.0f} %"
    if found.how == "argmax":
        return "the likeliest choice of every axis meets the target"
    off = f"the likeliest choices are {100 * found.argmax_miss:+.1f} % off the target"
    if abs(found.argmax_miss) <= within:
        off = "the likeliest choices meet the target, but are the budget before it or cannot be built together"
    if found.how == "combination":
        return (
            f"{off}; {found.changes} likelier combinations were passed over, each of which misses it by more than {zone}, is the budget "
            "before it or cannot be built"
        )
    if found.how == "repair":
        return f"{off}; {found.changes} choices were changed, one at a time, those first that lose the least probability for what they bring"
    return f"{off}; no combination that was tried comes within {zone}, and this is the nearest; give more choices"
