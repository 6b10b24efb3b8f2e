"""Families that NVFP4 can hold: every cut at a multiple of 16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from cases import granite, nemotron, randomize
from safetensors import safe_open
from transformers import (
    GraniteMoeHybridForCausalLM,
    NemotronHForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_elastic import ElasticConfig
from hf_elastic.architectures import get_architecture

WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_routed_experts": 8,
    "topk_group": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
}
"""Fields of a nemotron_h."""

CONFIGS = {
    "nemotron": lambda: nemotron("ME*EM-*E", **WIDTHS),
    "granite": lambda: granite(
        hidden_size=64,
        intermediate_size=32,
        shared_intermediate_size=48,
        num_attention_heads=4,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_expand=2,
        mamba_d_state=16,
    ),
}
"""Parents by name: all kinds of layers, experts one by one, and experts with gate and up in one stack."""

BUDGETS = {
    "nemotron": {
        "mid": {"hidden": 48, "experts": 6, "expert_ffn": 16, "mamba_heads": 4},
        "small": {"hidden": 32, "ffn": 48, "experts": 4, "expert_ffn": 16, "mamba_heads": 2, "attention_heads": 2},
    },
    "granite": {
        "mid": {"experts": 6, "expert_ffn": 16},
        "small": {"experts": 4, "expert_ffn": 16, "shared_expert_ffn": 16, "layers": [0, 1, 3]},
    },
}

_CLASSES = {"nemotron_h": NemotronHForCausalLM, "granitemoehybrid": GraniteMoeHybridForCausalLM}


def quantizable_parent(name: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A stock model, all of it random."""
    config: PreTrainedConfig = CONFIGS[name]()
    model: PreTrainedModel = _CLASSES[config.model_type](config).eval()
    randomize(model)
    model.to(dtype)
    for rule in get_architecture(config.model_type).rules(config):
        if rule.fp32:
            owner, _, leaf = rule.name.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, leaf, getattr(module, leaf).float())
    return model


def quantizable_family(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Write a family, not quantised, with its budgets; gives its parent."""
    model = quantizable_parent(name, dtype)
    model.save_pretrained(folder)
    elastic = ElasticConfig.from_parent(model.config, BUDGETS[name])
    elastic.dtype = dtype
    elastic.save_pretrained(folder)
    return model


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in the weight files of a folder."""
    return dict(_stored(folder))


def _stored(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                yield name, file.get_tensor(name)
