"""The checks of the conformance kit. Each goes through cases and gives deviations, or says what is wrong."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.initialization import no_init_weights

from ..architectures.cost import CostModel
from ..architectures.pieces import pieces
from ..elastification.elastify import elastify
from ..generation.caches import hand_over, join_rows, read_cache, take_row, write_cache
from ..modeling_elastic import ElasticForCausalLM
from ..submodels.buffers import constant_buffers
from ..submodels.masking import masked_weight
from ..submodels.slicing import check_table, slice_state_dict
from ..submodels.soft import Mixture, SoftUnits
from .cases import Case
from .subject import Subject

LOGITS = 2e-5
"""Relative to the largest logit or 1: float32 sums over other memory, with `x * 0` terms left out, in another order. The largest difference seen is
5e-6; a wrong row, scale or epsilon gives more than 1e-2."""
GRADIENTS = 1e-4
"""Relative to the largest gradient of a tensor: products of more factors, in another order."""


@dataclass(frozen=True)
class Deviation:
    """What one case of a check found: how far off, or what is wrong."""

    case: str
    by: float = 0.0
    limit: float = 0.0
    wrong: str = ""


Check = Callable[[Subject], Iterator[Deviation]]


class NotApplicable(Exception):
    """A check has nothing to look at in this model."""


def table(subject: Subject) -> Iterator[Deviation]:
    """Every tensor of the stock model has one rule of its shape, and every rule a tensor."""
    check_table(subject.architecture, subject.parent)
    yield Deviation("whole")


def counts(subject: Subject) -> Iterator[Deviation]:
    """Parameters as `plan` counts them are those of the stock model."""
    count = CostModel(subject.parent.config)
    for case in subject.cases.said:
        found, said = subject.slice(case).num_parameters(), count(case.submodel).total_params
        yield Deviation(case.name, wrong="" if found == said else f"{said} counted, {found} in the model")


def masked_is_sliced(subject: Subject) -> Iterator[Deviation]:
    """A slice computes what the masked parent computes, and not what the whole computes."""
    whole = subject.logits(subject.parent)
    for case in subject.cases.said:
        sliced = subject.logits(subject.slice(case))
        yield from _same_logits(case, sliced, subject.logits(subject.masked(case)))
        if case.sizes and float((sliced - whole).abs().max()) < 1e-3:
            yield Deviation(case.name, wrong="the case changes nothing, so nothing is checked by it")


def memory_is_disk(subject: Subject) -> Iterator[Deviation]:
    """A slice of the parent in memory has the weights of the slice from disk, bit by bit."""
    state = subject.parent.state_dict()
    for case in subject.cases.said:
        sliced = slice_state_dict(subject.architecture, subject.parent.config, state, case.submodel)
        yield _same_weights(case, sliced, subject.slice(case).state_dict())


def live_is_sliced(subject: Subject) -> Iterator[Deviation]:
    """A live budget has the weights, the buffers and the logits of the slice."""
    for case in subject.cases.said:
        sliced = subject.slice(case)
        with subject.live.at(case.submodel) as view:
            yield _same_weights(case, view.state_dict(), sliced.state_dict())
            yield from _same_logits(case, subject.logits(view), subject.logits(sliced))
            yield from _buffers(case, view)


def buffers(subject: Subject) -> Iterator[Deviation]:
    """Buffers that are not saved are those of a newly built stock model of the same config."""
    for case in subject.cases.said:
        yield from _buffers(case, subject.slice(case))
    yield from _buffers(subject.cases.said[0], subject.live)


def reloaded(subject: Subject) -> Iterator[Deviation]:
    """A slice that is saved and loaded again is the same; its export is a stock checkpoint that computes the same."""
    for case in subject.cases.named("whole", "all axes", "fewer layers"):
        sliced, folder = subject.slice(case), subject.folder / "again"
        sliced.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder)
        yield _same_weights(case, again.state_dict(), sliced.state_dict())
        yield from _same_logits(case, subject.logits(again), subject.logits(sliced))
        shutil.rmtree(folder)
        if case.submodel.is_homogeneous:
            sliced.export(folder)
            exported = subject.architecture.causal_class.from_pretrained(folder)
            yield from _same_logits(case, subject.logits(exported), subject.logits(sliced))
            yield from _buffers(case, exported)
            shutil.rmtree(folder)


def nested(subject: Subject) -> Iterator[Deviation]:
    """The nested layout holds the same weights, for every budget."""
    family, folder = subject.family(), subject.folder / "nested"
    family.save_pretrained(folder, layout="nested")
    for case, budget in ((subject.small, "small"), (subject.cases.said[0], None)):
        loaded = ElasticForCausalLM.from_pretrained(folder, budget=budget)
        yield _same_weights(case, loaded.state_dict(), subject.slice(case).state_dict())
        yield from _same_logits(case, subject.logits(loaded), subject.logits(subject.slice(case)))


def sorted_is_parent(subject: Subject) -> Iterator[Deviation]:
    """Sorting by importance does not change what the parent computes, but moves its weights."""
    rows = [{"input_ids": row.tolist()} for row in subject.ids]
    family = elastify(copy.deepcopy(subject.parent), rows, budgets=subject.budgets, progress=False)
    case = Case("sorted", {}, subject.cases.said[0].submodel)
    yield from _same_logits(case, subject.logits(family), subject.logits(subject.parent), 5 * LOGITS)
    before, after = subject.parent.state_dict(), family.state_dict()
    if all(torch.equal(before[name], after[name]) for name in before):
        yield Deviation("sorted", wrong="nothing was sorted")
    family.set_budget("small")
    yield from _same_logits(subject.small, subject.logits(family), subject.logits(family))


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
        yield from _same_logits(case, torch.cat(steps, dim=1), subject.logits(model))


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
            yield from _same_logits(case, step, view(subject.ids, use_cache=False).logits[:, -1])
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
                view(last, past_key_values=write_cache(given, view.config, text.shape[1]))


def gradients(subject: Subject) -> Iterator[Deviation]:
    """Training at a budget has the loss and the gradients of the masked parent, on the parent's own parameters."""
    family = subject.family().train()
    for case in subject.cases.named("all axes"):
        family.zero_grad(set_to_none=True)
        with torch.enable_grad(), family.at(case.submodel):
            loss = family(subject.ids, labels=subject.ids, use_cache=False).loss
            loss.backward()
        expected_loss, expected = _masked_gradients(subject, case)
        yield Deviation(case.name, _off(loss, expected_loss), LOGITS)
        yield from _same_gradients(case, family, expected)


