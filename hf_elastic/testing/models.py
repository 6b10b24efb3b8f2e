"""Tiny stock models whose every tensor is random, so that a tensor that is not cut, sorted or saved changes the logits."""

from __future__ import annotations

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..architectures import get_architecture
from .tiny import TINY

VOCAB = 64


def tiny_config(model_type: str, variant: int = 0) -> PreTrainedConfig:
    """The config of a tiny model of a table.

    Raises:
        `KeyError`: no tiny model is known for it; give [`check_architecture`] a config.
    """
    if model_type not in TINY:
        raise KeyError(f"no tiny model of {model_type!r} is known ({', '.join(TINY)} are); give a config of one.")
    first, *others = TINY[model_type]
    fields = first if variant == 0 else {**first, **others[variant - 1]}
    return AutoConfig.for_model(model_type, **fields)


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A stock causal model of this config in float32, all of it random."""
    model: PreTrainedModel = get_architecture(config.model_type).causal_class(config).eval()
    randomize(model, seed)
    return model.float()


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int = 0) -> None:
    """Fill every saved tensor with numbers of its own that keep logits of the order of 1 to 10."""
    generator = torch.Generator().manual_seed(seed)
    architecture = get_architecture(model.config.model_type)
    rules = {rule.name: rule for rule in architecture.rules(model.config)}
    for key, tensor in model.state_dict().items():
        leaf, rule = key.rpartition(".")[2], rules.get(key)
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in key and leaf == "weight":
            centre = getattr(rule.norm, "centre", 0.0) if rule is not None else 0.0
            tensor.copy_(1.0 - centre + 0.4 * noise)
        elif leaf in (
            "A_log",
            "dt_bias",
        ):  # softplus(dt_bias) stays far above time_step_min, the lower clamp of the scan
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 1.5 - 0.5)
        elif tensor.dim() == 1:
            tensor.copy_(0.3 * noise)
        elif "conv" in key and tensor.dim() == 3:
            tensor.copy_(0.5 * noise)
        elif "embed" in key:
            tensor.copy_(noise)
        else:
            tensor.copy_(noise * tensor.shape[-1] ** -0.5)
