"""The lab's first chapter on the shipped parent, and the table and chart it ends in."""

from __future__ import annotations

import json

import pytest
import torch

from hf_elastic import HFElasticError
from hf_elastic.cli import main
from hf_elastic.lab import zero_shot
from hf_elastic.lab.parent import load_parent


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """`hf-elastic lab` as `make demo` runs it, with fewer problems."""
    folder = tmp_path_factory.mktemp("lab") / "demo"
    assert main(["lab", "--output", str(folder), "--problems", "24"]) == 0
    return folder


@pytest.mark.slow
def test_results_are_complete_and_plausible(lab):
    results = json.loads((lab / "results.json").read_text())
    names = [entry["name"] for entry in results["budgets"]]
    assert names == ["full", *zero_shot.BUDGETS]
    exact = {entry["name"]: entry["exact"] for entry in results["budgets"]}
    assert exact["full"] >= 0.95
    assert exact["ffn-88"] >= 0.9
    assert exact["small"] <= 0.1  # an untrained cut of the residual stream: if it solves problems, it was not cut
    # Reordered float32 sums; logits of this model reach 19.
    assert results["sorted_parent_difference"] < 1e-3
    assert results["export"]["difference"] < 1e-4
    assert (lab / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (lab / "export").iterdir() if p.suffix in (".json", ".safetensors")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_live_submodel_that_is_not_the_slice_stops_the_lab(tmp_path, monkeypatch):
    parent, tokenizer = load_parent()
    monkeypatch.setattr(zero_shot, "BUDGETS", {"ffn-75": zero_shot.BUDGETS["ffn-75"]})
    load = zero_shot.AutoModelForCausalLM.from_pretrained

    def damaged(*args, **kwargs):
        model = load(*args, **kwargs)
        if "budget" in kwargs:
            with torch.no_grad():
                model.lm_head.weight[0, 0] += 1
        return model

    monkeypatch.setattr(zero_shot.AutoModelForCausalLM, "from_pretrained", damaged)
    with pytest.raises(HFElasticError, match="not the slice from disk"):
        zero_shot.run_zero_shot(parent, tokenizer, tmp_path, count=2, progress=False)


def test_an_export_that_plain_transformers_cannot_load_stops_the_lab(tmp_path):
    parent, tokenizer = load_parent()
    elastic = zero_shot.elastify(parent, budgets={"small": {"hidden": 40}}, sort=False)
    write = elastic._write_stock_config

    def damaged(config, submodel, directory):
        write(config, submodel, directory)
        path = directory / "config.json"
        path.write_text(path.read_text().replace('"hidden_size": 40', '"hidden_size": 44'))

    elastic._write_stock_config = damaged
    with pytest.raises(HFElasticError, match="could not load the export"):
        zero_shot.check_export(elastic, "small", tmp_path / "export", torch.tensor([[1, 2, 3]]))
    assert not list((tmp_path / "export").glob("*.pt"))
