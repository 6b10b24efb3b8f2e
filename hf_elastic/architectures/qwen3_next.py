"""Qwen3-Next: gated DeltaNet or gated attention, then routed experts with a gated shared one, or a dense MLP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig, Qwen3NextForCausalLM, Qwen3NextModel
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextDecoderLayer

from . import blocks
from .axes import TensorRule, dim
from .base import Architecture, Axis, StateRule
from .obstacles import REFUSES, Obstacle
from .submodel import Submodel

SHARED = (
    Axis("hidden", "hidden_size"),
    Axis("attention_heads", "num_attention_heads", "attention", groups="num_key_value_heads"),
    Axis("value_heads", "linear_num_value_heads", "delta", groups="linear_num_key_heads", channels="value_head_dim"),
    Axis("value_head_dim", "linear_value_head_dim", "delta"),
)
DENSE = (Axis("ffn", "intermediate_size", "mlp"),)
SPARSE = (
    Axis("experts", "num_experts", "moe"),
    Axis("experts_per_token", "num_experts_per_tok", "moe", among="experts"),
    Axis("expert_ffn", "moe_intermediate_size", "moe"),
    Axis("shared_expert_ffn", "shared_expert_intermediate_size", "moe"),
)


class Qwen3Next(Architecture):
    model_type = "qwen3_next"
    causal_class = Qwen3NextForCausalLM
    base_class = Qwen3NextModel
    layer_class = Qwen3NextDecoderLayer
    layer_lists = ("layer_types",)
    axes: ClassVar[tuple[Axis, ...]] = SHARED[:1] + DENSE + SHARED[1:] + SPARSE
    joined: ClassVar[bool] = True  # the DeltaNet has two input projections, key head by key head

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        mixer = "delta" if config.layer_types[layer] == "linear_attention" else "attention"
        return frozenset({mixer, "moe" if self.is_sparse(config, layer) else "mlp"})

    def is_sparse(self, config: PreTrainedConfig, layer: int) -> bool:
        """Whether a layer has routed experts, as the stock class asks."""
        listed = layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step
        return not listed and config.per_layer_config[layer].num_experts > 0

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
            heads, bias = {"kv_heads": c.num_key_value_heads, "head_dim": c.head_dim}, c.attention_bias
            yield from blocks.gated_attention(f"{prefix}.self_attn", layer, **heads, bias=bias)
            yield from blocks.head_norms(f"{prefix}.self_attn", layer, c.head_dim)
        if "mlp" in parts:
            yield from blocks.gated_mlp(f"{prefix}.mlp", layer, "ffn")
        else:
            yield from blocks.experts(f"{prefix}.mlp", layer)
            yield from blocks.gated_mlp(f"{prefix}.mlp.shared_expert", layer, "shared_expert_ffn")
            yield from blocks.linear(f"{prefix}.mlp.shared_expert_gate", layer, dim(1), blocks.HIDDEN)

    def layer_fields(self, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
        dense = [new for new, i in enumerate(kept) if not self.is_sparse(config, i)]
        return super().layer_fields(config, kept) | {"mlp_only_layers": dense, "decoder_sparse_step": 1}

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        if "delta" in self.parts(config, layer):
            return blocks.delta_net_states(**_delta(config))
        return blocks.attention_states(kv_heads=config.num_key_value_heads, head_dim=config.head_dim, normed=True)

    def obstacles(self, config: PreTrainedConfig, submodel: Submodel) -> Iterator[Obstacle]:
        dims = set(submodel.values("value_head_dim")) if "value_head_dim" in submodel else set()
        if other := sorted(dims - {config.linear_key_head_dim}):
            why = f"value_head_dim={other[0]} is not the {config.linear_key_head_dim} of the keys (its code was read)"
            yield Obstacle("llama.cpp", REFUSES, why)

    def bias_router(self, router: Any, source: Any, bias: torch.Tensor, top_k: int) -> None:
        blocks.bias_softmax_router(router, bias, top_k, normalized=getattr(router, "norm_topk_prob", True))


def _delta(c: PreTrainedConfig) -> dict[str, int]:
    return {"keys": c.linear_num_key_heads, "key_dim": c.linear_key_head_dim, "kernel": c.linear_conv_kernel_dim}
