"""A submodel as a masked parent: full shapes, zeros where the submodel has nothing, and the two corrections that make it exact.

Masking is how a router that has not decided yet sees the family; here the masks are hard. It is also an independent way to
compute a submodel, which the tests compare slices with.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from ..architectures import Architecture, get_architecture
from ..architectures.pieces import Piece, pieces
from ..architectures.submodel import Submodel
from ..errors import ElasticConfigError, shown


def masked_model(parent: PreTrainedModel, submodel: Submodel) -> PreTrainedModel:
    """A copy of a stock parent that computes what a submodel computes.

    - Every weight is multiplied by the outer product of its dimensions' masks (arXiv 2511.16664, eq. 20-25, 34, 35, 42).
    - An RMSNorm over N channels of which k live gets `eps * k/N` and `weight * sqrt(k/N)`: its mean runs over N channels, so
      `sqrt(S/N + eps k/N) = sqrt(k/N) sqrt(S/k + eps)`. The same holds per group of the gated norm inside Mamba.
    - Routers choose among the kept experts only.
    - A dropped layer is the identity (eq. 20).

    Args:
        parent (`PreTrainedModel`): Stock causal model; it is not changed.
        submodel (`Submodel`): Sizes, as `ElasticConfig.submodel` gives them.

    Returns:
        `PreTrainedModel`: Stock model of the parent's config.
    """
    if not isinstance(submodel, Submodel):
        raise ElasticConfigError(
            f"submodel={shown(submodel)} must be a Submodel: ElasticConfig.submodel(name), or resolve(budget)."
        )
    model = copy.deepcopy(parent)
    architecture = get_architecture(model.config.model_type)
    parts = [piece for piece in pieces(architecture, model.config, submodel) if not piece.rule.tied]
    with torch.no_grad():
        for piece in parts:
            owner = model.get_submodule(piece.rule.module)
            tensor = getattr(owner, piece.rule.name.rpartition(".")[2])
            tensor.mul_(piece.rule.mask(piece.full, piece.kept).to(tensor))
            if piece.rule.norm:
                _correct_norm(owner, piece)
    for piece in (part for part in parts if part.rule.routes):  # after the weights: -inf times a mask would be NaN
        router = model.get_submodule(piece.rule.module)
        bias = torch.full((piece.rule.dims[0].size(piece.full),), -torch.inf)
        for start, stop in piece.runs[0]:
            bias[start:stop] = 0.0
        top_k = piece.kept[architecture.per_token[piece.rule.experts]]
        architecture.bias_router(router, router, bias, top_k)
    layers = architecture.layers_of(model)
    for layer in set(range(submodel.depth)) - set(submodel.layers):
        layers[layer].forward = partial(_identity, architecture)  # type: ignore[method-assign]
    return model


def _correct_norm(norm: Any, piece: Piece) -> None:
    alive = math.prod(piece.shape) / piece.rule.count(piece.full)
    norm.weight.add_(piece.rule.centre).mul_(math.sqrt(alive)).sub_(piece.rule.centre)
    epsilon = epsilon_of(norm)
    setattr(norm, epsilon, getattr(norm, epsilon) * alive)


def epsilon_of(norm: Any) -> str:
    """What a stock norm calls its epsilon."""
    return "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps"


def _identity(architecture: Architecture, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return architecture.passed(hidden_states)
