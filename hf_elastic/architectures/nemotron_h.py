"""NVIDIA Nemotron-H, Nemotron Nano v2 (dense MLP) and v3 (MoE): one mixer per layer, chosen by the pattern."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import NemotronHForCausalLM, NemotronHModel, PreTrainedConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHBlock

from . import blocks, other_programs
from .axes import Cut, Sizes, TensorRule, dim
from .base import Architecture, Axis, StateRule
from .obstacles import Obstacle
from .submodel import Submodel

_PARTS = {"linear_attention": "mamba", "full_attention": "attention", "moe": "moe", "mlp": "mlp"}


class NemotronH(Architecture):
    model_type = "nemotron_h"
    causal_class = NemotronHForCausalLM
    base_class = NemotronHModel
    layer_class = NemotronHBlock
    disk_prefix = "backbone."
    old_names = {"embeddings.weight": "embedding.weight"}
    axes = (
        Axis("hidden", "hidden_size"),
        Axis("ffn", "intermediate_size", "mlp"),
        Axis("attention_heads", "num_attention_heads", "attention", groups="num_key_value_heads"),
        Axis("mamba_heads", "mamba_num_heads", "mamba", groups="n_groups", channels="mamba_head_dim"),
        Axis("mamba_head_dim", "mamba_head_dim", "mamba"),
        Axis("experts", "n_routed_experts", "moe", groups="n_group"),
        Axis("experts_per_token", "num_experts_per_tok", "moe", among="experts"),
        Axis("expert_ffn", "moe_intermediate_size", "moe"),
        Axis("shared_expert_ffn", "moe_shared_expert_intermediate_size", "moe"),
    )

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        return frozenset({_PARTS[config.layers_block_type[layer]]})

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        rules = blocks.trunk(config, blocks.rms_norm("model.norm_f", None), "model.embeddings")
        for layer in range(self.depth(config)):
            rules.append(blocks.rms_norm("model.layers.{layer}.norm", layer))
            mixer = _MIXERS[config.layers_block_type[layer]]
            rules += mixer("model.layers.{layer}.mixer", config.per_layer_config[layer], layer)
        # The Hub repository calls the base model `backbone`.
        return [replace(rule, disk=(rule.disk or rule.template).replace("model.", "backbone.", 1)) for rule in rules]

    def layer_fields(self, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
        # The stock class does not load the multi-token-prediction block, so no slice can carry it.
        return {"layers_block_type": [config.layers_block_type[i] for i in kept], "num_nextn_predict_layers": 0}

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        if (part := _PARTS[config.layers_block_type[layer]]) == "mamba":
            return blocks.mamba2_states(**_mamba_sizes(config))
        heads = {"kv_heads": config.num_key_value_heads, "head_dim": config.head_dim}
        return blocks.attention_states(**heads) if part == "attention" else ()

    def check_layer(self, config: PreTrainedConfig, sizes: Sizes, where: str) -> None:
        # The stock config takes these, and its router fails at the first token.
        if "experts" in sizes:
            blocks.check_router_groups(sizes, config.n_group, config.topk_group, where)

    def export_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        return other_programs.nemotron_h_fields(config)

    def obstacles(self, config: PreTrainedConfig, submodel: Submodel) -> Iterator[Obstacle]:
        return other_programs.nemotron_h_obstacles(submodel, self.parts_of(config, submodel.layers))

    def bias_router(self, router: Any, source: Any, bias: torch.Tensor, top_k: int) -> None:
        router.e_score_correction_bias = source.e_score_correction_bias + bias
        router.top_k = top_k


def _mamba_sizes(c: PreTrainedConfig) -> dict[str, Any]:
    return {"groups": c.n_groups, "state": c.ssm_state_size, "kernel": c.conv_kernel}


def _mamba(prefix: str, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    return blocks.mamba2(prefix, layer, **_mamba_sizes(c), conv_bias=c.use_conv_bias, proj_bias=c.use_bias)


def _attention(prefix: str, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    return blocks.attention(prefix, layer, kv_heads=c.num_key_value_heads, head_dim=c.head_dim, bias=False)


def _mlp(prefix: str, c: PreTrainedConfig, layer: int, axis: str = "ffn") -> Iterator[TensorRule]:
    return blocks.gateless_mlp(prefix, layer, axis, bias=c.mlp_bias)


def _moe(prefix: str, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    experts = dim(c.n_group, Cut("experts", groups=c.n_group))
    ffn, ffn_out = (dim(Cut("expert_ffn", within="experts", gated=gated)) for gated in (False, True))
    experts_out = dim(c.n_group, Cut("experts", groups=c.n_group, gated=True))
    latent = None if c.moe_latent_size is None else dim(c.moe_latent_size)
    token, token_out = latent or blocks.HIDDEN, latent or blocks.RESIDUAL
    for name, dims in (("up_proj", (experts, ffn, token)), ("down_proj", (experts_out, token_out, ffn_out))):
        disk = f"{prefix}.experts.{{expert}}.{name}.weight"
        yield TensorRule(f"{prefix}.experts.{name}", dims, layer, disk=disk, routed=True, kind="experts")
    yield TensorRule(f"{prefix}.gate.weight", (experts, blocks.HIDDEN), layer, routes=True)
    yield TensorRule(f"{prefix}.gate.e_score_correction_bias", (experts,), layer, buffer=True, fp32=True)
    yield from _mlp(f"{prefix}.shared_experts", c, layer, "shared_expert_ffn")
    if latent is not None:
        yield from blocks.linear(f"{prefix}.fc1_latent_proj", layer, latent, blocks.HIDDEN, bias=c.mlp_bias)
        yield from blocks.linear(f"{prefix}.fc2_latent_proj", layer, blocks.RESIDUAL, latent, bias=c.mlp_bias)


_MIXERS = {"linear_attention": _mamba, "full_attention": _attention, "mlp": _mlp, "moe": _moe}
