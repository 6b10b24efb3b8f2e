"""Tables of other people: registered in a process or announced by an entry point, checked before anything uses them."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
import torch
from compare import assert_same_logits, logits
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM, GraniteModel, LlamaForCausalLM
from transformers.models.granite.modeling_granite import GraniteDecoderLayer

import hf_elastic
from hf_elastic import ElasticConfigError, ElasticForCausalLM, UnsupportedArchitectureError, elastify, masked_model
from hf_elastic.architectures import ARCHITECTURES, Architecture, Axis, get_architecture, registry
from hf_elastic.architectures.dense import Dense, Llama
from hf_elastic.testing import ConformanceError, check_architecture


class Granite(Dense):
    """IBM's dense models: as Llama, with multipliers that depend on no size."""

    model_type = "granite"
    causal_class = GraniteForCausalLM
    base_class = GraniteModel
    layer_class = GraniteDecoderLayer


TINY = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 0.1,
    "logits_scaling": 0.5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@pytest.fixture
def granite(monkeypatch):
    """The table, registered for one test."""
    monkeypatch.setattr(ARCHITECTURES, "_places", dict(ARCHITECTURES._places))
    monkeypatch.setattr(ARCHITECTURES, "_loaded", dict(ARCHITECTURES._loaded))
    return hf_elastic.register_architecture(Granite)


def test_a_registered_table_is_taken_everywhere(granite, tmp_path, ids):
    with pytest.raises(KeyError, match="give a config"):
        check_architecture("granite")
    parent = GraniteForCausalLM(GraniteConfig(**TINY)).eval()
    family = elastify(parent, budgets={"small": {"hidden": 24, "attention_heads": 4, "layers": [0, 2]}}, sort=False)
    assert type(family).__name__ == "ElasticGraniteForCausalLM"
    family.save_pretrained(tmp_path / "family")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "family", budget="small")
    masked = masked_model(parent, family.elastic_config.submodel("small"))
    assert_same_logits(logits(small, ids), logits(masked, ids))
    assert torch.equal(small.model.layers[1].mlp.up_proj.weight, parent.model.layers[2].mlp.up_proj.weight[:, :24])
    small.export(tmp_path / "export")
    assert_same_logits(logits(GraniteForCausalLM.from_pretrained(tmp_path / "export"), ids), logits(small, ids))
    parent.save_pretrained(tmp_path / "parent")
    with pytest.raises(ElasticConfigError, match="plain granite checkpoint without budgets"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "parent", budget="small")


def test_without_the_table_its_checkpoints_say_what_is_missing(granite, tmp_path, monkeypatch):
    family = elastify(GraniteForCausalLM(GraniteConfig(**TINY)), budgets={"small": {"ffn": 16}}, sort=False)
    family.save_pretrained(tmp_path)
    monkeypatch.undo()
    for load in (ElasticForCausalLM, AutoModelForCausalLM):
        with pytest.raises(UnsupportedArchitectureError, match="'granite'.*register_architecture"):
            load.from_pretrained(tmp_path, budget="small")


def test_the_kit_reports_what_a_table_gets_wrong(granite, monkeypatch):
    monkeypatch.setattr(Granite, "centre", 1.0)
    report = check_architecture(GraniteConfig(**TINY), checks=["masked = sliced"], raise_on_failure=False)
    assert not report.passed
    assert "FAILED" in str(report)
    with pytest.raises(ConformanceError, match="off by"):
        check_architecture(GraniteConfig(**TINY), checks=["masked = sliced"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": None}, "model_type=None is no name"),
        ({"causal_class": LlamaForCausalLM}, "causal_class LlamaForCausalLM is of model_type 'llama', not 'granite'"),
        ({"base_class": dict}, "base_class=.*dict.* is no class of transformers models"),
        ({"axes": ()}, "must be a tuple of Axis, at least one"),
        ({"axes": Dense.axes[1:]}, "no axis 'hidden'"),
        ({"axes": (*Dense.axes, Dense.axes[0])}, r"\['hidden'\] are there twice"),
        ({"axes": (*Dense.axes, Axis("layers", "num_hidden_layers"))}, "may be called 'layers'"),
    ],
)
def test_incomplete_tables_are_refused(change, message):
    with pytest.raises(ElasticConfigError, match=message):
        hf_elastic.register_architecture(type("Changed", (Granite,), change))
    assert "granite" not in ARCHITECTURES


def test_what_is_no_table_is_refused():
    with pytest.raises(ElasticConfigError, match="takes a subclass of"):
        hf_elastic.register_architecture(Granite())  # type: ignore[arg-type]

    class Empty(Architecture):
        model_type = "granite"

    with pytest.raises(ElasticConfigError, match="does not define parts, rules, states"):
        hf_elastic.register_architecture(Empty)


def test_a_name_that_is_taken_is_refused_unless_it_is_to_be_replaced(granite):
    with pytest.raises(ElasticConfigError, match="a table of model_type 'llama' already; give exist_ok=True"):
        hf_elastic.register_architecture(Llama)
    other = type("Other", (Granite,), {})
    assert type(get_architecture("granite")) is Granite
    hf_elastic.register_architecture(other, exist_ok=True)
    assert type(get_architecture("granite")) is other


def test_packages_announce_tables(monkeypatch):
    def announced(value: str) -> registry.Registry:
        points = [EntryPoint("granite", value, registry.ENTRY_POINTS), EntryPoint("llama", "taken:Nobody", "x")]
        monkeypatch.setattr(registry, "entry_points", lambda group: points)
        return registry.Registry({"llama": "dense:Llama"})

    found = announced(f"{__name__}:Granite")
    assert list(found) == ["llama", "granite"]
    assert type(found["granite"]) is Granite
    assert type(found["llama"]) is Llama  # ours stays
    for value in (
        "no_such_package:Granite",
        f"{__name__}:Missing",
        f"{__name__}:TINY",
        "hf_elastic.architectures.dense:Llama",
    ):
        broken = announced(value)
        assert "granite" in broken
        with pytest.raises(UnsupportedArchitectureError, match="'granite'"):
            broken["granite"]
