"""Families with LoRA adapters on everything that can have one, and the merged weights by peft's own product."""

from __future__ import annotations

from typing import Any

import torch
from cases import BUDGETS, build_parent
from peft import LoraConfig, PeftModel, get_peft_model

from hf_elastic import elastify

RANK = 4
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_MODULES = {
    "nano": [*_ATTENTION, "in_proj", "up_proj", "down_proj"],
    "gran": [*_ATTENTION, "in_proj", "input_linear", "output_linear"],
}
_PARAMETERS = {
    "nano": ["mixer.experts.up_proj", "mixer.experts.down_proj", "mixer.gate.weight"],
    "gran": ["experts.gate_up_proj", "experts.down_proj", "router.weight"],
}
_DENSE = ("nano2", "granite_dense")
_LATENT = ("nano3_latent",)


def targets(name: str, **fields: Any) -> LoraConfig:
    """Every layer that peft and the axis tables can adapt, scaled by alpha / sqrt(r)."""
    latent = ["fc1_latent_proj", "fc2_latent_proj"] if name in _LATENT else []
    given: dict[str, Any] = {"target_modules": _MODULES[name[:4]] + latent}
    if name not in _DENSE:
        given["target_parameters"] = _PARAMETERS[name[:4]]
    given |= {"rank_pattern": {"in_proj": 2}, "use_rslora": True, "task_type": "CAUSAL_LM", **fields}
    return LoraConfig(r=RANK, lora_alpha=3, **given)


def adapted(name: str) -> PeftModel:
    """A family in training mode, with adapters that are not zero."""
    model = elastify(
        build_parent(name),
        budgets=BUDGETS.get(name, {"other": {"ffn" if name == "nano2" else "shared_expert_ffn": 8}}),
        sort=False,
    )
    return perturb(get_peft_model(model, targets(name))).train()


@torch.no_grad()
def perturb(wrapped: PeftModel, seed: int = 7) -> PeftModel:
    """Random factors: peft starts B at zero, where an adapter that is passed by changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(wrapped).values():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """A and B of every adapter by name."""
    return {key: p for key, p in model.named_parameters() if ".lora_" in key}


def effective_weights(wrapped: PeftModel, delta: bool = False) -> dict[str, torch.Tensor]:
    """`W + s B A` by its name in the stock model, differentiable in A and B; with `delta` only `s B A` where there is one."""
    model = wrapped.get_base_model()
    weights = {} if delta else {key.replace(".base_layer", ""): p for key, p in plain_parameters(model).items()}
    for path, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            name = f"{path.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}"
            product = layer.get_delta_weight("default")
            weights[name] = product if delta else weights[name] + product
    return weights


def plain_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of the model itself, frozen in training."""
    return {key: p for key, p in model.named_parameters() if ".lora_" not in key}
