"""Dense transformers: attention and a gated MLP in every layer. Llama and Qwen3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel, PreTrainedConfig, Qwen3ForCausalLM, Qwen3Model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from .axes import Cut, Sizes, TensorRule, dim
from .base import Architecture, Axis, StateRule
from .blocks import HIDDEN, RESIDUAL, attention, attention_states, linear, rms_norm


class Llama(Architecture):
    model_type = "llama"
    causal_class = LlamaForCausalLM
    base_class = LlamaModel
    layer_class: ClassVar[type[nn.Module]] = LlamaDecoderLayer
    head_norms: ClassVar[tuple[str, ...]] = ()
    axes = (
        Axis("hidden", "hidden_size"),
        Axis("ffn", "intermediate_size", "mlp"),
        Axis("attention_heads", "num_attention_heads", "attention", groups="num_key_value_heads"),
    )

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        return frozenset({"attention", "mlp"})

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        rules = [TensorRule("model.embed_tokens.weight", (dim(config.vocab_size), RESIDUAL))]
        for layer in range(self.depth(config)):
            c, prefix = config.per_layer_config[layer], "model.layers.{layer}"
            rules += [rms_norm(f"{prefix}.{name}", layer) for name in ("input_layernorm", "post_attention_layernorm")]
            heads = {"kv_heads": c.num_key_value_heads, "head_dim": c.head_dim, "bias": c.attention_bias}
            rules += attention(f"{prefix}.self_attn", layer, **heads)
            names = [f"{prefix}.self_attn.{name}.weight" for name in self.head_norms]
            rules += [TensorRule(name, (dim(c.head_dim),), layer) for name in names]
            bias = getattr(c, "mlp_bias", False)
            for name in ("gate_proj", "up_proj"):
                rules += linear(f"{prefix}.mlp.{name}", layer, dim(Cut("ffn")), HIDDEN, bias=bias)
            rules += linear(f"{prefix}.mlp.down_proj", layer, RESIDUAL, dim(Cut("ffn", gated=True)), bias=bias)
        tied = "model.embed_tokens.weight" if config.tie_word_embeddings else None
        head = TensorRule("lm_head.weight", (dim(config.vocab_size), HIDDEN), tied=tied)
        return [*rules, rms_norm("model.norm", None), head]

    def layer_fields(self, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
        types = getattr(config, "layer_types", None)
        listed = {"layer_types": [types[i] for i in kept]} if types else {}
        return {"num_hidden_layers": len(kept), **listed}

    def build_layer(self, config: PreTrainedConfig, layer: int) -> nn.Module:
        return self.layer_class(config, layer)

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        return attention_states(kv_heads=config.num_key_value_heads, head_dim=config.head_dim)

    def tied_fields(self, config: PreTrainedConfig, part: str, sizes: Sizes) -> dict[str, Any]:
        return {"head_dim": config.head_dim} if part == "attention" else {}

    def bias_router(self, router: Any, source: Any, bias: torch.Tensor, top_k: int) -> None:
        raise NotImplementedError


class Qwen3(Llama):
    model_type = "qwen3"
    causal_class = Qwen3ForCausalLM
    base_class = Qwen3Model
    layer_class = Qwen3DecoderLayer
    head_norms = ("q_norm", "k_norm")
