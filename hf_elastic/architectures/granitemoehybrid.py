"""IBM Granite 4 hybrids: every layer has a mixer (Mamba-2 or attention), routed experts with fused gate/up, and a shared MLP."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GraniteMoeHybridForCausalLM, GraniteMoeHybridModel, PreTrainedConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridDecoderLayer

from ..errors import ElasticConfigError
from .axes import Cut, Sizes, TensorRule, dim
from .base import LEGACY_LAYER_TYPES, Architecture, Axis, StateRule
from .blocks import HIDDEN, RESIDUAL, attention, attention_states, linear, mamba2, mamba2_states, rms_norm
from .obstacles import REFUSES, SILENT, Obstacle
from .submodel import Submodel


class GraniteMoeHybrid(Architecture):
    model_type = "granitemoehybrid"
    causal_class = GraniteMoeHybridForCausalLM
    base_class = GraniteMoeHybridModel
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

    one_share = ("hidden", "attention_heads", "mamba_heads")

    def parts(self, config: PreTrainedConfig, layer: int) -> frozenset[str]:
        mixer = "mamba" if config.layer_types[layer] == "linear_attention" else "attention"
        moe = {"moe"} if config.per_layer_config[layer].num_local_experts else set()
        return frozenset({mixer, "shared"} | moe)

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        vocab = dim(config.vocab_size)
        rules = [TensorRule("model.embed_tokens.weight", (vocab, RESIDUAL))]
        for layer in range(self.depth(config)):
            rules.extend(self._layer(config.per_layer_config[layer], layer))
        tied = "model.embed_tokens.weight" if config.tie_word_embeddings else None
        return [*rules, rms_norm("model.norm", None), TensorRule("lm_head.weight", (vocab, HIDDEN), tied=tied)]

    def _layer(self, c: PreTrainedConfig, layer: int) -> Iterator[TensorRule]:
        prefix = "model.layers.{layer}"
        parts = self.parts(c, layer)
        yield rms_norm(f"{prefix}.input_layernorm", layer)
        yield rms_norm(f"{prefix}.post_attention_layernorm", layer)
        if "mamba" in parts:
            yield from mamba2(
                f"{prefix}.mamba",
                layer,
                groups=c.mamba_n_groups,
                state=c.mamba_d_state,
                kernel=c.mamba_d_conv,
                conv_bias=c.mamba_conv_bias,
                proj_bias=c.mamba_proj_bias,
            )
        else:
            head_dim = _attention_head_dim(c)
            yield from attention(
                f"{prefix}.self_attn", layer, kv_heads=c.num_key_value_heads, head_dim=head_dim, bias=c.attention_bias
            )
        if "moe" in parts:
            yield from _moe(f"{prefix}.block_sparse_moe", layer)
        shared = (Cut("shared_expert_ffn"),)
        yield from linear(f"{prefix}.shared_mlp.input_linear", layer, dim(gate=shared, up=shared), HIDDEN)
        shared_out = dim(Cut("shared_expert_ffn", gated=True))
        yield from linear(f"{prefix}.shared_mlp.output_linear", layer, RESIDUAL, shared_out)

    def layer_fields(self, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
        return {"layer_types": [config.layer_types[i] for i in kept], "num_hidden_layers": len(kept)}

    def export_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        fields = {
            "layer_types": [LEGACY_LAYER_TYPES.get(kind, kind) for kind in config.layer_types],
            "position_embedding_type": config.position_embedding_type or "nope",
        }
        if any("moe" in self.parts(config, layer) for layer in range(self.depth(config))):
            return fields
        # The stock class takes a missing number of experts for 8. llama.cpp reads the width of a dense MLP from `intermediate_size`.
        fields |= {"num_local_experts": 0, "num_experts_per_tok": 0}
        if "shared_intermediate_size" not in (config.per_layer_attributes or ()):
            fields["intermediate_size"] = config.shared_intermediate_size
        return fields

    def build_layer(self, config: PreTrainedConfig, layer: int) -> nn.Module:
        return GraniteMoeHybridDecoderLayer(config, layer)

    def states(self, config: PreTrainedConfig, layer: int) -> tuple[StateRule, ...]:
        if "mamba" in self.parts(config, layer):
            return mamba2_states(groups=config.mamba_n_groups, state=config.mamba_d_state, kernel=config.mamba_d_conv)
        return attention_states(kv_heads=config.num_key_value_heads, head_dim=_attention_head_dim(config))

    def tied_fields(self, config: PreTrainedConfig, part: str, sizes: Sizes) -> dict[str, Any]:
        # The stock classes take attention's head_dim from hidden_size, and Mamba's inner width as mamba_expand * hidden_size.
        if part == "mamba":
            return {"mamba_expand": sizes["mamba_heads"] * sizes["mamba_head_dim"] // sizes["hidden"]}
        return {"head_dim": _attention_head_dim(config)} if part == "attention" else {}

    def unused_fields(self, config: PreTrainedConfig, parts: frozenset[str], sizes: Sizes) -> dict[str, Any]:
        # The stock config checks Mamba's widths against hidden_size where no layer has Mamba, too: any that go together will do.
        if "mamba" in parts:
            return {}
        some = config.per_layer_config[0]
        inner = some.mamba_expand * sizes["hidden"]
        heads = math.gcd(some.mamba_n_heads, inner)
        groups = math.gcd(some.mamba_n_groups, heads)
        return {"mamba_n_heads": heads, "mamba_d_head": inner // heads, "mamba_n_groups": groups}

    def check_layer(self, config: PreTrainedConfig, sizes: Sizes, where: str) -> None:
        if "mamba_heads" not in sizes:
            return
        inner, hidden = sizes["mamba_heads"] * sizes["mamba_head_dim"], sizes["hidden"]
        if inner % hidden:
            raise ElasticConfigError(
                f"{where}: {self.model_type} needs Mamba's inner width to be a whole multiple of hidden (mamba_expand), but "
                f"mamba_heads={sizes['mamba_heads']} * mamba_head_dim={sizes['mamba_head_dim']} = {inner} and hidden={hidden}; cut "
                "them together so that hidden divides the product."
            )

    def obstacles(self, config: PreTrainedConfig, submodel: Submodel) -> Iterator[Obstacle]:
        # Others take hidden / heads for the width of a head, 2 * hidden for Mamba's inner width, and positions from whether there is Mamba.
        sizes = {axis: size for axis in submodel if (size := submodel.size(axis)) is not None}
        hidden, rope = sizes["hidden"], config.position_embedding_type == "rope"
        if "attention_heads" in sizes:
            attention = next(layer for layer in submodel.layers if "attention" in self.parts(config, layer))
            heads, head_dim = sizes["attention_heads"], _attention_head_dim(config.per_layer_config[attention])
            if heads * head_dim != hidden:
                why = f"it takes hidden / attention_heads = {hidden} / {heads} for the width of a head, which is {head_dim}"
                yield Obstacle("vLLM", SILENT if heads * head_dim > hidden else REFUSES, why)
                yield from (Obstacle(program, REFUSES, why) for program in ("llama.cpp", "SGLang", "mistral.rs"))
        if "mamba_heads" in sizes:
            inner = sizes["mamba_heads"] * sizes["mamba_head_dim"]
            if inner != 2 * hidden:
                why = f"mamba_heads * mamba_head_dim = {inner} is not 2 * hidden = {2 * hidden}"
                yield Obstacle("llama.cpp", REFUSES, why)
            if rope:
                yield Obstacle("llama.cpp", SILENT, "it leaves out rotary positions where there are Mamba layers")
        else:
            if not rope:
                yield Obstacle("llama.cpp", SILENT, "it adds rotary positions where no layer has Mamba")
            yield Obstacle("mistral.rs", REFUSES, "no layer has Mamba")

    def bias_router(self, router: Any, source: Any, bias: torch.Tensor, top_k: int) -> None:
        def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = nn.functional.linear(hidden_states, router.weight).float() + bias
            top_logits, index = logits.topk(top_k, dim=-1)
            return logits, torch.softmax(top_logits, dim=-1).type_as(hidden_states), index

        router.forward = forward


def _moe(prefix: str, layer: int) -> Iterator[TensorRule]:
    experts, ffn = dim(Cut("experts")), (Cut("expert_ffn", within="experts"),)
    yield TensorRule(
        f"{prefix}.experts.gate_up_proj",
        (experts, dim(gate=ffn, up=ffn), HIDDEN),
        layer,
        disk=f"{prefix}.input_linear.weight",
        routed=True,
    )
    yield TensorRule(
        f"{prefix}.experts.down_proj",
        (dim(Cut("experts", gated=True)), RESIDUAL, dim(Cut("expert_ffn", within="experts", gated=True))),
        layer,
        disk=f"{prefix}.output_linear.weight",
        routed=True,
    )
    yield TensorRule(
        f"{prefix}.router.weight", (experts, HIDDEN), layer, disk=f"{prefix}.router.layer.weight", routes=True
    )


def _attention_head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
