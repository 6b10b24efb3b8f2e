"""Forward passes of a submodel whose sizes are not decided yet: mixtures over the choices of every axis.

A choice k of an axis keeps the first k entries. Undecided, entry j counts `w_j = sum_i pi_i [j < k_i]`, which multiplies the entry's
activation once (`Cut.gated` says where). An RMSNorm over N channels uses `eps * sum_i pi_i k_i/N` and `weight * sum_i pi_i sqrt(k_i/N)`
(the corrections of [`hf_elastic.submodels.masking`], mixed); experts are chosen as in the parent, except those whose weight is next to nothing; a
layer is kept with weight `g_l`: `h + g_l (f(h) - h)`. Where every pi is one-hot this is exactly the submodel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from transformers import PreTrainedModel

from ..architectures import Architecture
from ..architectures.axes import Norm, Sizes
from ..architectures.submodel import Submodel
from .masking import epsilon_of
from .slicing import build_meta
from .stencils import StandIn, Unit, checkpointed, make_units, uninstall

_DROPPED = 0.05
"""Experts with less weight than this are not chosen. Above it their outputs are weighted, so that the router feels what it loses."""


@dataclass(frozen=True)
class Mixture:
    """An undecided submodel.

    Args:
        choices (`dict[str, tuple[int, ...]]`): Per undecided axis its sizes.
        probabilities (`dict[tuple[str, int | None], torch.Tensor]`):
            Per axis and layer (`None` for one choice in all layers) the probability of every size, `(choices,)`.
        layers (`torch.Tensor`, *optional*): `(depth,)`, how much of every layer is kept; all of them if not given.
    """

    choices: Mapping[str, tuple[int, ...]]
    probabilities: Mapping[tuple[str, int | None], torch.Tensor]
    layers: torch.Tensor | None = None

    def of(self, axis: str, layer: int | None) -> torch.Tensor | None:
        """Probabilities of an axis in one layer; `None` if the axis is decided."""
        own = self.probabilities.get((axis, layer))
        return own if own is not None else self.probabilities.get((axis, None))

    def expected(self, full: Submodel, layer: int | None) -> dict[str, Any]:
        """Expected size of every axis in one layer; decided axes keep the parent's."""
        sizes: dict[str, Any] = dict(full.at(layer))
        for axis in sizes:
            pi = self.of(axis, layer)
            if pi is not None:
                sizes[axis] = (pi * pi.new_tensor(self.choices[axis])).sum()
        return sizes

    def weights(
        self, full: Mapping[str, int], groups: Mapping[str, int], layer: int | None
    ) -> dict[str, torch.Tensor]:
        """Per undecided axis the weight of every entry of one group."""
        result = {}
        for axis, size in full.items():
            pi = self.of(axis, layer)
            if pi is not None:
                group = groups.get(axis, 1)
                kept = torch.tensor(self.choices[axis], device=pi.device) // group
                result[axis] = (pi[:, None] * (torch.arange(size // group, device=pi.device) < kept[:, None])).sum(0)
        return result

    def mean(self, axes: Iterable[str], full: Sizes, layer: int | None, of: Callable[[Sizes], float]) -> Any:
        """The expected value of what follows from the sizes of some axes; differentiable in the probabilities."""
        known = {axis: pi for axis in dict.fromkeys(axes) if (pi := self.of(axis, layer)) is not None}
        total: Any = 0.0
        for chosen in product(*(range(len(self.choices[axis])) for axis in known)):
            value: Any = of({**full, **{axis: self.choices[axis][i] for axis, i in zip(known, chosen, strict=True)}})
            for pi, i in zip(known.values(), chosen, strict=True):
                value = pi[i] * value
            total = total + value
        return total


class SoftUnits:
    """Runs the units of a parent at a mixture. The parent's modules own the parameters, as with stencils.

    Args:
        model (`PreTrainedModel`): Elastic parent.
        architecture (`Architecture`): Its table.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture):
        self._model, self._architecture = model, architecture
        self._full = architecture.full(model.config)
        tree = build_meta(architecture, model.config, type(model))
        self.units = make_units(model, architecture, model.config, tree, self._full)
        self._layer_of = {id(layer): i for i, layer in enumerate(architecture.layers_of(model))}
        self._groups = {
            layer: {
                axis.name: int(getattr(model.config.per_layer_config[layer], axis.groups))
                for axis in architecture.axes
                if axis.groups and axis.name in self._full.at(layer)
            }
            for layer in range(self._full.depth)
        }

    def install(self, mixture: Mixture) -> None:
        """Let the parent's modules compute the mixture until `uninstall`."""
        for unit in self.units:
            unit.rounding = self._model.__dict__.get("_rounding")
            forward = partial(self._forward, unit, mixture)
            unit.module.forward = StandIn(checkpointed, unit.module, forward)  # type: ignore[method-assign]

    def uninstall(self) -> None:
        uninstall(self.units)

    def _forward(self, unit: Unit, mixture: Mixture, *args: Any, **kwargs: Any) -> Any:
        stencil: Any = unit.stencil
        layer = self._layer_of.get(id(unit.module))
        full = self._full.at(layer)
        weights = mixture.weights(full, self._groups.get(layer, {}) if layer is not None else {}, layer)
        unit.follow()
        live: dict[str, torch.Tensor] = {}
        undecided = [name for name, piece in unit.parts if piece.rule.routes and piece.rule.experts in weights]
        routers = {name.rpartition(".")[0] for name in undecided}
        tensors = unit.tensors()
        for name, piece in unit.parts:
            source = tensors[name]
            owner, _, _ = name.rpartition(".")
            module = stencil.get_submodule(owner)
            mean = partial(mixture.mean, piece.rule.axes, full, layer)
            if isinstance(norm := piece.rule.norm, Norm):
                alive, epsilon = partial(piece.rule.alive, full), epsilon_of(module, norm)
                setattr(module, epsilon, getattr(unit.module.get_submodule(owner), epsilon) * mean(alive))
                source = (source + norm.centre) * mean(partial(_root_of, alive)) - norm.centre
            if (scale := piece.rule.scale) is not None:
                source = source * (mean(scale) / scale(full))
            if piece.rule.routes and (experts := piece.rule.experts) in weights:
                gates = _tile(weights[experts], full[experts])
                original = unit.module.get_submodule(owner)
                dropped = torch.where(gates.detach() < _DROPPED, -torch.inf, 0.0)
                top_k = full[self._architecture.per_token[experts]]
                self._architecture.bias_router(module, original, dropped, top_k)
            if not (piece.rule.buffer and owner in routers):  # the router's bias is set with the choice
                live[name] = piece.rule.gate(source, full, weights)
        output = torch.func.functional_call(stencil, live, args, kwargs)
        if layer is None or mixture.layers is None:
            return output
        hidden = args[0] if args else kwargs["hidden_states"]
        after, *rest = output if self._architecture.layer_outputs else (output,)
        mixed = hidden + mixture.layers[layer].to(hidden.dtype) * (after - hidden)
        return (mixed, *rest) if self._architecture.layer_outputs else mixed


def _tile(weights: torch.Tensor, size: int) -> torch.Tensor:
    """Weights of one group, for all groups."""
    return weights.repeat(size // len(weights))


def keep_weights(probabilities: torch.Tensor, counts: tuple[int, ...], ranking: list[int]) -> torch.Tensor:
    """How much of every layer is kept, `(depth,)`, when the most important `counts[i]` stay with probability i."""
    position = torch.empty(len(ranking), dtype=torch.int64)
    position[torch.tensor(ranking)] = torch.arange(len(ranking))
    kept = position[None] < torch.tensor(counts)[:, None]
    return (probabilities[:, None] * kept.to(probabilities.device)).sum(0)


def _root_of(share: Callable[[Sizes], float], sizes: Sizes) -> float:
    return math.sqrt(share(sizes))
