"""NVIDIA Nemotron-H, Nemotron Nano v2 (dense MLP) and v3 (MoE): one mixer per layer, chosen by the pattern."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import NemotronHForCausalLM, NemotronHModel, PreTrainedConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHBlock

from ..errors import ElasticConfigError
from .axes import Cut, Sizes, TensorRule, dim
from .base import LEGACY_LAYER_TYPES, Architecture, Axis, StateRule
from .blocks import HIDDEN, RESIDUAL, attention, attention_states, linear, mamba2, mamba2_states, rms_norm
from .obstacles import REFUSES, Obstacle
from .submodel import Submodel

_PARTS = {"linear_attention": "mamba", "full_attention": "attention", "moe": "moe", "mlp": "mlp"}
_MOE_FIELDS = (
    "moe_intermediate_size",
    "moe_latent_size",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_overlap",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_experts_per_tok",
    "output_router_logits",
    "routed_scaling_factor",
    "topk_group",
)


class NemotronH(Architecture):
    model_type = "nemotron_h"
    causal_class = NemotronHForCausalLM
    base_class = NemotronHModel
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
        vocab = dim(config.vocab_size)
        rules = [TensorRule("model.embeddings.weight", (vocab, RESIDUAL))]
        for layer in range(self.depth(config)):
            layer_config = config.per_layer_config[layer]
            rules.append(rms_norm("model.layers.{layer}.norm", layer))
            rules.extend(_MIXERS[config.layers_block_type[layer]](layer_config, layer))
        rules += [rms_norm("model.norm_f", None), TensorRule("lm_head.weight", (vocab, HIDDEN))]
        return [_with_disk_name(rule) for rule in rules]

    def layer_fields(self, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
        # The stock class does not load the multi-token-prediction block, so no slice can carry it.
        return {"layers_block_type": [config.layers_block_type[i] for i in kept], "num_nextn_predict_layers": 0}

    def export_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        # Some read the list, some the pattern; llama.cpp takes what says `num_experts_per_tok` for a mixture of experts. SGLang and TensorRT-LLM
        # read `mamba_n_groups`. No slice has the multi-token-prediction block.
        kinds = config.layers_block_type
        return {
            "layers_block_type": [LEGACY_LAYER_TYPES.get(kind, kind) for kind in kinds],
            "hybrid_override_pattern": config.hybrid_override_pattern,
            "num_hidden_layers": len(kinds),
            "mamba_n_groups": config.n_groups,
            "mtp_layers_block_type": None,
            **(dict.fromkeys(_MOE_FIELDS) if "moe" not in kinds else {}),
            **({"moe_latent_size": None} if config.moe_latent_size is None else {}),
        }

    def build_layer(self, config: PreTrainedConfig, layer: int) -> nn.Module:
        return NemotronHBlock(config, layer)

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        part = _PARTS[config.layers_block_type[layer]]
        if part == "mamba":
            return mamba2_states(groups=config.n_groups, state=config.ssm_state_size, kernel=config.conv_kernel)
        if part == "attention":
            return attention_states(kv_heads=config.num_key_value_heads, head_dim=config.head_dim)
        return ()

    def check_layer(self, config: PreTrainedConfig, sizes: Sizes, where: str) -> None:
        if "experts" not in sizes:
            return
        per_group = sizes["experts"] // config.n_group
        if per_group < 2:
            raise ElasticConfigError(
                f"{where}: experts={sizes['experts']} leaves {per_group} expert in each of {config.n_group} router groups; the "
                f"router adds the two best of a group, so keep at least {2 * config.n_group}."
            )
        if sizes["experts_per_token"] > config.topk_group * per_group:
            raise ElasticConfigError(
                f"{where}: experts_per_token={sizes['experts_per_token']} is more than the {config.topk_group * per_group} experts "
                f"in the {config.topk_group} router groups a token may use; lower it or keep more experts."
            )

    def obstacles(self, config: PreTrainedConfig, submodel: Submodel) -> Iterator[Obstacle]:
        kinds = {part for layer in submodel.layers for part in self.parts(config, layer)}
        if "mamba" in kinds:
            inner = max(submodel.values("mamba_heads")) * max(submodel.values("mamba_head_dim"))
            if inner % 64:
                yield Obstacle("llama.cpp", REFUSES, f"mamba_heads * mamba_head_dim = {inner} is no multiple of 64")
        if {"mlp", "moe"} <= kinds:
            yield Obstacle("llama.cpp", REFUSES, "MLP and MoE layers are in one model, and it knows one kind of them")

    def bias_router(self, router: Any, source: Any, bias: torch.Tensor, top_k: int) -> None:
        router.e_score_correction_bias = source.e_score_correction_bias + bias
        router.top_k = top_k


def _mamba(c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    return mamba2(
        "model.layers.{layer}.mixer",
        layer,
        groups=c.n_groups,
        state=c.ssm_state_size,
        kernel=c.conv_kernel,
        conv_bias=c.use_conv_bias,
        proj_bias=c.use_bias,
    )


def _attention(c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    return attention(
        "model.layers.{layer}.mixer", layer, kv_heads=c.num_key_value_heads, head_dim=c.head_dim, bias=False
    )


def _mlp(
    c: PreTrainedConfig, layer: int, prefix: str = "model.layers.{layer}.mixer", axis: str = "ffn"
) -> Iterator[TensorRule]:
    yield from linear(f"{prefix}.up_proj", layer, dim(Cut(axis)), HIDDEN, bias=c.mlp_bias)
    yield from linear(f"{prefix}.down_proj", layer, RESIDUAL, dim(Cut(axis, gated=True)), bias=c.mlp_bias)


def _moe(c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    prefix = "model.layers.{layer}.mixer"
    experts = dim(c.n_group, Cut("experts", groups=c.n_group))
    ffn, ffn_out = (dim(Cut("expert_ffn", within="experts", gated=gated)) for gated in (False, True))
    experts_out = dim(c.n_group, Cut("experts", groups=c.n_group, gated=True))
    latent = None if c.moe_latent_size is None else dim(c.moe_latent_size)
    token, token_out = latent or HIDDEN, latent or RESIDUAL
    for name, dims in (("up_proj", (experts, ffn, token)), ("down_proj", (experts_out, token_out, ffn_out))):
        disk = f"{prefix}.experts.{{expert}}.{name}.weight"
        yield TensorRule(f"{prefix}.experts.{name}", dims, layer, disk=disk, routed=True)
    yield TensorRule(f"{prefix}.gate.weight", (experts, HIDDEN), layer, routes=True)
    yield TensorRule(f"{prefix}.gate.e_score_correction_bias", (experts,), layer, buffer=True, fp32=True)
    yield from _mlp(c, layer, f"{prefix}.shared_experts", "shared_expert_ffn")
    if latent is not None:
        yield from linear(f"{prefix}.fc1_latent_proj", layer, latent, HIDDEN, bias=c.mlp_bias)
        yield from linear(f"{prefix}.fc2_latent_proj", layer, RESIDUAL, latent, bias=c.mlp_bias)


_MIXERS = {"linear_attention": _mamba, "full_attention": _attention, "mlp": _mlp, "moe": _moe}


def _with_disk_name(rule: TensorRule) -> TensorRule:
    """The Hub repository calls the base model `backbone`."""
    name = rule.disk or rule.template
    return replace(rule, disk="backbone." + name.removeprefix("model.") if name.startswith("model.") else name)
