"""IBM Bamba: every layer has a mixer (Mamba-2 or attention) and a gated MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import BambaForCausalLM, BambaModel, PreTrainedConfig
from transformers.models.bamba.modeling_bamba import BambaDecoderLayer

from ..errors import ElasticConfigError
from .axes import Cut, Sizes, TensorRule, dim
from .base import Architecture, Axis, StateRule
from .blocks import HIDDEN, RESIDUAL, attention, attention_states, linear, mamba2, mamba2_states, rms_norm


class Bamba(Architecture):
    model_type = "bamba"
    causal_class = BambaForCausalLM
    base_class = BambaModel
    layer_outputs = 2
    axes = (
        Axis("hidden", "hidden_size"),
        Axis("ffn", "intermediate_size", "mlp"),
        Axis("attention_heads", "num_attention_heads", "attention", groups="num_key_value_heads"),
        Axis("mamba_heads", "mamba_n_heads", "mamba", groups="mamba_n_groups", channels="mamba_head_dim"),
        Axis("mamba_head_dim", "mamba_d_head", "mamba"),
    )

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        return frozenset({"mlp", "mamba" if config.layers_block_type[layer] == "linear_attention" else "attention"})

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        rules = [TensorRule("model.embed_tokens.weight", (dim(config.vocab_size), RESIDUAL))]
        for layer in range(self.depth(config)):
            c, prefix = config.per_layer_config[layer], "model.layers.{layer}"
            rules += [rms_norm(f"{prefix}.{name}", layer) for name in ("input_layernorm", "pre_ff_layernorm")]
            if "mamba" in self.parts(config, layer):
                sizes = {"groups": c.mamba_n_groups, "state": c.mamba_d_state, "kernel": c.mamba_d_conv}
                biases = {"conv_bias": c.mamba_conv_bias, "proj_bias": c.mamba_proj_bias}
                rules += mamba2(f"{prefix}.mamba", layer, **sizes, **biases)
            else:
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
        attention = [new for new, i in enumerate(kept) if "attention" in self.parts(config, i)]
        return {"attn_layer_indices": attention, "num_hidden_layers": len(kept)}

    def build_layer(self, config: PreTrainedConfig, layer: int) -> nn.Module:
        return BambaDecoderLayer(config, layer, config.layers_block_type[layer])

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        if "mamba" in self.parts(config, layer):
            return mamba2_states(groups=config.mamba_n_groups, state=config.mamba_d_state, kernel=config.mamba_d_conv)
        return attention_states(kv_heads=config.num_key_value_heads, head_dim=_head_dim(config))

    def tied_fields(self, config: PreTrainedConfig, part: str, sizes: Sizes) -> dict[str, Any]:
        if part == "mamba":
            return {"mamba_expand": sizes["mamba_heads"] * sizes["mamba_head_dim"] // sizes["hidden"]}
        return {"head_dim": _head_dim(config)} if part == "attention" else {}

    def check_layer(self, config: PreTrainedConfig, sizes: Sizes, where: str) -> None:
        if "mamba_heads" in sizes and sizes["mamba_heads"] * sizes["mamba_head_dim"] % sizes["hidden"]:
            raise ElasticConfigError(f"{where}: mamba_heads * mamba_head_dim must be a whole multiple of hidden.")

    def bias_router(self, router: Any, source: Any, bias: torch.Tensor, top_k: int) -> None:
        raise NotImplementedError


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
