"""Sizes that a stock config takes without a word and reads as others."""

from __future__ import annotations

import pytest
from cases import nemotron
from transformers import JambaConfig

from hf_elastic import ElasticConfig, ElasticConfigError
from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.jamba import Jamba
from hf_elastic.architectures.nemotron_h import NemotronH

JAMBA = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "mamba_d_state": 4,
    "use_mamba_kernels": False,
}


@pytest.mark.parametrize("experts", [1, {3: 1}], ids=["every layer", "one layer"])
def test_one_expert_which_the_stock_class_makes_a_dense_mlp_of(experts, monkeypatch):
    """The table says it in better words; without them it is found out."""
    monkeypatch.setattr(Jamba, "check_layer", lambda *args: None)
    config = JambaConfig(**JAMBA)
    message = r"budget 'small': a stock jamba config cannot say .*'experts': .*it is read as"
    with pytest.raises(ElasticConfigError, match=message):
        ElasticConfig.from_parent(config, {"small": {"experts": experts, "experts_per_token": 1}})
    get_architecture("jamba").submodel(config, {"experts": 2, "experts_per_token": 1})


def test_a_config_that_adjusts_a_size_is_found_out(monkeypatch):
    """As some stock classes round widths up to multiples of 256."""

    def rounded(self, config, submodel):
        built = config_for(self, config, submodel)
        built.intermediate_size = -(-built.intermediate_size // 8) * 8
        return built

    config_for = NemotronH.config_for
    monkeypatch.setattr(NemotronH, "config_for", rounded)
    table = get_architecture("nemotron_h")
    table.submodel(nemotron("M-*"), {"ffn": 32})
    with pytest.raises(ElasticConfigError, match=r"cannot say \{'ffn': 30\}; it is read as \{'ffn': 32\}"):
        table.submodel(nemotron("M-*"), {"ffn": 30})
