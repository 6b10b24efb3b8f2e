"""Tensors that the stock class does not load: named when they are left out, and noted wherever the sizes go."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from cases import build_parent
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_elastic import ElasticForCausalLM, elastify, render_card

NAMES = ["mtp.layers.0.*", "mtp.layers.1.*"]
BUDGETS = {"half": {"hidden": 32}}
told = pytest.warns(UserWarning, match=r"left out of .*: mtp\.layers\.0\.\*, mtp\.layers\.1\.\*\. Its stock class")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A plain checkpoint with a multi-token-prediction block, as published ones have it."""
    parent = build_parent("nano3")
    parent.save_pretrained(tmp_path / "plain")
    file, config = tmp_path / "plain/model.safetensors", tmp_path / "plain/config.json"
    extra = {"mtp.layers.0.eh_proj.weight": torch.ones(48, 96), "mtp.layers.0.enorm.weight": torch.ones(48)}
    save_file(
        {**load_file(file), **extra, "mtp.layers.1.norm.weight": torch.ones(48)}, file, metadata={"format": "pt"}
    )
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_nextn_predict_layers": 1}))
    return tmp_path / "plain"


def shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("given", ["path", "model"])
def test_elastify_names_them(folder, sharded, given, tmp_path):
    if sharded:
        shard(folder)
    parent = str(folder) if given == "path" else AutoModelForCausalLM.from_pretrained(folder)
    with told as caught:
        model = elastify(parent, budgets=BUDGETS, sort=False)
    assert [w.filename for w in caught if "left out" in str(w.message)] == [__file__]
    assert not any("mtp" in name for name in model.state_dict())
    assert model.elastic_config.left_out == NAMES
    assert config_of_saved(model, tmp_path / "family")["left_out"] == NAMES


def config_of_saved(model, folder: Path) -> dict:
    model.save_pretrained(folder)
    return config_of(folder)


def test_a_plain_family_names_them(folder):
    for budget in (None, "half"):
        with told as caught:
            model = ElasticForCausalLM.from_pretrained(folder, elastic_config=BUDGETS, budget=budget)
        assert [w.filename for w in caught if "left out" in str(w.message)] == [__file__]
        assert model.elastic_config.left_out == NAMES


def test_the_note_goes_wherever_the_sizes_go(folder, tmp_path):
    with told:
        model = elastify(str(folder), budgets=BUDGETS, sort=False)
    model.save_pretrained(tmp_path / "family")
    model.save_pretrained(tmp_path / "nested", layout="nested")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="left out")  # nothing is: these files have no such tensors
        small = AutoModelForCausalLM.from_pretrained(tmp_path / "family", budget="half")
        small.save_pretrained(tmp_path / "slice")
        small.export(tmp_path / "export")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "slice")
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
        second = elastify(exported, budgets={"quarter": {"hidden": 24}}, sort=False)
    for name in ("family", "nested", "nested/budgets/half", "slice", "export"):
        assert config_of(tmp_path / name)["left_out"] == NAMES, name
    small.resize_token_embeddings(60)
    assert small.elastic_config.left_out == again.elastic_config.left_out == NAMES
    assert small.elastic_config.cut_from == again.elastic_config.cut_from == {"budget": "half"}
    for source in (model, model.elastic_config, again, exported.config, second):
        assert "Left out, because the stock class" in (text := render_card(source, license="mit").text)
        assert "`mtp.layers.0.*`, `mtp.layers.1.*`" in text


def test_a_model_without_its_files_says_what_its_config_promises():
    parent = build_parent("nano2")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="left out")
        assert not hasattr(elastify(parent, budgets=BUDGETS, sort=False).elastic_config, "left_out")
    for name in ("", "no-such-folder", "someone/nothing-in-the-cache"):
        parent.config.num_nextn_predict_layers, parent.name_or_path = 1, name
        with pytest.warns(UserWarning, match=r"left out of .*: mtp\.layers\.0"):
            model = elastify(parent, budgets=BUDGETS, sort=False)
        assert model.elastic_config.left_out == ["mtp.layers.0.*"]
        assert model.config.num_nextn_predict_layers == 0
