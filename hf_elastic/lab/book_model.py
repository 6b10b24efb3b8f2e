"""The model of the `book` task: a hybrid of Mamba, attention and mixture-of-experts layers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from .task import build_tokenizer

FAMILY: dict[str, dict[str, Any]] = {
    "half": {"hidden": 32, "expert_ffn": 16, "shared_expert_ffn": 32},
    "third": {"hidden": 24, "expert_ffn": 8, "shared_expert_ffn": 16},
    "quarter": {"hidden": 16, "expert_ffn": 8, "shared_expert_ffn": 16},
}
"""Submodels of `book` that are trained, about 53, 35 and 24 % of the parent's active parameters."""


def parent_config(**overrides: Any) -> NemotronHConfig:
    """Gives the configuration of the parent: 6 layers of width 48, 141,856 parameters.

    Args:
        **overrides (`Any`): Fields of `NemotronHConfig` to set otherwise, such as `hidden_size=64`.

    Returns:
        `NemotronHConfig`: A configuration with the vocabulary and the special tokens of
        [`~hf_elastic.lab.book.build_tokenizer`].

    Example:

    ```python
    >>> from hf_elastic.lab.parent import parent_config
    >>> parent_config().hybrid_override_pattern
    'ME*EME'
    ```
    """
    tokenizer = build_tokenizer()
    fields = {
        "hybrid_override_pattern": "ME*EME",
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "mamba_num_heads": 8,
        "mamba_head_dim": 12,
        "n_groups": 2,
        "ssm_state_size": 16,
        # Sequences are short: the scan pads them to a multiple of this many tokens.
        "chunk_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 64,
        # Only a pattern with `-` uses it; the default is made for a model a hundred times as wide.
        "intermediate_size": 64,
        # With the usual 0.02 so narrow a model learns much more slowly.
        "initializer_range": 0.08,
        # The longest problem, 20 letters, has 218 tokens.
        "max_position_embeddings": 256,
    }
    return NemotronHConfig(**(fields | overrides))


def new_parent(seed: int, overrides: Mapping[str, Any] = MappingProxyType({})) -> NemotronHForCausalLM:
    """An untrained parent of the `book` task; its weights depend on the seed alone."""
    # Everything random about a training run besides its data is here, so the caller's generator is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NemotronHForCausalLM(parent_config(**overrides))
    model.generation_config.do_sample = False
    # A problem of 20 letters takes 156 new tokens; without a value generation would stop after 20.
    model.generation_config.max_new_tokens = 160
    return model
