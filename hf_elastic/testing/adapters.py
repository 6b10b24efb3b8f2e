"""The check of LoRA adapters: on everything that the table says can carry one, each has an effect, and its slice is that of a slice."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers.utils import is_peft_available

from ..adapters.slices import slice_adapter
from ..adapters.targets import targets_of
from ..submodels.slicing import slice_state_dict
from .cases import Case
from .checks import LOGITS, Deviation, NotApplicable, same_logits
from .subject import Subject


def adapters(subject: Subject) -> Iterator[Deviation]:
    """The adapter of a slice is the slice of the adapter: attached, merged before the cut, and trained at a budget."""
    if not is_peft_available():
        raise NotApplicable("peft is not installed")
    wrapped = _adapted(subject)
    yield from _without_effect(subject, wrapped)
    merged = copy.deepcopy(wrapped).merge_and_unload().state_dict()
    for case in (subject.cases.said[0], subject.small):
        attached = _attached(subject, case, wrapped)
        sliced = copy.deepcopy(subject.slice(case))
        before = subject.logits(sliced)
        sliced.load_state_dict(slice_state_dict(subject.architecture, subject.parent.config, merged, case.submodel))
        yield from same_logits(case, attached, subject.logits(sliced), 5 * LOGITS)
        with wrapped.get_base_model().at(case.submodel):
            yield from same_logits(case, subject.logits(wrapped.train()), attached, 5 * LOGITS)
        if float((attached - before).abs().max()) < 1e-3:
            yield Deviation(case.name, wrong="the adapter changes nothing, so nothing is checked by it")


def _adapted(subject: Subject) -> Any:
    """A family with adapters on all that can have one; peft starts B at zero, where one that is passed by changes nothing."""
    from peft import LoraConfig, get_peft_model

    targets: dict[str, Any] = dict(targets_of(subject.architecture, subject.parent.config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft saves, and nothing is saved
        wrapped = get_peft_model(subject.family(), LoraConfig(r=3, lora_alpha=2, task_type="CAUSAL_LM", **targets))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def _without_effect(subject: Subject, wrapped: Any) -> Iterator[Deviation]:
    with torch.enable_grad():
        wrapped(subject.ids, labels=subject.ids, use_cache=False).loss.backward()
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name and (parameter.grad is None or not parameter.grad.any()):
            yield Deviation("whole", wrong=f"{name} has no effect: is its tensor passed_by_kernels?")
    wrapped.zero_grad(set_to_none=True)


def _attached(subject: Subject, case: Case, wrapped: Any) -> torch.Tensor:
    from peft import get_peft_model, set_peft_model_state_dict

    config, state = slice_adapter(wrapped, case.submodel)
    small = get_peft_model(copy.deepcopy(subject.slice(case)), config)
    set_peft_model_state_dict(small, state)
    return subject.logits(small.eval())
