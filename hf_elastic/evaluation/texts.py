"""Every size measured on texts: how well it predicts them, and how far it is from the whole model. No size has to write anything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn import functional as F

from ..errors import ElasticConfigError
from ..modeling_elastic import ElasticForCausalLM

CHUNK = 1024
"""Tokens whose logits are float32 at any time; of a large vocabulary those of a batch would not fit beside the model."""


@torch.no_grad()
def measure_texts(model: ElasticForCausalLM, batches: Iterable[Mapping[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """Measure every named size on the same tokens. All tokens of a row count but the first, which nothing comes before.

    Args:
        model ([`ElasticForCausalLM`]): The whole family.
        batches (`Iterable[dict[str, torch.Tensor]]`): `input_ids` and `attention_mask`, as [`~hf_elastic.elastification.calibration.batches_of`] makes
            them of rows.

    Returns:
        `list[dict[str, Any]]`: Per size, the whole model first: `name`, `total_params`, `active_params`, `tokens` that were predicted; `loss`
            (nats per token) and `perplexity`, its exponential; `kl`, the divergence of the size from the whole model (nats per token); and
            `agreement`, the share of tokens for which both hold the same one likeliest.

    Raises:
        `ElasticConfigError`: no row has two tokens.
    """
    names = list(model.elastic_config.family())
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in names}
    tokens = 0
    for batch in batches:
        inputs = {key: tensor.to(model.device) for key, tensor in batch.items()}
        targets, seen = inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:].bool()
        whole = None
        for name in names:
            with model.at(name):
                logits = model(**inputs).logits[:, :-1][seen]
            whole = logits if whole is None else whole
            for part in zip(logits.split(CHUNK), whole.split(CHUNK), targets[seen].split(CHUNK), strict=True):
                sums[name] += _sums(*part).cpu()
        tokens += int(seen.sum())
    if not tokens:
        raise ElasticConfigError("no row has two tokens or more, so there is nothing to predict.")
    costs = model.elastic_config.costs()
    return [_entry(name, costs[name], tokens, *(sums[name] / tokens).tolist()) for name in names]


def _sums(logits: torch.Tensor, whole: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Over tokens: loss, divergence from the whole model, and how often both hold the same token likeliest."""
    log_p, log_q = F.log_softmax(whole.float(), -1), F.log_softmax(logits.float(), -1)
    loss = F.nll_loss(log_q, targets, reduction="sum")
    divergence = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    same = (logits.argmax(-1) == whole.argmax(-1)).sum()
    return torch.stack([loss.cpu().double(), divergence.double(), same.double()])


def _entry(name: str, cost: Any, tokens: int, loss: float, divergence: float, agreement: float) -> dict[str, Any]:
    return {
        "name": name,
        "total_params": cost.total_params,
        "active_params": cost.active_params,
        "tokens": tokens,
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "kl": divergence,
        "agreement": agreement,
    }
