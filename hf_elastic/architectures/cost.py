"""Exact cost of submodels: parameters, bytes of weights, and bytes of the caches that generation keeps.

Everything is read off the table of the architecture, so it needs a config and no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedConfig

from . import Architecture, StateRule, get_architecture
from .axes import TensorRule
from .base import tokens_kept
from .encodings import Encoding, itemsize
from .submodel import Submodel

WEIGHT_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Cost:
    """What one submodel costs. Parameters are counted as `num_parameters()` counts them: tied weights once, buffers not.

    Args:
        total_params (`int`): All parameters.
        active_params (`int`):
            Parameters that one token uses: `experts_per_token` of the routed experts, everything else whole, embeddings and head
            included.
        fp32_elements (`int`): Stored elements that stay in float32 at every load dtype.
        other_elements (`int`): Stored elements in the load dtype.
        kv_elements (`int`): Elements of the KV cache per token and sequence, in layers that keep all tokens.
        conv_elements (`int`): Elements of the convolution states per sequence.
        ssm_elements (`int`): Elements of the SSM states per sequence; they are kept in float32.
        windowed (`tuple[tuple[int, int], ...]`): Per sliding window the elements of the KV cache per token in layers that have it.
        coded_elements (`int`): Of `other_elements` those of weights that are stored as codes and scales.
        coded_bytes (`int`): Bytes of these codes and scales.
    """

    total_params: int = 0
    active_params: int = 0
    fp32_elements: int = 0
    other_elements: int = 0
    kv_elements: int = 0
    conv_elements: int = 0
    ssm_elements: int = 0
    windowed: tuple[tuple[int, int], ...] = ()
    coded_elements: int = 0
    coded_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        counts = [name for name in self.__dataclass_fields__ if name != "windowed"]
        windows = dict(self.windowed)
        for window, elements in other.windowed:
            windows[window] = windows.get(window, 0) + elements
        sums = {name: getattr(self, name) + getattr(other, name) for name in counts}
        return Cost(**sums, windowed=tuple(sorted(windows.items())))

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all weights and buffers in memory at a load dtype, where those that are stored as codes are decoded."""
        return 4 * self.fp32_elements + dtype.itemsize * self.other_elements

    def stored_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all stored tensors, without headers, if what is not stored as codes is in `dtype`; so many a packed model holds as well."""
        return self.weight_bytes(dtype) - dtype.itemsize * self.coded_elements + self.coded_bytes

    def kv_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that every token of a sequence adds to the KV cache; in layers with a sliding window none once that is full."""
        return dtype.itemsize * self.kv_elements

    def window_bytes(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of the KV cache of one sequence in layers with sliding windows, when these are full."""
        return dtype.itemsize * sum(tokens_kept(window, window) * elements for window, elements in self.windowed)

    def state_bytes(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of convolution states (in `dtype`) and SSM states (float32) of one sequence, however long it is."""
        return dtype.itemsize * self.conv_elements + 4 * self.ssm_elements

    def cache_bytes(self, context_length: int, batch_size: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that `batch_size` sequences of `context_length` tokens keep: KV cache, convolution states and SSM states."""
        kv = context_length * self.kv_elements
        kv += sum(tokens_kept(context_length, window) * elements for window, elements in self.windowed)
        return batch_size * (dtype.itemsize * kv + self.state_bytes(dtype))

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as `hf-elastic plan --json` prints it; caches for bfloat16 activations."""
        return {
            "total_params": self.total_params,
            "active_params": self.active_params,
            "weight_bytes": {name: self.weight_bytes(dtype) for name, dtype in WEIGHT_DTYPES.items()},
            "kv_bytes_per_token": self.kv_bytes_per_token(),
            "window_bytes": self.window_bytes(),
            "state_bytes": self.state_bytes(),
        }


Place = int | None | tuple[int, ...]
"""Where tensors are counted: in a layer, outside of all (`None`), or in a block that some layers share, which is there if one of them is."""


class CostModel:
    """Counts submodels of one parent; layers that are alike are counted once, so that a search can ask thousands of times.

    Args:
        config (`PreTrainedConfig`): The parent's stock config.
        architecture (`Architecture`, *optional*): Defaults to the one of the config's `model_type`.
        encodings (`dict[str, Encoding]`, *optional*): Of the weights that are stored in few bits, by their names in the live parent.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        architecture: Architecture | None = None,
        encodings: Mapping[str, Encoding] | None = None,
    ):
        self.config = config
        self.architecture = architecture or get_architecture(config.model_type)
        self._encodings = dict(encodings or {})
        self._rules: dict[Place, list[TensorRule]] = {
            None: [],
            **{i: [] for i in range(self.architecture.depth(config))},
        }
        for rule in self.architecture.rules(config):
            if not rule.copy_of:
                self._rules.setdefault(_place(rule), []).append(rule)
        self._states: dict[Place, tuple[StateRule, ...]] = {
            place: self.architecture.states(config.per_layer_config[place], place) if isinstance(place, int) else ()
            for place in self._rules
        }
        kinds: dict[
            Any, int
        ] = {}  # numbered, as hashing the rules again for every question would take most of the time
        self._kinds = {
            place: kinds.setdefault(
                (
                    tuple((rule.template, rule.dims, self._encodings.get(rule.name)) for rule in rules),
                    self._states[place],
                ),
                len(kinds),
            )
            for place, rules in self._rules.items()
        }
        self._known: dict[Any, Cost] = {}
        self._per_token = self.architecture.per_token

    @cached_property
    def full(self) -> Cost:
        """Cost of the whole parent."""
        return self(self.architecture.full(self.config))

    def __call__(self, submodel: Submodel) -> Cost:
        """Cost of a submodel.

        Raises:
            `ElasticConfigError`: it is cut off the blocks of a weight that is stored in few bits.
        """
        return sum(
            (self.part(place, submodel.at(layer)) for place, layer in self.places(submodel.layers).items()), Cost()
        )

    def places(self, layers: Iterable[int]) -> dict[Place, int | None]:
        """What is counted for these layers, each with the layer whose sizes it has."""
        kept = set(layers)
        found: dict[Place, int | None] = {None: None, **{layer: layer for layer in layers}}
        shared = (place for place in self._rules if isinstance(place, tuple))
        return found | {place: next(i for i in place if i in kept) for place in shared if kept & set(place)}

    def part(self, place: Place, sizes: dict[str, int]) -> Cost:
        """Cost of one layer, of what belongs to no layer (`None`), or of a block that layers share, at these sizes."""
        key = (self._kinds[place], tuple(sizes.items()))
        if key not in self._known:
            self._known[key] = self.count(place, sizes)
        return self._known[key]

    def count(self, place: Place, sizes: Mapping[str, Any]) -> Cost:
        """As `part`, for sizes that may be expected values (scalar tensors) too; then so are the counts, differentiable in them."""
        total = active = fp32 = other = coded = coded_bytes = 0
        for rule in self._rules[place]:
            count = rule.count(sizes)
            fp32 += count if rule.fp32 else 0
            other += 0 if rule.fp32 else count
            if encoding := self._encodings.get(rule.name):
                coded += count
                coded_bytes += sum(part.count(sizes) * itemsize(part.dtypes[0]) for part in encoding.rules(rule))
            if not rule.buffer:
                total += count
                used = count
                if rule.routed:  # exact for integers: the count is a multiple of the experts
                    used, experts = count * sizes[self._per_token[rule.experts]], sizes[rule.experts]
                    used = used // experts if isinstance(used, int) else used / experts
                active += used
        kept: dict[Any, Any] = dict.fromkeys(("kv", "conv", "ssm"), 0)
        for state in self._states[place]:
            kind = state.window or "kv" if state.kind in ("keys", "values") else state.kind
            kept[kind] = kept.get(kind, 0) + state.count(sizes)
        kv, conv, ssm = (kept.pop(kind) for kind in ("kv", "conv", "ssm"))
        return Cost(total, active, fp32, other, kv, conv, ssm, tuple(kept.items()), coded, coded_bytes)


def _place(rule: TensorRule) -> Place:
    if rule.user is not None:
        return rule.user
    return rule.shared_by if len(rule.shared_by) > 1 else rule.layer
