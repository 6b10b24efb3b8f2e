"""Elastic checkpoints with random weights, in the proportions of published hybrids and the layout of their Hub repositories."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GraniteMoeHybridConfig, NemotronHConfig, PreTrainedConfig

from hf_elastic import ElasticConfig
from hf_elastic.architectures.axes import TensorRule
from hf_elastic.configuration.known import KNOWN

PUBLISHED_LAYERS = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
"""Of Nemotron Nano v3."""
NANO_LAYERS = PUBLISHED_LAYERS[:14]


def nano_like(
    dtype: torch.dtype, *, scale: int = 2, experts: int = 64, layers: str = NANO_LAYERS, vocab_size: int | None = None
) -> NemotronHConfig:
    """A `nemotron_h` MoE parent with the widths of Nemotron Nano v3 (30B-A3B) divided by `scale`."""
    config = NemotronHConfig(
        vocab_size=vocab_size or 65536 // scale,
        hidden_size=2688 // scale,
        hybrid_override_pattern=layers,
        num_attention_heads=32 // scale,
        num_key_value_heads=2,
        head_dim=128,
        mamba_num_heads=64 // scale,
        mamba_head_dim=64,
        n_groups=8,
        ssm_state_size=128,
        n_routed_experts=experts,
        num_experts_per_tok=6,
        moe_intermediate_size=1856 // scale,
        moe_shared_expert_intermediate_size=3712 // scale,
        routed_scaling_factor=2.5,
    )
    config.dtype = dtype
    return config


def published_family(
    dtype: torch.dtype, *, scale: int = 1, experts: int = 32, layers: str = "MEMEM*EME", vocab_size: int = 32768
) -> tuple[NemotronHConfig, dict[str, dict[str, int]]]:
    """A parent as wide as Nemotron Nano v3, and the sizes of the family released with it, `23b` and `12b`, all divided by `scale`.

    Fewer layers, experts and tokens than published make it small enough for a test machine: 3.4 GB in bfloat16. What is cut of a matrix, and
    how long its rows are, is as published.
    """
    config = nano_like(dtype, scale=scale, experts=experts, layers=layers, vocab_size=vocab_size // scale)
    budgets = next(iter(KNOWN.values())).budgets
    return config, {
        name: {axis: size // scale // 8 * 8 for axis, size in sizes.items()}
        for name, sizes in budgets.items()
        if sizes
    }


def granite_like(dtype: torch.dtype, *, scale: int = 4, experts: int = 32) -> GraniteMoeHybridConfig:
    """A `granitemoehybrid` parent: fused gate and up in experts and shared MLP."""
    hidden = 4096 // scale
    config = GraniteMoeHybridConfig(
        vocab_size=65536 // scale,
        hidden_size=hidden,
        layer_types=["mamba", "mamba", "attention", "mamba"],
        num_hidden_layers=4,
        num_attention_heads=32 // scale,
        num_key_value_heads=8 // scale,
        mamba_n_heads=2 * hidden // 64,
        mamba_d_head=64,
        mamba_d_state=128,
        mamba_n_groups=1,
        mamba_expand=2,
        num_local_experts=experts,
        num_experts_per_tok=6,
        intermediate_size=3072 // scale,
        shared_intermediate_size=6144 // scale,
        tie_word_embeddings=True,
    )
    config.dtype = dtype
    return config


def half_budget(config: NemotronHConfig) -> dict[str, int]:
    """Sizes of a submodel with about half the bytes, from `hidden` and `expert_ffn` alone.

    Widths are multiples of 8, because the fast expert kernels need rows of a multiple of 16 bytes in bfloat16.
    """
    return {
        "hidden": config.hidden_size * 5 // 7 // 8 * 8,
        "expert_ffn": config.moe_intermediate_size * 16 // 25 // 8 * 8,
    }


def write_checkpoint(
    directory: Path, parent: PreTrainedConfig, budgets: Mapping[str, Mapping[str, Any]], seed: int = 0
) -> int:
    """Write an elastic checkpoint shard by shard, one per layer; returns the bytes of its weights."""
    config = ElasticConfig.from_parent(parent, budgets)
    config.architectures = ["ElasticForCausalLM"]
    full = config.architecture.full(parent)
    generator = torch.Generator().manual_seed(seed)
    shards: dict[int | None, list[TensorRule]] = {}
    for rule in config.architecture.rules(parent):
        shards.setdefault(rule.layer, []).append(rule)
    weight_map: dict[str, str] = {}
    total = 0
    for i, rules in enumerate(shards.values(), 1):
        tensors: dict[str, torch.Tensor] = {}
        for rule in (rule for rule in rules if not rule.tied):
            tensor = _random(rule, rule.shape(full.at(rule.layer)), parent.dtype, generator)
            if rule.stacked:
                # safetensors refuses tensors that share storage
                tensors.update({rule.disk_name(k): expert.clone() for k, expert in enumerate(tensor)})
            else:
                tensors[rule.disk_name()] = tensor
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(directory)
    return total


def write_stock(directory: Path, parent: PreTrainedConfig, elastic: Path) -> None:
    """The parent of an elastic checkpoint in the stock layout as a stock checkpoint: the same files under the stock config."""
    directory.mkdir()
    for file in elastic.glob("model*.safetensors*"):
        os.link(file, directory / file.name)
    stock = copy.deepcopy(parent)
    stock.architectures = ["NemotronHForCausalLM"]
    stock.save_pretrained(directory)


def _random(rule: TensorRule, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Norms at one, everything else small: activations stay finite and far from denormal numbers."""
    dtype = torch.float32 if rule.fp32 else dtype
    if rule.norm:
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(std=0.02, generator=generator)
