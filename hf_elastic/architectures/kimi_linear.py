"""Moonshot Kimi Linear: delta attention with decay per channel (KDA) or latent attention (MLA), then a dense MLP or experts with shared ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import KimiLinearForCausalLM, KimiLinearModel, PreTrainedConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDecoderLayer

from . import blocks, other_programs
from .axes import Cut, Sizes, TensorRule, dim
from .base import Architecture, Axis, StateRule
from .latent_attention import latent_attention, latent_states


class KimiLinear(Architecture):
    model_type = "kimi_linear"
    causal_class = KimiLinearForCausalLM
    base_class = KimiLinearModel
    layer_class = KimiLinearDecoderLayer
    layer_lists = ("layer_types", "mlp_layer_types")
    axes = (
        Axis("hidden", "hidden_size"),
        Axis("ffn", "intermediate_size", "mlp"),
        Axis("attention_heads", "num_attention_heads", "attention", channels="value_head_dim", counts=True),
        Axis("value_head_dim", "v_head_dim", "attention"),
        Axis("linear_heads", "linear_num_heads", "delta", counts=True),
        Axis("experts", "num_experts", "moe", groups="num_expert_group"),
        Axis("experts_per_token", "num_experts_per_token", "moe", among="experts"),
        Axis("expert_ffn", "moe_intermediate_size", "moe"),
    )

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        mixer = "delta" if config.layer_types[layer] == "linear_attention" else "attention"
        return frozenset({mixer, "moe" if config.mlp_layer_types[layer] == "sparse" else "mlp"})

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        layers = [rule for i in range(self.depth(config)) for rule in self._layer(config.per_layer_config[i], i)]
        # Stock ties no head, whatever the config says. On disk MLPs are called after the experts (the Hub's dense ones as in the live model).
        rules = [replace(rule, tied=None) for rule in blocks.trunk(config, blocks.rms_norm("model.norm", None))]
        return rules + [_with_disk_name(rule) for rule in layers]

    def _layer(self, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
        prefix, parts = "model.layers.{layer}", self.parts(c, layer)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield blocks.rms_norm(f"{prefix}.{name}", layer)
        yield from (_delta if "delta" in parts else latent_attention)(f"{prefix}.self_attn", c, layer)
        if "mlp" in parts:
            yield from blocks.gated_mlp(f"{prefix}.mlp", layer, "ffn")
            return
        yield from blocks.experts(f"{prefix}.mlp", layer, names=("w1", "w3", "w2"), groups=c.n_group)
        experts = dim(c.n_group, Cut("experts", groups=c.n_group))
        yield TensorRule(f"{prefix}.mlp.gate.e_score_correction_bias", (experts,), layer, buffer=True)
        shared = {"times": c.n_shared_experts, "order": "shared_expert_ffn"}
        yield from blocks.gated_mlp(f"{prefix}.mlp.shared_experts", layer, "expert_ffn", **shared)

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        if "attention" in self.parts(config, layer):
            return latent_states(config)
        inner = (Cut("linear_heads"), config.linear_head_dim)
        conv = (dim(q=inner, k=inner, v=inner), dim(config.linear_conv_kernel_dim))
        return StateRule("conv", conv, 0.5), StateRule("ssm", (dim(inner[0]), dim(inner[1]), dim(inner[1])), 0.6)

    def tied_fields(self, config: PreTrainedConfig, part: str, sizes: Sizes) -> dict[str, Any]:
        return {"num_key_value_heads": sizes["attention_heads"]} if part == "attention" else {}

    def layer_fields(self, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
        # The Hub's config says sizes and kinds of layers in a dict of its own, which would win over the fields.
        own: dict[str, Any] = {"linear_attn_config": {}} if hasattr(config, "linear_attn_config") else {}
        return super().layer_fields(config, kept) | own

    def export_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        return other_programs.kimi_linear_fields(config)

    def check_layer(self, config: PreTrainedConfig, sizes: Sizes, where: str) -> None:
        if "experts" in sizes:
            blocks.check_router_groups(sizes, config.n_group, config.topk_group, where)

    def bias_router(self, router: Any, source: Any, bias: torch.Tensor, top_k: int) -> None:
        router.e_score_correction_bias = source.e_score_correction_bias + bias
        router.top_k = top_k


def _delta(prefix: str, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    heads, width, hidden = Cut("linear_heads"), dim(c.linear_head_dim), blocks.HIDDEN
    inner, per_head = (heads, c.linear_head_dim), dim(heads)
    outs = {**dict.fromkeys(("q_proj", "k_proj", "v_proj"), dim(*inner)), "b_proj": per_head}
    for name, out in outs.items():
        facts: dict[str, Any] = {} if name == "b_proj" else {"kind": "linear_attention", "fused": "qkv_proj"}
        yield from blocks.linear(f"{prefix}.{name}", layer, out, hidden, **facts)
    for gate in ("forget_gate.f", "g"):  # by way of a vector as wide as one head
        yield from blocks.linear(f"{prefix}.{gate}_a_proj", layer, width, hidden)
        yield from blocks.linear(f"{prefix}.{gate}_b_proj", layer, dim(*inner), width)
    conv, disk = dim(q_conv1d=inner, k_conv1d=inner, v_conv1d=inner), f"{prefix}.{{segment}}.weight"
    yield blocks.convolution(f"{prefix}.conv1d", layer, conv, c.linear_conv_kernel_dim, disk)
    yield TensorRule(f"{prefix}.forget_gate.dt_bias", (dim(*inner),), layer)
    yield TensorRule(f"{prefix}.forget_gate.A_log", (dim(1), dim(1), per_head, dim(1)), layer)
    yield TensorRule(f"{prefix}.o_norm.weight", (width,), layer)
    gated = dim(Cut("linear_heads", gated=True), c.linear_head_dim)
    yield from blocks.linear(f"{prefix}.o_proj", layer, blocks.RESIDUAL, gated, kind="linear_attention")


def _with_disk_name(rule: TensorRule) -> TensorRule:
    name = (rule.disk or rule.template).replace(".mlp.", ".block_sparse_moe.").replace(".forget_gate.", ".")
    return replace(rule, disk=name)
