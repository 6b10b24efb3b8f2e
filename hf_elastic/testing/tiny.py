"""Tiny models of every table: fields of their stock configs. The first entry is the default, the others change some of its fields.

Epsilons are far larger than usual, so that a norm whose epsilon is not corrected gives visibly different logits. Widths of experts are multiples
of 4, because `grouped_mm` needs rows of 16 bytes in float32.
"""

from __future__ import annotations

from typing import Any

EPS = 0.1
_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_DENSE = _COMMON | {"num_hidden_layers": 3, "rms_norm_eps": EPS, "head_dim": 8, "attention_bias": True}
_KINDS = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_QWEN = _COMMON | {
    "num_hidden_layers": 4,
    "layer_types": _KINDS,
    "head_dim": 8,
    "attention_bias": True,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
    "rms_norm_eps": EPS,
}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3}
_GEMMA = {
    "sliding_window": 7,
    "query_pre_attn_scalar": 11,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 9.0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_QWEN_MOE = _QWEN | {
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
}

TINY: dict[str, tuple[dict[str, Any], ...]] = {
    "nemotron_h": (
        _COMMON
        | {
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
            "hybrid_override_pattern": "ME*E-M",
        },
        {"hybrid_override_pattern": "M-M*-"},
        {"moe_latent_size": 16, "topk_group": 2, "use_conv_bias": False, "mlp_bias": True, "use_bias": True},
    ),
    "granitemoehybrid": (
        _COMMON
        | {
            "intermediate_size": 16,
            "shared_intermediate_size": 24,
            "layer_types": _KINDS,
            "num_hidden_layers": 4,
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
        },
        {"tie_word_embeddings": True, "mamba_n_groups": 1, "num_local_experts": 0, "num_experts_per_tok": 0},
    ),
    "bamba": (
        _COMMON
        | {
            "num_hidden_layers": 4,
            "attn_layer_indices": [1, 3],
            "attention_bias": True,
            "mlp_bias": True,
            "mamba_n_heads": 24,
            "mamba_d_head": 8,
            "mamba_expand": 4,
            "mamba_n_groups": 2,
            "mamba_d_state": 6,
            "mamba_chunk_size": 8,
            "mamba_proj_bias": True,
            "rms_norm_eps": EPS,
        },
        {
            "attn_layer_indices": [1],
            "num_hidden_layers": 3,
            "attention_bias": False,
            "mlp_bias": False,
            "mamba_proj_bias": False,
            "mamba_conv_bias": False,
            "mamba_n_groups": 1,
            "head_dim": 10,
            "tie_word_embeddings": True,
        },
    ),
    "falcon_h1": (
        _COMMON
        | {
            "num_hidden_layers": 3,
            "attention_bias": True,
            "mlp_bias": True,
            "mamba_n_heads": 12,
            "mamba_d_head": 8,
            "mamba_d_ssm": 96,
            "mamba_n_groups": 2,
            "mamba_d_state": 6,
            "mamba_chunk_size": 8,
            "mamba_proj_bias": True,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "rms_norm_eps": EPS,
            "ssm_multipliers": [1.1, 0.9, 1.2, 0.8, 1.3],
            "mlp_multipliers": [1.2, 0.7],
            "key_multiplier": 1.3,
            "attention_out_multiplier": 0.8,
            "ssm_in_multiplier": 1.2,
            "ssm_out_multiplier": 0.9,
            "embedding_multiplier": 1.5,
            "lm_head_multiplier": 1.4,
        },
        {
            "mamba_d_ssm": None,
            "mamba_rms_norm": False,
            "projectors_bias": True,
            "mamba_proj_bias": False,
            "mamba_conv_bias": False,
            "attention_bias": False,
            "mlp_bias": False,
            "mamba_n_groups": 1,
            "tie_word_embeddings": True,
        },
    ),
    "lfm2": (
        _COMMON
        | {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            "conv_bias": True,
            "norm_eps": EPS,
        },
        {
            "intermediate_size": 50,
            "block_auto_adjust_ff_dim": True,
            "block_multiple_of": 8,
            "tie_word_embeddings": False,
        },
    ),
    "lfm2_moe": (
        _COMMON
        | {
            "moe_intermediate_size": 16,
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "num_dense_layers": 2,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 1.5,
            "conv_bias": True,
            "norm_eps": EPS,
        },
        {"conv_bias": False, "use_expert_bias": False, "tie_word_embeddings": False, "norm_topk_prob": False},
    ),
    "qwen3_next": (
        _QWEN_MOE | {"mlp_only_layers": [1]},
        {"tie_word_embeddings": True, "mlp_only_layers": None, "decoder_sparse_step": 2, "norm_topk_prob": False},
    ),
    "qwen3_5_text": (_QWEN, {"tie_word_embeddings": True, "attention_bias": False}),
    "qwen3_5_moe_text": (_QWEN_MOE | {"tie_word_embeddings": True},),
    "jamba": (
        _COMMON
        | {
            "intermediate_size": 16,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "mamba_expand": 3,
            "mamba_dt_rank": 5,
            "mamba_d_state": 6,
            "mamba_proj_bias": True,
            "rms_norm_eps": EPS,
        },
        {
            "num_experts": 1,
            "mamba_expand": 2,
            "mamba_proj_bias": False,
            "mamba_conv_bias": False,
            "tie_word_embeddings": True,
        },
        {"num_hidden_layers": 8, "attn_layer_period": 4, "mamba_expand": 2},
    ),
    "llama": (
        _DENSE | {"mlp_bias": True},
        {"tie_word_embeddings": True, "mlp_bias": False, "head_dim": None, "rope_parameters": _LLAMA3},
    ),
    "mistral": (_DENSE | {"sliding_window": 7},),
    "qwen2": (_DENSE | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},),
    "zamba2": (
        _COMMON
        | {
            "num_hidden_layers": 5,
            "layers_block_type": ["hybrid", "linear_attention", "hybrid", "hybrid", "hybrid"],
            "num_mem_blocks": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "use_mem_rope": True,
            "adapter_rank": 5,
            "n_mamba_heads": 24,
            "mamba_expand": 4,
            "mamba_ngroups": 2,
            "mamba_d_state": 6,
            "chunk_size": 8,
            "rms_norm_eps": EPS,
        },
        {"num_mem_blocks": 1, "use_shared_attention_adapter": True, "add_bias_linear": True, "use_mem_rope": False},
        {"num_mem_blocks": 3, "num_key_value_heads": 3, "mamba_ngroups": 1},
    ),
    "olmo_hybrid": (
        _COMMON
        | {
            "num_hidden_layers": 4,
            "layer_types": _KINDS,
            "attention_bias": True,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 8,
            "rms_norm_eps": EPS,
        },
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": None},
            "linear_allow_neg_eigval": False,
            "tie_word_embeddings": True,
            "attention_bias": False,
        },
    ),
    "kimi_linear": (
        _COMMON
        | {
            "num_key_value_heads": 6,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 4,
            "layer_types": _KINDS,
            "mlp_layer_types": ["dense", "sparse", "sparse", "dense"],
            "kv_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "attention_bias": True,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "n_shared_experts": 2,
            "n_group": 2,
            "topk_group": 1,
            "num_local_experts": 12,
            "num_experts_per_tok": 3,
            "rms_norm_eps": EPS,
        },
        {  # the dict that the Hub's config has for sizes and kinds of layers
            "layer_types": None,
            "mlp_layer_types": None,
            "first_k_dense_replace": 1,
            "linear_attn_config": {
                "head_dim": 8,
                "num_heads": 4,
                "short_conv_kernel_size": 3,
                "kda_layers": [1, 3],
                "full_attn_layers": [2, 4],
            },
            "q_lora_rank": 16,
            "n_shared_experts": 1,
            "n_group": 1,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,  # stock ties nothing
        },
    ),
    "qwen3": (_DENSE | {"tie_word_embeddings": True},),
    "gemma2": (_DENSE | _GEMMA,),
    "gemma3_text": (_DENSE | _GEMMA | {"sliding_window_pattern": 2, "tie_word_embeddings": False},),
    "mixtral": (_DENSE | {"intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 3},),
    "qwen3_moe": (
        _DENSE
        | _EXPERTS
        | {"mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 7, "norm_topk_prob": True},
        {"mlp_only_layers": None, "decoder_sparse_step": 2, "use_sliding_window": False, "norm_topk_prob": False},
    ),
}
"""Per `model_type` the fields of a tiny model, and of its variants."""

_IN_BLOCKS: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8, "head_dim": 8}
_DELTA = _IN_BLOCKS | {"linear_num_value_heads": 4, "linear_value_head_dim": 32}
_MAMBA = _IN_BLOCKS | {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_expand": 2, "mamba_d_ssm": 128}
_MOE = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}

BLOCKS: dict[str, dict[str, Any]] = {
    "nemotron_h": _IN_BLOCKS
    | {
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
    },
    "granitemoehybrid": _MAMBA | {"intermediate_size": 32, "shared_intermediate_size": 32},
    "bamba": _MAMBA,
    "falcon_h1": _MAMBA,
    "lfm2": _IN_BLOCKS | {"block_auto_adjust_ff_dim": False},
    "lfm2_moe": _IN_BLOCKS | _MOE,
    "qwen3_next": _DELTA | _MOE,
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": _DELTA | _MOE,
    "jamba": _IN_BLOCKS | {"intermediate_size": 32, "mamba_expand": 2},
    "zamba2": {name: value for name, value in _IN_BLOCKS.items() if name != "head_dim"}
    | {"num_key_value_heads": 8, "n_mamba_heads": 4, "mamba_expand": 2},
    "olmo_hybrid": _DELTA,
    "kimi_linear": _IN_BLOCKS
    | {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "v_head_dim": 32,
        "moe_intermediate_size": 32,
    },
    "mixtral": _IN_BLOCKS | {"intermediate_size": 32},
    "qwen3_moe": _IN_BLOCKS | _MOE,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"), _IN_BLOCKS),
}
"""What the same models have in other sizes, so that 16 neighbours of every row can share a scale: at the whole size, and at a smaller one of every axis."""
