"""Moonshot Kimi Linear: delta attention with decay per channel (KDA) or latent attention (MLA), then a dense MLP or experts with shared ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import KimiLinearForCausalLM, KimiLinearModel, PreTrainedConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDecoderLayer

from . import blocks
from .axes import Cut, Sizes, TensorRule, dim
from .base import Architecture, Axis, StateRule
from .blocks import HIDDEN, RESIDUAL, linear, rms_norm


class KimiLinear(Architecture):
    model_type = "kimi_linear"
    causal_class = KimiLinearForCausalLM
    base_class = KimiLinearModel
    layer_class = KimiLinearDecoderLayer
    layer_lists = ("layer_types", "mlp_layer_types")
    axes = (
        Axis("hidden", "hidden_size"),
        Axis("ffn", "intermediate_size", "mlp"),
        Axis("attention_heads", "num_attention_heads", "attention"),
        Axis("value_head_dim", "v_head_dim", "attention"),
        Axis("linear_heads", "linear_num_heads", "delta"),
        Axis("experts", "num_experts", "moe", groups="num_expert_group"),
        Axis("experts_per_token", "num_experts_per_token", "moe"),
        Axis("expert_ffn", "moe_intermediate_size", "moe"),
    )

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        mixer = "delta" if config.layer_types[layer] == "linear_attention" else "attention"
        return frozenset({mixer, "moe" if config.mlp_layer_types[layer] == "sparse" else "mlp"})

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        layers = [rule for i in range(self.depth(config)) for rule in self._layer(config.per_layer_config[i], i)]
        # Stock ties no head, whatever the config says. On disk MLPs are called after the experts (the Hub's dense ones as in the live model).
        rules = [replace(rule, tied=None) for rule in blocks.trunk(config, rms_norm("model.norm", None))]
        return rules + [_with_disk_name(rule) for rule in layers]

    def _layer(self, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
        prefix, parts = "model.layers.{layer}", self.parts(c, layer)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield rms_norm(f"{prefix}.{name}", layer)
        yield from (_delta if "delta" in parts else _attention)(f"{prefix}.self_attn", c, layer)
        if "mlp" in parts:
            yield from blocks.gated_mlp(f"{prefix}.mlp", layer, "ffn")
            return
        yield from blocks.experts(f"{prefix}.mlp", layer, names=("w1", "w3", "w2"), groups=c.n_group)
        experts = dim(c.n_group, Cut("experts", groups=c.n_group))
        yield TensorRule(f"{prefix}.mlp.gate.e_score_correction_bias", (experts,), layer, buffer=True)
        yield from blocks.gated_mlp(f"{prefix}.mlp.shared_experts", layer, "expert_ffn", times=c.n_shared_experts)

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        if "attention" in self.parts(
            config, layer
        ):  # the latent, which is normalised, and the part of the keys that heads share
            latent, shared = (dim(1), dim(config.kv_lora_rank)), (dim(1), dim(config.qk_rope_head_dim))
            return StateRule("keys", latent, degree=0.0), StateRule("values", shared, degree=0.5)
        inner = (Cut("linear_heads"), config.linear_head_dim)
        conv = (dim(q=inner, k=inner, v=inner), dim(config.linear_conv_kernel_dim))
        return StateRule("conv", conv, 0.5), StateRule("ssm", (dim(inner[0]), dim(inner[1]), dim(inner[1])), 0.5)

    def tied_fields(self, config: PreTrainedConfig, part: str, sizes: Sizes) -> dict[str, Any]:
        return {"num_key_value_heads": sizes["attention_heads"]} if part == "attention" else {}

    def check_layer(self, config: PreTrainedConfig, sizes: Sizes, where: str) -> None:
        if "experts" in sizes:
            blocks.check_router_groups(sizes, config.n_group, config.topk_group, where)

    def bias_router(self, router: Any, source: Any, bias: torch.Tensor, top_k: int) -> None:
        router.e_score_correction_bias = source.e_score_correction_bias + bias
        router.top_k = top_k


def _attention(prefix: str, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    heads, width, bias = Cut("attention_heads"), Cut("value_head_dim"), c.attention_bias
    query, latent = dim(heads, c.qk_nope_head_dim + c.qk_rope_head_dim), dim(c.kv_lora_rank)
    if c.q_lora_rank is None:
        yield from linear(f"{prefix}.q_proj", layer, query, HIDDEN)
    else:
        rank = dim(c.q_lora_rank)
        yield from linear(f"{prefix}.q_a_proj", layer, rank, HIDDEN, bias=bias)
        yield TensorRule(f"{prefix}.q_a_layernorm.weight", (rank,), layer)
        yield from linear(f"{prefix}.q_b_proj", layer, query, rank)
    joint = dim(latent=(c.kv_lora_rank,), shared=(c.qk_rope_head_dim,))
    yield from linear(f"{prefix}.kv_a_proj_with_mqa", layer, joint, HIDDEN, bias=bias)
    yield TensorRule(f"{prefix}.kv_a_layernorm.weight", (latent,), layer)
    yield from linear(f"{prefix}.kv_b_proj", layer, dim(heads, dim(key=(c.qk_nope_head_dim,), value=(width,))), latent)
    inner = dim(Cut("attention_heads", gated=True), Cut("value_head_dim", gated=True))
    yield from linear(f"{prefix}.o_proj", layer, RESIDUAL, inner, bias=bias)


def _delta(prefix: str, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    heads, width = Cut("linear_heads"), dim(c.linear_head_dim)
    inner, per_head = (heads, c.linear_head_dim), dim(heads)
    for name, out, inp in (
        *((f"{kind}_proj", dim(*inner), HIDDEN) for kind in "qkv"),
        *(
            pair
            for low in ("forget_gate.f", "g")
            for pair in ((f"{low}_a_proj", width, HIDDEN), (f"{low}_b_proj", dim(*inner), width))
        ),
        ("b_proj", per_head, HIDDEN),
        ("o_proj", RESIDUAL, dim(Cut("linear_heads", gated=True), c.linear_head_dim)),
    ):
        yield from linear(f"{prefix}.{name}", layer, out, inp)
    conv, disk = dim(q_conv1d=inner, k_conv1d=inner, v_conv1d=inner), f"{prefix}.{{segment}}.weight"
    yield TensorRule(f"{prefix}.conv1d.weight", (conv, dim(1), dim(c.linear_conv_kernel_dim)), layer, disk=disk)
    yield TensorRule(f"{prefix}.forget_gate.dt_bias", (dim(*inner),), layer)
    yield TensorRule(f"{prefix}.forget_gate.A_log", (dim(1), dim(1), per_head, dim(1)), layer)
    yield TensorRule(f"{prefix}.o_norm.weight", (width,), layer)


def _with_disk_name(rule: TensorRule) -> TensorRule:
    name = (rule.disk or rule.template).replace(".mlp.", ".block_sparse_moe.").replace(".forget_gate.", ".")
    return replace(rule, disk=name)
