"""A `config.json` of a newer transformers with fields that the installed one does not know."""

from __future__ import annotations

import json
import warnings

import pytest
import transformers
from cases import CONFIGS, nemotron
from transformers import AutoConfig, BambaConfig, Zamba2Config

from hf_elastic import ElasticConfig
from hf_elastic.architectures import get_architecture
from hf_elastic.configuration.parent import parent_from_dict

NEW = {"attention_gate": "per_head", "neutral": None, "off": False}


def fields_of(config, **more):
    exported = get_architecture(config.model_type).export_fields(config)
    return {**config.to_dict(), **{name: value for name, value in exported.items() if value is not None}, **more}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_new_field_is_named_and_kept(name):
    fields = fields_of(CONFIGS[name](), **NEW, transformers_version="99.0.0.dev0")
    message = r"written by transformers 99\.0\.0\.dev0.*does not know attention_gate\. What"
    with pytest.warns(UserWarning, match=message) as caught:
        config = parent_from_dict(fields)
    assert config.attention_gate == "per_head"
    assert caught[0].filename == __file__


@pytest.mark.parametrize("version", [transformers.__version__, "4.57.6", "no version", None, 7])
def test_not_what_is_no_newer(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parent_from_dict(fields_of(nemotron("M-*"), **NEW, transformers_version=version))


@pytest.mark.parametrize(
    "config",
    [
        *(make() for make in CONFIGS.values()),
        BambaConfig(head_dim=64, attn_layer_indices=[1], num_hidden_layers=2),
        Zamba2Config(),
    ],
    ids=lambda config: config.model_type,
)
def test_not_what_the_table_or_the_stock_class_knows(config):
    """Also what a stock class sets itself, and what it reads without declaring it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parent_from_dict(fields_of(config, transformers_version="99.0"))


def test_families_say_which_version_wrote_them_at_the_top(tmp_path):
    ElasticConfig.from_parent(nemotron("M-*"), {"half": {"ffn": 20}}).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    assert fields["transformers_version"] == transformers.__version__
    fields["parent_config"] |= NEW
    path.write_text(json.dumps({**fields, "transformers_version": "99.0"}))
    with pytest.warns(UserWarning, match="does not know attention_gate"):
        AutoConfig.from_pretrained(tmp_path)
