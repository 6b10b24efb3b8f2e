"""Liquid LFM2: short convolutions or attention, then a gated MLP, in every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from transformers import Lfm2ForCausalLM, Lfm2Model, Lfm2VlForConditionalGeneration, PreTrainedConfig
from transformers.models.lfm2.modeling_lfm2 import Lfm2DecoderLayer

from . import blocks
from .axes import Sizes, TensorRule
from .base import Architecture, Axis, StateRule
from .hosts import Host

_OUT = "model.multi_modal_projector.linear_2"  # writes images into the residual stream
_VISION_LANGUAGE = Host(
    "lfm2_vl",
    Lfm2VlForConditionalGeneration,
    prefix="model.language_model.",
    passengers=("model.vision_tower.", "model.multi_modal_projector."),
    along={f"{_OUT}.weight": {0: "hidden"}, f"{_OUT}.bias": {0: "hidden"}},
)


class Lfm2(Architecture):
    model_type = "lfm2"
    causal_class = Lfm2ForCausalLM
    base_class = Lfm2Model
    hosts: ClassVar[tuple[Host, ...]] = (_VISION_LANGUAGE,)
    layer_class = Lfm2DecoderLayer
    layer_lists = ("layer_types",)
    axes: ClassVar[tuple[Axis, ...]] = (
        Axis("hidden", "hidden_size"),
        Axis("ffn", "intermediate_size", "mlp"),
        Axis("attention_heads", "num_attention_heads", "attention", groups="num_key_value_heads"),
    )

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        return frozenset({"conv" if config.layer_types[layer] == "conv" else "attention", "mlp"})

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        layers = [rule for i in range(self.depth(config)) for rule in self._layer(config.per_layer_config[i], i)]
        return blocks.trunk(config, blocks.rms_norm("model.embedding_norm", None)) + layers

    def _layer(self, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
        prefix, parts = "model.layers.{layer}", self.parts(c, layer)
        yield blocks.rms_norm(f"{prefix}.operator_norm", layer)
        yield blocks.rms_norm(f"{prefix}.ffn_norm", layer)
        if "conv" in parts:
            yield from blocks.short_convolution(f"{prefix}.conv", layer, kernel=c.conv_L_cache, bias=c.conv_bias)
        else:
            heads = {"kv_heads": c.num_key_value_heads, "head_dim": blocks.head_dim(c)}
            yield from blocks.attention(f"{prefix}.self_attn", layer, **heads, bias=False, out="out_proj")
            yield from blocks.head_norms(
                f"{prefix}.self_attn", layer, heads["head_dim"], ("q_layernorm", "k_layernorm")
            )
        yield from self._feed_forward(f"{prefix}.feed_forward", c, layer)

    def _feed_forward(self, prefix: str, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
        return blocks.gated_mlp(prefix, layer, "ffn", names=("w1", "w3", "w2"))

    def layer_fields(self, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
        there = [new for new, i in enumerate(kept) if "attention" in self.parts(config, i)]
        return super().layer_fields(config, kept) | {"full_attn_idxs": there}

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        if "conv" in self.parts(config, layer):
            return blocks.short_convolution_states(kernel=config.conv_L_cache)
        heads = {"kv_heads": config.num_key_value_heads, "head_dim": blocks.head_dim(config)}
        return blocks.attention_states(**heads, normed=True)

    def size(self, config: PreTrainedConfig, axis: Axis) -> int:
        size = super().size(config, axis)
        if axis.name == "ffn" and config.block_auto_adjust_ff_dim:  # as the stock MLP computes its width
            size = int(2 * size / 3)
            if config.block_ffn_dim_multiplier is not None:
                size = int(config.block_ffn_dim_multiplier * size)
                size = -(-size // config.block_multiple_of) * config.block_multiple_of
        return size

    def tied_fields(self, config: PreTrainedConfig, part: str, sizes: Sizes) -> dict[str, Any]:
        if part == "mlp":
            return {"block_auto_adjust_ff_dim": False}  # the field says the width
        return {"head_dim": blocks.head_dim(config)} if part == "attention" else {}
