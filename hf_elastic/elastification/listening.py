"""What scores are made of, added up from forward hooks while a parent reads calibration text.

Which module to listen to follows from the table: a norm over the residual stream, the linear layer that leads from an axis back to it, the
segment that a rule names (`TensorRule.measured`), the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..architectures import Architecture
from ..architectures.axes import Cut, Dim, Sizes, TensorRule, dim


def score_key(architecture: Architecture, name: str) -> str:
    """Under which name an axis, or an order of its own (`Cut.order`), is in [`Scores`]; axes that are scored together have one."""
    if name in [axis.name for axis in architecture.axes] and (heads := architecture.heads_of(name)):
        return f"{heads.part}_channels"
    return name


def sorted_axes(architecture: Architecture, config: PreTrainedConfig) -> tuple[set[str], set[str]]:
    """The axes whose entries are sorted, as something runs along them that has no order of its own; and those sorted in every expert by itself."""
    cuts = [cut for rule in architecture.rules(config) for d in rule.dims for cut in d.cuts if not cut.order]
    return {cut.axis for cut in cuts}, {cut.axis for cut in cuts if cut.within}


@dataclass(frozen=True)
class _Measure:
    """What is added up of a dimension of activations: entries `span` of it, seen as `shape`, of which `own` factors belong to one score.

    Magnitudes are summed, L2 norms over the other factors where there are some; of `channels` the squares, of shape `(heads, channels)`.
    """

    key: str
    span: tuple[int, int]
    shape: tuple[int, ...]
    own: tuple[int, ...]
    channels: bool = False

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        value = value[..., self.span[0] : self.span[1]].float().unflatten(-1, self.shape)
        others = tuple(i - len(self.shape) for i in range(len(self.shape)) if i not in self.own)
        if self.channels:
            squares = value.square().sum(dim=others) if others else value.square()
            return squares.flatten(-len(self.own), -2)
        return value.norm(dim=others) if others else value.abs()


class Listener:
    """Adds up scores from forward hooks; `mask` says which positions of the current batch are real, `(B, T)`."""

    def __init__(self, architecture: Architecture, model: PreTrainedModel, wanted: set[str]):
        self.mask = torch.ones(0, 0, dtype=torch.bool)
        self._sums: dict[str, dict[int, torch.Tensor]] = {}
        self._routed: dict[int, torch.Tensor] = {}  # tokens per expert, (E,)
        self._experts: set[str] = set()  # axes of experts
        self._hooks: list[tuple[nn.Module, Callable[..., None], bool]] = []
        full, stream, rules = architecture.full(model.config), architecture.stream, architecture.rules(model.config)
        measured: dict[int | None, set[str]] = {}
        for rule in rules:
            measured.setdefault(rule.layer, set()).update(_measured(rule))
        seen: set[str] = set()
        for rule in rules:
            sizes = full.at(rule.layer)
            module = model.get_submodule(rule.module)
            if stream in wanted and rule.norm and _is_along(rule.dims[0], stream):
                self._listen(module, lambda m, i, out: self._add(stream, -1, out.abs()))
            if rule.measured:
                for measure in _measures(architecture, rule.dims[0], rule.measured, wanted, sizes, set()):
                    self._listen(module, self._on_output(rule.layer, measure))
            elif len(rule.dims) == 2 and _is_along(rule.dims[0], stream):
                for name, _ in rule.dims[1].segments:
                    for measure in _measures(architecture, rule.dims[1], name, wanted, sizes, measured[rule.layer]):
                        self._listen(module, self._on_input(rule.layer, measure), before=True)
            elif rule.routed and rule.module not in seen:
                seen.add(rule.module)
                self._experts.add(rule.experts)
                neurons = [cut.axis for d in rule.dims for cut in d.cuts if cut.within == rule.experts]
                if wanted & {rule.experts, *neurons}:
                    hook = self._on_experts(rule.layer, wanted, rule.experts, neurons[0] if neurons else None)
                    self._listen(module, hook, before=True)

    def _listen(self, module: nn.Module, hook: Callable[..., None], before: bool = False) -> None:
        self._hooks.append((module, hook, before))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Listen to the forward passes in the block."""
        handles = [
            m.register_forward_pre_hook(h) if before else m.register_forward_hook(h) for m, h, before in self._hooks
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def values(self) -> dict[str, dict[int, torch.Tensor]]:
        """What was added up, as the `values` of scores."""
        values = {axis: dict(layers) for axis, layers in self._sums.items()}
        for axis in self._experts & values.keys():
            values[axis] = {i: gain / self._routed[i].clamp(min=1) for i, gain in values[axis].items()}
        return values

    def _accumulate(self, axis: str, layer: int | None, value: torch.Tensor) -> None:
        layers = self._sums.setdefault(axis, {})
        key = -1 if layer is None else layer
        value = value.cpu().double()
        layers[key] = layers[key] + value if key in layers else value

    def _add(self, axis: str, layer: int | None, value: torch.Tensor) -> None:
        """Sum `(B, T, ...)` or `(B * T, ...)` over real positions."""
        real = self.mask if value.shape[:2] == self.mask.shape else self.mask.reshape(-1)
        self._accumulate(axis, layer, value[real.to(value.device)].float().sum(0))

    def _on_input(self, layer: int | None, measure: _Measure) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._add(measure.key, layer, measure(args[0]))

        return hook

    def _on_output(self, layer: int | None, measure: _Measure) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            self._add(measure.key, layer, measure(output))

        return hook

    def _on_experts(self, layer: int | None, wanted: set[str], experts: str, ffn: str | None) -> Callable[..., None]:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            x, index, weights = args  # (tokens, d), (tokens, k), (tokens, k)
            real = self.mask.reshape(-1).to(x.device)
            x, index, weights = (
                x.reshape(-1, x.shape[-1])[real],
                index.reshape(len(real), -1)[real],
                weights.reshape(len(real), -1)[real],
            )
            down = module.down_proj  # (E, d, i)
            reap, tokens = x.new_zeros(len(down), dtype=torch.float32), x.new_zeros(len(down), dtype=torch.float32)
            neurons = x.new_zeros(len(down), down.shape[-1], dtype=torch.float32)
            for expert in index.unique().tolist():
                token, slot = torch.where(index == expert)
                inner = _expert_neurons(module, expert, x[token])
                output = nn.functional.linear(inner, down[expert])
                reap[expert] = (weights[token, slot].float() * output.float().norm(dim=-1)).sum()
                tokens[expert] = len(token)
                neurons[expert] = inner.float().abs().sum(0)
            if experts in wanted:
                self._accumulate(experts, layer, reap)
                key = -1 if layer is None else layer
                self._routed[key] = self._routed.get(key, 0) + tokens.cpu().double()
            if ffn in wanted:
                self._accumulate(ffn, layer, neurons)

        return hook


def _expert_neurons(experts: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """Input of one expert's second matrix, `(tokens, expert_ffn)`, for gated and plain experts, by the names that all stock experts have."""
    if hasattr(experts, "gate_up_proj"):
        gate, up = nn.functional.linear(x, experts.gate_up_proj[expert]).chunk(2, dim=-1)
        return experts.act_fn(gate) * up
    return experts.act_fn(nn.functional.linear(x, experts.up_proj[expert]))


def _is_along(dimension: Dim, axis: str) -> bool:
    """Whether a dimension is the axis and nothing else, in its order."""
    return [(cut.axes, cut.order) for cut in dimension.cuts] == [((axis,), None)]


def _measured(rule: TensorRule) -> set[str]:
    """What is scored by the values of a rule's segment."""
    segment = dict(rule.dims[0].segments)[rule.measured] if rule.measured else ()
    return {factor.sorted_by for factor in segment if isinstance(factor, Cut)}


def _measures(
    architecture: Architecture, dimension: Dim, name: str, wanted: set[str], sizes: Sizes, elsewhere: set[str]
) -> Iterator[_Measure]:
    """What is scored at one segment of a dimension: every axis along it but the residual stream's, and every order of its own."""
    segment = dict(dimension.segments)[name]
    shape, span = tuple(dim(factor).size(sizes) for factor in segment), dimension.span(name, sizes)
    place = {factor.sorted_by: i for i, factor in enumerate(segment) if isinstance(factor, Cut)}
    for i, factor in enumerate(segment):
        if not isinstance(factor, Cut) or factor.sorted_by in {architecture.stream, *elsewhere}:
            continue
        key = score_key(architecture, factor.sorted_by)
        own = (i - 1, i) if factor.groups > 1 else (i,)
        if key == factor.sorted_by:
            if wanted & {*factor.axes, key}:
                yield _Measure(key, span, shape, own)
            continue
        heads = architecture.axis(factor.axis)
        if heads.channels in place and wanted & {heads.name, heads.channels}:
            yield _Measure(key, span, shape, (*own, place[heads.channels]), channels=True)
