"""The loop of phased generation: one batch, in which each sequence ends its phases at its own time.

All sequences go through a phase together, and leave the batch when it is over for them; what they keep in the cache is taken along, so the
next phase can begin with a batch again. Switching submodels happens between phases only; where a last phase has two submodels, the sequences of
the first go through it before those of the second.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from .batch import Batch, Row
from .binding import BoundPhase, SentenceEnds, Standing, standing
from .cascade import Cascade
from .events import EndReason, PhaseEvent, PhaseOutput, PhaseRecord


@dataclass
class Settings:
    """What the call says, prepared by the stock `generate`.

    Args:
        config (`GenerationConfig`): With special tokens as tensors.
        processors (`LogitsProcessorList`): The caller's own, besides those of the config.
        criteria (`StoppingCriteriaList`): They end the text of a sequence.
        max_new_tokens (`int`): Most tokens that submodels write in all phases together.
        context (`int`, *optional*): Most tokens of a sequence.
        ends_sentence (`SentenceEnds`): For grace windows.
        prefix_allowed_tokens_fn (`Callable`, *optional*): As in `generate`.
    """

    config: GenerationConfig
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    max_new_tokens: int
    context: int | None
    ends_sentence: SentenceEnds
    prefix_allowed_tokens_fn: Any = None


class PhaseLoop:
    """Runs bound phases over prompts; see [`run_phases`].

    Between two calls `live` are the indices of the sequences in `batch`, and all of their tokens were read except for the newest one. `starts`
    are the markers of earlier phases that may be opened again, and which they open.
    """

    def __init__(self, model: Any, phases: Sequence[BoundPhase], prompts: Sequence[Sequence[int]], settings: Settings):
        self.family, self.model, self.phases, self.settings = model, model, phases, settings
        self.rows = [Row(list(ids), len(ids)) for ids in prompts]
        count = len(self.rows)
        self.records = [
            PhaseRecord(
                bound.phase.name,
                bound.label,
                generated=[0] * count,
                reopened=[0] * count,
                inserted=[0] * count,
                spans=[(0, 0)] * count,
                reasons=[None] * count,
                confidence=[None] * count,
                drafted=[0] * count,
            )
            for bound in phases
        ]
        self.began = perf_counter()
        self.index = -1
        self.live: list[int] = []
        self.cascade = Cascade(phases, self.rows, self.records, self.began)
        eos = settings.config._eos_token_tensor
        self.eos_ids = set() if eos is None else set(eos.flatten().tolist())
        pad = settings.config._pad_token_tensor
        self.pad_id = int(pad) if pad is not None else 0

    # -- one phase -----------------------------------------------------------------------------------------------------

    def begin(self, index: int) -> list[PhaseEvent]:
        """Switch, take over, read, and choose nothing yet. Sequences that skip the phase are not in the batch; if all do, nothing is read."""
        started = perf_counter()
        self.index, bound, record = index, self.phases[index], self.records[index]
        chosen = self.cascade.choose(index)
        self.live = [i for i, row in enumerate(self.rows) if not row.done and row.escalates == bound.escalated]
        if not self.live and bound.phase.escalate_to is not None:
            return chosen
        source = None
        if bound.handover == "cache":
            source = next(b.submodel for b in self.phases[index - 1 :: -1] if b.index < bound.index)
        earlier = [k for k in range(index) if None not in (self.phases[k].start_id, self.phases[k].end_id)]
        self.starts = {self.phases[k].start_id: k for k in earlier if self.phases[k].start_id != bound.start_id}
        events = self._enter(bound)
        record.handover = bound.handover
        if source is not None and all(self.rows[i].states is None for i in self.live):
            source, record.handover = None, "reprefill"
        if not self.live:
            return [*chosen, self._event("start", handover=record.handover), *events]
        self.model = self.family._running_at(bound.submodel)
        chunk = self.settings.config.prefill_chunk_size
        self.batch = Batch(self.model, [self.rows[i] for i in self.live], source, self.pad_id, chunk)
        self.processors = self._processors(bound)
        self._wait()
        record.prefill_seconds = perf_counter() - started
        self.unread = False
        return [*chosen, self._event("start", handover=record.handover), *events]

    def _enter(self, bound: BoundPhase) -> list[PhaseEvent]:
        """What the plan puts in front of the phase, or instead of it; leaves those sequences live that the submodel writes."""
        record, events = self.records[self.index], []
        for i in self.live:
            row = self.rows[i]
            if bound.drafts:
                self.cascade.draft(i)
            row.log_probs = []
            if bound.handover != "cache":
                row.states, row.cached = None, 0
            if row.inside not in self.starts.values():
                row.inside = None
            record.spans[i] = (len(row.ids) - row.prompt,) * 2
            where = standing(row.ids, bound)
            if bound.phase.max_new_tokens == 0 or (bound.index == 0 and where == "no part"):
                events += self.cascade.tell(i, self._skip(i, where, bound))
            elif bound.start_id is not None and where != "inside":
                events += self.cascade.tell(i, self._insert(i, (bound.start_id,)))
        for i in self.live:
            if record.reasons[i] is None and self._fills_context(i):
                events += self.cascade.tell(i, self._end(i, 0, "length", bound))
            if record.reasons[i] is not None:
                events += self.cascade.keep(self.index, i)
        self.live = [i for i in self.live if record.reasons[i] is None]
        return events

    def step(self) -> list[PhaseEvent]:
        """One more token for every sequence in the batch."""
        started = perf_counter()
        batch = self.batch
        if self.unread:
            batch.read_newest()
        bound, record = self.phases[self.index], self.records[self.index]
        config = self.settings.config
        logits = batch.logits.to(dtype=torch.float32, copy=True)
        log_probs = torch.log_softmax(logits, dim=-1) if self.listening else None
        scores = self.processors(batch.ids, logits)
        if self.sampling:
            chosen = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            chosen = torch.argmax(scores, dim=-1)
        for place, i in enumerate(self.live):
            if self.rows[i].forced:
                chosen[place] = self.rows[i].forced[0]
        batch.append(chosen)
        taken = [0.0] * len(self.live) if log_probs is None else log_probs.gather(1, chosen[:, None])[:, 0].tolist()
        stopped = (
            self.settings.criteria(batch.ids, None).tolist() if self.settings.criteria else [False] * len(self.live)
        )
        events, ended = [], []
        for place, (i, token) in enumerate(zip(self.live, chosen.tolist(), strict=True)):
            row = self.rows[i]
            if row.forced:
                events += self.cascade.tell(i, self._insert(i, (row.forced.pop(0),)))
                if self._fills_context(i):
                    ended.append(place)
                    events += [
                        *self.cascade.tell(i, self._end(i, place, "length", bound)),
                        *self.cascade.keep(self.index, i),
                    ]
                continue
            row.generated += 1
            row.log_probs.append(taken[place])
            record.generated[i] += 1
            self._append(i, (token,))
            if config.output_scores:
                row.scores.append(scores[place])
            if config.output_logits:
                row.logits.append(logits[place])
            events += self.cascade.tell(i, [self._event("token", i, token_id=token)])
            if taken_back := self.cascade.take_back(self.index, i):
                ended.append(place)
                events += taken_back
                continue
            self._count_reopened(i, token)
            if reason := "stopping criteria" if stopped[place] else self._reason(i, token):
                ended.append(place)
                events += self.cascade.tell(i, self._end(i, place, reason, bound))
            if reason or bound.phase.signal == "answer_first":
                events += self.cascade.keep(self.index, i)
        batch.drop(ended)
        self.live = [i for place, i in enumerate(self.live) if place not in ended]
        self.unread = True
        record.decode_seconds += perf_counter() - started
        return events

    def _reason(self, i: int, token: int) -> EndReason | None:
        """Why the phase or text of a sequence is over with this token, if it is."""
        bound, row, written = self.phases[self.index], self.rows[i], self.records[self.index].generated[i]
        if bound.end_id is not None and token == bound.end_id:
            return "marker"
        if token in self.eos_ids:
            return "eos"
        settings, cap = self.settings, bound.phase.max_new_tokens
        if row.generated >= settings.max_new_tokens or self._fills_context(i):
            return "length"
        if cap is None:
            return None
        if written >= cap:
            return "cap"
        in_window = written >= cap - bound.phase.grace
        return "soft cap" if bound.phase.grace and in_window and settings.ends_sentence(row.ids) else None

    def _fills_context(self, i: int) -> bool:
        return bool(self.settings.context) and len(self.rows[i].ids) >= (self.settings.context or 0)

    def _end(self, i: int, place: int, reason: EndReason, bound: BoundPhase) -> list[PhaseEvent]:
        row = self.rows[i]
        self.records[self.index].reasons[i] = reason
        row.done = bound.index == self.phases[-1].index or reason in ("eos", "length", "stopping criteria")
        if not row.done and any(b.handover == "cache" for b in self.phases if b.index == bound.index + 1):
            self.batch.take(place)
        closing = {"cap": bound.closing_ids, "soft cap": bound.soft_closing_ids}.get(reason, ())
        forced, row.forced = ([] if row.done else row.forced), []
        return [*self._insert(i, (*forced, *closing)), self._event("end", i, reason=reason)]

    def _skip(self, i: int, where: Standing, bound: BoundPhase) -> list[PhaseEvent]:
        """Write nothing in a phase, and say so in the text if the prompt does not: the next submodel reads it from its beginning."""
        row = self.rows[i]
        row.states, row.cached = None, 0
        self.records[self.index].reasons[i] = "skipped"
        ids = () if where == "no part" else bound.empty_ids
        if where == "inside" and bound.end_id is not None:
            ids = ids[ids.index(bound.end_id) :]
        return [*self._insert(i, ids), self._event("end", i, reason="skipped")]

    def _count_reopened(self, i: int, token: int) -> None:
        """A phase that a later one opens again goes on with what is left of its cap; when that is used up, its closing comes next."""
        row = self.rows[i]
        if row.inside is None:
            row.inside = self.starts.get(token)
        else:
            self.records[self.index].reopened[i] += 1
            row.reopened[row.inside] = row.reopened.get(row.inside, 0) + 1
        if row.inside is None:
            return
        phase, written = self.phases[row.inside], row.reopened.get(row.inside, 0)
        cap = phase.phase.max_new_tokens
        if token == phase.end_id:
            row.inside = None
        elif cap is not None and self.records[row.inside].generated[i] + written >= cap:
            row.inside, row.forced = None, list(phase.closing_ids if written else phase.soft_closing_ids)

    def _insert(self, i: int, ids: Sequence[int]) -> list[PhaseEvent]:
        row = self.rows[i]
        self.records[self.index].inserted[i] += len(ids)
        self._append(i, ids)
        row.scores.extend([None] * len(ids))
        row.logits.extend([None] * len(ids))
        return [self._event("token", i, token_id=token, inserted=True) for token in ids]

    def _processors(self, bound: BoundPhase) -> LogitsProcessorList:
        config = copy.deepcopy(self.settings.config)
        config.update(**bound.phase.generation)
        self.sampling = config.do_sample
        self.listening = self.cascade.listens(bound)
        if bound.end_id is not None:  # ends the phase, as another end-of-sequence token would
            end = torch.tensor([bound.end_id], device=self.batch.ids.device)
            eos = config._eos_token_tensor
            config._eos_token_tensor = end if eos is None else torch.cat([eos.flatten().to(end), end])
        return self.model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=self.batch.ids.shape[1],
            encoder_input_ids=self.batch.ids,
            prefix_allowed_tokens_fn=self.settings.prefix_allowed_tokens_fn,
            logits_processor=self.settings.processors,
            device=self.batch.ids.device,
            model_kwargs={},
        )

    def _append(self, i: int, ids: Sequence[int]) -> None:
        row, record = self.rows[i], self.records[self.index]
        row.ids.extend(ids)
        record.spans[i] = (record.spans[i][0], len(row.ids) - row.prompt)

    # -- results -------------------------------------------------------------------------------------------------------

    def _event(self, kind: Any, row: int = -1, **what: Any) -> PhaseEvent:
        bound = self.phases[self.index]
        seconds = perf_counter() - self.began
        return PhaseEvent(kind, self.index, bound.phase.name, bound.label, row, seconds=seconds, **what)

    def _wait(self) -> None:
        if self.model.device.type != "cpu":  # the first token would pay for what was only put in a queue
            torch.accelerator.synchronize(self.model.device)

    def output(self, prompt: torch.Tensor) -> PhaseOutput:
        """What `generate` returns, for the prompts as they were given (`(batch, tokens)`, padded on the left)."""
        new = [row.ids[row.prompt :] for row in self.rows]
        longest = max(map(len, new))
        tokens = torch.tensor([ids + [self.pad_id] * (longest - len(ids)) for ids in new], dtype=prompt.dtype)
        sequences = torch.cat([prompt, tokens.view(len(new), longest).to(prompt.device)], dim=-1)
        config = self.settings.config
        scores = self._stack([row.scores for row in self.rows], longest) if config.output_scores else None
        logits = self._stack([row.logits for row in self.rows], longest) if config.output_logits else None
        return PhaseOutput(sequences=sequences, scores=scores, logits=logits, phases=self.records)

    def _stack(self, rows: Sequence[Sequence[torch.Tensor | None]], longest: int) -> tuple[torch.Tensor, ...]:
        vocabulary = torch.zeros(self.model.config.vocab_size, device=self.model.device)
        zero = torch.zeros_like(next((t for row in rows for t in row if t is not None), vocabulary))
        found = [[zero if t is None else t for t in row] + [zero] * (longest - len(row)) for row in rows]
        return tuple(torch.stack(step) for step in zip(*found, strict=True))


@torch.no_grad()
def run_phases(
    model: Any, phases: Sequence[BoundPhase], prompt: torch.Tensor, mask: torch.Tensor, settings: Settings
) -> Generator[PhaseEvent, None, PhaseOutput]:
    """Generate in phases, one event at a time. Every phase runs a size beside the model, which stays at its budget; only in training mode the
    model itself is switched, and put back at the end of the generator.

    Args:
        model ([`ElasticForCausalLM`]): Switchable between the submodels of the phases.
        phases (`list[BoundPhase]`): From [`hf_elastic.generation.binding.bind`].
        prompt (`torch.LongTensor` of shape `(batch, tokens)`): Padded on the left.
        mask (`torch.LongTensor` of shape `(batch, tokens)`): 0 for padding.
        settings (`Settings`): What the call says.

    Returns:
        `PhaseOutput`: The value of the generator.
    """
    texts = [ids[seen.bool()].tolist() for ids, seen in zip(prompt, mask, strict=True)]
    loop = PhaseLoop(model, phases, texts, settings)
    before = model.submodel
    try:
        for index in range(len(phases)):
            if all(row.done for row in loop.rows):
                break
            yield from loop.begin(index)
            while loop.live:
                yield from loop.step()
    finally:
        if model._trains:
            model.set_budget(before)
    return loop.output(prompt)
