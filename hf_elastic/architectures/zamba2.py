"""Zyphra Zamba2: Mamba-2 in every layer, and in some of them attention and an MLP that these layers share, with an adapter for each use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, Zamba2ForCausalLM, Zamba2Model
from transformers.models.zamba2.modeling_zamba2 import (
    Zamba2AttentionDecoderLayer,
    Zamba2HybridLayer,
    Zamba2MambaDecoderLayer,
)

from ..errors import ElasticConfigError
from .axes import Cut, Sizes, TensorRule, dim
from .base import Axis, StateRule
from .blocks import (
    BESIDE_EMBEDDINGS,
    HIDDEN,
    RESIDUAL,
    attention_states,
    fused_mlp,
    kv_heads_attention,
    kv_heads_dims,
    linear,
    low_rank,
    mamba2,
    mamba2_states,
    mamba_expand,
    rms_norm,
    trunk,
)
from .obstacles import Obstacle
from .other_programs import zamba2_fields, zamba2_obstacles
from .sharing import SharedInTurn
from .submodel import Submodel


class Zamba2(SharedInTurn):
    model_type = "zamba2"
    causal_class = Zamba2ForCausalLM
    base_class = Zamba2Model
    layer_lists = ("layers_block_type",)
    index_argument = 2
    one_share = ("hidden", "kv_heads")
    axes = (
        Axis("hidden", "hidden_size"),
        Axis("ffn", "intermediate_size", "attention", shared=True),
        Axis("kv_heads", "num_key_value_heads", "attention", shared=True, counts=True),
        Axis("mamba_heads", "n_mamba_heads", "mamba", groups="mamba_ngroups", channels="mamba_head_dim"),
        Axis("mamba_head_dim", "mamba_headdim", "mamba"),
    )

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        return frozenset({"mamba", "attention"} if layer in config.hybrid_layer_ids else {"mamba"})

    def users(self, config: PreTrainedConfig) -> Sequence[int]:
        if not config.tie_word_embeddings:
            raise ElasticConfigError("tie_word_embeddings=False: stock zamba2 then shares no blocks; not supported.")
        return list(config.hybrid_layer_ids)

    def blocks(self, config: PreTrainedConfig) -> int:
        return int(config.num_mem_blocks)

    def use_fields(self, users: list[int], blocks: int) -> dict[str, Any]:
        return {"hybrid_layer_ids": users, "num_mem_blocks": blocks}

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        rules = trunk(config, rms_norm("model.final_layernorm", None))
        for i in range(self.depth(config)):
            c, prefix = config.per_layer_config[i], "model.layers.{layer}"
            if "attention" in self.parts(config, i):
                rules += linear(f"{prefix}.linear", i, RESIDUAL, HIDDEN)
                rules += self.shared(config, i, _block(f"{prefix}.shared_transformer", i, c))
                rules += self.per_use(config, i, _adapters(f"{prefix}.shared_transformer", i, c))
                prefix = f"{prefix}.mamba_decoder"
            rules.append(rms_norm(f"{prefix}.input_layernorm", i))
            rules += mamba2(f"{prefix}.mamba", i, **_mamba(c), conv_bias=True, proj_bias=c.add_bias_linear)
        return rules

    def build_layer(self, config: PreTrainedConfig, layer: int) -> nn.Module:
        mamba = Zamba2MambaDecoderLayer(config, layer)
        if layer not in config.hybrid_layer_ids:
            return mamba
        block = Zamba2AttentionDecoderLayer(config, config.hybrid_layer_ids.index(layer) % config.num_mem_blocks)
        return Zamba2HybridLayer(block, nn.Linear(config.hidden_size, config.hidden_size, bias=False), mamba)

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        keys = attention_states(kv_heads=Cut("kv_heads"), head_dim=config.attention_head_dim)
        return mamba2_states(**_mamba(config)) + (keys if layer in config.hybrid_layer_ids else ())

    def tied_fields(self, config: PreTrainedConfig, part: str, sizes: Sizes) -> dict[str, Any]:
        if part == "mamba":
            return {"mamba_expand": mamba_expand(sizes)}
        width = {"attention_hidden_size": 2 * sizes["hidden"], "attention_head_dim": config.attention_head_dim}
        return width | {"num_attention_heads": sizes["kv_heads"] * _queries(config)}

    def check_layer(self, config: PreTrainedConfig, sizes: Sizes, where: str) -> None:
        wide, adapted = sizes.get("kv_heads", 0) * config.attention_head_dim, config.use_shared_attention_adapter
        if adapted and wide not in (0, 2 * sizes["hidden"]):
            raise ElasticConfigError(
                f"{where}: kv_heads={sizes['kv_heads']} heads of {config.attention_head_dim} are {wide} channels, but the adapters of the attention are "
                f"as wide as its input, 2 * hidden = {2 * sizes['hidden']}; cut hidden and kv_heads by the same share."
            )

    def export_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        return zamba2_fields(config)

    def obstacles(self, config: PreTrainedConfig, submodel: Submodel) -> Iterator[Obstacle]:
        return zamba2_obstacles(config, submodel)


def _mamba(c: PreTrainedConfig) -> dict[str, Any]:
    return {"groups": c.mamba_ngroups, "state": c.mamba_d_state, "kernel": c.mamba_d_conv}


def _queries(c: PreTrainedConfig) -> int:
    return int(c.num_attention_heads // c.num_key_value_heads)


def _block(prefix: str, layer: int, c: PreTrainedConfig) -> Iterator[TensorRule]:
    heads = {"queries": _queries(c), "head_dim": c.attention_head_dim}
    yield TensorRule(f"{prefix}.input_layernorm.weight", (BESIDE_EMBEDDINGS,), layer, norm=True)
    yield from kv_heads_attention(f"{prefix}.self_attn", layer, **heads, inp=BESIDE_EMBEDDINGS)
    yield rms_norm(f"{prefix}.pre_ff_layernorm", layer)
    yield from fused_mlp(f"{prefix}.feed_forward", layer, "ffn", bias=c.add_bias_linear)


def _adapters(prefix: str, layer: int, c: PreTrainedConfig) -> Iterator[TensorRule]:
    both, (query, key) = dim(gate=(Cut("ffn"),), up=(Cut("ffn"),)), kv_heads_dims(_queries(c), c.attention_head_dim)
    yield from low_rank(
        f"{prefix}.feed_forward.gate_up_proj_adapter_list.{{use}}", layer, c.adapter_rank, both, HIDDEN
    )
    for name, out in zip("qkv", (query, key, key) if c.use_shared_attention_adapter else (), strict=False):
        entry = f"{prefix}.self_attn.linear_{name}_adapter_list.{{use}}"
        yield from low_rank(entry, layer, c.adapter_rank, out, BESIDE_EMBEDDINGS)
