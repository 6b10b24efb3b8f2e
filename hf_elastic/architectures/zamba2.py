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
from .axes import Cut, Dim, Sizes, TensorRule, dim
from .base import Architecture, Axis, StateRule
from .blocks import (
    BESIDE_EMBEDDINGS,
    HIDDEN,
    RESIDUAL,
    attention_states,
    check_turns,
    linear,
    mamba2,
    mamba2_states,
    ranking_in_turn,
    rms_norm,
    shared,
    trunk,
)
from .submodel import Submodel


class Zamba2(Architecture):
    model_type = "zamba2"
    causal_class = Zamba2ForCausalLM
    base_class = Zamba2Model
    layer_lists = ("layers_block_type",)
    index_argument = 2
    axes = (
        Axis("hidden", "hidden_size"),
        Axis("ffn", "intermediate_size", "attention", shared=True),
        Axis("kv_heads", "num_key_value_heads", "attention", shared=True, counts=True),
        Axis("mamba_heads", "n_mamba_heads", "mamba", groups="mamba_ngroups", channels="mamba_head_dim"),
        Axis("mamba_head_dim", "mamba_headdim", "mamba"),
    )

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        return frozenset({"mamba", "attention"} if layer in config.hybrid_layer_ids else {"mamba"})

    def sharers(self, config: PreTrainedConfig, layer: int) -> tuple[int, ...]:
        uses = config.hybrid_layer_ids
        return tuple(
            uses[uses.index(layer) % config.num_mem_blocks :: config.num_mem_blocks] if layer in uses else [layer]
        )

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        if not config.tie_word_embeddings:
            raise ElasticConfigError(
                "tie_word_embeddings=False: the stock class then shares no block between layers, either; such zamba2 models are not supported."
            )
        return [
            *(rule for i in range(self.depth(config)) for rule in self._layer(config, config.per_layer_config[i], i)),
            *trunk(config, rms_norm("model.final_layernorm", None)),
        ]

    def _layer(self, config: PreTrainedConfig, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
        prefix = mamba = "model.layers.{layer}"
        if "attention" in self.parts(config, layer):
            mamba, sharers = f"{prefix}.mamba_decoder", self.sharers(config, layer)
            yield from linear(f"{prefix}.linear", layer, RESIDUAL, HIDDEN)
            yield from shared(_block(f"{prefix}.shared_transformer", layer, c), sharers)
            for user in sharers:
                adapters = _adapters(f"{prefix}.shared_transformer", layer, c)
                yield from shared(adapters, sharers, user, config.hybrid_layer_ids.index(user))
        yield rms_norm(f"{mamba}.input_layernorm", layer)
        sizes = {"groups": c.mamba_ngroups, "state": c.mamba_d_state, "kernel": c.mamba_d_conv}
        yield from mamba2(f"{mamba}.mamba", layer, **sizes, conv_bias=True, proj_bias=c.add_bias_linear)

    def layer_fields(self, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
        hybrid = [i for i in kept if i in config.hybrid_layer_ids]
        blocks = {self.sharers(config, i)[0] for i in hybrid}
        ids = {"hybrid_layer_ids": [kept.index(i) for i in hybrid], "num_mem_blocks": len(blocks)}
        return super().layer_fields(config, kept) | ids

    def build_layer(self, config: PreTrainedConfig, layer: int) -> nn.Module:
        mamba = Zamba2MambaDecoderLayer(config, layer)
        if layer not in config.hybrid_layer_ids:
            return mamba
        block = Zamba2AttentionDecoderLayer(config, config.hybrid_layer_ids.index(layer) % config.num_mem_blocks)
        return Zamba2HybridLayer(block, nn.Linear(config.hidden_size, config.hidden_size, bias=False), mamba)

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        mamba = {"groups": config.mamba_ngroups, "state": config.mamba_d_state, "kernel": config.mamba_d_conv}
        keys = attention_states(kv_heads=Cut("kv_heads"), head_dim=config.attention_head_dim)
        return mamba2_states(**mamba) + (keys if "attention" in self.parts(config, layer) else ())

    def tied_fields(self, config: PreTrainedConfig, part: str, sizes: Sizes) -> dict[str, Any]:
        if part == "mamba":
            return {"mamba_expand": sizes["mamba_heads"] * sizes["mamba_head_dim"] // sizes["hidden"]}
        heads = sizes["kv_heads"] * (config.num_attention_heads // config.num_key_value_heads)
        width = {"attention_hidden_size": 2 * sizes["hidden"], "attention_head_dim": config.attention_head_dim}
        return width | {"num_attention_heads": heads}

    def export_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        # The stock class computes these from other sizes, unless they are said.
        said = ("attention_head_dim", "attention_hidden_size", "mamba_headdim", "hybrid_layer_ids")
        return {name: getattr(config, name) for name in said}

    def check(self, config: PreTrainedConfig, submodel: Submodel, name: str = "the submodel") -> None:
        hybrid = [i for i in submodel.layers if i in config.hybrid_layer_ids]
        check_turns(hybrid, [self.sharers(config, i)[0] for i in hybrid], name)
        super().check(config, submodel, name)

    def keepable_ranking(self, config: PreTrainedConfig, ranking: Sequence[int]) -> list[int]:
        blocks = {i: self.sharers(config, i)[0] for i in config.hybrid_layer_ids}
        return super().keepable_ranking(config, ranking_in_turn(ranking, blocks))

    def check_layer(self, config: PreTrainedConfig, sizes: Sizes, where: str) -> None:
        if sizes["mamba_heads"] * sizes["mamba_head_dim"] % sizes["hidden"]:
            raise ElasticConfigError(
                f"{where}: mamba_heads * mamba_head_dim = {sizes['mamba_heads'] * sizes['mamba_head_dim']} is no multiple of hidden="
                f"{sizes['hidden']}, and the stock config can only say how many times it is that; choose sizes that divide."
            )
        wide = sizes.get("kv_heads", 0) * config.attention_head_dim
        if config.use_shared_attention_adapter and wide not in (0, 2 * sizes["hidden"]):
            raise ElasticConfigError(
                f"{where}: kv_heads={sizes['kv_heads']} heads of {config.attention_head_dim} are {wide} channels, but the adapters of the attention are "
                f"as wide as its input, 2 * hidden = {2 * sizes['hidden']}; cut hidden and kv_heads by the same share."
            )


def _queries(c: PreTrainedConfig) -> tuple[Dim, Dim]:
    """What runs along queries, and along keys and values: whole groups are cut, as attention here mostly has as many keys as queries."""
    heads = Cut("kv_heads")
    return dim(heads, c.num_attention_heads // c.num_key_value_heads, c.attention_head_dim), dim(
        heads, c.attention_head_dim
    )


_GATE_UP = dim(gate=(Cut("ffn"),), up=(Cut("ffn"),))


def _block(prefix: str, layer: int, c: PreTrainedConfig) -> Iterator[TensorRule]:
    query, key = _queries(c)
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.feed_forward"
    yield TensorRule(f"{prefix}.input_layernorm.weight", (BESIDE_EMBEDDINGS,), layer, norm=True)
    for name, out in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        yield from linear(f"{attention}.{name}", layer, out, BESIDE_EMBEDDINGS)
    heads = dim(Cut("kv_heads", gated=True), c.num_attention_heads // c.num_key_value_heads, c.attention_head_dim)
    yield from linear(f"{attention}.o_proj", layer, RESIDUAL, heads)
    yield rms_norm(f"{prefix}.pre_ff_layernorm", layer)
    yield from linear(f"{mlp}.gate_up_proj", layer, _GATE_UP, HIDDEN, bias=c.add_bias_linear)
    yield from linear(f"{mlp}.down_proj", layer, RESIDUAL, dim(Cut("ffn", gated=True)), bias=c.add_bias_linear)


def _adapters(prefix: str, layer: int, c: PreTrainedConfig) -> Iterator[TensorRule]:
    """Low-rank matrices of one use, beside those of the block."""
    query, key = _queries(c)
    lists = {f"{prefix}.feed_forward.gate_up_proj": (_GATE_UP, HIDDEN)}
    if c.use_shared_attention_adapter:
        lists |= {
            f"{prefix}.self_attn.linear_{n}": (out, BESIDE_EMBEDDINGS)
            for n, out in zip("qkv", (query, key, key), strict=True)
        }
    for name, (out, inp) in lists.items():
        yield from linear(f"{name}_adapter_list.{{use}}.0", layer, dim(c.adapter_rank), inp)
        yield from linear(f"{name}_adapter_list.{{use}}.1", layer, out, dim(c.adapter_rank))
