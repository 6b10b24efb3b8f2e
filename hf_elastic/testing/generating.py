"""Checks of the conformance kit on what generation keeps: with a cache, and from one size to another."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import DynamicCache

from ..generation.caches import States, hand_over, join_rows, read_cache, take_row, write_cache
from .cases import Case
from .deviations import LOGITS, Deviation, off, same_logits
from .subject import Subject


def decoding(subject: Subject) -> Iterator[Deviation]:
    """Token by token with a cache a slice computes what it computes at once."""
    rows, length = subject.ids.shape
    for case in subject.cases.named("whole", "all axes", "fewer layers"):
        model, cache, steps = subject.slice(case), None, []
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            for start, stop in [(0, length - 3), *((i, i + 1) for i in range(length - 3, length))]:
                positions = torch.arange(start, stop).expand(rows, -1)
                mask = torch.ones(rows, stop, dtype=torch.long)
                inputs = {
                    "attention_mask": mask,
                    "position_ids": positions,
                    "past_key_values": cache,
                    "use_cache": True,
                }
                steps.append(model(subject.ids[:, start:stop], **inputs).logits)
        yield from same_logits(case, torch.cat(steps, dim=1), subject.logits(model))


def handed_over(subject: Subject) -> Iterator[Deviation]:
    """Caches come apart and together again, and go up and down between sizes in the shapes that these keep themselves."""
    family, architecture = subject.live, subject.architecture
    config, whole = subject.parent.config, subject.cases.said[0]
    rows = subject.ids.shape[0]

    def states_at(case: Case, ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        with family.at(case.submodel) as view, torch.no_grad():
            return read_cache(view(ids, use_cache=True).past_key_values)

    text, last = subject.ids[:, :-1], subject.ids[:, -1:]
    for case in subject.cases.named("whole", "all axes")[:2]:
        states = states_at(case, text)
        again = join_rows([take_row(states, row, text.shape[1]) for row in range(rows)])
        with family.at(case.submodel) as view, torch.no_grad():
            cache = write_cache(again, view.config, text.shape[1])
            positions = torch.full((rows, 1), text.shape[1])
            mask = torch.ones(rows, text.shape[1] + 1, dtype=torch.long)
            step = view(last, past_key_values=cache, attention_mask=mask, position_ids=positions).logits[:, -1]
            yield from same_logits(case, step, view(subject.ids, use_cache=False).logits[:, -1])
    for case in subject.cases.named("all axes", "sizes per layer"):
        yield from _states_of_masks(subject, case, states_at(case, text), text)
    for case in subject.cases.named("all axes"):
        for source, target in ((whole, case), (case, whole)):
            if not set(target.submodel.layers) <= set(source.submodel.layers):
                continue
            given = hand_over(states_at(source, text), architecture, config, source.submodel, target.submodel)
            fresh = states_at(target, text)
            shapes = [[{k: t.shape for k, t in layer.items()} for layer in states] for states in (given, fresh)]
            finite = all(bool(t.isfinite().all()) for layer in given for t in layer.values())
            same = shapes[0] == shapes[1] and finite
            yield Deviation(case.name, wrong="" if same else f"handed over {shapes[0]}, the target keeps {shapes[1]}")
            with family.at(target.submodel) as view, torch.no_grad():
                after = view(last, past_key_values=write_cache(given, view.config, text.shape[1])).logits
            yield Deviation(case.name, wrong="" if after.isfinite().all() else "its logits are not finite afterwards")


def _states_of_masks(subject: Subject, case: Case, own: States, text: torch.Tensor) -> Iterator[Deviation]:
    """What a slice keeps is what the masked parent keeps of the same entries, which says where in a state they lie; elsewhere that has zeros."""
    architecture, config = subject.architecture, subject.parent.config
    with torch.no_grad():
        masked = read_cache(subject.masked(case)(text, use_cache=True).past_key_values)
    whole = architecture.full(config)
    down = hand_over(masked, architecture, config, whole, case.submodel, scale=False)
    yield from _same_states(case, own, down)
    if case.submodel.layers == whole.layers:
        yield from _same_states(case, hand_over(own, architecture, config, case.submodel, whole, scale=False), masked)


def _same_states(case: Case, left: States, right: States) -> Iterator[Deviation]:
    for ours, theirs in zip(left, right, strict=True):
        if ours.keys() != theirs.keys():
            yield Deviation(case.name, wrong=f"a layer keeps {sorted(ours)}, and {sorted(theirs)} with masks")
            return
        for key, state in ours.items():
            yield Deviation(f"{case.name}, {key}", off(state, theirs[key]), LOGITS)
