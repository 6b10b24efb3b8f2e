"""The check of the conformance kit on LoRA adapters, and the merged weights by peft's own product."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapters.slices import slice_adapter
from ..adapters.targets import targets_of
from ..submodels.masking import masked_model
from .deviations import GRADIENTS, LOGITS, Deviation, NotApplicable, off, same_gradients, same_logits
from .subject import Subject
from .training import gradients_of, masked_gradients

if TYPE_CHECKING:
    from peft import PeftModel


def adapters(subject: Subject) -> Iterator[Deviation]:
    """An adapter at a budget, and its slice on the slice, are the submodel of the merged parent, in logits, loss and gradients."""
    try:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    except ModuleNotFoundError:
        raise NotApplicable("peft is not installed") from None
    targets: dict[str, Any] = dict(targets_of(subject.architecture, subject.parent.config))
    if not targets:
        raise NotApplicable("the table names nothing that an adapter can be put on")
    lora = LoraConfig(r=3, lora_alpha=4, task_type="CAUSAL_LM", **targets)
    family = subject.family()
    wrapped = perturb(get_peft_model(family, lora)).train()
    parent = copy.deepcopy(subject.parent)
    with torch.no_grad():
        for name, added in effective_weights(wrapped, delta=True).items():
            parent.get_parameter(name).add_(added)
    for case in subject.cases.named("all axes")[-1:]:
        wrapped.zero_grad(set_to_none=True)
        with torch.enable_grad(), family.at(case.submodel):
            loss = wrapped(input_ids=subject.ids, labels=subject.ids, use_cache=False).loss
            loss.backward()
        found = gradients_of(wrapped, adapter_parameters(wrapped))
        expected_loss, of_weights = masked_gradients(subject, case, parent)
        yield Deviation(case.name, off(loss, expected_loss), LOGITS)
        wrapped.zero_grad(set_to_none=True)
        with torch.enable_grad():  # the chain rule: weights, then factors
            products = effective_weights(wrapped, delta=True)
            torch.stack(
                [(products[name] * of_weights[name]).sum() for name in products if name in of_weights]
            ).sum().backward()
        expected = gradients_of(wrapped, adapter_parameters(wrapped))
        yield from same_gradients(case, found, expected, 10 * GRADIENTS)  # one more product, in another order
        config, weights = slice_adapter(wrapped, case.submodel)
        sliced = get_peft_model(copy.deepcopy(subject.slice(case)), config).eval()
        set_peft_model_state_dict(sliced, weights)
        yield from same_logits(
            case, subject.logits(sliced), subject.logits(masked_model(parent, case.submodel)), 5 * LOGITS
        )


@torch.no_grad()
def perturb(wrapped: PeftModel, seed: int = 7) -> PeftModel:
    """Random factors: peft starts B at zero, where an adapter that is passed by changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(wrapped).values():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of every adapter by name."""
    return {key: p for key, p in model.named_parameters() if ".lora_" in key}


def effective_weights(wrapped: PeftModel, delta: bool = False) -> dict[str, torch.Tensor]:
    """`W + s B A` by its name in the stock model, differentiable in A and B; with `delta` only `s B A` where there is one."""
    model = wrapped.get_base_model()
    weights: dict[str, torch.Tensor] = (
        {} if delta else {key.replace(".base_layer", ""): p for key, p in plain_parameters(model).items()}
    )
    for path, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            name = f"{path.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}"
            product = layer.get_delta_weight("default")
            weights[name] = product if delta else weights[name] + product
    return weights


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the model itself, frozen in training."""
    return {key: p for key, p in model.named_parameters() if ".lora_" not in key}
