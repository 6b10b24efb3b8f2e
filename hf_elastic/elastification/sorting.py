"""Sorting a parent by importance so that every prefix is the most important part, without changing what it computes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from transformers import PreTrainedConfig

from ..architectures import Architecture
from ..errors import ElasticConfigError
from .importance import Scores
from .listening import score_key, sorted_axes

Orders = dict[int | None, dict[str, torch.Tensor]]
"""Per layer (`None`: global) and axis the old index of every new position, `(groups, size per group)`."""


def ranked(
    architecture: Architecture,
    config: PreTrainedConfig,
    scores: Scores,
    name: str,
    layer: int | None,
    channels: int | None = None,
) -> torch.Tensor:
    """The scores of an axis, or of an order of its own, in one layer as `(groups, size per group)`: each row is sorted by itself.

    Args:
        channels (`int`, *optional*): How many channels the smallest budget keeps: heads are ranked by these (eq. A 4).
    """
    axis = next((axis for axis in architecture.axes if axis.name == name), None)
    # Layers that share a block have one order of it, by what all of them have of an entry.
    layers: tuple[int, ...] = (-1 if layer is None else layer,)
    if axis is not None and axis.shared and layer is not None:
        layers = architecture.sharers(config, layer)
    values = torch.stack([scores.values[score_key(architecture, name)][i] for i in layers]).sum(0)
    heads = architecture.heads_of(name) if axis else None
    if heads is not None:  # (heads, head_dim)
        per_channel = values.sum(0).sqrt()
        if name == heads.channels:
            return per_channel[None]
        top = per_channel.topk(channels or len(per_channel)).indices
        values = values[:, top].sum(1).sqrt()
    elif values.dim() > 1 and not (axis and axis.groups):
        return values  # one row per expert
    layer_config = config if layer is None else config.per_layer_config[layer]
    groups = int(getattr(layer_config, axis.groups)) if axis and axis.groups else 1
    return values.reshape(groups, -1)


def orders_from_scores(
    architecture: Architecture,
    config: PreTrainedConfig,
    scores: Scores,
    axes: Collection[str],
    smallest: Mapping[tuple[str, int], int] | None = None,
) -> Orders:
    """How to sort the parent along the given axes.

    Args:
        axes (`Collection[str]`): Axes to sort, with what follows them and has an order of its own (`Cut.order`); the others keep their order.
        smallest (`dict[tuple[str, int], int]`, *optional*): Per axis and layer the smallest size of a budget, for channels of heads; all if not given.

    Raises:
        `ElasticConfigError`: an axis was not scored, or scores of another model were given.
    """
    full, in_order, within = architecture.full(config), *sorted_axes(architecture, config)
    wanted: list[tuple[str, int | None, int]] = []  # name, layer, size
    for axis in architecture.available_axes(config):
        if axis.name in axes and axis.name in in_order and not axis.among:
            layers = [None] if axis.part is None else architecture.layers_with(config, axis)
            wanted += [(axis.name, layer, full.at(layer)[axis.name]) for layer in layers]
    for (order, layer), cut in architecture.orders(config).items():
        if set(axes) & set(cut.axes):
            wanted.append((order, layer, cut.size(full.at(layer))))
    orders: Orders = {}
    for name, layer, size in wanted:
        if not scores.has(name, architecture):
            raise ElasticConfigError(
                f"axis {name!r} was not scored (scores has {', '.join(scores.values) or 'nothing'}); score it, or leave it out of axes."
            )
        heads = architecture.heads_of(name)
        channels = (
            (smallest or {}).get((heads.channels, layer)) if heads and heads.channels and layer is not None else None
        )
        try:
            values = ranked(architecture, config, scores, name, layer, channels)
        except (KeyError, RuntimeError) as error:
            raise ElasticConfigError(
                f"the scores of {name!r} are not of this model: layer {layer} ({error})."
            ) from error
        if values.shape[-1] * (1 if name in within else len(values)) != size:
            raise ElasticConfigError(
                f"the scores of {name!r} are not of this model: layer {layer} has {tuple(values.shape)}, its size is {size}."
            )
        # Stable: entries of equal score, dead ones above all, stay where they are.
        orders.setdefault(layer, {})[name] = values.sort(dim=-1, descending=True, stable=True).indices
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
