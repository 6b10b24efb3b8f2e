"""Gemma 3's text models: four norms per layer, which add one to their weights, and embeddings scaled by the root of the width."""

from __future__ import annotations

from typing import Any

from transformers import Gemma3ForCausalLM, Gemma3TextModel, PreTrainedConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer

from . import blocks
from .axes import TensorRule
from .dense import Llama


class Gemma3Text(Llama):
    model_type = "gemma3_text"
    causal_class = Gemma3ForCausalLM
    base_class = Gemma3TextModel
    layer_class = Gemma3DecoderLayer

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        rules = blocks.trunk(config, blocks.rms_norm("model.norm", None, centre=1.0))
        for layer in range(self.depth(config)):
            c, prefix = config.per_layer_config[layer], "model.layers.{layer}"
            for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
                rules.append(blocks.rms_norm(f"{prefix}.{name}_layernorm", layer, centre=1.0))
            heads = {"kv_heads": c.num_key_value_heads, "head_dim": c.head_dim, "bias": c.attention_bias}
            rules += blocks.attention(f"{prefix}.self_attn", layer, **heads)
            rules += blocks.head_norms(f"{prefix}.self_attn", layer, c.head_dim)
            rules += blocks.gated_mlp(f"{prefix}.mlp", layer, "ffn")
        return rules

    def tied_fields(self, config: PreTrainedConfig, part: str, sizes: Any) -> dict[str, Any]:
        return {}