def soft(subject: Subject) -> Iterator[Deviation]:
    """A mixture that has decided is the submodel, in its loss and its gradients."""
    family = subject.family().train()
    units = SoftUnits(family, subject.architecture)
    for case in subject.cases.named("all axes"):
        counted = subject.architecture.per_token.values()
        if any(axis in case.sizes and case.submodel[axis] != subject.live.submodel[axis] for axis in counted):
            sizes = {axis: size for axis, size in case.sizes.items() if axis not in counted}
            try:
                case = Case(case.name, sizes, subject.architecture.submodel(subject.parent.config, sizes))
            except Exception:
                continue
        family.zero_grad(set_to_none=True)
        units.install(_decided(subject, case))
        try:
            with torch.enable_grad():
                loss = family(subject.ids, labels=subject.ids, use_cache=False).loss
                loss.backward()
        finally:
            units.uninstall()
        expected_loss, expected = _masked_gradients(subject, case)
        yield Deviation(case.name, _off(loss, expected_loss), LOGITS)
        kept = _kept_only(subject, case, expected)
        yield from _same_gradients(case, family, kept, only=set(kept))


def _decided(subject: Subject, case: Case) -> Mixture:
    full = subject.architecture.full(subject.parent.config)
    choices, probabilities = {}, {}
    for axis in case.submodel:
        if axis in subject.architecture.per_token.values():
            continue
        sizes = tuple(sorted({*case.submodel.values(axis), *full.values(axis)}, reverse=True))
        choices[axis], mine, whole = sizes, case.submodel[axis], full[axis]
        for layer, size in ({None: mine} if isinstance(mine, int) else dict(enumerate(mine))).items():
            all_of_it = whole if layer is None else whole[layer]  # type: ignore[index]
            if all_of_it is not None:
                picked = all_of_it if size is None else size
                probabilities[axis, layer] = torch.tensor([float(s == picked) for s in sizes])
    kept = torch.tensor([float(layer in case.submodel.layers) for layer in range(full.depth)])
    return Mixture(choices, probabilities, kept)


