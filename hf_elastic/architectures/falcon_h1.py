"""TII Falcon-H1: every layer has Mamba-2 and attention side by side, and a gated MLP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import FalconH1ForCausalLM, FalconH1Model, PreTrainedConfig
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1DecoderLayer, compute_mup_vector

from .axes import Cut, Sizes, TensorRule, dim
from .base import Architecture, Axis, StateRule
from .blocks import HIDDEN, RESIDUAL, attention, attention_states, linear, mamba2, mamba2_states, rms_norm


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
        rules = [TensorRule("model.embed_tokens.weight", (dim(config.vocab_size), RESIDUAL))]
        for layer in range(self.depth(config)):
            c, prefix = config.per_layer_config[layer], "model.layers.{layer}"
            rules += [rms_norm(f"{prefix}.{name}", layer) for name in ("input_layernorm", "pre_ff_layernorm")]
            rules += _mamba(f"{prefix}.mamba", c, layer)
            heads = {"kv_heads": c.num_key_value_heads, "head_dim": _head_dim(c), "bias": c.attention_bias}
            rules += attention(f"{prefix}.self_attn", layer, **heads)
            for name in ("gate_proj", "up_proj"):
                rules += linear(f"{prefix}.feed_forward.{name}", layer, dim(Cut("ffn")), HIDDEN, bias=c.mlp_bias)
            down = dim(Cut("ffn", gated=True))
            rules += linear(f"{prefix}.feed_forward.down_proj", layer, RESIDUAL, down, bias=c.mlp_bias)
        tied = "model.embed_tokens.weight" if config.tie_word_embeddings else None
        head = TensorRule("lm_head.weight", (dim(config.vocab_size), HIDDEN), tied=tied)
        return [*rules, rms_norm("model.final_layernorm", None), head]

    def layer_fields(self, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
        return {"num_hidden_layers": len(kept)}

    def build_layer(self, config: PreTrainedConfig, layer: int) -> nn.Module:
        built = FalconH1DecoderLayer(config, layer)
        built.mamba.register_buffer("mup_vector", compute_mup_vector(config), persistent=False)
        return built

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        mamba = {"groups": config.mamba_n_groups, "state": config.mamba_d_state, "kernel": config.mamba_d_conv}
        return attention_states(kv_heads=config.num_key_value_heads, head_dim=_head_dim(config)) + mamba2_states(
            **mamba
        )

    def tied_fields(self, config: PreTrainedConfig, part: str, sizes: Sizes) -> dict[str, Any]:
        mamba = {"mamba_d_ssm": sizes["mamba_heads"] * sizes["mamba_head_dim"]}
        return {"mamba": mamba, "attention": {"head_dim": _head_dim(config)}}.get(part, {})

    def bias_router(self, router: Any, source: Any, bias: torch.Tensor, top_k: int) -> None:
        raise NotImplementedError


def _mamba(prefix: str, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    there = {"norm.weight": c.mamba_rms_norm, "in_proj.bias": c.mamba_proj_bias, "out_proj.bias": c.projectors_bias}
    sizes = {"groups": c.mamba_n_groups, "state": c.mamba_d_state, "kernel": c.mamba_d_conv}
    for rule in mamba2(prefix, layer, **sizes, conv_bias=c.mamba_conv_bias, proj_bias=True):
        if there.get(rule.template.removeprefix(f"{prefix}."), True):
            yield rule


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
