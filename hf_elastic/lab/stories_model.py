"""The model of the `stories` task: a hybrid of short convolutions and attention, and the sizes of its family."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from transformers import Lfm2Config, Lfm2ForCausalLM

from .stories import build_tokenizer

_LAYERS = {"c": "conv", "a": "full_attention"}
_PATTERN = "ccaccaca"

SIZES: dict[str, dict[str, Any]] = {
    "half": {"hidden": 48, "ffn": 96, "layers": [0, 2, 3, 5]},
    "quarter": {"hidden": 32, "ffn": 64, "layers": [0, 2, 3, 5]},
}
"""Submodels that are trained, besides the whole: narrower, and with fewer of the 8 layers, which is what saves time on a CPU."""


def parent_config(**overrides: Any) -> Lfm2Config:
    """Gives the configuration of the parent: 8 layers of width 64.

    Args:
        **overrides (`Any`): Fields of `Lfm2Config` to set otherwise, such as `hidden_size=96`.
    """
    tokenizer = build_tokenizer()
    fields = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "hidden_size": 64,
        "intermediate_size": 128,
        "block_auto_adjust_ff_dim": False,
        "num_hidden_layers": len(_PATTERN),
        "layer_types": [_LAYERS[letter] for letter in _PATTERN],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "conv_L_cache": 3,
        # With the usual 0.02 so narrow a model learns much more slowly.
        "initializer_range": 0.08,
        # A story of 10 people with its solution fits; those of the training have 5.
        "max_position_embeddings": 256,
    }
    return Lfm2Config(**(fields | overrides))


def new_parent(seed: int, overrides: Mapping[str, Any] = MappingProxyType({})) -> Lfm2ForCausalLM:
    """An untrained parent of the `stories` task; its weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Lfm2ForCausalLM(parent_config(**overrides))
    model.generation_config.do_sample = False
    # A story of 5 people takes 88 new tokens; without a value generation would stop after 20.
    model.generation_config.max_new_tokens = 128
    return model
