"""Adapters do not follow a budget yet; every way to attach one is refused rather than ignored."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import family, trainer

from hf_elastic import ElasticConfigError


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def test_a_peft_config_is_refused(tmp_path):
    with pytest.raises(ElasticConfigError, match="peft_config is not supported yet.*budget="):
        trainer(tmp_path, peft_config=lora())


def test_a_model_with_adapters_is_refused(tmp_path):
    base = family()
    wrapped = get_peft_model(base, lora())
    for model in (wrapped, base):
        with pytest.raises(ElasticConfigError, match="adapters are attached to the model.*Merge or unload"):
            trainer(tmp_path, model)


def test_training_one_size_with_an_adapter_is_stock(family_folder, ids):
    """What the refusal advises."""
    from hf_elastic import ElasticForCausalLM

    one = ElasticForCausalLM.from_pretrained(family_folder("nano3"), budget="large").train()
    wrapped = get_peft_model(one, lora())
    with torch.enable_grad():
        wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients = [p.grad for key, p in wrapped.named_parameters() if "lora_B" in key]
    assert gradients
    assert all(g is not None and g.abs().max() > 0 for g in gradients)
