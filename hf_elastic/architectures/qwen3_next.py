"""Qwen3-Next: gated DeltaNet or gated attention, then routed experts with a gated shared one, or a dense MLP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, Qwen3NextForCausalLM, Qwen3NextModel
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextDecoderLayer

from ..axes import TensorRule, dim
from . import blocks
from .base import Architecture, Axis, StateRule


class Qwen3Next(Architecture):
    model_type = "qwen3_next"
    causal_class = Qwen3NextForCausalLM
    base_class = Qwen3NextModel
    joined = True  # input projections of the DeltaNet
    axes = (
        Axis("hidden", "hidden_size"),
        Axis("ffn", "intermediate_size", "mlp"),
        Axis("attention_heads", "num_attention_heads", "attention", groups="num_key_value_heads"),
        Axis("value_heads", "linear_num_value_heads", "delta", groups="linear_num_key_heads"),
        Axis("value_head_dim", "linear_value_head_dim", "delta"),
        Axis("experts", "num_experts", "moe"),
        Axis("experts_per_token", "num_experts_per_tok", "moe"),
        Axis("expert_ffn", "moe_intermediate_size", "moe"),
        Axis("shared_expert_ffn", "shared_expert_intermediate_size", "moe"),
    )

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        mixer = "delta" if config.layer_types[layer] == "linear_attention" else "attention"
        sparse = layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
        return frozenset({mixer, "moe" if sparse and config.per_layer_config[layer].num_experts else "mlp"})

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        layers = [rule for i in range(self.depth(config)) for rule in self._layer(config.per_layer_config[i], i)]
        return blocks.trunk(config, blocks.rms_norm("model.norm", None, centre=1.0)) + layers

    def _layer(self, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
        prefix, parts = "model.layers.{layer}", self.parts(c, layer)
        yield blocks.rms_norm(f"{prefix}.input_layernorm", layer, centre=1.0)
        yield blocks.rms_norm(f"{prefix}.post_attention_layernorm", layer, centre=1.0)
        if "delta" in parts:
            yield from blocks.delta_net(f"{prefix}.linear_attn", layer, **_delta(c), joined=self.joined)
        else:
            heads, prefix_ = {"kv_heads": c.num_key_value_heads, "head_dim": c.head_dim}, f"{prefix}.self_attn"
            yield from blocks.gated_attention(prefix_, layer, **heads, bias=c.attention_bias)
            yield from blocks.head_norms(prefix_, layer, c.head_dim)
        if "mlp" in parts:
            yield from blocks.gated_mlp(f"{prefix}.mlp", layer, "ffn")
        else:
            yield from blocks.experts(f"{prefix}.mlp", layer)
            yield from blocks.gated_mlp(f"{prefix}.mlp.shared_expert", layer, "shared_expert_ffn")
            yield from blocks.linear(f"{prefix}.mlp.shared_expert_gate", layer, dim(1), blocks.HIDDEN)

    def layer_fields(self, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
        dense = [new for new, i in enumerate(kept) if "mlp" in self.parts(config, i)]
        types = [config.layer_types[i] for i in kept]
        fields = {"mlp_only_layers": dense, "decoder_sparse_step": 1}
        return {"layer_types": types, "num_hidden_layers": len(kept), **fields}

    def build_layer(self, config: PreTrainedConfig, layer: int) -> nn.Module:
        return Qwen3NextDecoderLayer(config, layer)

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        if "attention" in self.parts(config, layer):
            return attention_states(kv_heads=config.num_key_value_heads, head_dim=config.head_dim)
        keys, key_dim = config.linear_num_key_heads, config.linear_key_head_dim
        heads, head_dim = Cut("value_heads", groups=keys), Cut("value_head_dim")
        conv = dim(q=(keys, key_dim), k=(keys, key_dim), v=(keys, heads, head_dim))
        ssm = (dim(keys, heads), dim(key_dim), dim(head_dim))
        return StateRule("conv", (conv, dim(config.linear_conv_kernel_dim)), 0.5), StateRule("ssm", ssm, 0.5)

    def bias_router(self, router: Any, source: Any, bias: torch.Tensor, top_k: int) -> None:
        def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
            weights, index = torch.softmax(logits.float() + bias, dim=-1).topk(top_k, dim=-1)
            if getattr(router, "norm_topk_prob", True):
                weights = weights / weights.sum(dim=-1, keepdim=True)
            return logits, weights.to(logits.dtype), index

        router.forward = forward


def _norm(prefix: str, layer: int | None) -> TensorRule:
    return TensorRule(f"{prefix}.weight", (HIDDEN,), layer, norm=True, centre=1.0)


def _delta(prefix: str, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    keys, key_dim, prefix = c.linear_num_key_heads, c.linear_key_head_dim, f"{prefix}.linear_attn"
    heads, head_dim = Cut("value_heads", groups=keys), Cut("value_head_dim")
    v = (heads, Cut("value_head_dim", gated=True))
    qkvz = dim(keys, dim(q=(key_dim,), k=(key_dim,), v=v, z=(heads, head_dim)))  # key head by key head
    yield from linear(f"{prefix}.in_proj_qkvz", layer, qkvz, HIDDEN)
    yield from linear(f"{prefix}.in_proj_ba", layer, dim(keys, dim(b=(heads,), a=(heads,))), HIDDEN)
    conv = dim(q=(keys, key_dim), k=(keys, key_dim), v=(keys, heads, head_dim))
    yield TensorRule(f"{prefix}.conv1d.weight", (conv, dim(1), dim(c.linear_conv_kernel_dim)), layer)
    for name in ("dt_bias", "A_log"):
        yield TensorRule(f"{prefix}.{name}", (dim(keys, heads),), layer)
    yield TensorRule(f"{prefix}.norm.weight", (dim(head_dim),), layer, norm=True)  # of every head by itself
    out = dim(keys, Cut("value_heads", groups=keys, gated=True), head_dim)
    yield from linear(f"{prefix}.out_proj", layer, RESIDUAL, out)


def _attention(prefix: str, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
    kv, prefix = {"kv_heads": c.num_key_value_heads, "head_dim": c.head_dim}, f"{prefix}.self_attn"
    query = dim(c.num_key_value_heads, Cut("attention_heads", groups=c.num_key_value_heads), 2 * c.head_dim)
    for rule in attention(prefix, layer, **kv, bias=c.attention_bias):
        gated = ".q_proj." in rule.template  # query and gate, head by head
        yield replace(rule, dims=(query, *rule.dims[1:])) if gated else rule
    for name in ("q_norm", "k_norm"):
        yield TensorRule(f"{prefix}.{name}.weight", (dim(c.head_dim),), layer)


def _mlp(prefix: str, layer: int, axis: str) -> Iterator[TensorRule]:
    for name in ("gate_proj", "up_proj"):
        yield from linear(f"{prefix}.{name}", layer, dim(Cut(axis)), HIDDEN)
    yield from linear(f"{prefix}.down_proj", layer, RESIDUAL, dim(Cut(axis, gated=True)))


def _moe(prefix: str, layer: int) -> Iterator[TensorRule]:
    experts, ffn = dim(Cut("experts")), (Cut("expert_ffn", within="experts"),)
    disk = f"{prefix}.experts.{{expert}}.{{segment}}.weight"
    dims = (experts, dim(gate_proj=ffn, up_proj=ffn), HIDDEN)
    yield TensorRule(f"{prefix}.experts.gate_up_proj", dims, layer, disk=disk, routed=True)
    out = (dim(Cut("experts", gated=True)), RESIDUAL, dim(Cut("expert_ffn", within="experts", gated=True)))
    disk = f"{prefix}.experts.{{expert}}.down_proj.weight"
    yield TensorRule(f"{prefix}.experts.down_proj", out, layer, disk=disk, routed=True)
    yield TensorRule(f"{prefix}.gate.weight", (experts, HIDDEN), layer)
    yield from _mlp(f"{prefix}.shared_expert", layer, "shared_expert_ffn")
    yield from linear(f"{prefix}.shared_expert_gate", layer, dim(1), HIDDEN)
