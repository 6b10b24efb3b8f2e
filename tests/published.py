"""Sizes of published models that recipes and pages are for."""

from collections.abc import Callable
from typing import Any

from nano_v3 import nano_v3
from transformers import (
    BambaConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    KimiLinearConfig,
    Lfm2MoeConfig,
    LlamaConfig,
    NemotronHConfig,
    OlmoHybridConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)


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


def lfm2_8b() -> Lfm2MoeConfig:
    """Liquid LFM2-8B-A1B."""
    kinds = ["full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)]
    return Lfm2MoeConfig(layer_types=kinds, num_hidden_layers=len(kinds))


def bamba_9b() -> BambaConfig:
    """IBM Bamba-9B."""
    return BambaConfig(vocab_size=128256, attn_layer_indices=[9, 18, 27], mamba_d_state=128)


def llama31_8b() -> LlamaConfig:
    """Meta Llama 3.1 8B."""
    return LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8)


def qwen3_8b() -> Qwen3Config:
    """Qwen3-8B."""
    return Qwen3Config(intermediate_size=12288, num_hidden_layers=36, num_key_value_heads=8)


def qwen3_30b() -> Qwen3MoeConfig:
    """Qwen3-30B-A3B."""
    return Qwen3MoeConfig(
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    )


PARENTS: dict[str, Callable[[], PreTrainedConfig]] = {
    "Nemotron 3 Nano 30B-A3B": nano_v3,
    "Nemotron Nano 9B v2": nano2_9b,
    "Granite 4.0 H Tiny": granite4_tiny,
    "Bamba-9B": bamba_9b,
    "Jamba-v0.1": JambaConfig,
    "Qwen3-Next-80B-A3B": Qwen3NextConfig,
    "Kimi-Linear-48B-A3B": KimiLinearConfig,
    "Olmo-Hybrid-7B": OlmoHybridConfig,
    "LFM2-8B-A1B": lfm2_8b,
    "Llama-3.1-8B": llama31_8b,
    "Qwen3-8B": qwen3_8b,
    "Qwen3-30B-A3B": qwen3_30b,
}
"""Those that docs/architectures.md has sizes for; where it is the class alone, its defaults are that model."""
