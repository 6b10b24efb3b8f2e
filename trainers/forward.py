"""Hidden states of wrapped models, computed inside a call of the wrapper: DDP and FSDP only see what happens there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_elastic.submodels.stencils import CutHead

from .lora import base_of
from .losses import Head


def last_hidden_through(model: nn.Module, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """Last hidden states `(B, T, width)`, computed inside a call of the model, which is what gathers sharded parameters."""
    inner = getattr(model, "module", model)
    with forward_as(inner, lambda **kwargs: last_hidden(inner, kwargs)):
        return model(**tokens)


def last_hidden(model: Any, tokens: dict[str, Any]) -> torch.Tensor:
    """Last hidden states `(B, T, width)` of a causal model, wrapped or not; with a cache only if one is given with `use_cache`."""
    model = base_of(getattr(model, "module", model))
    return model.base_model(**{"use_cache": False, **tokens}).last_hidden_state


def head_of(model: PreTrainedModel) -> Head:
    """From last hidden states to logits."""
    scaling = getattr(model.config, "logits_scaling", 1.0)
    return lambda hidden: model.get_output_embeddings()(hidden) / scaling


def head_now(model: Any) -> Head:
    """From last hidden states to logits at the budget of an elastic model that is active now, whichever is when it is called: chunks of logits
    are made again in backward."""
    scaling, head = getattr(model.config, "logits_scaling", 1.0), model.get_output_embeddings()
    forward = (head.module if isinstance(head, CutHead) else head).forward
    return lambda hidden: forward(hidden) / scaling


@contextmanager
def states_after(layers: Sequence[nn.Module], target: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Collect what layers of a model put out inside a `with` block, in the order in which they run.

    The block has to end before backward: layers that are computed again there are not to be collected again.

    Args:
        target (`torch.Tensor`): Boolean `(B, T)`, or `(B, T - 1)` if the last position is not a target; at which positions to collect.

    Returns:
        `list[torch.Tensor]`: One `(target tokens, width)` per layer, with gradient if the layer's output has one.
    """
    states: list[torch.Tensor] = []

    def collect(module: nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        states.append(output[:, : target.shape[1]][target])

    handles = [layer.register_forward_hook(collect) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


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
