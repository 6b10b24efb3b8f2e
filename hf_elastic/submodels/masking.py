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
from torch import nn
from transformers import PreTrainedModel

from ..architectures import Architecture, get_architecture
from ..architectures.axes import Norm
from ..architectures.pieces import Piece, pieces
from ..architectures.submodel import Submodel
from ..errors import ElasticConfigError, HFElasticError, shown


def masked_model(parent: PreTrainedModel, submodel: Submodel) -> PreTrainedModel:
    """A copy of a stock parent that computes what a submodel computes.

    - Every weight is multiplied by the outer product of its dimensions' masks (arXiv 2511.16664, eq. 20-25, 34, 35, 42).
    - An RMSNorm over N channels of which k live gets `eps * k/N` and `weight * sqrt(k/N)`: its mean runs over N channels, so
      `sqrt(S/N + eps k/N) = sqrt(k/N) sqrt(S/k + eps)`. The same holds per group of the gated norm inside Mamba.
    - What a module multiplies by because of a size (`TensorRule.scale`) is that of the submodel's size.
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
    parts = list(pieces(architecture, model.config, submodel))
    with torch.no_grad():
        for piece in parts:
            owner = model.get_submodule(piece.rule.module)
            if not piece.copy_of:  # the weight may be shared, the epsilon is each module's own
                tensor = getattr(owner, piece.rule.name.rpartition(".")[2])
                tensor.copy_(masked_weight(piece, tensor))
            correct_epsilon(owner, piece)
            if piece.rule.scale is not None:
                ratio = piece.rule.scale(piece.kept) / piece.rule.scale(piece.full)
                owner.register_forward_hook(partial(_scaled, ratio))
    for piece in (part for part in parts if part.rule.routes):  # after the weights: -inf times a mask would be NaN
        router = model.get_submodule(piece.rule.module)
        bias = torch.full((piece.rule.dims[0].size(piece.full),), -torch.inf, device=model.device)
        for start, stop in piece.runs[0]:
            bias[start:stop] = 0.0
        top_k = piece.kept[architecture.per_token[piece.rule.experts]]
        architecture.bias_router(router, router, bias, top_k)
    layers = architecture.layers_of(model)
    for layer in set(range(submodel.depth)) - set(submodel.layers):
        layers[layer].forward = partial(_identity, architecture)  # type: ignore[method-assign]
    return model


_EPSILONS = ("variance_epsilon", "eps", "epsilon")
"""What stock norms call their epsilon."""


def masked_weight(piece: Piece, weight: torch.Tensor) -> torch.Tensor:
    """A tensor of the parent as the masked model has it; differentiable in the tensor."""
    masked = weight * piece.rule.mask(piece.full, piece.kept).to(weight)
    if isinstance(norm := piece.rule.norm, Norm):
        return (masked + norm.centre) * math.sqrt(piece.rule.alive(piece.full, piece.kept)) - norm.centre
    return masked


def correct_epsilon(module: Any, piece: Piece) -> None:
    """Give a norm of the masked model, if that is what a module is, its epsilon."""
    if isinstance(norm := piece.rule.norm, Norm):
        epsilon = epsilon_of(module, norm)
        setattr(module, epsilon, getattr(module, epsilon) * piece.rule.alive(piece.full, piece.kept))


def epsilon_of(module: Any, norm: Norm) -> str:
    """What a stock norm calls its epsilon.

    Raises:
        `HFElasticError`: the module has none, or subtracts a mean, which no correction of weight and epsilon makes up for.
    """
    known = (norm.epsilon,) if norm.epsilon else _EPSILONS
    names = [name for name in known if isinstance(getattr(module, name, None), (int, float, torch.Tensor))]
    if not names or is_layer_norm(module):
        raise HFElasticError(
            f"the table calls a {type(module).__name__} an RMSNorm, but it "
            + ("subtracts a mean" if names else f"has no number called {' or '.join(known)}")
            + ": masks and mixtures of sizes cannot be made exact."
        )
    return names[0]


def is_layer_norm(module: nn.Module) -> bool:
    """Whether a norm subtracts a mean, by its class."""
    return isinstance(module, (nn.LayerNorm, nn.GroupNorm)) or type(module).__name__.endswith("LayerNorm")


def _scaled(ratio: float, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * ratio


def _identity(architecture: Architecture, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return architecture.passed(hidden_states)
