"""Liquid LFM2-MoE: short convolutions or attention, dense MLPs first and routed experts after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import Lfm2MoeForCausalLM, Lfm2MoeModel, PreTrainedConfig
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeDecoderLayer

from .axes import Cut, Sizes, TensorRule, dim
from .base import Architecture, Axis, StateRule
from .blocks import HIDDEN, RESIDUAL, attention, attention_states, linear, rms_norm


class Lfm2Moe(Architecture):
    model_type = "lfm2_moe"
    causal_class = Lfm2MoeForCausalLM
    base_class = Lfm2MoeModel
    axes = (
        Axis("hidden", "hidden_size"),
        Axis("ffn", "intermediate_size", "mlp"),
        Axis("attention_heads", "num_attention_heads", "attention", groups="num_key_value_heads"),
        Axis("experts", "num_experts", "moe"),
        Axis("experts_per_token", "num_experts_per_tok", "moe", among="experts"),
        Axis("expert_ffn", "moe_intermediate_size", "moe"),
    )

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        mixer = "conv" if config.layer_types[layer] == "conv" else "attention"
        return frozenset({mixer, "mlp" if layer < config.num_dense_layers else "moe"})

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        rules = [TensorRule("model.embed_tokens.weight", (dim(config.vocab_size), RESIDUAL))]
        for layer in range(self.depth(config)):
            c, prefix, parts = config.per_layer_config[layer], "model.layers.{layer}", self.parts(config, layer)
            rules += [rms_norm(f"{prefix}.{name}", layer) for name in ("operator_norm", "ffn_norm")]
            rules += (_conv if "conv" in parts else _attention)(prefix, c, layer)
            rules += (_mlp if "mlp" in parts else _moe)(f"{prefix}.feed_forward", c, layer)
        tied = "model.embed_tokens.weight" if config.tie_word_embeddings else None
        head = TensorRule("lm_head.weight", (dim(config.vocab_size), HIDDEN), tied=tied)
        return [*rules, rms_norm("model.embedding_norm", None), head]

    def layer_fields(self, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
        dense = sum(i < config.num_dense_layers for i in kept)
        types = [config.layer_types[i] for i in kept]
        return {"layer_types": types, "num_hidden_layers": len(kept), "num_dense_layers": dense}

    def build_layer(self, config: PreTrainedConfig, layer: int) -> nn.Module:
        return Lfm2MoeDecoderLayer(config, layer)

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        if "conv" in self.parts(config, layer):
            return (StateRule("conv", (HIDDEN, dim(config.conv_L_cache)), degree=1.0),)
        return attention_states(kv_heads=config.num_key_value_heads, head_dim=_head_dim(config))

    def tied_fields(self, config: PreTrainedConfig, part: str, sizes: Sizes) -> dict[str, Any]:
        return {"head_dim": _head_dim(config)} if part == "attention" else {}

    def bias_router(self, router: Any, source: Any, bias: torch.Tensor, top_k: int) -> None:
        def forward(hidden: torch.Tensor, expert_bias: torch.Tensor | float | None = None) -> tuple[torch.Tensor, ...]:
            logits = nn.functional.linear(hidden, router.weight)
            weights = logits.sigmoid()
            index = (weights + (0.0 if expert_bias is None else expert_bias) + bias).topk(top_k, dim=-1).indices
            picked = weights.gather(1, index).type_as(logits)
            if router.norm_topk_prob:
                picked = picked / (picked.sum(dim=-1, keepdim=True) + 1e-6)
            return logits, picked * router.routed_scaling_factor, index

        router.forward = forward


def _conv(prefix: str, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    inner, x = (Cut("hidden"),), (Cut("hidden", gated=True),)
    yield from linear(f"{prefix}.conv.in_proj", layer, dim(B=inner, C=inner, x=x), HIDDEN, bias=c.conv_bias)
    yield TensorRule(f"{prefix}.conv.conv.weight", (dim(*inner), dim(1), dim(c.conv_L_cache)), layer)
    if c.conv_bias:
        yield TensorRule(f"{prefix}.conv.conv.bias", (dim(*x),), layer)
    yield from linear(f"{prefix}.conv.out_proj", layer, RESIDUAL, dim(*inner), bias=c.conv_bias)


def _attention(prefix: str, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    head_dim = _head_dim(c)
    for rule in attention(f"{prefix}.self_attn", layer, kv_heads=c.num_key_value_heads, head_dim=head_dim, bias=False):
        yield replace(rule, template=rule.template.replace("o_proj", "out_proj"))
    for name in ("q_layernorm", "k_layernorm"):
        yield TensorRule(f"{prefix}.self_attn.{name}.weight", (dim(head_dim),), layer)


def _mlp(prefix: str, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    for name in ("w1", "w3"):
        yield from linear(f"{prefix}.{name}", layer, dim(Cut("ffn")), HIDDEN)
    yield from linear(f"{prefix}.w2", layer, RESIDUAL, dim(Cut("ffn", gated=True)))


def _moe(prefix: str, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    experts, ffn = dim(Cut("experts")), (Cut("expert_ffn", within="experts"),)
    disk = f"{prefix}.experts.{{expert}}.{{segment}}.weight"
    dims = (experts, dim(w1=ffn, w3=ffn), HIDDEN)
    yield TensorRule(f"{prefix}.experts.gate_up_proj", dims, layer, disk=disk, routed=True)
    out = (dim(Cut("experts", gated=True)), RESIDUAL, dim(Cut("expert_ffn", within="experts", gated=True)))
    disk = f"{prefix}.experts.{{expert}}.w2.weight"
    yield TensorRule(f"{prefix}.experts.down_proj", out, layer, disk=disk, routed=True)
    yield TensorRule(f"{prefix}.gate.weight", (experts, HIDDEN), layer, routes=True)
    if c.use_expert_bias:
        yield TensorRule(f"{prefix}.expert_bias", (experts,), layer, buffer=True, fp32=True)


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
