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
from .obstacles import Obstacle
from .other_programs import computed_head_width
from .submodel import Submodel


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
    qkv_bias: ClassVar[bool | str] = "attention_bias"  # whether there is one, or the field that says so
    out_bias: ClassVar[bool | str] = "attention_bias"
    mlp_bias: ClassVar[bool | str] = False

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        return frozenset({"attention", "mlp"})

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        layers = [rule for i in range(self.depth(config)) for rule in self.layer(config.per_layer_config[i], i)]
        return blocks.trunk(config, blocks.rms_norm("model.norm", None, centre=self.centre)) + layers

    def layer(self, config: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
        """The rules of one layer, whose own config is given."""
        attention = "model.layers.{layer}.self_attn"
        heads: dict[str, Any] = {"kv_heads": config.num_key_value_heads, "head_dim": blocks.head_dim(config)}
        biases: dict[str, Any] = {"bias": _said(config, self.qkv_bias), "out_bias": _said(config, self.out_bias)}
        for name in self.norms:
            yield blocks.rms_norm(f"model.layers.{{layer}}.{name}", layer, centre=self.centre)
        yield from blocks.attention(attention, layer, **heads, **biases)
        if self.head_norms:
            yield from blocks.head_norms(attention, layer, heads["head_dim"])
        yield from self.feed_forward(config, layer, "model.layers.{layer}.mlp")

    def feed_forward(self, config: PreTrainedConfig, layer: int, prefix: str) -> Iterator[TensorRule]:
        """The rules of what follows attention in a layer."""
        return blocks.gated_mlp(prefix, layer, "ffn", bias=_said(config, self.mlp_bias))

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        heads = {"kv_heads": config.num_key_value_heads, "head_dim": blocks.head_dim(config)}
        window = blocks.sliding_window(config, layer)
        return blocks.attention_states(**heads, window=window, normed=self.head_norms)

    def tied_fields(self, config: PreTrainedConfig, part: str, sizes: Sizes) -> dict[str, Any]:
        # Several take hidden_size / num_attention_heads for it where the config does not say it.
        return {"head_dim": blocks.head_dim(config)} if part == "attention" else {}


class Llama(Dense):
    model_type = "llama"
    causal_class = LlamaForCausalLM
    base_class = LlamaModel
    layer_class = LlamaDecoderLayer
    mlp_bias = "mlp_bias"


class Mistral(Dense):
    model_type = "mistral"
    causal_class = MistralForCausalLM
    base_class = MistralModel
    layer_class = MistralDecoderLayer
    qkv_bias = out_bias = False


class Qwen2(Dense):
    model_type = "qwen2"
    causal_class = Qwen2ForCausalLM
    base_class = Qwen2Model
    layer_class = Qwen2DecoderLayer
    qkv_bias, out_bias = True, False
    one_share = ("hidden", "attention_heads")

    def obstacles(self, config: PreTrainedConfig, submodel: Submodel) -> Iterator[Obstacle]:
        heads = max(submodel.values("attention_heads"))
        return computed_head_width(submodel.values("hidden")[0], heads, blocks.head_dim(config.per_layer_config[0]))


class Qwen3(Dense):
    model_type = "qwen3"
    causal_class = Qwen3ForCausalLM
    base_class = Qwen3Model
    layer_class = Qwen3DecoderLayer
    head_norms = True


def _said(config: PreTrainedConfig, what: bool | str) -> bool:
    return bool(getattr(config, what)) if isinstance(what, str) else what
