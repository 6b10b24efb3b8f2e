"""Choices of a router that meet a target by the exact count: the likeliest combination first, or the argmax repaired.

The expected sizes that the resource loss steers can meet a target that the likeliest choices (the argmax) miss. So combinations are tried
in the order of their probability; where there are too many of them (a choice per layer), the argmax is repaired, one choice at a time, by
those that give up the least probability for what they bring towards the target.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch

from ..architectures.cost import Cost, CostModel, Place
from ..architectures.submodel import LAYERS, Submodel
from ..configuration.budgets import Limit
from ..configuration_elastic import ElasticConfig
from ..errors import ElasticConfigError

Key = tuple[str, int | None]
"""Axis and layer of a choice; `None` for one choice in all layers."""

_MAX_STATES = 200_000  # combinations that the search by probability may keep in memory
_MAX_REPAIRS = 200  # combinations of the choices for all layers that are tried with repairs of those per layer


class Chooser(Protocol):
    """What sizes are chosen from: a trained router, as far as it is read here."""

    config: ElasticConfig
    full: Submodel
    count: CostModel
    names: list[str]
    keys: list[Key]
    choices: dict[str, tuple[int, ...]]
    limits: dict[str, Limit]
    final_logit_scale: float

    def logits(self, budget: str | torch.Tensor) -> dict[Key, torch.Tensor]:
        """Of every choice, for a budget or a mixture of budgets."""
        ...

    def measure(self, cost: Cost, limit: Limit) -> Any:
        """The quantity of a cost that a limit is about."""
        ...


@dataclass
class Found:
    submodel: Submodel
    miss: float
    how: str  # "argmax", "combination", "repair" or "nearest"
    changes: int = 0  # combinations passed over, or choices changed
    argmax_miss: float = 0.0
    probabilities: dict[Key, float] = field(default_factory=dict)


class Search:
    """The likeliest choices for one target that meet it inside a larger submodel."""

    def __init__(self, router: Chooser, name: str, larger: Submodel, within: float):
        self._router, self._name, self._larger, self._within = router, name, larger, within
        self._limit: Limit = router.limits[name]
        self._bounds: dict[Place, dict[str, int]] = {
            place: larger.at(layer) for place, layer in router.count.places(larger.layers).items()
        }
        self._options = {
            key: self._options_of(key, (router.final_logit_scale * logits.cpu().double()).log_softmax(-1).tolist())
            for key, logits in router.logits(name).items()
            if key[1] is None or key[1] in larger.layers
        }
        self._chosen = {place: self._chosen_in(place) for place in self._bounds}
        self._measured: dict[Any, int] = {}
        self._nearest: Found | None = None

    def run(self) -> Found:
        argmax = {key: max(options, key=lambda size: options[size]) for key, options in self._options.items()}
        found = self._search(argmax)
        if found is None:
            found = self._nearest
        if found is None:
            raise ElasticConfigError(
                f"no choice for budget {self._name!r} is smaller than the budget before it; give more choices."
            )
        found.argmax_miss = self._miss(argmax)
        return found

    def _search(self, argmax: dict[Key, int]) -> Found | None:
        for i, sizes in enumerate(islice(self._by_probability(list(self._options)), self._most(self._options))):
            if found := self._try(sizes, "combination" if i else "argmax", i):
                return found
        if found := self._repair(argmax, list(self._options)):
            return found
        shared = [key for key in self._options if key[1] is None]
        own = [key for key in self._options if key[1] is not None]
        for sizes in islice(self._by_probability(shared), _MAX_REPAIRS if own else 0):
            if found := self._repair({**argmax, **sizes}, own, sum(sizes[key] != argmax[key] for key in shared)):
                return found
        return None

    def _options_of(self, key: Key, log_pi: list[float]) -> dict[int, float]:
        """Log-probability of every size that fits into the larger submodel; larger choices count as that submodel's size."""
        axis, layer = key
        bound = len(self._larger.layers) if axis == LAYERS else max(self._larger.values(axis), default=0)
        if layer is not None:
            bound = self._bounds[layer][axis]
        options: dict[int, float] = {}
        for choice, value in zip(self._router.choices[axis], log_pi, strict=True):
            size = min(choice, bound)
            options[size] = max(options.get(size, -math.inf), value)
        return options

    def _most(self, keys: Mapping[Key, Any]) -> int:
        return max(1, _MAX_STATES // max(1, len(keys)))

    def _by_probability(self, keys: list[Key]) -> Iterator[dict[Key, int]]:
        """All combinations of the choices of `keys`, likeliest first: best-first, each state reached from one other only."""
        ranked = [sorted(self._options[key].items(), key=lambda option: -option[1]) for key in keys]
        heap = [(-sum(options[0][1] for options in ranked), bytes(len(keys)))]
        while heap:
            loss, ranks = heapq.heappop(heap)
            yield {key: ranked[i][rank][0] for i, (key, rank) in enumerate(zip(keys, ranks, strict=True))}
            last = max((i for i, rank in enumerate(ranks) if rank), default=0)
            for i in range(last, len(keys)):
                rank = ranks[i] + 1
                if rank < min(len(ranked[i]), 256):  # a rank is one byte: nothing that unlikely is looked for
                    step = ranked[i][rank - 1][1] - ranked[i][rank][1]
                    heapq.heappush(heap, (loss + step, ranks[:i] + bytes([rank]) + ranks[i + 1 :]))

    def _repair(self, sizes: dict[Key, int], keys: list[Key], changes: int = 0) -> Found | None:
        """Change one choice at a time towards the target: the one that loses least log-probability for what it brings nearer."""
        sizes = dict(sizes)
        while True:
            parts = {layer: self._measure_layer(layer, sizes) for layer in self._kept(sizes)}
            total = sum(parts.values())
            miss = abs(total / self._limit.value - 1)
            if miss <= self._within:
                return self._try(sizes, "repair", changes)
            best: tuple[float, Key, int] | None = None
            for key in keys:
                axis, layer = key
                if layer is not None and layer not in parts:
                    continue
                now = self._options[key][sizes[key]]
                for size, value in self._options[key].items():
                    if (size < sizes[key]) != (total > self._limit.value) or size == sizes[key]:
                        continue
                    changed = {**sizes, key: size}
                    after = (
                        self._measure(changed)
                        if layer is None
                        else total - parts[layer] + self._measure_layer(layer, changed)
                    )
                    gain = miss - abs(after / self._limit.value - 1)
                    if gain > 0 and (best is None or (now - value) / gain < best[0]):
                        best = (now - value) / gain, key, size
            if best is None:
                self._try(sizes, "repair", changes)
                return None
            sizes[best[1]] = best[2]
            changes += 1

    def _try(self, sizes: Mapping[Key, int], how: str, changes: int) -> Found | None:
        """These choices, if they meet the target and can be built; the nearest of those that do not is remembered."""
        miss = self._miss(sizes)
        if abs(miss) > self._within and self._nearest is not None and abs(miss) >= abs(self._nearest.miss):
            return None
        try:
            submodel = build(self._router, sizes, self._larger)
        except ElasticConfigError:  # sizes that the stock config cannot have together
            return None
        if submodel == self._larger:
            return None
        kept = {key for key in sizes if key[1] is None or key[1] in submodel.layers}
        probabilities = {key: math.exp(self._options[key][size]) for key, size in sizes.items() if key in kept}
        found = Found(submodel, miss, how, changes, probabilities=probabilities)
        if abs(miss) <= self._within:
            return found
        found.how = "nearest"
        self._nearest = found
        return None

    def _kept(self, sizes: Mapping[Key, int]) -> list[Place]:
        return list(self._router.count.places(_layers(self._router, sizes, self._larger)))

    def _chosen_in(self, place: Place) -> list[Key]:
        """The choices that the cost of a layer, or of a block that layers share, depends on."""
        keys: Iterator[tuple[Any, Key]] = (((axis, place), (axis, None)) for axis in self._bounds[place])
        return [
            own if own in self._options else shared for own, shared in keys if {own, shared} & self._options.keys()
        ]

    def _measure_layer(self, place: Place, sizes: Mapping[Key, int]) -> int:
        known = (place, *[sizes[key] for key in self._chosen[place]])  # thousands of combinations have the same layers
        if known not in self._measured:
            here = {axis: _size(sizes, axis, place, bound) for axis, bound in self._bounds[place].items()}
            self._measured[known] = self._router.measure(self._router.count.part(place, here), self._limit)
        return self._measured[known]

    def _measure(self, sizes: Mapping[Key, int]) -> int:
        return sum(self._measure_layer(layer, sizes) for layer in self._kept(sizes))

    def _miss(self, sizes: Mapping[Key, int]) -> float:
        return self._measure(sizes) / self._limit.value - 1


def _size(sizes: Mapping[Any, int], axis: str, place: Place, bound: int) -> int:
    return min(bound, sizes.get((axis, place), sizes.get((axis, None), bound)))


def _layers(router: Chooser, sizes: Mapping[Key, int], larger: Submodel) -> tuple[int, ...]:
    if (LAYERS, None) not in sizes:
        return larger.layers
    ranking = [layer for layer in router.config.axes[LAYERS]["ranking"] if layer in larger.layers]
    return tuple(sorted(ranking[: sizes[LAYERS, None]]))


def build(router: Chooser, sizes: Mapping[Key, int], larger: Submodel, smaller: Submodel | None = None) -> Submodel:
    """The submodel of these sizes, cut down to nest in a larger one, and widened to hold a smaller one.

    Raises:
        `ElasticConfigError`: the stock config cannot have these sizes together.
    """
    if smaller is not None:  # one size in all layers stays one, also in layers that the smaller one does not have
        least = {axis: max(smaller.values(axis), default=0) for axis in smaller} | {LAYERS: len(smaller.layers)}
        sizes = {key: size if key[1] is not None else max(size, least[key[0]]) for key, size in sizes.items()}
    layers = _layers(router, sizes, larger)
    built: dict[str, Any] = {LAYERS: list(layers)}
    for layer in (None, *layers):
        inner = smaller.at(layer) if smaller is not None else {}
        for axis, bound in larger.at(layer).items():
            size = max(_size(sizes, axis, layer, bound), inner.get(axis, 0))
            if isinstance(larger[axis], int):
                built[axis] = size
            else:
                built.setdefault(axis, {})[layer] = size
    return router.config.architecture.submodel(router.config.parent_config, built, "the router's choice")
