"""Rules of latent attention (MLA): keys and values of all heads come from one narrow vector per token, which is what the cache keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from .axes import Cut, TensorRule, dim
from .base import StateRule
from .blocks import HIDDEN, RESIDUAL, linear


def latent_attention(prefix: str, config: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    """Heads are cut whole, and the width of their values in all of them; the latent vectors, of which no head has a part, stay."""
    heads, bias = Cut("attention_heads"), config.attention_bias
    down: dict[str, Any] = {"kind": "attention", "fused": None if config.q_lora_rank is None else "fused_qkv_a_proj"}
    query, latent = dim(heads, config.qk_nope_head_dim + config.qk_rope_head_dim), dim(config.kv_lora_rank)
    if config.q_lora_rank is None:
        yield from linear(f"{prefix}.q_proj", layer, query, HIDDEN, kind="attention")
    else:
        rank = dim(config.q_lora_rank)
        yield from linear(f"{prefix}.q_a_proj", layer, rank, HIDDEN, bias=bias, **down)
        yield TensorRule(f"{prefix}.q_a_layernorm.weight", (rank,), layer)
        yield from linear(f"{prefix}.q_b_proj", layer, query, rank, kind="attention")
    joint = dim(latent=(config.kv_lora_rank,), shared=(config.qk_rope_head_dim,))
    yield from linear(f"{prefix}.kv_a_proj_with_mqa", layer, joint, HIDDEN, bias=bias, **down)
    yield TensorRule(f"{prefix}.kv_a_layernorm.weight", (latent,), layer)
    both = dim(key=(config.qk_nope_head_dim,), value=(Cut("value_head_dim"),))
    yield from linear(f"{prefix}.kv_b_proj", layer, dim(heads, both), latent, kind="attention")
    inner = dim(Cut("attention_heads", gated=True), Cut("value_head_dim", gated=True))
    yield from linear(f"{prefix}.o_proj", layer, RESIDUAL, inner, bias=bias, kind="attention")


def latent_states(config: PreTrainedConfig) -> tuple[StateRule, ...]:
    """In the place of keys the latent vector, which is normalised, and in that of values the part of the keys that all heads share."""
    latent, shared = (dim(1), dim(config.kv_lora_rank)), (dim(1), dim(config.qk_rope_head_dim))
    return StateRule("keys", latent, degree=0.0), StateRule("values", shared, degree=0.5)
