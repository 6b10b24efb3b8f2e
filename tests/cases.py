"""Tiny parents and the submodels that the tests cut out of them: one table, which every behaviour goes through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import (
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.submodel import Submodel

VOCAB = 64
EPS = 0.1
"""Far larger than usual, so that a norm whose epsilon is not corrected gives visibly different logits."""


def nemotron(pattern: str, **fields: Any) -> NemotronHConfig:
    """Sizes are multiples of 4 where experts run, because `grouped_mm` needs rows of 16 bytes in float32."""
    defaults = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_num_heads": 12,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 6,
        "chunk_size": 8,
        "layer_norm_epsilon": EPS,
        "n_routed_experts": 12,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 1.5,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 24,
        "max_position_embeddings": 128,
        "eos_token_id": None,
        "hybrid_override_pattern": pattern,
    }
    return NemotronHConfig(**{**defaults, **fields})


def granite(**fields: Any) -> GraniteMoeHybridConfig:
    """`mamba_expand * hidden_size = mamba_n_heads * mamba_d_head = 192` leaves room to cut each of the three alone."""
    kinds = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    defaults = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 16,
        "shared_intermediate_size": 24,
        "layer_types": kinds,
        "num_hidden_layers": len(kinds),
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mamba_n_heads": 24,
        "mamba_d_head": 8,
        "mamba_expand": 4,
        "mamba_n_groups": 2,
        "mamba_d_state": 6,
        "mamba_chunk_size": 8,
        "mamba_proj_bias": True,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "position_embedding_type": "rope",
        "embedding_multiplier": 1.5,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.4,
        "rms_norm_eps": EPS,
        "max_position_embeddings": 128,
        "eos_token_id": None,
    }
    return GraniteMoeHybridConfig(**{**defaults, **fields})


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "nano2": lambda: nemotron("M-M*-"),
    "nano3": lambda: nemotron("ME*EM-*E"),
    "nano3_latent": lambda: nemotron("ME*E", moe_latent_size=20, topk_group=2, use_conv_bias=False),
    "nano3_bias": lambda: nemotron("ME-*", mlp_bias=True, use_bias=True, n_group=1, norm_topk_prob=False),
    "granite": lambda: granite(),
    "granite_tied": lambda: granite(
        tie_word_embeddings=True, position_embedding_type=None, mamba_n_groups=1, attention_bias=False
    ),
    "granite_dense": lambda: granite(num_local_experts=0, num_experts_per_tok=0, mamba_conv_bias=False),
}

_CLASSES = {"nemotron_h": NemotronHForCausalLM, "granitemoehybrid": GraniteMoeHybridForCausalLM}


def build_parent(name: str, seed: int = 0) -> PreTrainedModel:
    """A stock model whose every tensor is random, so that a tensor that is not cut, sorted or saved changes the logits."""
    config = CONFIGS[name]()
    model = _CLASSES[config.model_type](config).eval()
    randomize(model, seed)
    return model


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))

    for key, tensor in model.state_dict().items():
        leaf = key.rpartition(".")[2]
        if "norm" in key:
            normal(tensor, 0.4, mean=1.0)
        elif leaf in (
            "A_log",
            "dt_bias",
        ):  # softplus(dt_bias) stays far above time_step_min, the lower clamp of the scan
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 1.5 - 0.5)
        elif leaf == "D":
            normal(tensor, 0.5)
        elif leaf in ("bias", "e_score_correction_bias"):
            normal(tensor, 0.3)
        elif "conv1d" in key:
            normal(tensor, 0.5)
        elif "embed" in key:
            normal(tensor, 1.0)
        else:
            normal(tensor, tensor.shape[-1] ** -0.5)


@dataclass(frozen=True)
class Case:
    """A submodel of one of the parents."""

    parent: str
    name: str
    sizes: dict[str, Any]

    @property
    def id(self) -> str:
        return f"{self.parent}-{self.name}"

    @property
    def submodel(self) -> Submodel:
        return submodel(self.parent, self.sizes)

    @property
    def middle(self) -> Submodel:
        """A submodel between this one and the parent, in every axis that leaves room."""
        config, mine = parent_config(self.parent), self.submodel
        full = get_architecture(config.model_type).full(config)
        layers = tuple(sorted({*mine.layers, *sorted(set(range(mine.depth)) - set(mine.layers))[1:]}))
        sizes: dict[str, Any] = {"layers": list(layers)} if len(layers) < mine.depth else {}
        for axis in mine.cuts(full):
            if axis in MIDDLE[config.model_type]:
                at_least = MIDDLE[config.model_type][axis]
                if isinstance(mine[axis], int):
                    sizes[axis] = max(mine[axis], at_least)
                else:
                    sizes[axis] = [
                        None if whole is None or i not in layers else min(whole, max(size or 0, at_least))
                        for i, (size, whole) in enumerate(zip(mine[axis], full[axis], strict=True))
                    ]
        return submodel(self.parent, sizes)


MIDDLE: dict[str, dict[str, int]] = {
    "nemotron_h": {
        "hidden": 40,
        "ffn": 32,
        "attention_heads": 4,
        "mamba_heads": 8,
        "mamba_head_dim": 6,
        "experts": 8,
        "expert_ffn": 12,
        "shared_expert_ffn": 18,
    },
    "granitemoehybrid": {"attention_heads": 4, "experts": 6, "expert_ffn": 12, "shared_expert_ffn": 18},
}


@cache
def parent_config(name: str) -> PreTrainedConfig:
    return CONFIGS[name]()


def submodel(parent: str, sizes: dict[str, Any]) -> Submodel:
    config = parent_config(parent)
    return get_architecture(config.model_type).submodel(config, sizes)


_NANO3_ALL = {
    "hidden": 32,
    "ffn": 24,
    "attention_heads": 2,
    "mamba_heads": 6,
    "mamba_head_dim": 4,
    "experts": 8,
    "experts_per_token": 2,
    "expert_ffn": 8,
    "shared_expert_ffn": 12,
}
_GRANITE_ALL = {
    "hidden": 24,
    "attention_heads": 2,
    "mamba_heads": 12,
    "mamba_head_dim": 4,
    "experts": 5,
    "experts_per_token": 2,
    "expert_ffn": 8,
    "shared_expert_ffn": 12,
}


def _each(parent: str, sizes: dict[str, Any], name: str = "{}") -> list[Case]:
    return [Case(parent, name.format(axis), {axis: size}) for axis, size in sizes.items()]


_NANO3_PER_LAYER = {
    "attention_heads": {2: 2, 6: 4},
    "mamba_heads": {0: 10, 4: 4},
    "mamba_head_dim": [3, None, None, None, 8, None, None, None],
    "experts": {1: 6, 3: 8},
    "experts_per_token": {1: 1, 7: 2},
    "expert_ffn": {3: 4, 7: 12},
    "shared_expert_ffn": {1: 7},
}
_GRANITE_PER_LAYER = {
    "attention_heads": {1: 2, 3: 4},
    "mamba_heads": {0: 12, 2: 18},
    "mamba_head_dim": {2: 4},
    "experts": {0: 4, 3: 7},
    "experts_per_token": {1: 1, 2: 2},
    "expert_ffn": {0: 4, 1: 12},
    "shared_expert_ffn": {3: 7},
}

CASES: list[Case] = [
    *(Case(parent, "full", {}) for parent in CONFIGS),
    # every axis alone, one size everywhere
    *_each("nano3", _NANO3_ALL),
    *_each("granite", _GRANITE_ALL),
    # every axis alone, another size in every layer
    *_each("nano3", _NANO3_PER_LAYER, "{}_per_layer"),
    *_each("granite", _GRANITE_PER_LAYER, "{}_per_layer"),
    Case("nano2", "ffn_per_layer", {"ffn": {1: 17, 4: 30}}),
    # depth: any subset
    Case("nano3", "layers_without_first", {"layers": [1, 2, 3, 4, 5, 6, 7]}),
    Case("nano3", "layers_without_first_attention", {"layers": [0, 1, 3, 4, 5, 6, 7]}),
    Case("nano3", "layers_without_mamba", {"layers": [1, 2, 3, 5, 6]}),
    Case("nano3", "layers_one", {"layers": [6]}),
    Case("granite", "layers_without_first", {"layers": [1, 2, 3]}),
    Case("granite", "layers_without_first_attention", {"layers": [0, 2, 3]}),
    Case("granite", "layers_without_mamba", {"layers": [1, 3]}),
    # everything together
    Case("nano2", "all", {"hidden": 36, "ffn": 22, "attention_heads": 4, "mamba_heads": 10, "mamba_head_dim": 5}),
    Case("nano3", "all", _NANO3_ALL),
    Case("nano3", "all_and_layers", {**_NANO3_ALL, "layers": [0, 1, 4, 5, 6]}),
    Case("nano3", "all_per_layer", {"hidden": 32, **_NANO3_PER_LAYER, "layers": [0, 1, 2, 3, 5, 6, 7]}),
    Case(
        "nano3_latent", "all", {"hidden": 32, "mamba_heads": 6, "experts": 6, "expert_ffn": 8, "shared_expert_ffn": 9}
    ),
    Case(
        "nano3_latent", "all_per_layer", {"hidden": 36, "mamba_head_dim": 5, "experts": {1: 6}, "expert_ffn": {3: 4}}
    ),
    Case("nano3_bias", "all", {k: v for k, v in _NANO3_ALL.items() if k != "experts"} | {"experts": 5}),
    Case("granite", "all", _GRANITE_ALL),
    Case("granite", "all_and_layers", {**_GRANITE_ALL, "layers": [0, 3]}),
    Case(
        "granite", "all_per_layer", {**_GRANITE_PER_LAYER, "mamba_head_dim": {0: 4}, "hidden": 48, "layers": [0, 1, 2]}
    ),
    Case("granite_tied", "all", {**_GRANITE_ALL, "mamba_heads": 15, "mamba_head_dim": 8}),
    Case("granite_dense", "all", {"hidden": 32, "attention_heads": 4, "mamba_heads": 16, "shared_expert_ffn": 10}),
]
HOMOGENEOUS = [case for case in CASES if case.submodel.is_homogeneous]

IDS: Callable[[Case], str] = lambda case: case.id  # noqa: E731


BUDGETS = {
    "nano3": {
        "large": {"mamba_heads": 8, "expert_ffn": 12},
        "medium": {
            "hidden": 40,
            "mamba_heads": 8,
            "experts": {1: 8},
            "expert_ffn": 12,
            "layers": [0, 1, 2, 3, 5, 6, 7],
        },
        "small": {"hidden": 32, "ffn": 24, "mamba_heads": 6, "experts": 6, "expert_ffn": 8, "layers": [0, 1, 2, 6, 7]},
    },
    "granite": {
        "large": {"mamba_heads": 18, "expert_ffn": 12},
        "medium": {"mamba_heads": {0: 12, 2: 18}, "experts": 6, "expert_ffn": 12},
        "small": {
            "hidden": 24,
            "mamba_heads": 12,
            "experts": 4,
            "expert_ffn": 8,
            "attention_heads": 4,
            "layers": [0, 2, 3],
        },
    },
}
"""Named, nested budgets: `medium` differs per layer, `small` drops layers."""
