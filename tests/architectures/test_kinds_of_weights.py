"""Which weights of every table can be quantised, and which have to have one global scale, by the modules of the stock models."""

from __future__ import annotations

import re

import pytest
from torch import nn

from hf_elastic.architectures import get_architecture
from hf_elastic.submodels.slicing import build_meta
from hf_elastic.testing.models import tiny_config
from hf_elastic.testing.tiny import TINY

VARIANTS = [(name, i) for name in TINY for i in range(len(TINY[name]))]

KEPT = {
    r"lm_head": "the head decides between tokens that are close",
    r"\.(x_proj|dt_proj)$": "what a scan makes of its channels: step, B and C",
    r"\.(in_proj_)?(a|b|ba)(_proj)?$": "how far the heads of a delta net decay and learn",
    r"\.(f_a|f_b|g_a|g_b)_proj$": "gates by way of a vector as wide as one head",
    r"_adapter_list\.\d+\.[01]$": "adapters of low rank",
    r"\.shared_expert_gate$": "one row, a gate",
    r"\.fc[12]_latent_proj$": "narrow, and all that the routed experts read and write goes through it",
    r"^model\.layers\.\d+\.linear$": "takes what a shared block wrote to the residual stream, where all that follows reads it",
}
"""Linear layers that no recipe quantises, and why."""

FUSED = [
    {"q_proj", "k_proj", "v_proj", "g_proj"},
    {"q_proj", "k_proj", "v_proj"},
    {"q_a_proj", "kv_a_proj_with_mqa"},
    {"in_proj_qkv", "in_proj_z"},
    {"gate_proj", "up_proj"},
    {"w1", "w3"},
]
"""Modules that vLLM makes one matrix of (`packed_modules_mapping`, `WeightsMapper`), in one module; the first that is there whole."""

KINDS = {
    r"\.(mamba|mamba_decoder\.mamba)\.(in|out)_proj$": "mamba",
    r"\.conv\.(in|out)_proj$": "short_convolution",
    r"\.linear_attn\.\w+$": "linear_attention",
    r"\.self_attn\.\w+$": "attention",
    r"\.shared_(experts?|mlp)\.\w+$": "shared_experts",
    r"\.experts$": "experts",
    r"\.(mlp|feed_forward)\.\w+$": "mlp",
}
"""By the stock module's name. Where it says nothing: `exact_kind`."""


def exact_kind(name, module, config):
    """What stock code makes of a layer that is called `mixer` or `self_attn` whatever it is."""
    owner = type(module).__name__
    if "Mamba" in owner:
        return "mamba"
    if "Delta" in owner or "KDA" in owner:
        return "linear_attention"
    if ".mixer." in name:
        return "attention" if "Attention" in owner else "mlp"
    return None


@pytest.fixture(scope="module")
def built():
    made = {}

    def build(model_type, variant):
        if (model_type, variant) not in made:
            config, table = tiny_config(model_type, variant), get_architecture(model_type)
            made[model_type, variant] = build_meta(table, config, table.causal_class), table.rules(config)
        return made[model_type, variant]

    return build


@pytest.mark.parametrize(("model_type", "variant"), VARIANTS)
def test_every_linear_layer_has_a_kind_or_a_reason(model_type, variant, built):
    model, rules = built(model_type, variant)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    stacks = {name for name, p in model.named_parameters() if p.dim() == 3 and ".experts." in name}
    with_kind = {rule.name.removesuffix(".weight") for rule in rules if rule.kind}
    kept = {name for name in linear if any(re.search(pattern, name) for pattern in KEPT)}
    assert with_kind == (linear - kept) | stacks
    assert not with_kind & kept


@pytest.mark.parametrize(("model_type", "variant"), VARIANTS)
def test_kinds_are_those_of_the_stock_modules(model_type, variant, built):
    model, rules = built(model_type, variant)
    modules = dict(model.named_modules())
    for rule in rules:
        if rule.kind is None:
            continue
        name = rule.name.removesuffix(".weight") if rule.name.endswith(".weight") else rule.module
        owner = modules[name.rpartition(".")[0]]
        said = next((kind for pattern, kind in KINDS.items() if re.search(pattern, name)), None)
        exact = exact_kind(name, owner, model.config) if said in (None, "attention") else None
        assert rule.kind == (exact or said), name


@pytest.mark.parametrize(("model_type", "variant"), VARIANTS)
def test_what_others_make_one_matrix_of_has_one_global_scale(model_type, variant, built):
    _, rules = built(model_type, variant)
    owners = {}
    for rule in rules:
        if rule.kind and len(rule.dims) == 2:
            owner, _, name = rule.module.rpartition(".")
            owners.setdefault(owner, {})[name] = rule.fused
    for owner, members in owners.items():
        expected = next((group for group in FUSED if group <= members.keys()), set())
        groups = {fused for name, fused in members.items() if name in expected}
        assert len(groups) == bool(expected), owner
        assert None not in groups, owner
        assert {name for name, fused in members.items() if fused} == expected, owner
