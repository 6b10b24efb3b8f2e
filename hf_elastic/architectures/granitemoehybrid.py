"""IBM Granite 4 hybrids: every layer has a mixer (Mamba-2 or attention), routed experts with fused gate/up, and a shared MLP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import GraniteMoeHybridForCausalLM, GraniteMoeHybridModel, PreTrainedConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridDecoderLayer

from . import blocks, other_programs
from .axes import Cut, Sizes, TensorRule, dim
from .base import Architecture, Axis, StateRule
from .obstacles import Obstacle
from .submodel import Submodel


class GraniteMoeHybrid(Architecture):
    model_type = "granitemoehybrid"
    causal_class = GraniteMoeHybridForCausalLM
    base_class = GraniteMoeHybridModel
    layer_class = GraniteMoeHybridDecoderLayer
    layer_lists = ("layer_types",)
    one_share = ("hidden", "attention_heads", "mamba_heads")
    axes = (
        Axis("hidden", "hidden_size"),
        Axis("attention_heads", "num_attention_heads", "attention", groups="num_key_value_heads"),
        Axis("mamba_heads", "mamba_n_heads", "mamba", groups="mamba_n_groups", channels="mamba_head_dim"),
        Axis("mamba_head_dim", "mamba_d_head", "mamba"),
        Axis("experts", "num_local_experts", "moe"),
        Axis("experts_per_token", "num_experts_per_tok", "moe", among="experts"),
        Axis("expert_ffn", "intermediate_size", "moe"),
        Axis("shared_expert_ffn", "shared_intermediate_size", "shared"),
    )

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        mixer = "mamba" if config.layer_types[layer] == "linear_attention" else "attention"
        moe = {"moe"} if config.per_layer_config[layer].num_local_experts else set()
        return frozenset({mixer, "shared"} | moe)

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        layers = [rule for i in range(self.depth(config)) for rule in self._layer(config.per_layer_config[i], i)]
        return blocks.trunk(config, blocks.rms_norm("model.norm", None)) + layers

    def _layer(self, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
        prefix, parts = "model.layers.{layer}", self.parts(c, layer)
        yield blocks.rms_norm(f"{prefix}.input_layernorm", layer)
        yield blocks.rms_norm(f"{prefix}.post_attention_layernorm", layer)
        if "mamba" in parts:
            biases = {"conv_bias": c.mamba_conv_bias, "proj_bias": c.mamba_proj_bias}
            yield from blocks.mamba2(f"{prefix}.mamba", layer, **blocks.mamba2_sizes(c), **biases)
        else:
            heads = {"kv_heads": c.num_key_value_heads, "head_dim": blocks.head_dim(c)}
            yield from blocks.attention(f"{prefix}.self_attn", layer, **heads, bias=c.attention_bias)
        if "moe" in parts:
            yield from _moe(f"{prefix}.block_sparse_moe", layer)
        names = ("input_linear", "output_linear")
        yield from blocks.fused_mlp(f"{prefix}.shared_mlp", layer, "shared_expert_ffn", names=names)

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

    def export_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        return other_programs.granite_fields(config, self.parts_of(config, range(self.depth(config))))

    def obstacles(self, config: PreTrainedConfig, submodel: Submodel) -> Iterator[Obstacle]:
        attention = [layer for layer in submodel.layers if "attention" in self.parts(config, layer)]
        head_dim = blocks.head_dim(config.per_layer_config[(attention or submodel.layers)[0]])
        return other_programs.granite_obstacles(config, submodel, head_dim)

    def bias_router(self, router: Any, source: Any, bias: torch.Tensor, top_k: int) -> None:
        def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = nn.functional.linear(hidden_states, router.weight).float() + bias
            top_logits, index = logits.topk(top_k, dim=-1)
            return logits, torch.softmax(top_logits, dim=-1).type_as(hidden_states), index

        router.forward = forward


def _moe(prefix: str, layer: int) -> Iterator[TensorRule]:
    experts, ffn = dim(Cut("experts")), (Cut("expert_ffn", within="experts"),)
    dims = (experts, dim(gate=ffn, up=ffn), blocks.HIDDEN)
    facts: dict[str, Any] = {"routed": True, "kind": "experts"}
    disk, coded = f"{prefix}.input_linear.weight", f"{prefix}.experts.{{expert}}"
    gates = f"{coded}.{{segment}}_proj.weight"
    yield TensorRule(f"{prefix}.experts.gate_up_proj", dims, layer, disk=disk, coded=gates, **facts)
    out = (dim(Cut("experts", gated=True)), blocks.RESIDUAL, dim(Cut("expert_ffn", within="experts", gated=True)))
    disk = f"{prefix}.output_linear.weight"
    yield TensorRule(f"{prefix}.experts.down_proj", out, layer, disk=disk, coded=f"{coded}.down_proj.weight", **facts)
    disk = f"{prefix}.router.layer.weight"
    yield TensorRule(f"{prefix}.router.weight", (experts, blocks.HIDDEN), layer, disk=disk, routes=True)
