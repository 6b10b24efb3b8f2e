"""Families of a text model that is published inside a vision-language model: the rest of that is kept, and goes with every size."""

from __future__ import annotations

import copy
import json
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from compare import assert_same_logits, logits
from hosted import HIDDEN, LFM_SIZES, SIZES, build_whole, read, save_whole, seen
from hosted import OUT as OUTS
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from hf_elastic import ElasticConfig, ElasticForCausalLM, elastify, render_card
from hf_elastic.commands.plan import plan
from hf_elastic.configuration.hosting import parted
from hf_elastic.errors import CheckpointError, ElasticConfigError, ExportError, UnsupportedArchitectureError
from hf_elastic.hub.publishing import CardArguments, prepare_upload
from hf_elastic.storage.checksums import CHECKSUMS_NAME
from hf_elastic.submodels.masking import masked_model

OUT = "model.visual.merger.linear_fc2"
FILE = "passengers.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Per kind: the repository, its model, and the family in a folder, sorted."""
    found = {}

    def make(kind: str) -> tuple[Path, torch.nn.Module, Path]:
        if kind not in found:
            root = tmp_path_factory.mktemp(kind)
            whole = save_whole(kind, root / "repo", tied=kind == "dense")
            rows = [{"input_ids": read()[:1]}]
            sizes = LFM_SIZES if kind == "lfm" else SIZES
            family = elastify(str(root / "repo"), rows, budgets={"small": sizes})
            family.save_pretrained(root / "family")
            found[kind] = root / "repo", whole, root / "family"
        return found[kind]

    return make


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def vision(whole: torch.nn.Module) -> dict[str, torch.Tensor]:
    text = ("model.language_model.", "lm_head.")
    return {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith(text)}


@pytest.mark.parametrize("kind", ["dense", "moe", "lfm"])
@torch.no_grad()
def test_the_family_computes_what_the_text_model_does_and_keeps_the_rest(made, kind):
    repo, whole, folder = made(kind)
    family = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_logits(logits(family, read()), logits(whole, read()))
    assert not any("visual" in name for name in family.state_dict())
    assert not hasattr(family.elastic_config, "left_out")
    kept, theirs = load_file(folder / FILE), vision(whole)
    out = OUTS.get(kind, OUT)
    order = kept[f"{out}.weight"]  # sorted as the residual stream was, and nothing else changed
    assert not torch.equal(order, theirs[f"{out}.weight"])
    assert torch.equal(order.sort(0).values, theirs[f"{out}.weight"].sort(0).values)
    assert kept.keys() == theirs.keys()
    assert all(torch.equal(kept[name], theirs[name]) for name in kept if not name.startswith(out))
    assert config_of(folder)["host_config"]["model_type"] == whole.config.model_type
    if kind != "lfm":
        assert config_of(folder)["host_config"]["vision_config"]["out_hidden_size"] == HIDDEN
    assert (folder / "preprocessor_config.json").read_bytes() == (repo / "preprocessor_config.json").read_bytes()


@pytest.mark.parametrize("kind", ["dense", "moe", "lfm"])
@torch.no_grad()
def test_the_whole_family_exported_is_the_vision_language_model(made, kind, tmp_path):
    _, whole, folder = made(kind)
    AutoModelForCausalLM.from_pretrained(folder).export(tmp_path / "full", "full", max_shard_size="40KB")
    stock, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "full", output_loading_info=True)
    assert type(stock) is type(whole)
    assert not any(info.values())
    shown = seen(kind)
    assert_same_logits(stock(**shown).logits, whole(**shown).logits)
    assert_same_logits(logits(stock, read()), logits(whole, read()))
    assert not torch.allclose(stock(**shown).logits, logits(stock, shown["input_ids"]), atol=0.1)  # the image counts


