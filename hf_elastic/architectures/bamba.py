"""IBM Bamba: every layer has a mixer (Mamba-2 or attention) and a gated MLP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import BambaForCausalLM, BambaModel, PreTrainedConfig
from transformers.models.bamba.modeling_bamba import BambaDecoderLayer

from . import blocks, other_programs
from .axes import Sizes, TensorRule
from .base import Architecture, Axis, StateRule
from .obstacles import Obstacle
from .submodel import Submodel


class Bamba(Architecture):
    model_type = "bamba"
    causal_class = BambaForCausalLM
    base_class = BambaModel
    layer_outputs = 2
    one_share = ("hidden", "attention_heads", "mamba_heads")
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
        layers = [rule for i in range(self.depth(config)) for rule in self._layer(config.per_layer_config[i], i)]
        return blocks.trunk(config, blocks.rms_norm("model.final_layernorm", None)) + layers

    def _layer(self, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
        prefix = "model.layers.{layer}"
        yield blocks.rms_norm(f"{prefix}.input_layernorm", layer)
        yield blocks.rms_norm(f"{prefix}.pre_ff_layernorm", layer)
        if "mamba" in self.parts(c, layer):
            biases = {"conv_bias": c.mamba_conv_bias, "proj_bias": c.mamba_proj_bias}
            yield from blocks.mamba2(f"{prefix}.mamba", layer, **blocks.mamba2_sizes(c), **biases)
        else:
            heads = {"kv_heads": c.num_key_value_heads, "head_dim": blocks.head_dim(c)}
            yield from blocks.attention(f"{prefix}.self_attn", layer, **heads, bias=c.attention_bias)
        yield from blocks.gated_mlp(f"{prefix}.feed_forward", layer, "ffn", bias=c.mlp_bias)

    def layer_fields(self, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
        attention = [new for new, i in enumerate(kept) if "attention" in self.parts(config, i)]
        return {"attn_layer_indices": attention, "num_hidden_layers": len(kept)}

    def build_layer(self, config: PreTrainedConfig, layer: int) -> nn.Module:
        return BambaDecoderLayer(config, layer, config.layers_block_type[layer])

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        if "mamba" in self.parts(config, layer):
            return blocks.mamba2_states(**blocks.mamba2_sizes(config))
        return blocks.attention_states(kv_heads=config.num_key_value_heads, head_dim=blocks.head_dim(config))

    def tied_fields(self, config: PreTrainedConfig, part: str, sizes: Sizes) -> dict[str, Any]:
        # The stock classes take attention's head_dim from hidden_size, and Mamba's inner width as mamba_expand * hidden_size.
        if part == "mamba":
            return {"mamba_expand": blocks.mamba_expand(sizes)}
        return {"head_dim": blocks.head_dim(config)} if part == "attention" else {}

    def unused_fields(self, config: PreTrainedConfig, parts: frozenset[str], sizes: Sizes) -> dict[str, Any]:
        return {} if "mamba" in parts else blocks.idle_mamba(config, sizes["hidden"])

    def obstacles(self, config: PreTrainedConfig, submodel: Submodel) -> Iterator[Obstacle]:
        attention = [layer for layer in submodel.layers if "attention" in self.parts(config, layer)]
        head_dim = blocks.head_dim(config.per_layer_config[(attention or submodel.layers)[0]])
        return other_programs.bamba_obstacles(submodel, head_dim)
