"""Plain checkpoints that are sorted already are cut without conversion, if somebody says what they nest."""

from __future__ import annotations

import json

import pytest
import torch
from cases import BUDGETS
from compare import assert_same_weights
from nano_v3 import nano_v3
from published import NANO3_4B, first_layers_of, nano2_9b, nano2_12b
from transformers import AutoModelForCausalLM

from hf_elastic import ElasticConfig, ElasticConfigError, ElasticForCausalLM
from hf_elastic.architectures.cost import CostModel
from hf_elastic.checkpoints.described import described_config
from hf_elastic.cli import main
from hf_elastic.configuration.known import KNOWN
from hf_elastic.submodels.slicing import slice_state_dict

STAR = "nvidia/NVIDIA-Nemotron-Labs-3-Elastic-30B-A3B-BF16"
load = ElasticForCausalLM.from_pretrained


@pytest.fixture(scope="module")
def stock(original, tmp_path_factory):
    """A checkpoint as the stock class saves it."""
    folder = tmp_path_factory.mktemp("stock")
    original("nano3").save_pretrained(folder)
    return folder


def test_the_sizes_of_the_released_family_have_the_published_counts(tmp_path, caplog):
    """Reports of arXiv 2605.07182 say 30B, 23B and 12B; of active parameters 3.6B, 2.8B and 2.0B, which these sizes only come near to."""
    nano_v3().save_pretrained(tmp_path)
    config = described_config(tmp_path, STAR)
    counts = {name: (cost.total_params / 1e9, cost.active_params / 1e9) for name, cost in config.costs().items()}
    expected = {"30b": (31.58, 3.58), "23b": (23.68, 2.69), "12b": (12.43, 2.08)}
    assert counts == {name: pytest.approx(pair, abs=0.005) for name, pair in expected.items()}
    assert f"the sizes of {STAR} are reconstructed, not published" in caplog.text
    assert all(family.source and (family.reconstructed or "http" in family.source) for family in KNOWN.values())
    assert config.name_of(config.resolve("24.9GB", torch.bfloat16)) == "12b"


def test_the_sizes_of_published_models_have_the_published_counts(tmp_path, capsys):
    """NVIDIA cut the 9B out of the 12B (56 of 62 layers), and the 4B out of the 9B (42 of 56); counts are those of the released files."""
    nine, four = nano2_9b(), {"hidden": 3136, "ffn": 12544, "mamba_heads": 96}
    assert CostModel(nano2_12b()).full.total_params == 12_310_001_152
    layers = first_layers_of(nano2_12b().hybrid_override_pattern, nine.hybrid_override_pattern)
    sizes = {"9b": {"hidden": 4480, "ffn": 15680, "layers": layers}}
    assert ElasticConfig.from_parent(nano2_12b(), sizes).costs()["9b"].total_params == 8_888_227_328
    layers = first_layers_of(nine.hybrid_override_pattern, NANO3_4B)
    config = ElasticConfig.from_parent(nine, {"4b": {**four, "layers": layers}})
    stock = config.stock_config(config.submodel("4b"))
    assert (len(layers), stock.hybrid_override_pattern) == (42, NANO3_4B)
    nine.save_pretrained(tmp_path)
    options = [f"--size={axis}={size}" for axis, size in {**four, "layers": ",".join(map(str, layers))}.items()]
    assert main(["plan", str(tmp_path), "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)["budgets"]
    assert [member["total_params"] for member in found] == [8_888_227_328, 3_973_556_832]


@pytest.mark.parametrize("how", ["budgets", "section", "config"])
def test_a_described_family_is_cut_without_conversion(how, stock, original, tmp_path):
    config = ElasticConfig.from_parent(original("nano3").config, BUDGETS["nano3"])
    described = {"budgets": BUDGETS["nano3"], "section": config.elastic, "config": config}[how]
    small = load(stock, budget="small", elastic_config=described)
    submodel = config.submodel("small")
    expected = slice_state_dict(config.architecture, config.parent_config, original("nano3").state_dict(), submodel)
    assert_same_weights(small, expected)
    family = load(stock, elastic_config=described)
    assert_same_weights(family, original("nano3"))
    with family.at("small"):
        assert_same_weights(family, expected)
    family.save_pretrained(tmp_path)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path, budget="small"), expected)


def test_what_is_not_known_or_does_not_fit_is_refused(stock, family_folder, monkeypatch, capsys):
    section = ElasticConfig.from_parent(nano_v3(), {"12b": {"hidden": 1920}}).elastic
    for described, message in {
        "auto": f"no sizes of {stock} are known; known are {STAR}",
        STAR.lower(): f"Did you mean '{STAR}'",
        STAR: rf"this is not {STAR}: that has hidden=2688, its config says \{{48\}}",
        7: "must be 'auto', the name of a known family",
    }.items():
        with pytest.raises(ElasticConfigError, match=message):
            load(stock, elastic_config=described)
    with pytest.raises(ElasticConfigError, match="hidden"):
        load(stock, elastic_config=section)
    with pytest.raises(ElasticConfigError, match="says itself what it nests; leave out elastic_config="):
        load(family_folder("nano3"), elastic_config=BUDGETS["nano3"])
    with pytest.raises(ElasticConfigError, match=r"is for ElasticForCausalLM.from_pretrained"):
        AutoModelForCausalLM.from_pretrained(stock, elastic_config=BUDGETS["nano3"])
    with pytest.raises(ElasticConfigError, match="without budgets.*sorted by importance already.*elastic_config="):
        load(stock, budget="small")
    monkeypatch.setitem(KNOWN, str(stock), KNOWN[STAR])
    with pytest.raises(ElasticConfigError, match="its sizes are known, give elastic_config='auto'"):
        load(stock, budget="12b")
    assert main(["slice", str(stock), str(stock) + "-out", "--budget", "12b", "--elastic-config", "auto"]) == 2
    assert "that has hidden=2688" in capsys.readouterr().err


def test_plan_shows_the_sizes_of_a_released_family(tmp_path, capsys):
    nano_v3().save_pretrained(tmp_path)
    fits = ["--fits", "26GB", "--context", "32768", "--dtype", "bf16"]
    assert main(["plan", str(tmp_path), "--elastic-config", STAR, *fits]) == 0
    out = capsys.readouterr().out
    assert "12b     12.43B   2.08B" in out
    assert "largest in 26.00 GB with the caches of 1 x 32768 tokens in bfloat16: 12b, which needs 25." in out