@pytest.mark.parametrize("kind", ["dense", "moe", "lfm"])
@torch.no_grad()
def test_a_size_sees_what_the_masked_model_sees(made, kind, tmp_path):
    """The export of a size against the whole model with zeros where the size has nothing."""
    _, _, folder = made(kind)
    family = AutoModelForCausalLM.from_pretrained(folder)
    family.export(tmp_path / "full", "full")
    family.export(tmp_path / "text", "full", text_only=True)
    family.export(tmp_path / "small", "small")
    masked = AutoModelForImageTextToText.from_pretrained(tmp_path / "full", experts_implementation="eager")
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "text", experts_implementation="eager")
    zeroed = masked_model(text, family.elastic_config.submodel("small"))
    masked.model.language_model, masked.lm_head = zeroed.model, zeroed.lm_head
    out = masked.get_submodule(OUTS.get(kind, OUT))
    out.weight[SIZES["hidden"] :] = 0
    out.bias[SIZES["hidden"] :] = 0
    small, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "small", output_loading_info=True, experts_implementation="eager"
    )
    assert not any(info.values())
    assert_same_logits(small(**seen(kind)).logits, masked(**seen(kind)).logits)
    with family.at("small"):
        assert_same_logits(logits(small, read()), logits(family, read()))
    said = config_of(tmp_path / "small")
    assert said["text_config"]["hidden_size"] == SIZES["hidden"]
    if kind != "lfm":
        assert said["vision_config"]["out_hidden_size"] == SIZES["hidden"]
        text = AutoModelForCausalLM.from_pretrained(tmp_path / "small")  # reads the text model out of it
        assert_same_logits(logits(text, read()), logits(small, read()))
    assert said["cut_from"] == {"budget": "small"}
    assert (tmp_path / "small/preprocessor_config.json").exists()
    assert not (tmp_path / "text/preprocessor_config.json").exists()


@torch.no_grad()
def test_they_travel_through_slices_and_the_nested_layout(made, tmp_path):
    _, _, folder = made("dense")
    family = AutoModelForCausalLM.from_pretrained(folder)
    family.save_pretrained(tmp_path / "nested", layout="nested")
    assert load_file(tmp_path / "nested" / FILE).keys() == load_file(folder / FILE).keys()
    assert config_of(tmp_path / "nested/budgets/small")["model_type"] == "qwen3_5_text"
    family.export(tmp_path / "small", "small")
    expected = load_file(tmp_path / "small/model-00002-of-00002.safetensors")
    for source in (folder, tmp_path / "nested"):
        small = AutoModelForCausalLM.from_pretrained(source, budget="small")
        small.save_pretrained(tmp_path / "slice")
        small.export(tmp_path / "again")
        whole = AutoModelForCausalLM.from_pretrained(source)
        whole.save_pretrained(tmp_path / "cut", budget="small")
        whole.sized("small").save_pretrained(tmp_path / "taken")
        copy.deepcopy(whole).save_pretrained(tmp_path / "copied", budget="small")
        pickle.loads(pickle.dumps(whole)).save_pretrained(tmp_path / "pickled", budget="small")
        for made_ in ("slice", "cut", "taken", "copied", "pickled", "again"):
            name = "model-00002-of-00002.safetensors" if made_ == "again" else FILE
            found = load_file(tmp_path / made_ / name)
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), made_
            assert found.keys() == expected.keys()
        assert config_of(tmp_path / "slice")["host_config"]["vision_config"]["out_hidden_size"] == SIZES["hidden"]
        AutoModelForCausalLM.from_pretrained(tmp_path / "slice", verify=True).export(tmp_path / "third")
        third = load_file(tmp_path / "third/model-00002-of-00002.safetensors")
        assert all(torch.equal(third[name], tensor) for name, tensor in expected.items())


def test_they_are_read_from_files_that_are_gone_and_follow_the_type(made, tmp_path):
    _, whole, folder = made("dense")
    family = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    family.save_pretrained(tmp_path / "family")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "family")
    for file in (tmp_path / "family").iterdir():
        file.unlink()
    again.save_pretrained(tmp_path / "family")
    found, theirs = load_file(tmp_path / "family" / FILE), load_file(folder / FILE)
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in theirs.items())


