"""The budget router: learns which size every axis should have to meet a cost target (arXiv 2511.16664, eq. 6-12)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .architectures import Architecture
from .budgets import FULL, Limit, parse_limit
from .configuration_elastic import ElasticConfig
from .cost import Cost, CostModel
from .errors import ElasticConfigError
from .soft import Mixture, keep_weights
from .submodel import LAYERS, Submodel

DEAD_ZONE = 0.05
"""Relative distance from a target within which the resource loss is zero."""


@dataclass(frozen=True)
class Schedule:
    """Temperature and logit scale over the router's training, both linear in the progress (0 to 1).

    Args:
        temperature (`tuple[float, float]`, *optional*, defaults to `(1.0, 0.05)`): Of the Gumbel-Softmax.
        logit_scale (`tuple[float, float]`, *optional*, defaults to `(1.0, 10.0)`): Multiplies the logits.
        hard_share (`float`, *optional*, defaults to 0.004): Share of micro-batches with straight-through hard samples.
    """

    temperature: tuple[float, float] = (1.0, 0.05)
    logit_scale: tuple[float, float] = (1.0, 10.0)
    hard_share: float = 0.004

    def at(self, progress: float) -> tuple[float, float]:
        """`(temperature, logit_scale)`; progress outside 0..1 counts as the nearer end."""
        p = min(1.0, max(0.0, progress))
        return tuple(a + p * (b - a) for a, b in (self.temperature, self.logit_scale))  # type: ignore[return-value]


class BudgetRouter(nn.Module):
    r"""
    One small network per axis (per layer for axes in `per_layer`): one-hot budget -> Linear -> LeakyReLU -> Linear -> logits over the
    axis's choices.

    Args:
        config ([`ElasticConfig`]): Its axes and choices are what the router chooses among.
        targets (`dict[str, str | float]`):
            Per budget what it may cost: a share of the parent's total parameters (`0.5`), or `"12B"`, `"2.1B active"`, `"24GB"`. The whole
            parent (`"full"`) is always a budget of the router.
        per_layer (`list[str]`, *optional*): Axes with a choice of their own in every layer; `hidden` and `layers` are always global.
        width (`int`, *optional*, defaults to 256): Hidden width.
        std (`float`, *optional*, defaults to 0.05): Standard deviation of the initial weights; there are no biases.

    Raises:
        `ElasticConfigError`: no axis with more than one choice, or targets that are not below the parent's cost or not different.
    """

    def __init__(
        self,
        config: ElasticConfig,
        targets: Mapping[str, str | float],
        *,
        per_layer: Sequence[str] = (),
        width: int = 256,
        std: float = 0.05,
    ):
        super().__init__()
        self.config = config
        self._architecture: Architecture = config.architecture
        self._parent = config.parent_config
        self._full = self._architecture.full(self._parent)
        self._count = CostModel(self._parent)
        self.limits = _limits(targets, self._count.full, self._dtype())
        self.names = [FULL, *sorted(self.limits, key=lambda name: -self._share(name))]
        self.choices = {
            axis: tuple(entry["choices"])
            for axis, entry in config.axes.items()
            if len(entry["choices"]) > 1 and axis != "experts_per_token"
        }
        if not self.choices:
            raise ElasticConfigError("no axis has more than one choice; give choices to elastify(axes=...).")
        for axis in per_layer:
            if axis in ("hidden", LAYERS) or axis not in self.choices:
                raise ElasticConfigError(
                    f"per_layer={axis!r} must be an elastic axis that belongs to layers, one of {sorted(self.choices)}."
                )
        self._keys: list[tuple[str, int | None]] = []
        for axis in self.choices:
            layers = (
                self._architecture.layers_with(self._parent, self._architecture.axis(axis))
                if axis in per_layer
                else [None]
            )
            self._keys += [(axis, layer) for layer in layers]
        self.networks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(len(self.names), width, bias=False),
                nn.LeakyReLU(0.1),
                nn.Linear(width, len(self.choices[axis]), bias=False),
            )
            for axis, _ in self._keys
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std)

    # -- what it chooses -----------------------------------------------------------------------------------------------

    def logits(self, budget: str | torch.Tensor) -> dict[tuple[str, int | None], torch.Tensor]:
        """Logits over the choices of every axis.

        Args:
            budget (`str` or `torch.Tensor`): A budget of the router, or weights over `names` between them, `(budgets,)`.
        """
        device = next(self.parameters()).device
        if isinstance(budget, str):
            if budget not in self.names:
                raise ElasticConfigError(f"unknown budget {budget!r}; the router has {', '.join(self.names)}.")
            budget = F.one_hot(torch.tensor(self.names.index(budget)), len(self.names)).float()
        return {key: network(budget.to(device)) for key, network in zip(self._keys, self.networks, strict=True)}

    def sample(
        self,
        budget: str,
        temperature: float,
        logit_scale: float = 1.0,
        *,
        hard: bool = False,
        generator: torch.Generator | None = None,
    ) -> dict[tuple[str, int | None], torch.Tensor]:
        """Gumbel-Softmax probabilities of every axis (eq. 8), one-hot with soft gradients if `hard`."""
        sampled = {}
        for key, logits in self.logits(budget).items():
            uniform = (
                torch.rand(logits.shape, generator=generator, device="cpu").clamp(1e-9, 1 - 1e-7).to(logits.device)
            )
            gumbel = -torch.log(-torch.log(uniform))
            soft = F.softmax((logits * logit_scale + gumbel) / temperature, dim=-1)
            if hard:
                soft = F.one_hot(soft.argmax(), len(soft)).to(soft) - soft.detach() + soft
            sampled[key] = soft
        return sampled

    def mixture(self, probabilities: Mapping[tuple[str, int | None], torch.Tensor]) -> Mixture:
        """Probabilities as the undecided submodel that the model runs."""
        layers = None
        if LAYERS in self.choices:
            ranking = self.config.axes[LAYERS]["ranking"]
            layers = keep_weights(probabilities[LAYERS, None], self.choices[LAYERS], ranking)
        rest = {key: pi for key, pi in probabilities.items() if key[0] != LAYERS}
        return Mixture({axis: sizes for axis, sizes in self.choices.items() if axis != LAYERS}, rest, layers)

    # -- what it costs -------------------------------------------------------------------------------------------------

    def expected(self, mixture: Mixture, limit: Limit) -> torch.Tensor:
        """The exact counter at the expected sizes: total or active parameters, or bytes."""
        total = self._measure(None, mixture, limit)
        for layer in self._full.layers:
            part = self._measure(layer, mixture, limit)
            total = total + (part if mixture.layers is None else mixture.layers[layer] * part)
        return torch.as_tensor(total, dtype=torch.float32)

    def resource_loss(self, budget: str, probabilities: Mapping[tuple[str, int | None], torch.Tensor]) -> torch.Tensor:
        r"""`abs(P(d) / target - 1)` at the expected sizes d, zero inside the dead zone; for the whole parent instead
        `10 * MSE(pi, one-hot largest)`, as nothing but the largest choice is right there (eq. 12).
        """
        if budget == FULL:
            errors = [
                (pi - F.one_hot(torch.tensor(0), len(pi)).to(pi)).square().mean() for pi in probabilities.values()
            ]
            return 10 * torch.stack(errors).mean()
        limit = self.limits[budget]
        miss = (self.expected(self.mixture(probabilities), limit) / limit.value - 1).abs()
        return torch.where(miss <= DEAD_ZONE, torch.zeros_like(miss), miss)

    # -- what it decides -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decide(self, within: float = DEAD_ZONE) -> dict[str, Submodel]:
        """The submodel of every target: the likeliest choices whose exact cost is within 5 % of the target, nested from large to small.

        The argmax alone can miss a target that the expected sizes met, so for axes with one choice in all layers combinations are
        tried in the order of their probability. Per-layer axes take their argmax.

        Raises:
            `ElasticConfigError`: no combination of choices comes near a target.
        """
        decided: dict[str, Submodel] = {}
        larger = self._full
        for name in self.names[1:]:
            log_pi = {key: logits.log_softmax(-1) for key, logits in self.logits(name).items()}
            decided[name] = larger = self._nearest(name, log_pi, larger, within)
        return decided

    def report(self, decided: Mapping[str, Submodel]) -> list[dict[str, Any]]:
        """What was chosen for every target, what it costs, and how far that is from the target."""
        rows = []
        for name, submodel in decided.items():
            limit = self.limits[name]
            cost = limit.measure(self._count(submodel), self._dtype())
            rows.append(
                {
                    "budget": name,
                    "target": str(limit),
                    "quantity": limit.quantity,
                    "cost": cost,
                    "miss": cost / limit.value - 1,
                    "sizes": {axis: submodel.to_dict()[axis] for axis in submodel.cuts(self._full)},
                }
            )
        return rows

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _dtype(self) -> torch.dtype:
        dtype = self.config.dtype
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    def _share(self, name: str) -> float:
        limit = self.limits[name]
        return limit.value / limit.measure(self._count.full, self._dtype())

    def _measure(self, layer: int | None, mixture: Mixture, limit: Limit) -> Any:
        return limit.measure(self._count.count(layer, mixture.expected(self._full, layer)), self._dtype())

    def _nearest(
        self, name: str, log_pi: Mapping[tuple[str, int | None], torch.Tensor], larger: Submodel, within: float
    ) -> Submodel:
        limit = self.limits[name]
        fixed = {key: int(values.argmax()) for key, values in log_pi.items() if key[1] is not None}
        free = [key for key in log_pi if key[1] is None]
        options = itertools.product(*(range(len(self.choices[axis])) for axis, _ in free))
        ranked = sorted(options, key=lambda picks: -sum(float(log_pi[k][i]) for k, i in zip(free, picks, strict=True)))
        nearest, smallest_miss = None, math.inf
        for picks in ranked:
            try:
                submodel = self._build({**fixed, **dict(zip(free, picks, strict=True))}, larger)
            except ElasticConfigError:  # sizes that the stock config cannot have together
                continue
            miss = abs(limit.measure(self._count(submodel), self._dtype()) / limit.value - 1)
            if submodel != larger and miss <= within:
                return submodel
            if submodel != larger and miss < smallest_miss:
                nearest, smallest_miss = submodel, miss
        if nearest is None:
            raise ElasticConfigError(
                f"no choice for budget {name!r} is smaller than the budget before it; give more choices."
            )
        return nearest

    def _build(self, picks: Mapping[tuple[str, int | None], int], larger: Submodel) -> Submodel:
        """The submodel of these choices, cut down to nest in a larger one."""
        sizes: dict[str, Any] = {}
        layers = larger.layers
        for (axis, layer), i in picks.items():
            size = self.choices[axis][i]
            if axis == LAYERS:
                ranking = [i for i in self.config.axes[LAYERS]["ranking"] if i in larger.layers]
                layers = tuple(sorted(ranking[:size]))
            elif layer is not None:
                sizes.setdefault(axis, {})[layer] = size
            elif isinstance(larger[axis], int):
                sizes[axis] = min(size, larger[axis])  # type: ignore[type-var]
            else:
                sizes[axis] = {at: size for at, whole in enumerate(self._full[axis]) if whole is not None}  # type: ignore[arg-type]
        for axis, size in sizes.items():
            if isinstance(size, dict):
                bound = larger[axis]
                sizes[axis] = {at: min(s, bound[at] or s) for at, s in size.items()}  # type: ignore[index]
        return self._architecture.submodel(self._parent, {**sizes, LAYERS: list(layers)}, "the router's choice")


def _limits(targets: Mapping[str, str | float], full: Cost, dtype: torch.dtype) -> dict[str, Limit]:
    limits = {}
    for name, target in targets.items():
        if isinstance(target, float) and 0 < target < 1:
            limit: Limit | None = Limit("total", target * full.total_params)
        else:
            limit = parse_limit(target) if not isinstance(target, bool) else None
        if limit is None or name == FULL:
            raise ElasticConfigError(
                f"router target {name!r}={target!r} must be a share of the parent (0.5), or '12B', '2.1B active', '24GB'; 'full' is implied."
            )
        whole = limit.measure(full, dtype)
        if limit.value >= whole:
            raise ElasticConfigError(
                f"router target {name!r}={target!r} is not below the parent's {Limit(limit.quantity, whole)}."
            )
        limits[name] = limit
    if not limits:
        raise ElasticConfigError("the router needs at least one target.")
    return limits
