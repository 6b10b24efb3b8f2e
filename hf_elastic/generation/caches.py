"""What generation keeps, as plain tensors: take the sequences of a batch apart, join others, and hand over to another submodel.

A cache is read into `States`, one dict per layer from the key of a state (`StateRule.key`) to its tensor:

```
keys, values   (batch, kv heads, tokens, head_dim)      conv   (batch, channels, kernel)      ssm   (batch, heads, head_dim, state)
```

Where a layer has several states of one kind, the next are `conv.1`, `conv.2`, ... A layer with a sliding window has the keys and values of the
newest tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig

from ..architectures import Architecture
from ..architectures.axes import Dim, Sizes
from ..architectures.base import state_key
from ..architectures.submodel import Submodel
from ..errors import HandoverError

States = list[dict[str, torch.Tensor]]
"""Per layer of a submodel the tensors it keeps, by key."""

PER_TOKEN = ("keys", "values")
"""Kinds that grow with every token, or until a window is full; their tokens are dimension 2."""


def read_cache(cache: Cache) -> States:
    """The tensors of a cache; nothing is copied."""
    states: States = []
    for layer in cache.layers:
        found: dict[str, torch.Tensor] = {}
        if getattr(layer, "is_initialized", False) and getattr(layer, "keys", None) is not None:
            found.update(keys=layer.keys, values=layer.values)
        found.update(_slots(layer))
        states.append(found)
    return states


def _slots(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The states of a recurrent layer that were written, by key. Upstream notes that with the convolution, if there is one."""
    for slot, noted in getattr(layer, "has_previous_state", {}).items():
        convolved = layer.is_conv_states_initialized[slot]
        if convolved and noted:
            yield state_key("conv", slot), layer.conv_states[slot]
        if layer.is_recurrent_states_initialized[slot] and (noted or not convolved):
            yield state_key("ssm", slot), layer.recurrent_states[slot]


def write_cache(states: States, config: PreTrainedConfig, tokens: int | None = None) -> Cache:
    """A cache that holds these tensors.

    Args:
        config (`PreTrainedConfig`): Stock config of the submodel they belong to.
        tokens (`int`, *optional*): How many tokens they are of; found out where a layer keeps all of them.

    Raises:
        `HandoverError`: every layer has a sliding window, and `tokens` is missing.
    """
    cache = DynamicCache(config=config)
    tokens = _tokens(states, cache) if tokens is None else tokens
    for i, found in enumerate(states):
        if "keys" in found:
            cache.update(found["keys"], found["values"], i)
            if slides(cache.layers[i]):
                cache.layers[i].cumulative_length = tokens
        for key, tensor in found.items():
            kind, _, slot = key.partition(".")
            at: dict[str, int] = {"layer_idx": i, "state_idx": int(slot or 0)}
            if kind == "conv":
                cache.update_conv_state(tensor, **at, conv_kernel_size=tensor.shape[-1])
            elif kind == "ssm":
                cache.update_recurrent_state(tensor, **at)
                cache.layers[i].has_previous_state[at["state_idx"]] = True
    return cache


def slides(layer: Any) -> bool:
    """Whether a layer of a cache keeps the newest tokens alone."""
    return bool(getattr(layer, "is_sliding", False))


def _tokens(states: States, cache: Cache) -> int:
    held = [
        (found["keys"].shape[2], layer) for found, layer in zip(states, cache.layers, strict=False) if "keys" in found
    ]
    if held and all(slides(layer) and length >= layer.sliding_window - 1 for length, layer in held):
        raise HandoverError(
            "the windows of all layers are full, so nothing says how many tokens they have read; give tokens=, their number."
        )
    return max((length for length, _ in held), default=0)


def claim(
    cache: Cache, architecture: Architecture, config: PreTrainedConfig, submodel: Submodel, writer: Submodel
) -> None:
    """Note on a cache which submodel writes it.

    Args:
        config (`PreTrainedConfig`): The parent's stock config.
        submodel (`Submodel`): Who goes on with it.
        writer (`Submodel`): What to note for that; the same, or how another parent calls it.

    Raises:
        `HandoverError`: another one has written it.
    """
    found = getattr(cache, "_hf_elastic_writer", None)
    if found is writer:
        return
    if found is None and not _fits(read_cache(cache), architecture, config, submodel):
        by = "another model or budget"
    elif found is not None and found != writer:
        by = f"the budget {found.to_dict()}"
    else:
        cache._hf_elastic_writer = writer  # type: ignore[attr-defined]
        return
    raise HandoverError(
        f"this cache was written by {by}, and the model is at {writer.to_dict()}. A cache goes on at the budget that wrote it; to go on at another "
        "one, use generate(phase_plan=...), which hands it over, or read the text again with an empty cache."
    )


def _fits(states: States, architecture: Architecture, config: PreTrainedConfig, submodel: Submodel) -> bool:
    """Whether states can be a submodel's: none yet, or those that each of its layers keeps, in its sizes."""
    if not any(states):
        return True
    if any(states[len(submodel.layers) :]):
        return False
    states = states + [{}] * (len(submodel.layers) - len(states))
    for found, layer in zip(states, submodel.layers, strict=False):
        rules = architecture.states(config.per_layer_config[layer], layer)
        if found.keys() != {rule.key for rule in rules}:
            return False
        for rule in rules:
            shape = list(found[rule.key].shape)
            if shape[1:2] + shape[3 if rule.kind in PER_TOKEN else 2 :] != [
                dim.size(submodel.at(layer)) for dim in rule.dims
            ]:
                return False
    return True


