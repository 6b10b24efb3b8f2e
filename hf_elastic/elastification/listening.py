"""What scores are made of, added up from forward hooks while a parent reads calibration text.

Which module to listen to follows from the table: a norm over `hidden`, the linear layer that leads from an axis back to `hidden`,
the `x` segment of Mamba's input projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architectures import Architecture
from ..architectures.axes import Cut, Sizes, TensorRule, dim

MAMBA = "mamba_channels"
"""Key of the second moments of Mamba's x, of shape `(heads, head_dim)`: both Mamba axes are scored from them."""

MAMBA_AXES = ("mamba_heads", "mamba_head_dim")
_SCORED_OTHERWISE = ("hidden", "experts", "expert_ffn", *MAMBA_AXES)


class Listener:
    """Adds up scores from forward hooks; `mask` says which positions of the current batch are real, `(B, T)`."""

    def __init__(self, architecture: Architecture, model: PreTrainedModel, wanted: set[str]):
        self.mask = torch.ones(0, 0, dtype=torch.bool)
        self._sums: dict[str, dict[int, torch.Tensor]] = {}
        self._routed: dict[int, torch.Tensor] = {}  # tokens per expert, (E,)
        self._hooks: list[tuple[nn.Module, Callable[..., None], bool]] = []
        full = architecture.full(model.config)
        seen: set[str] = set()
        for rule in architecture.rules(model.config):
            sizes = full.at(rule.layer)
            module = model.get_submodule(rule.module)
            if "hidden" in wanted and rule.norm and [cut.axis for cut in rule.dims[0].cuts] == ["hidden"]:
                self._listen(module, lambda m, i, out: self._add("hidden", -1, out.abs()))
            for cut, shape, others in _consumed(rule, wanted, sizes):
                self._listen(module, self._on_input(cut.axis, rule.layer, shape, others), before=True)
            if (
                wanted & set(MAMBA_AXES)
                and rule.dims
                and "x" in dict(rule.dims[0].segments)
                and rule.name.endswith("in_proj.weight")
            ):
                span = rule.dims[0].span("x", sizes)
                shape = (sizes["mamba_heads"], sizes["mamba_head_dim"])
                self._listen(module, self._on_mamba(rule.layer, span, shape))
            elif rule.routed and wanted & {"experts", "expert_ffn"} and rule.module not in seen:
                seen.add(rule.module)
                self._listen(module, self._on_experts(rule.layer, wanted), before=True)

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
        for layer, tokens in self._routed.items():
            if "experts" in values:
                values["experts"][layer] = values["experts"][layer] / tokens.clamp(min=1)
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

    def _on_input(
        self, axis: str, layer: int | None, shape: tuple[int, ...], others: tuple[int, ...]
    ) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            value = args[0].float()
            if others:  # (..., kv * heads * head_dim) -> the norm of each head, (..., kv, heads per kv)
                value = value.unflatten(-1, shape).norm(dim=others)
            self._add(axis, layer, value.abs())

        return hook

    def _on_mamba(self, layer: int | None, span: tuple[int, int], shape: tuple[int, int]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            x = output[..., span[0] : span[1]].float()
            self._add(MAMBA, layer, x.unflatten(-1, shape).square())

        return hook

    def _on_experts(self, layer: int | None, wanted: set[str]) -> Callable[..., None]:
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
            if "experts" in wanted:
                self._accumulate("experts", layer, reap)
                key = -1 if layer is None else layer
                self._routed[key] = self._routed.get(key, 0) + tokens.cpu().double()
            if "expert_ffn" in wanted:
                self._accumulate("expert_ffn", layer, neurons)

        return hook


def _expert_neurons(experts: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """Input of one expert's second matrix, `(tokens, expert_ffn)`, for gated and plain experts."""
    if hasattr(experts, "gate_up_proj"):
        gate, up = nn.functional.linear(x, experts.gate_up_proj[expert]).chunk(2, dim=-1)
        return experts.act_fn(gate) * up
    return experts.act_fn(nn.functional.linear(x, experts.up_proj[expert]))


def _consumed(
    rule: TensorRule, wanted: set[str], sizes: Sizes
) -> Iterator[tuple[Cut, tuple[int, ...], tuple[int, ...]]]:
    """The axes that a linear layer leads back to `hidden` from, if they are scored at that layer's input.

    Each with how the input is made up, and which of its factors belong to one entry of the axis, counted from the end.
    """
    if len(rule.dims) != 2 or [cut.axis for cut in rule.dims[0].cuts] != ["hidden"]:
        return
    for _, segment in rule.dims[1].segments:
        shape = tuple(dim(factor).size(sizes) for factor in segment)
        for i, factor in enumerate(segment):
            if isinstance(factor, Cut) and factor.axis in wanted and factor.axis not in _SCORED_OTHERWISE:
                own = {i - 1, i} if factor.groups > 1 else {i}
                yield factor, shape, tuple(k - len(segment) for k in range(len(segment)) if k not in own)
