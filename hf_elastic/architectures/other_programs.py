"""What other programs read of an export: fields that are written as they know them, and sizes that they do not run.

Tried as `obstacles.py` says. Tables give these on as `Architecture.export_fields` and `Architecture.obstacles`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedConfig

from .obstacles import REFUSES, SILENT, Obstacle
from .submodel import Submodel

_LEGACY_LAYER_TYPES = {"linear_attention": "mamba", "full_attention": "attention"}
"""What kinds of layers were called before transformers 5, which reads these names as well; many other programs read only these."""

_NEMOTRON_MOE_FIELDS = (
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


def legacy_kinds(kinds: Sequence[str]) -> list[str]:
    """Kinds of layers by the names that they had before transformers 5."""
    return [_LEGACY_LAYER_TYPES.get(kind, kind) for kind in kinds]


def nemotron_h_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Some read the list of layers, some the pattern; llama.cpp takes what says `num_experts_per_tok` for a mixture of experts. SGLang and
    TensorRT-LLM read `mamba_n_groups`. No slice has the multi-token-prediction block.
    """
    kinds = config.layers_block_type
    return {
        "layers_block_type": legacy_kinds(kinds),
        "hybrid_override_pattern": config.hybrid_override_pattern,
        "num_hidden_layers": len(kinds),
        "mamba_n_groups": config.n_groups,
        "mtp_layers_block_type": None,
        **(dict.fromkeys(_NEMOTRON_MOE_FIELDS) if "moe" not in kinds else {}),
        **({"moe_latent_size": None} if config.moe_latent_size is None else {}),
    }


def nemotron_h_obstacles(submodel: Submodel, parts: frozenset[str]) -> Iterator[Obstacle]:
    """`parts`: what the kept layers have."""
    if "mamba" in parts:
        inner = max(submodel.values("mamba_heads")) * max(submodel.values("mamba_head_dim"))
        if inner % 64:
            yield Obstacle("llama.cpp", REFUSES, f"mamba_heads * mamba_head_dim = {inner} is no multiple of 64")
    if {"mlp", "moe"} <= parts:
        yield Obstacle("llama.cpp", REFUSES, "MLP and MoE layers are in one model, and it knows one kind of them")


def granite_fields(config: PreTrainedConfig, parts: frozenset[str]) -> dict[str, Any]:
    """The stock class takes a missing number of experts for 8. llama.cpp reads the width of a dense MLP from `intermediate_size`."""
    fields: dict[str, Any] = {
        "layer_types": legacy_kinds(config.layer_types),
        "position_embedding_type": config.position_embedding_type or "nope",
    }
    if "moe" in parts:
        return fields
    fields |= {"num_local_experts": 0, "num_experts_per_tok": 0}
    if "shared_intermediate_size" not in (config.per_layer_attributes or ()):
        fields["intermediate_size"] = config.shared_intermediate_size
    return fields


def granite_obstacles(config: PreTrainedConfig, submodel: Submodel, head_dim: int) -> Iterator[Obstacle]:
    """Others take hidden / heads for the width of a head, 2 * hidden for Mamba's inner width, and positions from whether there is Mamba."""
    yield from _computed_widths(submodel, head_dim, ("llama.cpp", "SGLang", "mistral.rs"))
    rope = config.position_embedding_type == "rope"
    if "mamba_heads" in submodel and submodel.size("mamba_heads") is not None:
        if rope:
            yield Obstacle("llama.cpp", SILENT, "it leaves out rotary positions where there are Mamba layers")
    else:
        if not rope:
            yield Obstacle("llama.cpp", SILENT, "it adds rotary positions where no layer has Mamba")
        yield Obstacle("mistral.rs", REFUSES, "no layer has Mamba")


def bamba_obstacles(submodel: Submodel, head_dim: int) -> Iterator[Obstacle]:
    """As Granite's, whose code vLLM, SGLang and llama.cpp share with it. Read there, not run."""
    for obstacle in _computed_widths(submodel, head_dim, ("llama.cpp", "SGLang")):
        yield obstacle._replace(why=f"{obstacle.why} (its code was read)")


def computed_head_width(hidden: int, heads: int, head_dim: int) -> Iterator[Obstacle]:
    """vLLM takes the first rows of query, key and value heads that are wider than it thinks."""
    if heads * head_dim != hidden:
        why = f"it takes hidden / attention_heads = {hidden} / {heads} for the width of a head, which is {head_dim}"
        yield Obstacle("vLLM", SILENT if heads * head_dim > hidden else REFUSES, why)


def kimi_linear_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The Hub's own words for kinds of layers, counted from 1, for KDA's sizes, and for how many dense layers come first."""
    kinds, dense = config.layer_types, [kind == "dense" for kind in config.mlp_layer_types]
    said = {"full_attn_layers": "full_attention", "kda_layers": "linear_attention"}
    return {
        "linear_attn_config": {
            "head_dim": config.linear_head_dim,
            "num_heads": config.linear_num_heads,
            "short_conv_kernel_size": config.linear_conv_kernel_dim,
            **{name: [i for i, kind in enumerate(kinds, start=1) if kind == wanted] for name, wanted in said.items()},
        },
        "first_k_dense_replace": sum(dense) if dense == sorted(dense, reverse=True) else None,
    }


def _computed_widths(submodel: Submodel, head_dim: int, refusing: Sequence[str]) -> Iterator[Obstacle]:
    """Widths that others compute from `hidden`: vLLM and `refusing` that of an attention head, llama.cpp Mamba's inner width."""
    sizes = {axis: size for axis in submodel if (size := submodel.size(axis)) is not None}
    hidden = sizes["hidden"]
    if (heads := sizes.get("attention_heads")) is not None:
        for obstacle in computed_head_width(hidden, heads, head_dim):
            yield obstacle
            yield from (obstacle._replace(program=program, does=REFUSES) for program in refusing)
    if "mamba_heads" in sizes and (inner := sizes["mamba_heads"] * sizes["mamba_head_dim"]) != 2 * hidden:
        why = f"mamba_heads * mamba_head_dim = {inner} is not 2 * hidden = {2 * hidden}"
        yield Obstacle("llama.cpp", REFUSES, why)


def zamba2_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Whoever reads these takes them for what follows from other sizes, unless they are said."""
    said = ("attention_head_dim", "attention_hidden_size", "mamba_headdim", "hybrid_layer_ids")
    kinds = {"layers_block_type": legacy_kinds(config.layers_block_type)}
    return kinds | {name: getattr(config, name) for name in said}


def zamba2_obstacles(config: PreTrainedConfig, submodel: Submodel) -> Iterator[Obstacle]:
    """vLLM has as many keys as queries, and checks that these are together as wide as their input; its code was only read."""
    hidden, heads, width = submodel.size("hidden"), submodel.size("kv_heads"), config.attention_head_dim
    if config.num_key_value_heads != config.num_attention_heads:
        yield Obstacle("vLLM", REFUSES, "it has as many keys as queries")
    elif hidden is not None and heads is not None and heads * width != 2 * hidden:
        yield Obstacle(
            "vLLM", REFUSES, f"{heads} heads of {width} are not as wide as their input, 2 * hidden = {2 * hidden}"
        )
