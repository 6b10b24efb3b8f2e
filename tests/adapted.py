"""Families with LoRA adapters on everything that can have one, and the merged weights by peft's own product."""

from __future__ import annotations

from typing import Any

from cases import BUDGETS, build_parent
from peft import LoraConfig, PeftModel, get_peft_model

from hf_elastic import elastify
from hf_elastic.testing.adapting import perturb

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
