"""Adapters of slices in plain peft: they are attached to their size, or refused with a word on how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM

from hf_elastic import ElasticConfigError, slice_adapter

SAME_SHAPES = {"ffn": 24, "experts": 8}
"""A size whose attention is that of the family: an adapter of its projections fits both."""


@pytest.fixture(scope="module")
def folder(family_folder, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("family")
    load(family_folder("nano3")).save_pretrained(made)
    return made


def load(folder: Any, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


def adapted(model: Any, **fields: Any) -> PeftModel:
    made = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **fields))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in made.named_parameters():
        if ".lora_B." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
@pytest.mark.parametrize("budget", ["small", "large", SAME_SHAPES], ids=str)
@pytest.mark.parametrize("switched", [False, True])
def test_an_adapter_of_a_slice_is_attached_to_its_size_alone(folder, tmp_path, ids, task, budget, switched):
    model = load(folder) if switched else load(folder, budget=budget)
    if switched:
        model.set_budget(budget)
    trained = adapted(model, task_type=task)
    trained.save_pretrained(tmp_path)
    logits = trained(ids).logits
    family = load(folder)
    before = family(ids).logits
    for attach in (
        lambda: AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32),
        lambda: PeftModel.from_pretrained(family, tmp_path),
        lambda: family.load_adapter(str(tmp_path)),
        lambda: PeftModel.from_pretrained(load(folder, budget="medium"), tmp_path),
    ):
        with pytest.raises(ElasticConfigError, match=r"trained at budget=.*AutoPeftModelForCausalLM.*budget="):
            attach()
    assert torch.equal(family(ids).logits, before)
    assert not hasattr(family, "peft_config")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path, budget=budget, dtype=torch.float32)
    torch.testing.assert_close(again(ids).logits, logits, rtol=0, atol=1e-5)  # products in another order
    by_hand = PeftModel.from_pretrained(load(folder, budget=budget), tmp_path)
    assert torch.equal(by_hand(ids).logits, again(ids).logits)


def test_adapters_of_a_whole_family_and_of_its_slices_are_not_marked(folder, tmp_path, ids):
    trained = adapted(load(folder), task_type="CAUSAL_LM")
    trained.save_pretrained(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "adapter_config.json").read_text())["auto_mapping"] is None
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert torch.equal(again(ids).logits, trained(ids).logits)
    medium = load(folder, budget="medium")
    lora, _ = slice_adapter(adapted(medium), "small", tmp_path / "small")
    assert lora.auto_mapping is None
    PeftModel.from_pretrained(load(folder, budget="small"), tmp_path / "small")


def test_a_second_adapter(folder, tmp_path, ids):
    small = adapted(load(folder, budget=SAME_SHAPES), task_type="CAUSAL_LM")
    small.add_adapter("second", LoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM"))
    small.save_pretrained(tmp_path)
    family = adapted(load(folder), task_type="CAUSAL_LM")
    before = family(ids).logits
    for source, name in ((tmp_path, "other"), (tmp_path / "second", "second")):
        with pytest.raises(ElasticConfigError, match=r"trained at budget="):
            family.load_adapter(source, name)
        assert list(family.peft_config) == ["default"]
        assert not [key for key in family.state_dict() if f".{name}." in key]
    assert torch.equal(family(ids).logits, before)
    other = PeftModel.from_pretrained(load(folder, budget=SAME_SHAPES), tmp_path)
    other.load_adapter(tmp_path / "second", "second")


def test_in_training_mode_an_adapter_is_of_the_whole_family(folder):
    model = load(folder).train()
    model.set_budget("small")
    assert adapted(model).peft_config["default"].auto_mapping is None


def test_a_base_model(folder, tmp_path):
    small = AutoModel.from_pretrained(folder, budget="small", dtype=torch.float32)
    adapted(small).save_pretrained(tmp_path)
    with pytest.raises(ElasticConfigError, match="trained at budget='small'"):
        PeftModel.from_pretrained(AutoModel.from_pretrained(folder, dtype=torch.float32), tmp_path)


def test_a_refused_adapter_leaves_nothing_behind(folder, tmp_path, ids):
    small = load(folder, budget="large")
    lora = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["experts.up_proj", "experts.down_proj"],
        modules_to_save=["lm_head"],
    )
    get_peft_model(small, lora).save_pretrained(tmp_path)
    family = load(folder)
    names, before = dict(family.named_modules()).keys(), family(ids).logits
    with pytest.raises(ElasticConfigError, match="trained at budget='large'"):
        PeftModel.from_pretrained(family, tmp_path)
    assert dict(family.named_modules()).keys() == names
    assert torch.equal(family(ids).logits, before)
    with family.at("small"):
        pass


def test_unloading_and_attaching_again(folder, ids):
    small = load(folder, budget="small")
    before = small(ids).logits
    assert adapted(small).unload() is small
    assert not hasattr(small, "peft_config")
    assert torch.equal(small(ids).logits, before)
    adapted(small).merge_and_unload()
    assert not torch.equal(small(ids).logits, before)


def test_cards_and_configs_name_the_family(folder, tmp_path, local_hub):
    local_hub.commit("someone/nano3", folder)
    adapted(load("someone/nano3", budget="small")).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/nano3"
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "someone/nano3"
    assert "python/object" not in str(card)
