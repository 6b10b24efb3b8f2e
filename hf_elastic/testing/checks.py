"""The checks of the conformance kit. Each goes through cases and gives deviations, or says what is wrong."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from ..architectures.cost import CostModel
from ..elastification.elastify import elastify
from ..modeling_elastic import ElasticForCausalLM
from ..submodels.buffers import constant_buffers
from ..submodels.masking import masked_model
from ..submodels.slicing import check_table, slice_state_dict
from .adapting import adapters
from .cases import Case
from .deviations import LOGITS, Deviation, NotApplicable, same_logits, same_weights
from .generating import caches_counted, decoding, handed_over
from .quantizing import kinds, quantised, quantised_elsewhere, refused
from .subject import Subject
from .training import gradients, soft

Check = Callable[[Subject], Iterator[Deviation]]


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
        yield from same_logits(case, sliced, subject.logits(subject.masked(case)))
        if case.sizes and float((sliced - whole).abs().max()) < 1e-3:
            yield Deviation(case.name, wrong="the case changes nothing, so nothing is checked by it")


def memory_is_disk(subject: Subject) -> Iterator[Deviation]:
    """A slice of the parent in memory has the weights of the slice from disk, bit by bit."""
    state = subject.parent.state_dict()
    for case in subject.cases.said:
        sliced = slice_state_dict(subject.architecture, subject.parent.config, state, case.submodel)
        yield same_weights(case, sliced, subject.slice(case).state_dict())


def live_is_sliced(subject: Subject) -> Iterator[Deviation]:
    """A live budget has the weights, the buffers and the logits of the slice."""
    for case in subject.cases.said:
        sliced = subject.slice(case)
        with subject.live.at(case.submodel) as view:
            yield same_weights(case, view.state_dict(), sliced.state_dict())
            yield from same_logits(case, subject.logits(view), subject.logits(sliced))
            yield from _buffers(case, view)


def buffers(subject: Subject) -> Iterator[Deviation]:
    """Buffers that are not saved are those of a newly built stock model of the same config."""
    if not any(constant_buffers(subject.parent)):
        raise NotApplicable("this model has none")
    for case in subject.cases.said:
        yield from _buffers(case, subject.slice(case))
    yield from _buffers(subject.cases.said[0], subject.live)


def reloaded(subject: Subject) -> Iterator[Deviation]:
    """A slice that is saved and loaded again is the same; its export is a stock checkpoint that computes the same, in types that are the same."""
    stock, folder = subject.architecture.causal_class, subject.folder / "again"
    for case in subject.cases.named("whole", "all axes"):
        sliced = subject.slice(case)
        sliced.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder)
        yield same_weights(case, again.state_dict(), sliced.state_dict())
        yield from same_logits(case, subject.logits(again), subject.logits(sliced))
        shutil.rmtree(folder)
        sliced.export(folder)
        exported = stock.from_pretrained(folder)
        yield from same_logits(case, subject.logits(exported), subject.logits(sliced))
        yield from _buffers(case, exported)
        if not case.sizes:
            half = [
                cls.from_pretrained(at, dtype=torch.bfloat16)
                for cls, at in ((ElasticForCausalLM, subject.checkpoint), (stock, folder))
            ]
            yield same_weights(case, half[0].state_dict(), half[1].state_dict())
        shutil.rmtree(folder)


def names_in_files(subject: Subject) -> Iterator[Deviation]:
    """A file with the names that the table gives to tensors, and to their experts and segments, is one that the stock class loads whole."""
    parent, folder = subject.parent, subject.folder / "named"
    state, full, stored = parent.state_dict(), subject.architecture.full(parent.config), {}
    for rule in subject.architecture.rules(parent.config):
        if rule.copy_of:
            continue
        rows = dict(enumerate(state[rule.name])) if rule.stacked else {None: state[rule.name]}
        for expert, tensor in rows.items():
            lengths = [shape[0] for shape in rule.stored_shapes(full.at(rule.layer))] if rule.parted else [len(tensor)]
            for segment, part in zip(rule.segments, tensor.split(lengths), strict=True):
                stored[rule.disk_name(expert, segment)] = part.contiguous()
    parent.config.save_pretrained(folder)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = subject.architecture.causal_class.from_pretrained(folder, dtype=torch.float32)
    yield same_weights(subject.cases.said[0], loaded.state_dict(), state)


def nested(subject: Subject) -> Iterator[Deviation]:
    """The nested layout holds the same weights, for every budget."""
    family, folder = subject.family(), subject.folder / "nested"
    family.save_pretrained(folder, layout="nested")
    for case, budget in ((subject.small, "small"), (subject.cases.said[0], None)):
        loaded = ElasticForCausalLM.from_pretrained(folder, budget=budget)
        yield same_weights(case, loaded.state_dict(), subject.slice(case).state_dict())
        yield from same_logits(case, subject.logits(loaded), subject.logits(subject.slice(case)))


def sorted_is_parent(subject: Subject) -> Iterator[Deviation]:
    """Sorting by importance does not change what the parent computes, but moves its weights."""
    rows = [{"input_ids": row.tolist()} for row in subject.ids]
    family = elastify(copy.deepcopy(subject.parent), rows, budgets=subject.budgets, progress=False)
    case = Case("sorted", {}, subject.cases.said[0].submodel)
    yield from same_logits(case, subject.logits(family), subject.logits(subject.parent), 5 * LOGITS)
    before, after = subject.parent.state_dict(), family.state_dict()
    if all(torch.equal(before[name], after[name]) for name in before):
        yield Deviation("sorted", wrong="nothing was sorted")
    stock = subject.architecture.causal_class(copy.deepcopy(subject.parent.config)).eval()
    stock.load_state_dict(after)
    family.set_budget("small")
    masked = masked_model(stock, family.submodel)
    yield from same_logits(subject.small, subject.logits(family), subject.logits(masked))


def _buffers(case: Case, model: PreTrainedModel) -> Iterator[Deviation]:
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
    "names in files": names_in_files,
    "nested layout = sliced": nested,
    "sorted = parent": sorted_is_parent,
    "with a cache = without": decoding,
    "caches are handed over": handed_over,
    "caches are counted": caches_counted,
    "gradients at a budget": gradients,
    "decided mixture = submodel": soft,
    "adapters at a budget": adapters,
    "kinds of weights": kinds,
    "sizes off the blocks are refused": refused,
    "quantised = sliced": quantised,
    "quantised in other forms = sliced": quantised_elsewhere,
}
"""Every check by the name that it has in reports."""
