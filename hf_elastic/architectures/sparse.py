"""Transformers with routed experts: Mixtral in every layer, Qwen3-MoE in those that its config does not make dense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import MixtralForCausalLM, MixtralModel, PreTrainedConfig, Qwen3MoeForCausalLM, Qwen3MoeModel
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from . import blocks
from .axes import TensorRule
from .base import Axis
from .dense import Dense

_HIDDEN, _FFN, _HEADS = Dense.axes


class Mixtral(Dense):
    model_type = "mixtral"
    causal_class = MixtralForCausalLM
    base_class = MixtralModel
    layer_class = MixtralDecoderLayer
    qkv_bias = out_bias = False
    axes = (
        _HIDDEN,
        _HEADS,
        Axis("experts", "num_local_experts", "moe"),
        Axis("experts_per_token", "num_experts_per_tok", "moe", among="experts"),
        Axis("expert_ffn", "intermediate_size", "moe"),
    )

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        return frozenset({"attention", "moe"})

    def feed_forward(self, config: PreTrainedConfig, layer: int, prefix: str) -> Iterator[TensorRule]:
        return blocks.experts(prefix, layer, names=("w1", "w3", "w2"), stored="model.layers.{layer}.block_sparse_moe")

    def bias_router(self, router: Any, source: Any, bias: torch.Tensor, top_k: int) -> None:
        blocks.bias_softmax_router(router, bias, top_k, normalized=True)


class Qwen3Moe(Dense):
    model_type = "qwen3_moe"
    causal_class = Qwen3MoeForCausalLM
    base_class = Qwen3MoeModel
    layer_class = Qwen3MoeDecoderLayer
    head_norms = True
    axes = (
        _HIDDEN,
        _FFN,
        _HEADS,
        Axis("experts", "num_experts", "moe"),
        Axis("experts_per_token", "num_experts_per_tok", "moe", among="experts"),
        Axis("expert_ffn", "moe_intermediate_size", "moe"),
    )

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        sparse = layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
        return frozenset({"attention", "moe" if sparse and config.per_layer_config[layer].num_experts else "mlp"})

    def feed_forward(self, config: PreTrainedConfig, layer: int, prefix: str) -> Iterator[TensorRule]:
        if "moe" in self.parts(config, layer):
            return blocks.experts(prefix, layer)
        return super().feed_forward(config, layer, prefix)

    def layer_fields(self, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
        dense = [new for new, layer in enumerate(kept) if "mlp" in self.parts(config, layer)]
        return super().layer_fields(config, kept) | {"mlp_only_layers": dense, "decoder_sparse_step": 1}

    def bias_router(self, router: Any, source: Any, bias: torch.Tensor, top_k: int) -> None:
        blocks.bias_softmax_router(router, bias, top_k, normalized=router.norm_topk_prob)
