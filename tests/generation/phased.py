"""What the tests of phases share besides fixtures."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

PAD, EOS, THINK, END, NEWLINE, POINT = range(6)
NARROW = {
    "nano3": {"hidden": 32, "mamba_heads": 6, "mamba_head_dim": 4, "experts": 8, "expert_ffn": 8},
    "granite": {"hidden": 24, "mamba_heads": 12, "attention_heads": 4, "expert_ffn": 8},
}
"""A small submodel of each parent that keeps every layer, so that it can hand over."""


class Script(LogitsProcessor):
    """Makes a model write given tokens: `lines[first token of the prompt][tokens of the text after it]`."""

    def __init__(self, lines: dict[int, list[int]], prompt: int):
        self.lines, self.prompt = lines, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, float("-inf"))
        for row, ids in enumerate(input_ids.tolist()):
            text = [token for token in ids if token != PAD]
            forced[row, self.lines[text[0]][len(text) - self.prompt]] = 0.0
        return forced
