"""Finding the sizes of a budget: from ratios, or the best choices that meet a parameter or memory target."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..architectures import Architecture
from ..architectures.cost import Cost, CostModel
from ..architectures.portability import check_portable
from ..architectures.submodel import LAYERS, Submodel, first_layers
from ..configuration.budgets import Limit, format_count, unit_hint
from ..errors import ElasticConfigError, UnknownBudgetError
from .importance import Scores
from .multiples import Multiples
from .sorting import ranked

MAX_COMBINATIONS = 500_000
DEFAULT_RATIOS = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)


def round_size(
    architecture: Architecture,
    config: PreTrainedConfig,
    axis: str,
    ratio: float,
    multiple_of: int | Multiples,
    full: int | None = None,
) -> int:
    """The allowed size nearest to a share of the parent's: a multiple of the axis's groups, and of `multiple_of` for widths.

    A parent whose own width is no multiple of one number for all is cut freely.

    Args:
        multiple_of (`int` or [`Multiples`]): One number for all widths, or all that is known.
        full (`int`, *optional*): The size that it is a share of; defaults to the parent's largest.
    """
    if isinstance(ratio, bool) or not 0 < ratio <= 1:
        raise ElasticConfigError(f"{axis}={ratio!r}: a ratio must be in (0, 1]; give a whole number for a size.")
    spec = architecture.axis(axis)
    full = full or max(architecture.full(config).values(axis))
    step = (
        max(int(getattr(config.per_layer_config[i], spec.groups)) for i in architecture.layers_with(config, spec))
        if spec.groups
        else 1
    )
    multiples = multiple_of if isinstance(multiple_of, Multiples) else Multiples(multiple_of)
    step = min(full, multiples.step(architecture, axis, full, step))
    return max(step, min(full, round(full * ratio / step) * step))


def round_depth(
    architecture: Architecture, config: PreTrainedConfig, ratio: float, ranking: Sequence[int] | None = None
) -> int:
    """The number of layers nearest to a share of the parent's that a ranking of them can be cut to; whole units in the parent's order by default."""
    depth = architecture.depth(config)
    if ranking is None:
        ranking = architecture.keepable_ranking(config, range(depth))
    return min(architecture.depths(config, ranking), key=lambda count: abs(count - max(1, round(depth * ratio))))


def sizes_from_spec(
    architecture: Architecture,
    config: PreTrainedConfig,
    spec: Mapping[str, Any],
    ranking: Sequence[int] | None,
    multiple_of: int | Multiples,
) -> dict[str, Any]:
    """Sizes with the ratios in them resolved; `layers` may be a count or a ratio, which the ranking turns into layers."""
    sizes: dict[str, Any] = {}
    for axis, value in spec.items():
        if axis == LAYERS:
            count = round_depth(architecture, config, value, ranking) if isinstance(value, float) else value
            if isinstance(count, int) and not isinstance(count, bool):
                if ranking is None:
                    raise ElasticConfigError(
                        f"layers={value!r} is a number, and nothing says which layers are the most important ones; list the layers to "
                        "keep, or score the axis 'layers'."
                    )
                count = first_layers(ranking, count, f"layers={value!r}")
            sizes[axis] = count
        elif not isinstance(value, float):
            sizes[axis] = value
        elif len(set((full := architecture.full(config)).values(axis))) == 1:
            sizes[axis] = round_size(architecture, config, axis, value, multiple_of)
        else:  # a share of what each layer has
            own = ((layer, full.at(layer).get(axis)) for layer in range(full.depth))
            sizes[axis] = {
                i: round_size(architecture, config, axis, value, multiple_of, size) for i, size in own if size
            }
    return sizes


def default_choices(
    architecture: Architecture, config: PreTrainedConfig, axis: str, multiple_of: int | Multiples
) -> list[int]:
    """Sizes to search over if the user gives none, largest first."""
    if axis == LAYERS:
        return sorted({round_depth(architecture, config, ratio) for ratio in DEFAULT_RATIOS}, reverse=True)
    return sorted(
        {round_size(architecture, config, axis, ratio, multiple_of) for ratio in DEFAULT_RATIOS}, reverse=True
    )


class BudgetSearch:
    """Searches homogeneous sizes over all combinations of the choices, with the exact counter.

    Among the submodels that meet a target it takes the one that keeps the largest share of the importance scores, multiplied over
    the axes; the searched submodel always nests in the one searched before.

    Args:
        choices (`dict[str, list[int]]`): Per axis the sizes to choose from.
        scores (`Scores`, *optional*): Without scores an axis is worth the share of its size.
        ranking (`list[int]`, *optional*): All layers, the ones to keep first; in the parent's order if not given.
        portable (`torch.dtype`, *optional*): Take only sizes that other programs can hold in this type, as they can hold the parent.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: PreTrainedConfig,
        choices: Mapping[str, Sequence[int]],
        scores: Scores | None = None,
        ranking: Sequence[int] | None = None,
        portable: torch.dtype | None = None,
    ):
        self._portable = portable
        self._ranking = list(ranking or range(architecture.depth(config)))
        self._architecture, self._config, self._scores = architecture, config, scores
        self._count = CostModel(config, architecture)
        self._full = architecture.full(config)
        self._choices = {axis: sorted(set(sizes), reverse=True) for axis, sizes in choices.items()}
        linked = [axis for axis in architecture.one_share if axis in choices and portable is not None]
        # What is chosen independently: the size of an axis, or the share of all that `portable_choices` made to agree.
        self._options = [
            [{axis: size} for size in sizes] for axis, sizes in self._choices.items() if axis not in linked
        ]
        if linked:
            together = zip(*(self._choices[axis] for axis in linked), strict=True)
            self._options.append([dict(zip(linked, sizes, strict=True)) for sizes in together])
        total = math.prod(map(len, self._options))
        if total > MAX_COMBINATIONS:
            raise ElasticConfigError(
                f"{total} combinations of choices are too many to search (at most {MAX_COMBINATIONS}); give fewer choices or axes."
            )
        self._worth = {
            axis: {size: self._share(axis, size) for size in sizes} for axis, sizes in self._choices.items()
        }

    def check(self, limit: Limit, dtype: torch.dtype, name: str = "searched budget") -> None:
        """Raise `UnknownBudgetError` if even the smallest choices exceed a limit. Scores do not matter for that, a ranking of layers may."""
        self._check_reach(limit, dtype, name, self._options, self._full)

    def find(
        self, limit: Limit, dtype: torch.dtype, within: Submodel | None = None, name: str = "searched budget"
    ) -> Submodel:
        """The best submodel that meets a limit and nests in another one.

        Raises:
            `UnknownBudgetError`: even the smallest choices exceed the limit; the message says by how much.
        """
        within = within or self._full
        allowed = [
            [part for part in parts if all(size <= self._ceiling(axis, within) for axis, size in part.items())]
            for parts in self._options
        ]
        if not all(allowed):
            empty = [axis for parts, left in zip(self._options, allowed, strict=True) if not left for axis in parts[0]]
            raise ElasticConfigError(f"{name}: no choice of {empty} is small enough to nest in the larger budget.")
        self._check_reach(limit, dtype, name, allowed, within)
        names = list(self._choices)
        fitting: list[tuple[float, int, tuple[int, ...]]] = []
        for parts in itertools.product(*allowed):
            sizes = {axis: size for part in parts for axis, size in part.items()}
            cost = self._cost(sizes, within)
            if limit.measure(cost, dtype) <= limit.value:
                worth = sum(math.log(self._worth[axis][size]) for axis, size in sizes.items())
                fitting.append((worth, cost.total_params, tuple(sizes[axis] for axis in names)))
        problem: Exception | None = None
        for _, _, values in sorted(fitting, reverse=True):
            try:  # sizes that the stock config cannot express together are skipped
                found = self._submodel(dict(zip(names, values, strict=True)), within, name)
                if self._portable is not None:
                    check_portable(self._architecture, self._config, found, self._portable, name)
                return found
            except ElasticConfigError as error:
                problem = problem or error
        raise UnknownBudgetError(
            f"{name}: no choice within {limit} is a model that can be built; for example: {problem}"
        )

    def _check_reach(
        self, limit: Limit, dtype: torch.dtype, name: str, options: Sequence[list[dict[str, int]]], within: Submodel
    ) -> None:
        smallest = {
            axis: size for parts in options for axis, size in min(parts, key=lambda p: sum(p.values())).items()
        }
        least = limit.measure(self._cost(smallest, within), dtype)
        if least > limit.value:
            need = format_count(least) if limit.quantity != "bytes" else str(Limit("bytes", least))
            raise UnknownBudgetError(
                f"{name}: no choice of {', '.join(self._choices)} fits into {limit}; the smallest needs {need}. Add smaller choices.{unit_hint(limit)}"
            )

    def _ceiling(self, axis: str, within: Submodel) -> int:
        return len(within.layers) if axis == LAYERS else max(within.values(axis), default=0)

    def _layers(self, sizes: Mapping[str, int], within: Submodel) -> tuple[int, ...]:
        if LAYERS not in sizes:
            return within.layers
        return tuple(sorted([layer for layer in self._ranking if layer in within.layers][: sizes[LAYERS]]))

    def _merged(self, sizes: Mapping[str, int], within: Submodel) -> dict[str, Any]:
        merged: dict[str, Any] = dict(within.to_dict())
        merged.update({axis: size for axis, size in sizes.items() if axis != LAYERS})
        merged[LAYERS] = list(self._layers(sizes, within))
        return merged

    def _cost(self, sizes: Mapping[str, int], within: Submodel) -> Any:
        cost = Cost()
        for place, layer in self._count.places(self._layers(sizes, within)).items():
            here = within.at(layer)
            cost += self._count.part(place, {axis: min(sizes.get(axis, size), size) for axis, size in here.items()})
        return cost

    def _submodel(self, sizes: Mapping[str, int], within: Submodel, name: str) -> Submodel:
        merged = self._merged(sizes, within)
        for axis, size in sizes.items():
            if axis != LAYERS and isinstance(
                within[axis], tuple
            ):  # a larger budget that differs per layer stays the ceiling
                merged[axis] = [None if s is None else min(s, size) for s in within[axis]]  # type: ignore[union-attr]
        return self._architecture.submodel(self._config, merged, name)

    def _share(self, axis: str, size: int) -> float:
        """Share of the importance that a size keeps, averaged over layers."""
        scores = self._scores
        if axis == LAYERS:
            kept = set(self._ranking[:size])
            total = sum(error for _, error in scores.layers) if scores else 0.0
            return (
                max(1e-9, sum(e for i, e in scores.layers if i in kept) / total)
                if scores and total
                else size / self._full.depth
            )
        spec = self._architecture.axis(axis)
        shares = []
        for layer in [None] if spec.part is None else self._architecture.layers_with(self._config, spec):
            full = self._full.at(layer)[axis]
            if scores is None or spec.among or not scores.has(axis, self._architecture):
                shares.append(min(1.0, size / full))
                continue
            values = ranked(self._architecture, self._config, scores, axis, layer)
            keep = values.shape[-1] * min(size, full) // full
            shares.append(float(values.topk(keep, dim=-1).values.sum() / values.sum().clamp(min=1e-30)))
        return max(1e-9, sum(shares) / len(shares))
