"""AI21 Jamba: Mamba-1 or attention, then a gated MLP or routed experts, each at a fixed period."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import JambaForCausalLM, JambaModel, PreTrainedConfig
from transformers.models.jamba.modeling_jamba import ALL_DECODER_LAYER_TYPES

from ..errors import ElasticConfigError
from . import blocks
from .axes import Cut, Sizes, TensorRule, dim
from .base import Architecture, Axis, StateRule

_INNER = Cut("hidden", by="mamba_expand", order="mamba_channels")
_STEP = (("dt", "mamba_dt_rank"), ("b", "mamba_d_state"), ("c", "mamba_d_state"))


class Jamba(Architecture):
    model_type = "jamba"
    causal_class = JambaForCausalLM
    base_class = JambaModel
    axes = (
        Axis("hidden", "hidden_size"),
        Axis("ffn", "intermediate_size", "mlp"),
        Axis("attention_heads", "num_attention_heads", "attention", groups="num_key_value_heads"),
        Axis("mamba_expand", "mamba_expand", "mamba", counts=True),  # channels per hidden one
        Axis("experts", "num_experts", "moe"),
        Axis("experts_per_token", "num_experts_per_tok", "moe", among="experts"),
        Axis("expert_ffn", "intermediate_size", "moe"),  # one field: where they differ, it differs from layer to layer
    )

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        sparse = layer % config.expert_layer_period == config.expert_layer_offset
        sparse = sparse and config.per_layer_config[layer].num_experts > 1
        return frozenset({config.layers_block_type[layer], "moe" if sparse else "mlp"})

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        layers = [rule for i in range(self.depth(config)) for rule in self._layer(config.per_layer_config[i], i)]
        return blocks.trunk(config, blocks.rms_norm("model.final_layernorm", None)) + layers

    def _layer(self, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
        prefix, parts = "model.layers.{layer}", self.parts(c, layer)
        yield blocks.rms_norm(f"{prefix}.input_layernorm", layer)
        yield blocks.rms_norm(f"{prefix}.pre_ff_layernorm", layer)
        if "mamba" in parts:
            yield from _mamba(f"{prefix}.mamba", c, layer)
        else:
            heads = {"kv_heads": c.num_key_value_heads, "head_dim": blocks.head_dim(c)}
            yield from blocks.attention(f"{prefix}.self_attn", layer, **heads, bias=False)
        if "moe" in parts:
            yield from blocks.experts(f"{prefix}.feed_forward", layer, router="router")
        else:
            yield from blocks.gated_mlp(f"{prefix}.feed_forward", layer, "ffn")

    def layer_units(self, config: PreTrainedConfig) -> list[list[int]]:
        sparse = config.per_layer_config[0].num_experts > 1
        period = math.lcm(config.attn_layer_period, config.expert_layer_period if sparse else 1)
        return [list(range(self.depth(config)))[i : i + period] for i in range(0, self.depth(config), period)]

    def layer_fields(self, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
        fields: dict[str, Any] = {"num_hidden_layers": len(kept)}
        for name, part in (("attn", "attention"), ("expert", "moe")):
            there = [new for new, i in enumerate(kept) if part in self.parts(config, i)]
            said = getattr(config, f"{name}_layer_offset"), getattr(config, f"{name}_layer_period")
            if (found := _period(there, len(kept), said)) is None:
                raise ElasticConfigError(
                    f"layers={list(kept)}: a stock {self.model_type} config says which layers have {part} by a period, and these have it at {there} of "
                    f"{len(kept)}. Keep or drop whole periods of the parent: {', '.join(f'{u[0]}..{u[-1]}' for u in self.layer_units(config))}."
                )
            fields |= {f"{name}_layer_offset": found[0], f"{name}_layer_period": found[1]}
        return fields

    def check_layer(self, config: PreTrainedConfig, sizes: Sizes, where: str) -> None:
        if sizes.get("experts") == 1:
            raise ElasticConfigError(
                f"{where}: experts=1 is an MLP without a router for {self.model_type}; keep at least 2."
            )

    def build_layer(self, config: PreTrainedConfig, layer: int) -> nn.Module:
        return ALL_DECODER_LAYER_TYPES[config.layers_block_type[layer]](config, layer)

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        if "attention" in self.parts(config, layer):
            return blocks.attention_states(kv_heads=config.num_key_value_heads, head_dim=blocks.head_dim(config))
        inner, kernel, state = dim(_INNER), dim(config.mamba_d_conv), dim(config.mamba_d_state)
        return StateRule("conv", (inner, kernel), 0.5), StateRule("ssm", (inner, state), 0.5)  # B is normalised

    def tied_fields(self, config: PreTrainedConfig, part: str, sizes: Sizes) -> dict[str, Any]:
        return {"head_dim": blocks.head_dim(config)} if part == "attention" else {}

    def bias_router(self, router: Any, source: Any, bias: Any, top_k: int) -> None:
        blocks.bias_softmax_router(router, bias, top_k, normalized=False)


def _period(there: Sequence[int], depth: int, said: tuple[int, int]) -> tuple[int, int] | None:
    """Offset and period of the layers that are there, if they have them; those that the parent says if they will do."""
    every = (said, *((o, p) for p in range(1, depth + 1) for o in range(p)), (depth, depth + 1))
    return next(((o, p) for o, p in every if list(range(o, depth, p)) == list(there)), None)


def _mamba(prefix: str, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    """Mamba-1: every channel has a state of its own, and all together choose its step, B and C."""
    inner, x = dim(_INNER), replace(_INNER, gated=True)
    yield from blocks.linear(
        f"{prefix}.in_proj", layer, dim(x=(x,), z=(_INNER,)), blocks.HIDDEN, bias=c.mamba_proj_bias
    )
    yield blocks.convolution(f"{prefix}.conv1d", layer, inner, c.mamba_d_conv)
    if c.mamba_conv_bias:
        yield TensorRule(f"{prefix}.conv1d.bias", (dim(x),), layer)
    yield from blocks.linear(
        f"{prefix}.x_proj", layer, dim(**{name: (getattr(c, size),) for name, size in _STEP}), inner
    )
    rank = dim(c.mamba_dt_rank)
    yield from blocks.linear(f"{prefix}.dt_proj", layer, inner, rank, bias=True, passed_by_kernels=True)
    for name, size in _STEP:
        yield TensorRule(f"{prefix}.{name}_layernorm.weight", (dim(getattr(c, size)),), layer)
    yield TensorRule(f"{prefix}.A_log", (inner, dim(c.mamba_d_state)), layer)
    yield TensorRule(f"{prefix}.D", (inner,), layer)
    yield from blocks.linear(f"{prefix}.out_proj", layer, blocks.RESIDUAL, inner, bias=c.mamba_proj_bias)