@pytest.mark.parametrize("given", ["folder", "text model", "whole model", "described"])
@torch.no_grad()
def test_every_way_to_a_family_keeps_them(made, given, tmp_path):
    repo, whole, _ = made("dense")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="left out|saved without")
        if given == "described":
            family = ElasticForCausalLM.from_pretrained(repo, elastic_config={"small": SIZES})
        else:
            parent = {"folder": str(repo), "whole model": whole}.get(given) or AutoModelForCausalLM.from_pretrained(
                repo
            )
            family = elastify(parent, budgets={"small": SIZES}, sort=False)
        family.save_pretrained(tmp_path / "family")
    assert_same_logits(logits(family, read()), logits(whole, read()))
    kept = load_file(tmp_path / "family" / FILE)
    assert kept.keys() == vision(whole).keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in vision(whole).items())
    text = render_card(family, license="mit").text
    assert "What else the qwen3_5 has (`model.visual.`) is kept" in text


def test_plan_counts_the_text_model(made):
    repo, whole, _ = made("moe")
    text = AutoModelForCausalLM.from_pretrained(repo)
    assert plan(str(repo))[0]["total_params"] == text.num_parameters()


def test_base_models_are_loaded_from_both(made):
    repo, whole, folder = made("dense")
    base = AutoModel.from_pretrained(folder, budget="small")
    with pytest.raises(ElasticConfigError, match="plain qwen3_5"):
        AutoModelForCausalLM.from_pretrained(repo, budget="small")
    assert base.config.hidden_size == SIZES["hidden"]


def test_what_was_made_without_them_says_so(made, tmp_path):
    _, _, folder = made("dense")
    config = ElasticConfig.from_pretrained(folder)
    model = ElasticForCausalLM(config)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "new")  # which is in the way
    assert (tmp_path / "new" / FILE).exists()
    with pytest.warns(UserWarning, match=r"saved without model\.visual\.: .* part of a qwen3_5, but") as caught:
        model.save_pretrained(tmp_path / "new")
    assert [w.filename for w in caught if "saved without" in str(w.message)] == [__file__]
    assert "host_config" not in config_of(tmp_path / "new")
    assert not (tmp_path / "new" / FILE).exists()


def test_sizes_that_differ_per_layer_are_exported_alone(made, tmp_path):
    _, _, folder = made("dense")
    family = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ExportError, match="text_only=True"):
        family.export(tmp_path / "x", {"ffn": [40, 16]}, heterogeneous=True)
    assert not (tmp_path / "x").exists()
    family.export(tmp_path / "x", {"ffn": [40, 16]}, heterogeneous=True, text_only=True)


@pytest.mark.parametrize("layout", ["stock", "nested"])
def test_from_the_hub_they_are_fetched_when_they_are_needed(made, layout, local_hub, tmp_path):
    _, _, folder = made("dense")
    family = AutoModelForCausalLM.from_pretrained(folder)
    family.save_pretrained(tmp_path / "family", layout=layout)
    local_hub.commit("org/seeing", tmp_path / "family")
    small = AutoModelForCausalLM.from_pretrained("org/seeing", budget="small", cache_dir=tmp_path / "cache")
    assert FILE not in local_hub.sent
    small.save_pretrained(tmp_path / "slice")
    assert FILE in local_hub.sent
    family.save_pretrained(tmp_path / "here", budget="small")
    found, expected = load_file(tmp_path / "slice" / FILE), load_file(tmp_path / "here" / FILE)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / "slice/preprocessor_config.json").exists()


def test_a_push_takes_them_along(made, local_hub, tmp_path):
    _, _, folder = made("dense")
    AutoModelForCausalLM.from_pretrained(folder).push_to_hub("org/pushed", license="mit")
    again = AutoModelForCausalLM.from_pretrained("org/pushed", cache_dir=tmp_path / "cache")
    again.export(tmp_path / "small", "small")
    assert config_of(tmp_path / "small")["model_type"] == "qwen3_5"
    prepare_upload(tmp_path / "small", "org/seeing", CardArguments(license="mit"), offline=True)  # an export is sound


