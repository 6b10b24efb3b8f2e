"""The lab's third chapter: a family of whole blocks in 8 and 4 bits. What it costs is shown by the benchmark, not here."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_elastic import ElasticConfig, ElasticConfigError, ElasticForCausalLM
from hf_elastic.architectures.cost import CostModel
from hf_elastic.cli import main
from hf_elastic.hub.cards import render_card
from hf_elastic.lab.book import EOS, evaluate, problems
from hf_elastic.lab.family import load_family
from hf_elastic.lab.formats import measure_stored, write_formats, write_quantized
from hf_elastic.lab.quantized import BLOCK_DIR, BLOCKS, EVERYTHING, load_block_family, make_block_family
from hf_elastic.quantization.codec import decode, encode
from hf_elastic.quantization.recipes import quantized_config


@pytest.fixture(scope="module")
def blocks():
    return load_block_family()


def test_nvfp4_holds_these_sizes_and_not_those_of_the_first_family(blocks):
    config = blocks[0].elastic_config
    quantized = quantized_config(config, EVERYTHING).encodings
    assert {encoding.name for encoding in quantized.values()} == {"nvfp4"}
    assert len(quantized) > len(quantized_config(config, "nvfp4").encodings)
    with pytest.raises(ElasticConfigError, match="third"):
        quantized_config(load_family()[0].elastic_config, "nvfp4")


def test_the_shipped_family_is_what_its_record_says(blocks):
    family, _ = blocks
    record = json.loads((BLOCK_DIR / "training.json").read_text())["evaluation"]
    costs = family.elastic_config.costs()
    assert list(costs) == ["full", *BLOCKS] == [entry["name"] for entry in record["budgets"]]
    for entry in record["budgets"]:
        assert entry["active_params"] == costs[entry["name"]].active_params
        assert entry["exact"] >= 0.95
    shares = [cost.active_params / costs["full"].active_params for cost in costs.values()]
    assert shares == pytest.approx([1.0, 0.67, 0.53, 0.28], abs=0.01)
    assert ElasticConfig.from_pretrained(BLOCK_DIR).dtype == torch.bfloat16


def test_new_sizes_have_the_weights_of_the_trained_family():
    trained, _ = load_family()
    family = make_block_family(trained)
    assert list(family.elastic_config.family()) == ["full", *BLOCKS]
    weights = family.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trained.state_dict().items())
    family.lm_head.weight.data.add_(1.0)
    assert not torch.equal(trained.lm_head.weight, family.lm_head.weight), "a copy"


def test_what_is_measured_is_the_slice_of_rounded_weights(blocks, tmp_path):
    """Against a model whose weights were put there by hand."""
    family, tokenizer = blocks
    write_quantized(family, tokenizer, tmp_path, "fp8")
    options = {"count": 2, "letters": 2}
    measured = {entry["name"]: entry for entry in measure_stored(tmp_path, tokenizer, family, **options)}
    assert list(measured) == ["full", *BLOCKS]
    elastic = ElasticConfig.from_pretrained(tmp_path)
    by_hand = make_block_family(family)
    with torch.no_grad():
        for name, weight in by_hand.named_parameters():
            if name in elastic.encodings:
                weight.copy_(decode(encode(weight, "fp8"), "fp8", torch.float32))
    assert elastic.encodings
    source = problems("heldout", 2, 1)
    ids = torch.tensor(tokenizer([next(source).text + EOS for _ in range(2)])["input_ids"])
    start = ids[0].tolist().index(tokenizer.convert_tokens_to_ids("<think>"))
    counted = CostModel(family.elastic_config.parent_config)
    for name in ("full", "quarter"):
        with torch.no_grad():
            with by_hand.at(name):
                rates = evaluate(by_hand, tokenizer, **options)
                student = by_hand(ids).logits[:, start:-1].log_softmax(-1).flatten(0, 1)
            teacher = family(ids).logits[:, start:-1].log_softmax(-1).flatten(0, 1)
        wanted = torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean")
        entry = measured[name]
        assert (entry["exact"], entry["trace"]) == (rates.exact, rates.trace)
        assert entry["kl"] == pytest.approx(float(wanted), rel=1e-3, abs=1e-6)
        assert entry["kl"] > 0
        cost = counted(family.elastic_config.submodel(name))
        assert entry["total_params"] == cost.total_params
        assert cost.total_params < entry["stored_bytes"] < 2 * cost.total_params


def test_the_card_has_a_column_per_format(blocks, tmp_path):
    family, tokenizer = blocks
    write_quantized(family, tokenizer, tmp_path / "fp8", "fp8")
    counts = {
        name: {"total_params": cost.total_params, "active_params": cost.active_params}
        for name, cost in family.elastic_config.costs().items()
    }
    found = {
        way: [{"name": name, **counts[name], "exact": rate - i / 8, "kl": i / 64} for i, name in enumerate(counts)]
        for way, rate in (("float32", 1.0), ("fp8", 0.875))
    }
    write_formats(tmp_path, found, ["fp8"], problems=7)
    card = (tmp_path / "fp8" / "README.md").read_text()
    assert "exact:\n\n| size | float32 | fp8 |" in card
    assert "| most | 0.875 | 0.75 |" in card
    assert "kl:\n\n| size | float32 | fp8 |" in card
    assert "| quarter | 0.04688 | 0.04688 |" in card
    assert "problems 7" in card
    assert "stored, fp8" in card
    assert "](results/formats.json)" in card
    file = tmp_path / "fp8" / "results" / "formats.json"
    assert json.loads(file.read_text())["formats"] == found
    found["fp8"][1]["active_params"] += 1
    file.write_text(json.dumps({"formats": found}))
    with pytest.raises(ElasticConfigError, match="another family"):
        render_card(family, results=[file])
    del found["fp8"][1]
    file.write_text(json.dumps({"formats": found}))
    with pytest.raises(ElasticConfigError, match="other budgets in 'fp8' than in 'float32'"):
        render_card(family, results=[file])


@pytest.mark.slow
def test_the_command_writes_every_format(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_elastic.lab.tour.check_export", lambda *args: 0.0)
    arguments = ["lab", "--task", "book", "--quantize", "--steps", "4", "--problems", "1", "--letters", "4"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "quantized" / "formats.json").read_text())
    assert list(results["formats"]) == ["float32", "fp8", "nvfp4", "nvfp4-distilled"]
    stored = {}
    for name, entries in results["formats"].items():
        assert f"{name}: right (KL)" in printed
        folder = tmp_path / "quantized" / name
        found = ElasticConfig.from_pretrained(folder)
        assert {encoding.format for encoding in found.encodings.values()} == {name.partition("-")[0]} - {"float32"}
        assert (folder / "README.md").exists() == (name != "float32")
        assert [entry["stored_bytes"] for entry in entries] == [
            cost.stored_bytes(torch.bfloat16) for cost in found.costs().values()
        ]
        model = AutoModelForCausalLM.from_pretrained(folder, budget="quarter")
        assert isinstance(model, ElasticForCausalLM)
        stored[name] = model.model.layers[1].mixer.experts.up_proj
    assert not torch.equal(stored["nvfp4"], stored["nvfp4-distilled"]), "a step was made"
    assert not torch.equal(stored["nvfp4"], stored["float32"])
