"""Tables that cannot be imported, are none, or are not registered here."""

from __future__ import annotations

import json

import pytest
from cases import nemotron
from transformers import AutoConfig

from hf_elastic import ElasticConfig, ElasticForCausalLM, UnsupportedArchitectureError
from hf_elastic.architectures import ARCHITECTURES, bamba
from hf_elastic.architectures.registry import Registry


def test_stock_classes_that_the_installed_transformers_lacks():
    for place in ("no_such_module:Bamba", "bamba:NoSuchTable"):
        registry = Registry({"bamba": place})
        assert "bamba" in registry
        with pytest.raises(UnsupportedArchitectureError, match=r"'bamba' cannot be imported: .*needs transformers>=5"):
            registry["bamba"]


def test_what_is_registered_is_no_table_of_that_model_type():
    registry = Registry({"zamba9": "bamba:Bamba", "axes": "axes:Cut"})
    for model_type in registry:
        with pytest.raises(UnsupportedArchitectureError, match=f"model_type = '{model_type}'"):
            registry[model_type]


def test_asking_what_is_known_imports_nothing():
    registry = Registry({"bamba": "no_such_module:Bamba"})
    assert "bamba" in registry
    assert "gpt2" not in registry
    assert list(registry) == ["bamba"]
    assert registry.get("gpt2") is None
    assert isinstance(ARCHITECTURES["bamba"], bamba.Bamba)


@pytest.mark.parametrize("load", [AutoConfig.from_pretrained, ElasticForCausalLM.from_pretrained])
def test_a_family_whose_table_is_not_registered_here(load, tmp_path):
    ElasticConfig.from_parent(nemotron("M-*"), {"half": {"ffn": 20}}).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    fields["parent_config"]["model_type"] = "somebodys_hybrid"
    path.write_text(json.dumps(fields))
    message = r"model_type 'somebodys_hybrid'; supported: nemotron_h.* import it if it calls hf_elastic.register_architecture"
    with pytest.raises(UnsupportedArchitectureError, match=message):
        load(tmp_path)