def damage(folder: Path, change) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    (folder / CHECKSUMS_NAME).unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{OUT}.bias"), r"linear_fc2\.bias is missing"),
        (lambda t: t.update({f"{OUT}.bias": torch.ones(24)}), r"linear_fc2\.bias is \(24,\), the config says \(48,\)"),
        (lambda t: t.update({"model.visual.more": torch.ones(1)}), r"model\.visual\.more is unknown"),
        (lambda t: t.update({f"{OUT}.bias": torch.ones(48, dtype=torch.int8)}), "stored as I8"),
    ],
)
def test_damaged_ones_are_refused(made, change, message, tmp_path):
    _, _, folder = made("dense")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    damage(tmp_path, change)
    for load in (AutoModelForCausalLM.from_pretrained, lambda folder: prepare_upload(folder, "org/x", offline=True)):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)


def test_bytes_that_changed_are_found(made, tmp_path):
    _, _, folder = made("dense")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    damaged = bytearray((tmp_path / FILE).read_bytes())
    damaged[-3] ^= 1
    (tmp_path / FILE).write_bytes(damaged)
    for load in (
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, verify=True),
        lambda: prepare_upload(tmp_path, "org/x", offline=True),
    ):
        with pytest.raises(CheckpointError, match=rf"{FILE} is damaged from byte"):
            load()


def test_a_repository_that_lacks_some_is_refused(made, tmp_path):
    repo, whole, _ = made("dense")
    os.makedirs(tmp_path / "repo")
    tensors = load_file(repo / "model.safetensors")
    del tensors["model.visual.pos_embed.weight"]
    save_file(tensors, tmp_path / "repo/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "repo/config.json").write_text((repo / "config.json").read_text())
    for load in (
        lambda: ElasticForCausalLM.from_pretrained(tmp_path / "repo", elastic_config={"small": SIZES}),
        lambda: elastify(str(tmp_path / "repo"), budgets={"small": SIZES}, sort=False),
    ):
        with pytest.raises(CheckpointError, match=r"pos_embed\.weight is missing"):
            load()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (3, r"host_config=3 must be the config of a model around a qwen3_5_text, which are qwen3_5"),
        ({"model_type": "llava"}, "must be the config of a model around"),
        (
            {"model_type": "qwen3_5", "vision_config": {"out_hidden_size": 40}},
            r"host_config\.vision_config\.out_hidden_size=40 must be the hidden of the parent, 48",
        ),
        (
            {"model_type": "qwen3_5", "vision_config": {"out_hidden_size": 48, "depth": "deep"}},
            "make no config",
        ),
    ],
)
def test_a_damaged_config_is_refused(made, fields, message, tmp_path):
    _, _, folder = made("dense")
    written = config_of(folder) | {"host_config": fields}
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ElasticConfigError, match=message):
        ElasticConfig.from_pretrained(tmp_path)


def test_a_model_that_no_table_knows_is_named(tmp_path):
    whole = build_whole("dense")
    fields = json.loads(whole.config.to_json_string()) | {"model_type": "qwen3_vl"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UnsupportedArchitectureError, match="'qwen3_vl'"):
        plan(str(tmp_path))


@pytest.mark.parametrize(("said", "tied"), [({}, False), ({"tie_word_embeddings": True}, True)])
@pytest.mark.parametrize("inside", [True, False])
def test_a_head_is_tied_by_the_word_of_the_whole_model(said, tied, inside):
    """As in the stock class: what the whole model does not say is the default of its class, whatever the text model says."""
    text = {"model_type": "qwen3_5_text", "tie_word_embeddings": inside}
    mine, _ = parted({"model_type": "qwen3_5", "text_config": text, **said})
    assert mine["tie_word_embeddings"] is tied
