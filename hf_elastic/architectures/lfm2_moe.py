"""Liquid LFM2-MoE: short convolutions or attention, dense MLPs first and routed experts after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Lfm2MoeForCausalLM, Lfm2MoeModel, PreTrainedConfig
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeDecoderLayer

from ..errors import ElasticConfigError
from . import blocks
from .axes import Cut, Sizes, TensorRule, dim
from .base import Architecture, Axis
from .lfm2 import Lfm2


class Lfm2Moe(Lfm2):
    model_type = "lfm2_moe"
    causal_class = Lfm2MoeForCausalLM
    base_class = Lfm2MoeModel
    layer_class = Lfm2MoeDecoderLayer
    hosts = ()
    axes = (
        *Lfm2.axes,
        Axis("experts", "num_experts", "moe"),
        Axis("experts_per_token", "num_experts_per_tok", "moe", among="experts"),
        Axis("expert_ffn", "moe_intermediate_size", "moe"),
    )

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        if config.layer_types is None:
            raise ElasticConfigError(
                "layer_types is missing, and the stock lfm2_moe has no default for it; list 'conv' or 'full_attention' per layer."
            )
        mixer = "conv" if config.layer_types[layer] == "conv" else "attention"
        return frozenset({mixer, "mlp" if layer < config.num_dense_layers else "moe"})

    def _feed_forward(self, prefix: str, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
        if "mlp" in self.parts(c, layer):
            yield from super()._feed_forward(prefix, c, layer)
            return
        yield from blocks.experts(prefix, layer, names=("w1", "w3", "w2"))
        if c.use_expert_bias:
            yield TensorRule(f"{prefix}.expert_bias", (dim(Cut("experts")),), layer, buffer=True, fp32=True)

    def layer_fields(self, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
        dense = sum(i < config.num_dense_layers for i in kept)
        return Architecture.layer_fields(self, config, kept) | {"num_dense_layers": dense}

    def size(self, config: PreTrainedConfig, axis: Axis) -> int:
        return Architecture.size(self, config, axis)

    def tied_fields(self, config: PreTrainedConfig, part: str, sizes: Sizes) -> dict[str, Any]:
        return {"head_dim": blocks.head_dim(config)} if part == "attention" else {}

    def bias_router(self, router: Any, source: Any, bias: torch.Tensor, top_k: int) -> None:
        def forward(hidden: torch.Tensor, expert_bias: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
            logits = nn.functional.linear(hidden, router.weight)
            weights = logits.sigmoid()
            scores = weights if expert_bias is None else weights + expert_bias
            index = (scores + bias).topk(top_k, dim=-1).indices
            picked = weights.gather(1, index).type_as(logits)
            if router.norm_topk_prob:
                picked = picked / (picked.sum(dim=-1, keepdim=True) + 1e-6)
            return logits, picked * router.routed_scaling_factor, index

        router.forward = forward
