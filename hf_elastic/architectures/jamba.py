"""AI21 Jamba: Mamba-1 or attention, then a dense MLP or routed experts, each at a fixed period."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import JambaForCausalLM, JambaModel, PreTrainedConfig
from transformers.models.jamba.modeling_jamba import ALL_DECODER_LAYER_TYPES

from ..errors import ElasticConfigError
from .axes import Cut, Sizes, TensorRule, dim
from .base import Architecture, Axis, StateRule
from .blocks import HIDDEN, RESIDUAL, attention, attention_states, linear, rms_norm
from .submodel import Submodel


class Jamba(Architecture):
    model_type = "jamba"
    causal_class = JambaForCausalLM
    base_class = JambaModel
    axes = (
        Axis("hidden", "hidden_size"),
        Axis("ffn", "intermediate_size", "mlp"),
        Axis("attention_heads", "num_attention_heads", "attention", groups="num_key_value_heads"),
        Axis("mamba_expand", "mamba_expand", "mamba"),  # channels per hidden one
        Axis("experts", "num_experts", "moe"),
        Axis("experts_per_token", "num_experts_per_tok", "moe", among="experts"),
        Axis("expert_ffn", "intermediate_size", "moe"),
    )

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        mixer = "mamba" if config.layers_block_type[layer] == "mamba" else "attention"
        sparse = layer % config.expert_layer_period == config.expert_layer_offset
        return frozenset({mixer, "moe" if sparse and config.per_layer_config[layer].num_experts > 1 else "mlp"})

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        rules = [TensorRule("model.embed_tokens.weight", (dim(config.vocab_size), RESIDUAL))]
        for layer in range(self.depth(config)):
            c, prefix, parts = config.per_layer_config[layer], "model.layers.{layer}", self.parts(config, layer)
            rules += [rms_norm(f"{prefix}.{name}", layer) for name in ("input_layernorm", "pre_ff_layernorm")]
            if "mamba" in parts:
                rules += _mamba(f"{prefix}.mamba", c, layer)
            else:
                heads = {"kv_heads": c.num_key_value_heads, "head_dim": _head_dim(c), "bias": False}
                rules += attention(f"{prefix}.self_attn", layer, **heads)
            rules += (_moe if "moe" in parts else _mlp)(f"{prefix}.feed_forward", layer)
        tied = "model.embed_tokens.weight" if config.tie_word_embeddings else None
        head = TensorRule("lm_head.weight", (dim(config.vocab_size), HIDDEN), tied=tied)
        return [*rules, rms_norm("model.final_layernorm", None), head]

    def layer_fields(self, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
        fields: dict[str, Any] = {"num_hidden_layers": len(kept)}
        for name, part in (("attn", "attention"), ("expert", "moe")):
            there = [new for new, i in enumerate(kept) if part in self.parts(config, i)]
            found = _period(there, len(kept))
            if found is None:
                raise ElasticConfigError(
                    f"layers={list(kept)}: {self.model_type} places {part} layers at a fixed period, which these are not at."
                )
            fields |= {f"{name}_layer_offset": found[0], f"{name}_layer_period": found[1]}
        return fields

    def check(self, config: PreTrainedConfig, submodel: Submodel, name: str = "the submodel") -> None:
        super().check(config, submodel, name)
        self.layer_fields(config, submodel.layers)

    def build_layer(self, config: PreTrainedConfig, layer: int) -> nn.Module:
        return ALL_DECODER_LAYER_TYPES[config.layers_block_type[layer]](config, layer)

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        if "attention" in self.parts(config, layer):
            return attention_states(kv_heads=config.num_key_value_heads, head_dim=_head_dim(config))
        inner, kernel = dim(Cut("hidden"), Cut("mamba_expand")), dim(config.mamba_d_conv)
        return StateRule("conv", (inner, kernel), 0.5), StateRule("ssm", (inner, dim(config.mamba_d_state)), 0.5)

    def tied_fields(self, config: PreTrainedConfig, part: str, sizes: Sizes) -> dict[str, Any]:
        return {"head_dim": _head_dim(config)} if part == "attention" else {}

    def bias_router(self, router: Any, source: Any, bias: torch.Tensor, top_k: int) -> None:
        def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = nn.functional.linear(hidden, router.weight)
            # not normalised over the chosen ones: a dropped expert leaves its share to the others
            weights, index = torch.softmax(logits.float() + bias, dim=-1).topk(top_k, dim=-1)
            return logits, weights.to(hidden.dtype), index

        router.forward = forward


def _period(there: Sequence[int], depth: int) -> tuple[int, int] | None:
    """Offset and period of the layers that are there, if they have them."""
    for period in range(1, depth + 1):
        for offset in range(period):
            if list(there) == list(range(offset, depth, period)):
                return offset, period
    return None if there else (depth, depth + 1)


def _mamba(prefix: str, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    inner, rank, state = (Cut("hidden"), Cut("mamba_expand")), c.mamba_dt_rank, c.mamba_d_state
    x = (Cut("hidden", gated=True), Cut("mamba_expand", gated=True))
    yield from linear(f"{prefix}.in_proj", layer, dim(x=x, z=inner), HIDDEN, bias=c.mamba_proj_bias)
    yield TensorRule(f"{prefix}.conv1d.weight", (dim(*inner), dim(1), dim(c.mamba_d_conv)), layer)
    if c.mamba_conv_bias:
        yield TensorRule(f"{prefix}.conv1d.bias", (dim(*x),), layer)
    yield from linear(f"{prefix}.x_proj", layer, dim(rank + 2 * state), dim(*inner))
    yield from linear(f"{prefix}.dt_proj", layer, dim(*inner), dim(rank), bias=True)
    yield TensorRule(f"{prefix}.A_log", (dim(*inner), dim(state)), layer)
    yield TensorRule(f"{prefix}.D", (dim(*inner),), layer)
    yield from linear(f"{prefix}.out_proj", layer, RESIDUAL, dim(*inner), bias=c.mamba_proj_bias)
    for name, size in (("dt", rank), ("b", state), ("c", state)):
        yield TensorRule(f"{prefix}.{name}_layernorm.weight", (dim(size),), layer)


def _mlp(prefix: str, layer: int) -> Iterator[TensorRule]:
    for name in ("gate_proj", "up_proj"):
        yield from linear(f"{prefix}.{name}", layer, dim(Cut("ffn")), HIDDEN)
    yield from linear(f"{prefix}.down_proj", layer, RESIDUAL, dim(Cut("ffn", gated=True)))


def _moe(prefix: str, layer: int) -> Iterator[TensorRule]:
    experts, ffn, disk = dim(Cut("experts")), (Cut("expert_ffn", within="experts"),), f"{prefix}.experts.{{expert}}"
    dims = (experts, dim(gate_proj=ffn, up_proj=ffn), HIDDEN)
    yield TensorRule(f"{prefix}.experts.gate_up_proj", dims, layer, disk=f"{disk}.{{segment}}.weight", routed=True)
    out = (dim(Cut("experts", gated=True)), RESIDUAL, dim(Cut("expert_ffn", within="experts", gated=True)))
    yield TensorRule(f"{prefix}.experts.down_proj", out, layer, disk=f"{disk}.down_proj.weight", routed=True)
    yield TensorRule(f"{prefix}.router.weight", (experts, HIDDEN), layer, routes=True)


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
