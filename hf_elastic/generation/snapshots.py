"""Take back what a submodel has read: keys and values can be cut off, or put back where a window slides, convolution and SSM states only be put back from a copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache

from .caches import PER_TOKEN, States, read_cache, slides


@dataclass(frozen=True)
class Snapshot:
    """Where a cache stood.

    Args:
        tokens (`int`): Tokens in it, padding of the prompt included.
        states (`States`): Per layer copies of what the next token overwrites. Keys and values are not copied: they only grow, or, in a layer with a
            sliding window, are made anew with every pass.
    """

    tokens: int
    states: States

    @classmethod
    def take(cls, cache: Cache, tokens: int) -> Snapshot:
        """Of a cache that holds so many tokens."""
        kept = [
            {k: t if k in PER_TOKEN else t.clone() for k, t in found.items() if k not in PER_TOKEN or slides(layer)}
            for found, layer in zip(read_cache(cache), cache.layers, strict=True)
        ]
        return cls(tokens, kept)

    def restore(self, cache: Cache) -> None:
        """Put the same cache back, in place."""
        for layer, found, kept in zip(cache.layers, read_cache(cache), self.states, strict=True):
            for kind, tensor in kept.items():
                if kind not in PER_TOKEN:
                    found[kind].copy_(tensor)
            if slides(layer):
                layer.keys, layer.values, layer.cumulative_length = kept["keys"], kept["values"], self.tokens
            elif "keys" in found:
                layer.keys, layer.values = (found[kind][:, :, : self.tokens] for kind in PER_TOKEN)


class Reader:
    """A submodel that reads a text which grows and is sometimes taken back. Its settings are changed while it reads.

    Args:
        model (`ElasticForCausalLM`): Reads; nobody else may run these modules.
        ids (`torch.LongTensor` of shape `(1, prompt)`): Is read here, as plain generation reads a prompt.
        generation_config (`GenerationConfig`): As upstream's `generate` prepared it.
        inputs (`dict[str, Any]`): Further arguments of the model, as upstream's `generate` prepared them for the prompt.
    """

    def __init__(self, model: Any, ids: torch.Tensor, generation_config: Any, inputs: dict[str, Any]):
        self.model, self.inputs = model, inputs
        self.cache = DynamicCache(config=model.config)
        self.mixers = [module for module in model.modules() if hasattr(module, "time_step_limit")]
        self.logits: torch.Tensor = model._prefill(
            ids, generation_config, {**inputs, "past_key_values": self.cache}
        ).logits[:, -1]
        self.tokens = ids.shape[1]
        self._marks: list[Snapshot] = []

    def read(self, ids: torch.Tensor, count: int = 1) -> torch.Tensor:
        """Read what of this text was not read yet.

        Returns:
            `torch.FloatTensor` of shape `(count, vocabulary)`: Logits of what follows each of the last `count` tokens, in float32.
        """
        new = ids.shape[1] - self.tokens
        inputs = self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=new, past_key_values=self.cache, **_grown(self.inputs, ids.shape[1])
        )
        with as_decoding(self.mixers, new):
            logits = self.model(**inputs | {"logits_to_keep": count}, return_dict=True).logits
        self.tokens = ids.shape[1]
        return logits[0, -count:].to(device=ids.device, dtype=torch.float32, copy=True)

    def mark(self) -> None:
        """Make it possible to go back to here."""
        self._marks.append(Snapshot.take(self.cache, self.tokens))

    def keep(self, tokens: int) -> None:
        """Have nothing in the states but tokens among the first `tokens`: go back to the last mark that has no others, if need be."""
        if self.tokens > tokens:
            mark = [mark for mark in self._marks if mark.tokens <= tokens][-1]
            mark.restore(self.cache)
            self.tokens = mark.tokens
        self._marks = []


@contextmanager
def as_decoding(mixers: Sequence[Any], tokens: int) -> Iterator[None]:
    """Let a scan over a few tokens compute what as many steps of one token do.

    Upstream's scan clamps the time step from below and its steps do not, so that a chunk would come out otherwise than decoding by more
    than rounding. The reference implementation, which is what runs on a CPU, also pads to whole chunks of up to 256 tokens.
    """
    before = [(mixer.time_step_limit, mixer.chunk_size) for mixer in mixers]
    try:
        for mixer in mixers if tokens > 1 else ():
            mixer.time_step_limit = (0.0, float("inf"))
            if mixer.D.device.type == "cpu":
                mixer.chunk_size = min(mixer.chunk_size, tokens)
        yield
    finally:
        for mixer, (limit, size) in zip(mixers, before, strict=True):
            mixer.time_step_limit, mixer.chunk_size = limit, size


def _grown(inputs: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The arguments for the prompt as they are when the text has so many tokens."""
    grown = dict(inputs)
    if (mask := inputs.get("attention_mask")) is not None:
        grown["attention_mask"] = nn.functional.pad(mask, (0, tokens - mask.shape[1]), value=1)
    if (positions := inputs.get("position_ids")) is not None:
        more = torch.arange(1, tokens - positions.shape[1] + 1, device=positions.device)
        grown["position_ids"] = torch.cat([positions, positions[:, -1:] + more], dim=1)
    return grown
