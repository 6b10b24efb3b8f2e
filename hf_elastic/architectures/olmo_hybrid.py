"""Ai2 OLMo hybrids: gated DeltaNet or attention, then a gated MLP; norms are after the blocks of attention layers and before those of the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import OlmoHybridForCausalLM, OlmoHybridModel, PreTrainedConfig
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import (
    OlmoHybridAttentionDecoderLayer,
    OlmoHybridLinearAttentionDecoderLayer,
)

from . import blocks
from .axes import Cut, Sizes, TensorRule, dim
from .base import Architecture, Axis, StateRule

_DISK = {"input_layernorm": "attention_layer_norm", "post_attention_layernorm": "feedforward_layer_norm"}


class OlmoHybrid(Architecture):
    model_type = "olmo_hybrid"
    causal_class = OlmoHybridForCausalLM
    base_class = OlmoHybridModel
    layer_lists = ("layer_types",)
    axes = (
        Axis("hidden", "hidden_size"),
        Axis("ffn", "intermediate_size", "mlp"),
        Axis("attention_heads", "num_attention_heads", "attention", groups="num_key_value_heads"),
        Axis(
            "value_heads", "linear_num_value_heads", "delta", groups="linear_num_key_heads", channels="value_head_dim"
        ),
        Axis("value_head_dim", "linear_value_head_dim", "delta"),
    )

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        return frozenset({"delta" if config.layer_types[layer] == "linear_attention" else "attention", "mlp"})

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        layers = [rule for i in range(self.depth(config)) for rule in self._layer(config.per_layer_config[i], i)]
        return blocks.trunk(config, blocks.rms_norm("model.norm", None)) + layers

    def _layer(self, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
        prefix, delta = "model.layers.{layer}", "delta" in self.parts(c, layer)
        for name in ("input_layernorm" if delta else "post_feedforward_layernorm", "post_attention_layernorm"):
            # The Hub has the second one of attention layers under its live name; stock classes save it as here.
            disk = f"{prefix}.{_DISK[name]}.weight" if name in _DISK else None
            yield replace(blocks.rms_norm(f"{prefix}.{name}", layer), disk=disk)
        yield from (
            _delta_net(f"{prefix}.linear_attn", c, layer) if delta else _attention(f"{prefix}.self_attn", c, layer)
        )
        yield from blocks.gated_mlp(f"{prefix}.mlp", layer, "ffn")

    def build_layer(self, config: PreTrainedConfig, layer: int) -> nn.Module:
        if "delta" in self.parts(config, layer):
            return OlmoHybridLinearAttentionDecoderLayer(config, layer)
        return OlmoHybridAttentionDecoderLayer(config, layer)

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        if "delta" in self.parts(config, layer):
            return blocks.delta_net_states(**_keys(config))
        dims = (dim(config.num_key_value_heads), dim(blocks.head_dim(config)))
        # Keys are normalised; values are made of the residual stream itself, which shrinks as well (measured: 0.6 to 0.8).
        return StateRule("keys", dims, degree=0.0), StateRule("values", dims, degree=0.7)

    def tied_fields(self, config: PreTrainedConfig, part: str, sizes: Sizes) -> dict[str, Any]:
        return {"head_dim": blocks.head_dim(config)} if part == "attention" else {}


def _attention(prefix: str, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    kv, head_dim = c.num_key_value_heads, blocks.head_dim(c)
    # One norm runs over all queries, so undecided heads are weighted before it, and once more where they are read: a query of 0 reads as well.
    query, weighted = (dim(kv, Cut("attention_heads", groups=kv, gated=gated), head_dim) for gated in (False, True))
    for rule in blocks.attention(prefix, layer, kv_heads=kv, head_dim=head_dim, bias=c.attention_bias):
        yield replace(rule, dims=(weighted, *rule.dims[1:])) if ".q_proj." in rule.template else rule
    yield TensorRule(f"{prefix}.q_norm.weight", (query,), layer, norm=True)
    yield TensorRule(f"{prefix}.k_norm.weight", (dim(kv, head_dim),), layer)


def _delta_net(prefix: str, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    keys, kernel = c.linear_num_key_heads, c.linear_conv_kernel_dim
    heads, width, key = Cut("value_heads", groups=keys), Cut("value_head_dim"), (keys, c.linear_key_head_dim)
    gated = dim(keys, heads, Cut("value_head_dim", gated=True))
    value, per_head = dim(keys, heads, width), dim(keys, heads)
    outs = {"q": dim(*key), "k": dim(*key), "v": gated, "g": value, "a": per_head, "b": per_head}
    for name, out in outs.items():
        facts: dict[str, Any] = {"kind": "linear_attention", "fused": "in_proj_qkvg"} if name in "qkvg" else {}
        yield from blocks.linear(f"{prefix}.{name}_proj", layer, out, blocks.HIDDEN, **facts)
    conv = dim(q_conv1d=key, k_conv1d=key, v_conv1d=(keys, heads, width))
    disk = f"{prefix}.{{segment}}.weight"
    yield blocks.convolution(f"{prefix}.conv1d", layer, conv, kernel, disk)
    for name in ("dt_bias", "A_log"):
        yield TensorRule(f"{prefix}.{name}", (dim(keys, heads),), layer)
    yield TensorRule(f"{prefix}.o_norm.weight", (dim(width),), layer, norm=True)  # of every head by itself
    inner = dim(keys, Cut("value_heads", groups=keys, gated=True), width)
    yield from blocks.linear(f"{prefix}.o_proj", layer, blocks.RESIDUAL, inner, kind="linear_attention")


def _keys(c: PreTrainedConfig) -> dict[str, int]:
    return {"keys": c.linear_num_key_heads, "key_dim": c.linear_key_head_dim, "kernel": c.linear_conv_kernel_dim}