def take_row(states: States, row: int, tokens: int) -> States:
    """The states of one sequence of a batch, without the padding on its left.

    Args:
        tokens (`int`): How many tokens of the sequence the cache holds.
    """
    return [
        {
            key: tensor[row : row + 1, :, max(0, tensor.shape[2] - tokens) :]
            if key in PER_TOKEN
            else tensor[row : row + 1]
            for key, tensor in layer.items()
        }
        for layer in states
    ]


def join_rows(rows: Sequence[States]) -> States:
    """One batch out of sequences that may have seen different numbers of tokens; the shorter ones are padded on the left."""
    joined: States = []
    for layers in zip(*rows, strict=True):
        layer = {}
        for key in layers[0]:
            tensors = [found[key] for found in layers]
            if key in PER_TOKEN:
                longest = max(tensor.shape[2] for tensor in tensors)
                tensors = [torch.nn.functional.pad(tensor, (0, 0, longest - tensor.shape[2], 0)) for tensor in tensors]
            layer[key] = torch.cat(tensors)
        joined.append(layer)
    return joined


def hand_over(
    states: States,
    architecture: Architecture,
    config: PreTrainedConfig,
    source: Submodel,
    target: Submodel,
    *,
    scale: bool = True,
) -> States:
    """The states that `target` goes on with where `source` stopped.

    Along every axis entries that both have are kept, and those that only `target` has start at zero, as they have seen nothing. So does a
    layer that only `target` has, if all that it keeps is the window of a convolution, a few tokens long. What
    submodels of different widths write is of different size: the norms in front of the mixers run over fewer channels, so that with k of N
    channels keys, values and convolution inputs are about sqrt(k / N), SSM states k / N times as large, and keys that have a norm of their own
    just as large (`StateRule.degree`). `scale` corrects for that (measured in the lab: without it a larger submodel cannot go on at all; in a
    small Qwen3-Next: with sqrt(k / N) for keys that are normed, 1.28 nats instead of 0.68).

    Args:
        states (`States`): Of `source`, one entry per layer that it keeps.
        config (`PreTrainedConfig`): The parent's stock config.
        source, target (`Submodel`): Sizes of the submodel that wrote the states and of the one that goes on.
        scale (`bool`, *optional*, defaults to `True`): Correct the size of what was written.

    Returns:
        `States`: One entry per layer of `target`; differentiable in `states`. The same object if the submodels are the same.

    Raises:
        `HandoverError`: `target` has a layer that keeps more than the window of a convolution, and `source` does not have it.
    """
    check_hand_over(architecture, config, source, target)
    if source == target:
        return states
    full = architecture.full(config)
    position = {layer: i for i, layer in enumerate(source.layers)}
    wider = target.at(None)[architecture.stream] / source.at(None)[architecture.stream]
    given: States = []
    for layer in target.layers:
        found: dict[str, torch.Tensor] = {}
        for rule in architecture.states(config.per_layer_config[layer], layer):
            if layer not in position:
                found[rule.key] = _untouched(states, [dim.size(target.at(layer)) for dim in rule.dims])
                continue
            tensor = states[position[layer]][rule.key]
            first, *rest = rule.dims
            along = {1: first, **dict(enumerate(rest, start=3 if rule.kind in PER_TOKEN else 2))}
            for i, dim in along.items():
                tensor = _move(tensor, i, dim, full.at(layer), source.at(layer), target.at(layer))
            found[rule.key] = tensor * wider**rule.degree if scale and wider != 1 else tensor
        given.append(found)
    return given


def check_hand_over(architecture: Architecture, config: PreTrainedConfig, source: Submodel, target: Submodel) -> None:
    """Raise [`HandoverError`] if `target` has a layer that `source` does not have, and that keeps more than the window of a convolution."""

    def kept(layer: int) -> set[str]:
        return {rule.kind for rule in architecture.states(config.per_layer_config[layer], layer)}

    missing = [layer for layer in target.layers if layer not in source.layers and kept(layer) - {"conv"}]
    if missing:
        raise HandoverError(
            f"the cache cannot be handed over: layers {missing} keep a cache and were dropped from the submodel before; use "
            "handover='reprefill'."
        )


def _untouched(states: States, shape: list[int]) -> torch.Tensor:
    """The window of a convolution that has read nothing, for the sequences of other states."""
    # SSM states are in float32 whatever the model is in.
    like = next(tensor for found in states for key, tensor in found.items() if not key.startswith("ssm"))
    return like.new_zeros(like.shape[0], *shape)


def _move(tensor: torch.Tensor, i: int, dim: Dim, full: Sizes, source: Sizes, target: Sizes) -> torch.Tensor:
    """Dimension `i` of a submodel's tensor as another submodel has it, by way of the parent's."""
    if dim.runs(full, source) == dim.runs(full, target):
        return tensor
    shape = list(tensor.shape)
    shape[i] = dim.size(full)
    whole = tensor.new_zeros(shape).index_copy(i, _index(dim, full, source, tensor.device), tensor)
    return whole.index_select(i, _index(dim, full, target, tensor.device))


def _index(dim: Dim, full: Sizes, kept: Sizes, device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in dim.runs(full, kept)])
