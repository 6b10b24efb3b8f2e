"""Qwen3-Next: gated DeltaNet or gated attention, then routed experts with a gated shared one, or a dense MLP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, Qwen3NextForCausalLM, Qwen3NextModel
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextDecoderLayer

from . import blocks
from .axes import TensorRule, dim
from .base import Architecture, Axis, StateRule


class Qwen3Next(Architecture):
    model_type = "qwen3_next"
    causal_class = Qwen3NextForCausalLM
    base_class = Qwen3NextModel
    joined = True  # input projections of the DeltaNet
    axes = (
        Axis("hidden", "hidden_size"),
        Axis("ffn", "intermediate_size", "mlp"),
        Axis("attention_heads", "num_attention_heads", "attention", groups="num_key_value_heads"),
        Axis(
            "value_heads", "linear_num_value_heads", "delta", groups="linear_num_key_heads", channels="value_head_dim"
        ),
        Axis("value_head_dim", "linear_value_head_dim", "delta"),
        Axis("experts", "num_experts", "moe"),
        Axis("experts_per_token", "num_experts_per_tok", "moe", among="experts"),
        Axis("expert_ffn", "moe_intermediate_size", "moe"),
        Axis("shared_expert_ffn", "shared_expert_intermediate_size", "moe"),
    )

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        mixer = "delta" if config.layer_types[layer] == "linear_attention" else "attention"
        sparse = layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
        return frozenset({mixer, "moe" if sparse and config.per_layer_config[layer].num_experts else "mlp"})

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        layers = [rule for i in range(self.depth(config)) for rule in self._layer(config.per_layer_config[i], i)]
        return blocks.trunk(config, blocks.rms_norm("model.norm", None, centre=1.0)) + layers

    def _layer(self, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
        prefix, parts = "model.layers.{layer}", self.parts(c, layer)
        yield blocks.rms_norm(f"{prefix}.input_layernorm", layer, centre=1.0)
        yield blocks.rms_norm(f"{prefix}.post_attention_layernorm", layer, centre=1.0)
        if "delta" in parts:
            yield from blocks.delta_net(f"{prefix}.linear_attn", layer, **_delta(c), joined=self.joined)
        else:
            heads, prefix_ = {"kv_heads": c.num_key_value_heads, "head_dim": c.head_dim}, f"{prefix}.self_attn"
            yield from blocks.gated_attention(prefix_, layer, **heads, bias=c.attention_bias)
            yield from blocks.head_norms(prefix_, layer, c.head_dim)
        if "mlp" in parts:
            yield from blocks.gated_mlp(f"{prefix}.mlp", layer, "ffn")
        else:
            yield from blocks.experts(f"{prefix}.mlp", layer)
            yield from blocks.gated_mlp(f"{prefix}.mlp.shared_expert", layer, "shared_expert_ffn")
            yield from blocks.linear(f"{prefix}.mlp.shared_expert_gate", layer, dim(1), blocks.HIDDEN)

    def layer_fields(self, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
        dense = [new for new, i in enumerate(kept) if "mlp" in self.parts(config, i)]
        types = [config.layer_types[i] for i in kept]
        fields = {"mlp_only_layers": dense, "decoder_sparse_step": 1}
        return {"layer_types": types, "num_hidden_layers": len(kept), **fields}

    def build_layer(self, config: PreTrainedConfig, layer: int) -> nn.Module:
        return Qwen3NextDecoderLayer(config, layer)

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        if "attention" in self.parts(config, layer):
            return blocks.attention_states(kv_heads=config.num_key_value_heads, head_dim=config.head_dim)
        return blocks.delta_net_states(**_delta(config))

    def bias_router(self, router: Any, source: Any, bias: torch.Tensor, top_k: int) -> None:
        blocks.bias_softmax_router(router, bias, top_k, normalized=getattr(router, "norm_topk_prob", True))


def _delta(c: PreTrainedConfig) -> dict[str, int]:
    return {"keys": c.linear_num_key_heads, "key_dim": c.linear_key_head_dim, "kernel": c.linear_conv_kernel_dim}
