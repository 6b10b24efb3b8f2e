"""Dense transformers: attention and a gated MLP in every layer. Llama, Mistral, Qwen2 and Qwen3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from transformers import (
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    PreTrainedConfig,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from . import blocks
from .axes import Sizes, TensorRule
from .base import Architecture, Axis, StateRule


class Dense(Architecture):
    """What these have in common. Subclasses say what their layers have besides."""

    axes: ClassVar[tuple[Axis, ...]] = (
        Axis("hidden", "hidden_size"),
        Axis("ffn", "intermediate_size", "mlp"),
        Axis("attention_heads", "num_attention_heads", "attention", groups="num_key_value_heads"),
    )
    layer_lists = ("layer_types",)
    norms: ClassVar[tuple[str, ...]] = ("input_layernorm", "post_attention_layernorm")
    centre: ClassVar[float] = 0.0  # of these norms and the last one
    head_norms: ClassVar[bool] = False  # of queries and keys

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        return frozenset({"attention", "mlp"})

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        layers = [rule for i in range(self.depth(config)) for rule in self.layer(config.per_layer_config[i], i)]
        return blocks.trunk(config, blocks.rms_norm("model.norm", None, centre=self.centre)) + layers

    def layer(self, config: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
        """The rules of one layer, whose own config is given."""
        attention, head_dim = "model.layers.{layer}.self_attn", blocks.head_dim(config)
        for name in self.norms:
            yield blocks.rms_norm(f"model.layers.{{layer}}.{name}", layer, centre=self.centre)
        yield from blocks.attention(
            attention, layer, kv_heads=config.num_key_value_heads, head_dim=head_dim, **self.attention_biases(config)
        )
        if self.head_norms:
            yield from blocks.head_norms(attention, layer, head_dim)
        yield from self.feed_forward(config, layer, "model.layers.{layer}.mlp")

    def attention_biases(self, config: PreTrainedConfig) -> dict[str, bool]:
        return {"bias": bool(getattr(config, "attention_bias", False))}

    def feed_forward(self, config: PreTrainedConfig, layer: int, prefix: str) -> Iterator[TensorRule]:
        return blocks.gated_mlp(prefix, layer, "ffn", bias=bool(getattr(config, "mlp_bias", False)))

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        heads = {"kv_heads": config.num_key_value_heads, "head_dim": blocks.head_dim(config)}
        return blocks.attention_states(**heads, window=blocks.sliding_window(config, layer))

    def tied_fields(self, config: PreTrainedConfig, part: str, sizes: Sizes) -> dict[str, Any]:
        # Several take hidden_size / num_attention_heads for it where the config does not say it.
        return {"head_dim": blocks.head_dim(config)} if part == "attention" else {}


class Llama(Dense):
    model_type = "llama"
    causal_class = LlamaForCausalLM
    base_class = LlamaModel
    layer_class = LlamaDecoderLayer


class Mistral(Dense):
    model_type = "mistral"
    causal_class = MistralForCausalLM
    base_class = MistralModel
    layer_class = MistralDecoderLayer


class Qwen2(Dense):
    model_type = "qwen2"
    causal_class = Qwen2ForCausalLM
    base_class = Qwen2Model
    layer_class = Qwen2DecoderLayer

    def attention_biases(self, config: PreTrainedConfig) -> dict[str, bool]:
        return {"bias": True, "out_bias": False}


class Qwen3(Dense):
    model_type = "qwen3"
    causal_class = Qwen3ForCausalLM
    base_class = Qwen3Model
    layer_class = Qwen3DecoderLayer
    head_norms = True
