"""Parents and sizes without Mamba, without attention, without either: what a stock config checks although no layer has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import VOCAB, granite, nemotron, randomize
from compare import assert_same_logits, assert_same_weights, logits
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    GraniteMoeHybridForCausalLM,
    NemotronHForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_elastic import ElasticConfig, ElasticConfigError, elastify
from hf_elastic.architectures import blocks, get_architecture
from hf_elastic.architectures.cost import CostModel
from hf_elastic.architectures.granitemoehybrid import GraniteMoeHybrid
from hf_elastic.commands.plan import plan
from hf_elastic.submodels.masking import masked_model

KINDS = ["full_attention"] * 3
IBM_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "attn_layer_indices": [1, 3],
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "mamba_n_heads": 24,
    "mamba_d_head": 8,
    "mamba_expand": 4,
    "mamba_n_groups": 2,
    "mamba_d_state": 6,
}
DENSE = {"num_local_experts": 0, "num_experts_per_tok": 0}
_CLASSES = {"nemotron_h": NemotronHForCausalLM, "granitemoehybrid": GraniteMoeHybridForCausalLM}


@dataclass(frozen=True)
class Kind:
    """A parent, and sizes that nest in each other."""

    config: Callable[[], PreTrainedConfig]
    budgets: dict[str, dict[str, Any]]


ATTENTION_ONLY = {
    "large": {"hidden": 40},
    "medium": {"hidden": 32, "attention_heads": 4},
    "small": {"hidden": 24, "attention_heads": 2, "shared_expert_ffn": 10, "layers": [0, 2]},
}
FAMILIES = {
    # as granite-4.0-350m, 1b and micro: the config has Mamba fields, and no layer has Mamba
    "granite, attention only": Kind(
        lambda: granite(layer_types=KINDS, num_hidden_layers=3, attention_bias=False, **DENSE), ATTENTION_ONLY
    ),
    "granite, attention only, tied and without positions": Kind(
        lambda: granite(
            layer_types=KINDS, num_hidden_layers=3, position_embedding_type=None, tie_word_embeddings=True, **DENSE
        ),
        ATTENTION_ONLY,
    ),
    "granite, attention only, experts": Kind(
        lambda: granite(layer_types=KINDS, num_hidden_layers=3),
        {**ATTENTION_ONLY, "small": {**ATTENTION_ONLY["small"], "experts": 5, "expert_ffn": 8}},
    ),
    "granite that drops its Mamba layers": Kind(
        granite,
        {
            "large": {"layers": [0, 1, 3]},
            "medium": {"layers": [1, 3], "hidden": 40},
            "small": {"layers": [1, 3], "hidden": 20, "attention_heads": 4, "shared_expert_ffn": 12},
        },
    ),
    "granite, Mamba only": Kind(
        lambda: granite(layer_types=["linear_attention"] * 2, num_hidden_layers=2),
        {"large": {"mamba_heads": 18}, "small": {"hidden": 24, "mamba_heads": 12, "layers": [1]}},
    ),
    "nemotron_h without Mamba": Kind(
        lambda: nemotron("*E-*"),
        {
            "large": {"hidden": 40, "experts": 8},
            "small": {"hidden": 24, "attention_heads": 2, "experts": 8, "layers": [1, 2, 3]},
        },
    ),
    "nemotron_h that drops its Mamba layers": Kind(
        lambda: nemotron("M*-M"), {"large": {"layers": [0, 1, 2]}, "small": {"layers": [1, 2], "hidden": 20}}
    ),
    "nemotron_h without attention": Kind(
        lambda: nemotron("ME-M"),
        {"large": {"hidden": 40}, "small": {"hidden": 24, "mamba_heads": 4, "layers": [1, 3]}},
    ),
    "nemotron_h without attention that drops its Mamba layers": Kind(
        lambda: nemotron("M-E"), {"large": {"layers": [1, 2]}, "small": {"layers": [1], "hidden": 24, "ffn": 12}}
    ),
    "nemotron_h, MLP only": Kind(
        lambda: nemotron("---"), {"large": {"ffn": 24}, "small": {"hidden": 20, "ffn": 16, "layers": [0, 2]}}
    ),
}


def build(config: PreTrainedConfig) -> PreTrainedModel:
    model = _CLASSES[config.model_type](config).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_size_is_planned_loaded_and_exported(name, ids, tmp_path):
    parent = build(FAMILIES[name].config())
    budgets = FAMILIES[name].budgets
    rows = [{"input_ids": row.tolist()} for row in torch.randint(0, VOCAB, (4, 9))]
    family = elastify(parent, rows, budgets=budgets, batch_size=4, progress=False)
    family.save_pretrained(tmp_path / "family")
    planned = {entry["name"]: entry for entry in plan(str(tmp_path / "family"))}
    assert planned.keys() == {"full", *budgets}
    whole = logits(family, ids)
    for budget in planned:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "family", budget=budget)
        assert loaded.num_parameters() == planned[budget]["total_params"]
        here = logits(loaded, ids)
        with family.at(budget):
            assert_same_weights(family, loaded)
            assert_same_logits(logits(family, ids), here)
        sorted_parent = _CLASSES[parent.config.model_type](parent.config).eval()
        sorted_parent.load_state_dict(family.state_dict())
        masked = masked_model(sorted_parent, family.elastic_config.submodel(budget))
        assert_same_logits(logits(masked, ids), here)
        assert budget == "full" or (here - whole).abs().max() > 0.1
        loaded.export(tmp_path / budget)
        exported, info = AutoModelForCausalLM.from_pretrained(tmp_path / budget, output_loading_info=True)
        assert type(exported) is _CLASSES[parent.config.model_type]
        assert not any(info.values())
        assert_same_weights(exported, loaded)
        assert_same_logits(logits(exported, ids), here)


def test_what_no_config_can_say_is_refused_by_upstreams_own_rules(monkeypatch):
    """No table repeats the stock class's rules: whatever it refuses is refused when the sizes are given, and named."""
    monkeypatch.setattr(blocks, "mamba_expand", lambda s: s["mamba_heads"] * s["mamba_head_dim"] // s["hidden"])
    monkeypatch.setattr(GraniteMoeHybrid, "unused_fields", lambda *args: {})
    for config, sizes in (
        (granite(), {"hidden": 40}),
        (granite(layer_types=KINDS, num_hidden_layers=3), {"hidden": 40}),
    ):
        message = r"cannot hold \{'hidden': 40\}.*(mamba_n_heads must divide|Mamba head state do not match)"
        with pytest.raises(ElasticConfigError, match=message):
            get_architecture("granitemoehybrid").submodel(config, sizes)
        with pytest.raises(ElasticConfigError, match=r"budget 'half': .*cannot hold"):
            ElasticConfig.from_parent(config, {"half": sizes})


@pytest.mark.parametrize("config", [granite(), BambaConfig(**IBM_SIZES)], ids=("granite", "bamba"))
def test_mamba_as_wide_as_no_multiple_of_hidden_is_refused_in_the_users_words(config):
    message = (
        r"'hidden': 40.*mamba_heads=24 \* mamba_head_dim=8 = 192 is no whole multiple of hidden=40.*cut them together"
    )
    with pytest.raises(ElasticConfigError, match=message):
        get_architecture(config.model_type).submodel(config, {"hidden": 40})


@pytest.mark.parametrize("config", [granite(), BambaConfig(**IBM_SIZES)], ids=("granite", "bamba"))
def test_hidden_is_free_where_no_mamba_layer_is_kept(config):
    """The stock configs check Mamba's width where no layer has Mamba, too."""
    table = get_architecture(config.model_type)
    submodel = table.submodel(config, {"hidden": 40, "layers": [1, 3]})
    stock = table.config_for(config, submodel)
    with torch.device("meta"):
        assert table.causal_class(stock).num_parameters() == CostModel(config)(submodel).total_params


def test_layers_of_other_sizes_are_checked_one_by_one(monkeypatch):
    monkeypatch.setattr(GraniteMoeHybrid, "tied_fields", lambda *args: {})
    with pytest.raises(ElasticConfigError, match="Mamba head state do not match"):
        get_architecture("granitemoehybrid").submodel(granite(), {"mamba_heads": {2: 12}})


def test_a_size_is_checked_against_the_config_as_it_is_now():
    """What was built once is remembered for that config only, not for one that was changed since."""
    config = granite(layer_types=KINDS, num_hidden_layers=3)
    table = get_architecture("granitemoehybrid")
    table.submodel(config, {"hidden": 40})
    config.layer_types = ["attention"] * 3  # upstream reads the old names only when a config is made
    config.layer_types[0] = "sliding"
    with pytest.raises(ElasticConfigError, match="cannot hold"):
        table.submodel(config, {"hidden": 40})
