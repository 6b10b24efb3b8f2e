"""Checks of the conformance kit on training: gradients at a budget, mixtures that have decided, adapters."""

from __future__ import annotations

from collections.abc import Container, Iterator

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..architectures.pieces import pieces
from ..errors import ElasticConfigError
from ..submodels.masking import masked_model, masked_weight
from ..submodels.soft import Mixture, SoftUnits
from .cases import Case
from .deviations import LOGITS, Deviation, NotApplicable, off, same_gradients
from .subject import Subject


def gradients(subject: Subject) -> Iterator[Deviation]:
    """Training at a budget has the loss and the gradients of the masked parent, on the parent's own parameters."""
    family = subject.family().train()
    for case in subject.cases.named("all axes"):
        family.zero_grad(set_to_none=True)
        with torch.enable_grad(), family.at(case.submodel):
            loss = family(subject.ids, labels=subject.ids, use_cache=False).loss
            loss.backward()
        expected_loss, expected = masked_gradients(subject, case, subject.parent)
        yield Deviation(case.name, off(loss, expected_loss), LOGITS)
        yield from same_gradients(case, gradients_of(family), expected)


def soft(subject: Subject) -> Iterator[Deviation]:
    """A mixture that has decided is the submodel, in its loss and its gradients."""
    family = subject.family().train()
    units = SoftUnits(family, subject.architecture)
    for case in subject.cases.named("all axes"):
        case = _without_counts(subject, case)
        family.zero_grad(set_to_none=True)
        units.install(_decided(subject, case))
        try:
            with torch.enable_grad():
                loss = family(subject.ids, labels=subject.ids, use_cache=False).loss
                loss.backward()
        finally:
            units.uninstall()
        expected_loss, expected = masked_gradients(subject, case, subject.parent)
        yield Deviation(case.name, off(loss, expected_loss), LOGITS)
        kept = _kept_only(subject, case, expected)
        yield from same_gradients(case, gradients_of(family, kept), kept)


def _without_counts(subject: Subject, case: Case) -> Case:
    """The same with as many experts per token as the parent has, which mixtures leave as they are; with all experts if it has to be."""
    architecture, config = subject.architecture, subject.parent.config
    counts, sizes = architecture.per_token, dict(case.sizes)
    for left_out in (counts.values(), counts.keys()):
        sizes = {axis: size for axis, size in sizes.items() if axis not in left_out}
        try:
            return Case(case.name, sizes, architecture.submodel(config, sizes))
        except ElasticConfigError as error:
            reason = str(error)
    raise NotApplicable(reason)


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


def masked_gradients(
    subject: Subject, case: Case, parent: PreTrainedModel
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the parent's parameters through masks, by autograd: `w * mask`, norms corrected."""
    free = {name: p.detach().clone().requires_grad_() for name, p in parent.named_parameters()}
    used = dict(free)
    model = masked_model(parent, case.submodel).train()
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


def gradients_of(model: nn.Module, only: Container[str] | None = None) -> dict[str, torch.Tensor]:
    """Gradients by name, zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if only is None or name in only
    }
