"""Sorting a parent by importance so that every prefix is the most important part, without changing what it computes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from transformers import PreTrainedConfig

from ..architectures import Architecture
from ..architectures.submodel import LAYERS
from ..errors import ElasticConfigError
from .importance import Scores
from .listening import MAMBA

Orders = dict[int | None, dict[str, torch.Tensor]]
"""Per layer (`None`: global) and axis the old index of every new position, `(groups, size per group)`."""


def ranked(
    architecture: Architecture, config: PreTrainedConfig, scores: Scores, axis: str, layer: int | None, channels: int
) -> torch.Tensor:
    """The scores of one axis in one layer as `(groups, size per group)`: each row is sorted by itself.

    Args:
        channels (`int`): Head channels that the smallest budget keeps; `mamba_heads` are ranked by these (eq. A 4).
    """
    spec = architecture.axis(axis)
    key = -1 if layer is None else layer
    if axis in ("mamba_heads", "mamba_head_dim"):
        moments = scores.values[MAMBA][key]  # (heads, head_dim)
        per_channel = moments.sum(0).sqrt()
        if axis == "mamba_head_dim":
            return per_channel[None]
        top = per_channel.topk(channels).indices
        values = moments[:, top].sum(1).sqrt()
    else:
        # Layers that share a block have one order of it, by what all of them have of an entry.
        layers = architecture.sharers(config, layer) if spec.shared and layer is not None else (key,)
        values = torch.stack([scores.values[axis][i] for i in layers]).sum(0)
    if axis == "expert_ffn":
        return values  # one row per expert
    layer_config = config if layer is None else config.per_layer_config[layer]
    groups = int(getattr(layer_config, spec.groups)) if spec.groups else 1
    return values.reshape(groups, -1)


def orders_from_scores(
    architecture: Architecture,
    config: PreTrainedConfig,
    scores: Scores,
    axes: Collection[str],
    smallest: Mapping[int, int] | None = None,
) -> Orders:
    """How to sort the parent along the given axes.

    Args:
        axes (`Collection[str]`): Axes to sort; the others keep their order.
        smallest (`dict[int, int]`, *optional*): Per layer the fewest head channels that a budget keeps; all if not given.

    Raises:
        `ElasticConfigError`: an axis was not scored, or scores of another model were given.
    """
    full = architecture.full(config)
    orders: Orders = {}
    for axis in architecture.available_axes(config):
        if axis.name not in axes or axis.name in (LAYERS, "experts_per_token"):
            continue
        if not scores.has(axis.name):
            raise ElasticConfigError(
                f"axis {axis.name!r} was not scored (scores has {', '.join(scores.values) or 'nothing'}); score it, or leave it out of axes."
            )
        for layer in [None] if axis.part is None else architecture.layers_with(config, axis):
            sizes = full.at(layer)
            channels = (smallest or {}).get(layer, sizes.get("mamba_head_dim", 1)) if layer is not None else 1
            try:
                values = ranked(architecture, config, scores, axis.name, layer, channels)
            except (KeyError, RuntimeError) as error:
                raise ElasticConfigError(
                    f"the scores of {axis.name!r} are not of this model: layer {layer} ({error})."
                ) from error
            if values.shape[-1] * (1 if axis.name == "expert_ffn" else len(values)) != sizes[axis.name]:
                raise ElasticConfigError(
                    f"the scores of {axis.name!r} are not of this model: layer {layer} has {tuple(values.shape)}, its size is {sizes[axis.name]}."
                )
            # Stable: entries of equal score, dead ones above all, stay where they are.
            orders.setdefault(layer, {})[axis.name] = values.sort(dim=-1, descending=True, stable=True).indices
    return orders


def sort_state_dict(
    architecture: Architecture,
    config: PreTrainedConfig,
    state_dict: dict[str, torch.Tensor],
    orders: Orders,
    release: bool = False,
) -> dict[str, torch.Tensor]:
    """Sort every tensor of a parent. The result shares nothing with the input.

    Args:
        state_dict (`dict[str, torch.Tensor]`): Of the live causal model.
        orders (`Orders`): From [`orders_from_scores`].
        release (`bool`, *optional*, defaults to `False`): Take tensors out of the state dict once they are sorted, so that their memory is free.
    """
    full = architecture.full(config)
    result: dict[str, torch.Tensor] = {}
    for rule in architecture.rules(config):
        here = {**orders.get(None, {}), **orders.get(rule.layer, {})}
        tensor = state_dict.pop(rule.name) if release else state_dict[rule.name]
        if (stored := rule.copy_of) is not None and stored in result:  # one tensor under several names stays one
            result[rule.name] = result[stored]
            continue
        moved = rule.permute(tensor, full.at(rule.layer), here)
        result[rule.name] = moved.clone() if moved is tensor else moved.contiguous()
    return result
