"""Sizes of published models that recipes are for."""

from typing import Any

from transformers import GraniteMoeHybridConfig, NemotronHConfig


def granite4_tiny() -> GraniteMoeHybridConfig:
    """Granite 4.0 H Tiny."""
    kinds = ["full_attention" if i in (5, 15, 25, 35) else "linear_attention" for i in range(40)]
    return GraniteMoeHybridConfig(
        vocab_size=100352,
        hidden_size=1536,
        intermediate_size=512,
        shared_intermediate_size=1024,
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        num_attention_heads=12,
        num_key_value_heads=4,
        mamba_n_heads=48,
        mamba_d_head=64,
        mamba_d_state=128,
        mamba_n_groups=1,
        num_local_experts=64,
        num_experts_per_tok=6,
        tie_word_embeddings=True,
        position_embedding_type="nope",
        max_position_embeddings=131072,
    )


def nano2_9b(**fields: Any) -> NemotronHConfig:
    """NVIDIA Nemotron Nano 9B v2."""
    return NemotronHConfig(
        **{
            "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
            "vocab_size": 131072,
            "hidden_size": 4480,
            "intermediate_size": 15680,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "mamba_num_heads": 128,
            "mamba_head_dim": 80,
            "n_groups": 8,
            "ssm_state_size": 128,
            "max_position_embeddings": 131072,
        }
        | fields
    )


def nano2_12b() -> NemotronHConfig:
    """NVIDIA Nemotron Nano 12B v2, the parent of the 9B and of the Nemotron Elastic family."""
    pattern = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
    return nano2_9b(hybrid_override_pattern=pattern, hidden_size=5120, intermediate_size=20480)


NANO3_4B = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"
"""Kinds of the layers of NVIDIA Nemotron 3 Nano 4B. Which layers of the 9B they are is not published: many choices give this list."""


def first_layers_of(pattern: str, kinds: str) -> list[int]:
    """The earliest layers that are of these kinds, in order."""
    layers, start = [], 0
    for kind in kinds:
        layers.append(pattern.index(kind, start))
        start = layers[-1] + 1
    return layers
