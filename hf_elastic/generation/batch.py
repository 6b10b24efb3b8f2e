"""The sequences that a submodel is writing: their tokens, their cache, and the logits of what comes next."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache

from ..architectures.submodel import Submodel
from .caches import States, hand_over, join_rows, read_cache, take_row, write_cache


@dataclass
class Row:
    """One sequence.

    Args:
        ids (`list[int]`): Its tokens so far, without padding.
        prompt (`int`): How many of them were given.
        states (`States`, *optional*): What the last phase kept of it, if the next one goes on from that.
        cached (`int`): How many of its tokens are in `states`.
        generated (`int`): Tokens that submodels wrote, in all phases.
        inside (`int`, *optional*): The earlier phase that was opened again and is not closed.
        reopened (`dict[int, int]`): Per phase that was opened again the tokens that were written in it since.
        forced (`list[int]`): Tokens that have to come next.
        done (`bool`): Whether the text is over.
        scores, logits (`list[torch.Tensor]`): One entry per new token, if asked for; `None` for one that was inserted.
        log_probs (`list[float]`): What a submodel gave to the tokens that it wrote in this phase, if somebody decides by them.
        escalates (`bool`): Whether the second submodel of the last phase writes it.
    """

    ids: list[int]
    prompt: int
    states: States | None = None
    cached: int = 0
    generated: int = 0
    inside: int | None = None
    reopened: dict[int, int] = field(default_factory=dict)
    forced: list[int] = field(default_factory=list)
    done: bool = False
    scores: list[torch.Tensor | None] = field(default_factory=list)
    logits: list[torch.Tensor | None] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    escalates: bool = False

    def copy(self) -> Row:
        """The sequence as it is now, whatever becomes of it."""
        copied = copy.copy(self)
        for name in ("ids", "reopened", "forced", "scores", "logits", "log_probs"):  # these grow
            setattr(copied, name, copy.copy(getattr(self, name)))
        return copied


class Batch:
    """Sequences that run together at the model's active budget.

    `ids` holds their tokens, padded on the left, `mask` 0 for padding (`None` if there is none), `logits` what follows the newest token once
    that was read.

    Args:
        model ([`ElasticForCausalLM`]): At the budget that writes.
        rows (`list[Row]`): Their `states` are used up; one without is read from its beginning.
        source (`Submodel`, *optional*): Who kept these; `None` reads every sequence from its beginning.
        pad_id (`int`): Token that stands for padding.
        chunk (`int`, *optional*): Tokens that are read at once; all of them if not given.
    """

    def __init__(
        self, model: Any, rows: Sequence[Row], source: Submodel | None, pad_id: int, chunk: int | None = None
    ):
        self.model, self.rows, self.pad_id, self.chunk = model, list(rows), pad_id, chunk
        self.ids = torch.empty(0, 0, dtype=torch.long)
        self.mask: torch.Tensor | None = None
        self.cache: Cache | None = None
        self._read(source)
        for row in rows:
            row.states, row.cached = None, 0

    def append(self, tokens: torch.Tensor) -> None:
        """One more token of every sequence, `(batch,)`, not read yet."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=-1)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=-1)

    def read_newest(self) -> None:
        """Read the tokens that were appended last."""
        self.logits = self._forward(self.cache, 1)

    def take(self, place: int) -> None:
        """Keep the states of one sequence in its row; everything but its newest token was read."""
        assert self.cache is not None
        row = self.rows[place]
        row.cached = len(row.ids) - 1
        row.states = take_row(read_cache(self.cache), place, row.cached)

    def drop(self, places: Sequence[int]) -> None:
        """Take sequences out."""
        if not places:
            return
        kept = [place for place in range(len(self.rows)) if place not in places]
        self.rows = [self.rows[place] for place in kept]
        index = torch.tensor(kept, dtype=torch.long, device=self.ids.device)
        self.ids, self.mask = self.ids[index], None if self.mask is None else self.mask[index]
        if not kept:
            self.cache = None
        if self.cache is not None:
            self.cache.reorder_cache(index)

    def _read(self, source: Submodel | None) -> None:
        """Read what is unread: everything, or what `source` has not read on top of what it kept.

        Sequences with as many unread tokens, all on top of something or none, are read together. Padding would go through the convolutions of Mamba layers, where it counts if
        their projections have a bias, and padding in the middle of a sequence would go through their states.
        """
        groups: dict[tuple[int, bool], list[int]] = {}
        for i, row in enumerate(self.rows):
            groups.setdefault((len(row.ids) - row.cached, row.states is None), []).append(i)
        logits: dict[int, torch.Tensor] = {}
        read: dict[int, States] = {}
        for (unread, whole), members in groups.items():
            rows = [self.rows[i] for i in members]
            cache = self._kept(None if whole else source, rows)
            self.ids, self.mask = self._pad(rows)
            logits.update(zip(members, self._forward(cache, unread), strict=True))
            if len(groups) > 1:
                states = read_cache(cache)
                read.update((i, take_row(states, k, len(self.rows[i].ids))) for k, i in enumerate(members))
        if len(groups) > 1:
            self.ids, self.mask = self._pad(self.rows)
            joined = join_rows([read[i] for i in range(len(self.rows))])
            cache = write_cache(joined, self.model._running_config, self.ids.shape[1])
        self.cache, self.logits = cache, torch.stack([logits[i] for i in range(len(self.rows))])

    def _kept(self, source: Submodel | None, rows: Sequence[Row]) -> Cache:
        """A cache of the active submodel with what `source` kept of some sequences; an empty one for `None`."""
        model = self.model
        if source is None:
            return DynamicCache(config=model._running_config)
        joined = join_rows([row.states for row in rows if row.states is not None])
        given = hand_over(joined, model.architecture, model.elastic_config.parent_config, source, model.submodel)
        return write_cache(given, model._running_config, max(row.cached for row in rows))

    def _pad(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor | None]:
        texts = [row.ids for row in rows]
        longest, device = max(map(len, texts)), self.model.device
        ids = torch.tensor([[self.pad_id] * (longest - len(text)) + text for text in texts], device=device)
        if min(map(len, texts)) == longest:
            return ids, None
        return ids, torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts], device=device)

    def _forward(self, cache: Cache | None, unread: int) -> torch.Tensor:
        """Read the last `unread` tokens; returns the logits after them, `(batch, vocabulary)`."""
        length, at_once = self.ids.shape[1], self.chunk or unread
        done = length - unread
        if not self.model.architecture.reads_on:  # all that is first, and the rest token by token
            at_once = 1 if done else unread
        while done < length:
            count = min(at_once, length - done)
            done += count
            mask = None if self.mask is None else self.mask[:, :done]
            if mask is None:
                positions = torch.arange(done - count, done, device=self.ids.device)[None].expand(len(self.ids), -1)
            else:
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -count:]
            inputs = self.model.prepare_inputs_for_generation(
                self.ids[:, :done],
                next_sequence_length=count,
                past_key_values=cache,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
            )
            outputs = self.model(**inputs, return_dict=True)
        return outputs.logits[:, -1]
