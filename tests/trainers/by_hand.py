"""The distillation step written out: full logits, masks on the parent's weights, and the optimizer's formula."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from cases import build_parent
from torch import Tensor
from torch.func import functional_call

from hf_elastic import ElasticConfig, masked_model
from hf_elastic.architectures.pieces import pieces

Batch = Mapping[str, Tensor]


class ByHand:
    """A parent's parameters and AdamW's moments, updated by the definitions.

    Args:
        name (`str`): Of the parent.
        elastic (`ElasticConfig`): Names the budgets.
    """

    def __init__(self, name: str, elastic: ElasticConfig):
        self.parent, self.elastic = build_parent(name), elastic
        self.parameters = {key: p.detach().clone() for key, p in self.parent.named_parameters()}
        self.moments = {key: (torch.zeros_like(p), torch.zeros_like(p)) for key, p in self.parameters.items()}
        self.updates = 0

    def logits(
        self,
        budget: str | None,
        batch: Batch,
        weights: dict[str, Tensor] | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """Of the parent through the masks of a budget, `(B, T, V)`; of the untouched parent for `None`.

        Args:
            states (`list[torch.Tensor]`, *optional*): Gets the output of every layer, `(B, T, width)`, as wide as the parent's.
        """
        tokens = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        if budget is None:
            with torch.no_grad(), _recorded(self.elastic.architecture.layers_of(self.parent), states):
                return self.parent(**tokens).logits
        model, used = self.masked(budget, self.parameters if weights is None else weights)
        with _recorded(self.elastic.architecture.layers_of(model), states):
            return functional_call(model, used, (), tokens).logits

    def masked(self, budget: str, weights: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """The parent as a budget's masks leave it, and the weights to call it with."""
        submodel, used = self.elastic.submodel(budget), dict(weights)
        for piece in pieces(self.elastic.architecture, self.parent.config, submodel):
            if piece.rule.buffer or piece.rule.tied:
                continue
            used[piece.rule.name] = used[piece.rule.name] * piece.rule.mask(piece.full, piece.kept)
            if piece.rule.norm:
                used[piece.rule.name] *= math.sqrt(math.prod(piece.shape) / piece.rule.count(piece.full))
        return masked_model(self.parent, submodel).train(), used

    def distance(
        self, budget: str, batch: Batch, kind: str, layers: Sequence[int] | None, weights: dict[str, Tensor]
    ) -> Tensor:
        """Sum over target tokens of the mean over layers of `1 - cos(s, t)` or `mean (s - t)^2 / mean t^2`."""
        submodel = self.elastic.submodel(budget)
        width, students, teachers = submodel["hidden"], [], []
        self.logits(budget, batch, weights, students)
        self.logits(None, batch, states=teachers)
        target = batch["labels"][:, 1:] != -100
        total = torch.zeros((), dtype=torch.float64)
        kept = [layer for layer in (range(submodel.depth) if layers is None else layers) if layer in submodel.layers]
        for layer in kept:
            s, t = (states[layer][:, :-1, :width].double() for states in (students, teachers))
            if kind == "cosine":
                per_token = 1 - (s * t).sum(-1) / (s.square().sum(-1).sqrt() * t.square().sum(-1).sqrt())
            else:
                per_token = (s - t).square().mean(-1) / t.square().mean(-1)
            total = total + (per_token * target).sum() / len(kept)
        return total

    def divergence(self, budget: str, batch: Batch, weights: dict[str, Tensor] | None = None) -> tuple[Tensor, int]:
        """Sum of `sum_v p log(p / q)` over the target tokens, and their number."""
        teacher = self.logits(None, batch)[:, :-1].double().softmax(-1)
        student = self.logits(budget, batch, weights)[:, :-1].double().softmax(-1)
        per_token = (teacher * (teacher.log() - student.log())).sum(-1)
        target = batch["labels"][:, 1:] != -100
        return (per_token * target).sum(), int(target.sum())

    def step(self, micro_batches: Sequence[tuple[str, Batch]], rate: float, clip: float, **adam: Any) -> float:
        """One optimizer step over all micro-batches; returns the loss, the mean over all their target tokens."""
        weights = {key: p.clone().requires_grad_() for key, p in self.parameters.items()}
        parts = [self.divergence(budget, batch, weights) for budget, batch in micro_batches]
        loss = torch.stack([total for total, _ in parts]).sum() / sum(count for _, count in parts)
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        gradients = {
            key: torch.zeros_like(p) if g is None else g for (key, p), g in zip(weights.items(), found, strict=True)
        }
        norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients.values()))
        scale = min(1.0, clip / norm)
        self.updates += 1
        for key, p in self.parameters.items():
            self.moments[key] = _adamw(p, scale * gradients[key], self.moments[key], self.updates, rate, **adam)
        return float(loss.detach())


@contextmanager
def _recorded(layers: Any, states: list[Tensor] | None) -> Iterator[None]:
    handles = (
        []
        if states is None
        else [layer.register_forward_hook(lambda module, args, output: states.append(output)) for layer in layers]
    )
    yield
    for handle in handles:
        handle.remove()


def _adamw(
    p: Tensor,
    g: Tensor,
    moments: tuple[Tensor, Tensor],
    t: int,
    rate: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float,
    decay: float,
) -> tuple[Tensor, Tensor]:
    """In place on `p`; returns the new moments (arXiv 1711.05101, algorithm 2)."""
    m = betas[0] * moments[0] + (1 - betas[0]) * g
    v = betas[1] * moments[1] + (1 - betas[1]) * g**2
    p.mul_(1 - rate * decay)
    p.sub_(rate * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps))
    return m, v