def _masked_gradients(subject: Subject, case: Case) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the parent's parameters through masks, by autograd: `w * mask`, norms corrected."""
    parent = subject.parent
    free = {name: p.detach().clone().requires_grad_() for name, p in parent.named_parameters()}
    used = dict(free)
    model = subject.masked(case).train()
    with torch.enable_grad():
        for piece in pieces(subject.architecture, parent.config, case.submodel):
            name = piece.rule.stored.name
            if name not in free or piece.copy_of:
                continue
            used[name] = masked_weight(piece, free[name])
        loss = functional_call(
            model, used, (), {"input_ids": subject.ids, "labels": subject.ids, "use_cache": False}
        ).loss
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in free.items() if p.grad is not None}


def _kept_only(subject: Subject, case: Case, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    kept = {p.rule.stored.name for p in pieces(subject.architecture, subject.parent.config, case.submodel)}
    return {name: gradient for name, gradient in expected.items() if name in kept}


def _same_gradients(
    case: Case, model: PreTrainedModel, expected: dict[str, torch.Tensor], only: set[str] | None = None
) -> Iterator[Deviation]:
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    if largest < 1e-4:
        yield Deviation(case.name, wrong="all gradients are zero, so nothing is checked")
    for name, parameter in model.named_parameters():
        if only is None or name in only:
            theirs = expected.get(name, torch.zeros_like(parameter))
            ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            off = float((ours - theirs).abs().max()) / max(float(theirs.abs().max()), 0.01 * largest)
            yield Deviation(f"{case.name}, {name}", off, GRADIENTS)


def _same_weights(case: Case, left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> Deviation:
    if left.keys() != right.keys():
        return Deviation(case.name, wrong=f"only one of the two has {sorted(left.keys() ^ right.keys())[:3]}")
    other = [n for n in left if left[n].dtype != right[n].dtype or not torch.equal(left[n], right[n])]
    return Deviation(case.name, wrong=f"other weights in {other[:3]}" if other else "")


def _same_logits(case: Case, left: torch.Tensor, right: torch.Tensor, limit: float = LOGITS) -> Iterator[Deviation]:
    yield Deviation(case.name, _off(left, right), limit)


def _off(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference, relative to the largest value or 1."""
    if left.shape != right.shape or not (left.isfinite().all() and right.isfinite().all()):
        return math.inf
    left, right = left.detach(), right.detach()
    return float((left - right).abs().max()) / max(float(right.abs().max()), 1.0)


def _buffers(case: Case, model: PreTrainedModel) -> Iterator[Deviation]:
    if not any(True for _ in constant_buffers(model)):
        return
    with no_init_weights():
        fresh = dict(type(model)(copy.deepcopy(model.config)).named_buffers())
    for name, _, _, buffer in constant_buffers(model):
        same = buffer.shape == fresh[name].shape and torch.equal(buffer, fresh[name].to(buffer.dtype))
        yield Deviation(case.name, wrong="" if same else f"buffer {name} is not that of a new model")


CHECKS: dict[str, Check] = {
    "every tensor has a rule": table,
    "parameters are counted": counts,
    "masked = sliced": masked_is_sliced,
    "from memory = from disk": memory_is_disk,
    "live = sliced": live_is_sliced,
    "buffers that are not saved": buffers,
    "reloaded = exported = sliced": reloaded,
    "nested layout = sliced": nested,
    "sorted = parent": sorted_is_parent,
    "with a cache = without": decoding,
    "caches are handed over": handed_over,
    "gradients at a budget": gradients,
    "decided mixture = submodel": soft,
}
"""Every check by the name that it has in reports."""
