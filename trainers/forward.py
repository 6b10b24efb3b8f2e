"""Hidden states of wrapped models, computed inside a call of the wrapper: DDP and FSDP only see what happens there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .losses import Head


def last_hidden_through(
    model: nn.Module, tokens: dict[str, torch.Tensor], base: nn.Module | None = None
) -> torch.Tensor:
    """Last hidden states `(B, T, width)`, computed inside a call of the model, which is what gathers sharded parameters.

    Args:
        base (`nn.Module`, *optional*): The causal model inside it, if more is around it than DDP (adapters).
    """
    inner = getattr(model, "module", model)
    with forward_as(inner, lambda **kwargs: last_hidden(inner if base is None else base, kwargs)):
        return model(**tokens)


def last_hidden(model: Any, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """Last hidden states `(B, T, width)` of a causal model, wrapped or not."""
    model = getattr(model, "module", model)
    return model.base_model(**tokens, use_cache=False).last_hidden_state


def head_of(model: PreTrainedModel) -> Head:
    """From last hidden states to logits."""
    scaling = getattr(model.config, "logits_scaling", 1.0)
    return lambda hidden: model.get_output_embeddings()(hidden) / scaling


@contextmanager
def forward_as(model: nn.Module, forward: Any) -> Iterator[None]:
    """Let calling the model, through whatever wraps it, run another function."""
    had = model.__dict__.get("forward")
    model.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if had is None:
            del model.__dict__["forward"]
        else:
            model.forward = had  # type: ignore[method-assign]
