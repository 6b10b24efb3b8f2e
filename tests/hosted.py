"""Tiny vision-language models around a text model that can be elastic, and what they are shown."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

IMAGE, HIDDEN = 60, 48
SIZES = {"hidden": 24, "attention_heads": 4, "value_heads": 2}
LFM_SIZES = {"hidden": 24, "attention_heads": 4}
OUT = {"lfm": "model.multi_modal_projector.linear_2"}
"""What writes images into the residual stream, where it is not Qwen's `model.visual.merger.linear_fc2`."""
TEXT = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "full_attention_interval": 2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
DENSE = {"intermediate_size": 40}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 16,
}
KINDS = {
    "dense": (Qwen3_5Config, Qwen3_5ForConditionalGeneration, DENSE),
    "moe": (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration, MOE),
}


LFM_TEXT = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "layer_types": ["conv", "full_attention"],
    "block_auto_adjust_ff_dim": False,
}
LFM_VISION = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_patches": 16,
    "patch_size": 4,
    "vision_use_head": False,
}


def build_whole(kind: str, tied: bool = False) -> PreTrainedModel:
    """A stock vision-language model with a random value in every tensor."""
    torch.manual_seed(0)
    if kind == "lfm":
        sections = {"text_config": dict(LFM_TEXT), "vision_config": dict(LFM_VISION)}
        config = Lfm2VlConfig(**sections, projector_hidden_size=20, image_token_id=IMAGE)
        model = Lfm2VlForConditionalGeneration(config).eval()
    else:
        config_class, model_class, sizes = KINDS[kind]
        config = config_class(
            text_config={**TEXT, **sizes, "tie_word_embeddings": tied},
            vision_config=dict(VISION),
            image_token_id=IMAGE,
            video_token_id=61,
            vision_start_token_id=58,
            vision_end_token_id=59,
            tie_word_embeddings=tied,
        )
        model = model_class(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def save_whole(kind: str, folder: Path, tied: bool = False) -> PreTrainedModel:
    """Saves it as a repository has it, with a processor's file."""
    model = build_whole(kind, tied)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"patch_size": 4}\n')
    return model


def seen(kind: str = "dense") -> dict[str, torch.Tensor]:
    """A text around an image of 4 x 4 patches, which are merged 2 x 2."""
    torch.manual_seed(1)
    ids = torch.tensor([[1, 2, 58, *[IMAGE] * 4, 59, 5, 6, 7]])
    if kind == "lfm":
        mask, shapes = torch.ones(1, 16, dtype=torch.long), torch.tensor([[4, 4]])
        patches = torch.randn(1, 16, 3 * 4 * 4)
        return {"input_ids": ids, "pixel_values": patches, "spatial_shapes": shapes, "pixel_attention_mask": mask}
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def read() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randint(0, 50, (2, 9))
