"""TII Falcon-H1: every layer has Mamba-2 and attention side by side, and a gated MLP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import FalconH1ForCausalLM, FalconH1Model, PreTrainedConfig
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1DecoderLayer, compute_mup_vector

from . import blocks
from .axes import Sizes, TensorRule
from .base import Architecture, Axis, StateRule


class FalconH1(Architecture):
    model_type = "falcon_h1"
    causal_class = FalconH1ForCausalLM
    base_class = FalconH1Model
    layer_outputs = 1
    axes = (
        Axis("hidden", "hidden_size"),
        Axis("ffn", "intermediate_size", "mlp"),
        Axis("attention_heads", "num_attention_heads", "attention", groups="num_key_value_heads"),
        Axis("mamba_heads", "mamba_n_heads", "mamba", groups="mamba_n_groups", channels="mamba_head_dim"),
        Axis("mamba_head_dim", "mamba_d_head", "mamba"),
    )

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        return frozenset({"mlp", "mamba", "attention"})

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        layers = [rule for i in range(self.depth(config)) for rule in _layer(config.per_layer_config[i], i)]
        return blocks.trunk(config, blocks.rms_norm("model.final_layernorm", None)) + layers

    def build_layer(self, config: PreTrainedConfig, layer: int) -> nn.Module:
        built = FalconH1DecoderLayer(config, layer)
        # The stock model puts the multipliers on its layers from outside.
        built.mamba.register_buffer("mup_vector", compute_mup_vector(config), persistent=False)
        return built

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        heads = {"kv_heads": config.num_key_value_heads, "head_dim": blocks.head_dim(config)}
        return blocks.attention_states(**heads) + blocks.mamba2_states(**blocks.mamba2_sizes(config))

    def tied_fields(self, config: PreTrainedConfig, part: str, sizes: Sizes) -> dict[str, Any]:
        if part == "mamba":
            return {"mamba_d_ssm": sizes["mamba_heads"] * sizes["mamba_head_dim"]}
        return {"head_dim": blocks.head_dim(config)} if part == "attention" else {}


def _layer(c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    prefix = "model.layers.{layer}"
    yield blocks.rms_norm(f"{prefix}.input_layernorm", layer)
    yield blocks.rms_norm(f"{prefix}.pre_ff_layernorm", layer)
    biases = {"conv_bias": c.mamba_conv_bias, "proj_bias": c.mamba_proj_bias, "out_bias": bool(c.projectors_bias)}
    yield from blocks.mamba2(f"{prefix}.mamba", layer, **blocks.mamba2_sizes(c), **biases, norm=c.mamba_rms_norm)
    heads = {"kv_heads": c.num_key_value_heads, "head_dim": blocks.head_dim(c)}
    yield from blocks.attention(f"{prefix}.self_attn", layer, **heads, bias=c.attention_bias)
    yield from blocks.gated_mlp(f"{prefix}.feed_forward", layer, "ffn", bias=c.mlp_bias)
