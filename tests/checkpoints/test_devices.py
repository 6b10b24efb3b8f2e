"""Where things are computed. No accelerator is needed: `meta` stands for one, on which nothing is computed but everything can be placed."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from cases import CONFIGS

from hf_elastic import ElasticConfigError, elastify, score
from hf_elastic.checkpoints import devices
from hf_elastic.checkpoints.loading import load_stock

META = torch.device("meta")


@pytest.fixture
def accelerator(monkeypatch):
    """As if there were one, with so many bytes free."""

    def with_free(count: float) -> None:
        monkeypatch.setattr(devices, "accelerator", lambda: META)
        monkeypatch.setattr(devices, "get_max_memory", lambda: {"meta": int(count), "cpu": 10**12})

    return with_free


def test_auto_is_the_accelerator_where_there_is_one(accelerator, original):
    parent = original("nano2")
    if not torch.accelerator.is_available():
        assert devices.checked_device("auto") == devices.scoring_device(parent) == torch.device("cpu")
    accelerator(1e9)
    assert devices.checked_device("auto") == devices.checked_device(None) == META
    assert devices.scoring_device(parent) == META
    assert devices.scoring_device(parent, "cpu") == torch.device("cpu")


def test_a_parent_that_does_not_fit_is_scored_on_the_cpu_and_that_is_said(accelerator, original, caplog):
    parent = original("nano2")
    needed = sum(tensor.nbytes for tensor in [*parent.parameters(), *parent.buffers()])
    accelerator(needed / devices.SHARE + 2)
    assert devices.scoring_device(parent) == META
    accelerator(needed / devices.SHARE - 2)
    with caplog.at_level(logging.WARNING, logger="hf_elastic"):
        assert devices.scoring_device(parent) == torch.device("cpu")
    assert "scoring on the CPU, which is slow: the parent's weights take" in caplog.text
    assert devices.scoring_device(parent, "meta") == META  # who asks for it gets it


def test_a_parent_that_was_spread_stays_where_it_is(accelerator, parent):
    accelerator(1e9)
    model = parent("nano2")
    model.hf_device_map = {"model": 0, "lm_head": 1}
    assert devices.scoring_device(model) == torch.device("cpu")
    with pytest.raises(ElasticConfigError, match="device='meta': device_map spread the parent"):
        devices.scoring_device(model, "meta")


@pytest.mark.parametrize("device", ["cudaa", "xpu:7", 1.5, ["cpu"]])
def test_a_device_that_cannot_be_used(device, original):
    with pytest.raises(ElasticConfigError, match="device=.* cannot be used: .*Allowed are auto"):
        elastify(original("nano2"), [{"input_ids": [1]}], budgets={"a": {"ffn": 8}}, device=device)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_copy_elsewhere_leaves_the_model_alone(name, original):
    model = original(name)
    before = dict(model.named_parameters())
    copied = devices.copied_to(model, META)
    assert all(tensor.is_meta for tensor in [*copied.parameters(), *copied.buffers()])
    assert all(before[key] is tensor and not tensor.is_meta for key, tensor in model.named_parameters())
    assert [*dict(copied.named_parameters())] == [*before]  # what is tied is listed once
    assert all(tensor.requires_grad == before[key].requires_grad for key, tensor in copied.named_parameters())
    assert type(copied) is type(model)


@pytest.mark.parametrize("name", ["nano3", "granite"])
def test_scoring_reads_on_the_device_of_the_copy(name, original, accelerator, monkeypatch):
    accelerator(1e9)
    parent, seen = original(name), []

    def forward(self, **inputs):
        seen.append({tensor.device for tensor in [*self.parameters(), inputs["input_ids"], inputs["attention_mask"]]})

    monkeypatch.setattr(type(parent), "forward", forward)
    axes = ["hidden", "experts"]
    assert score(parent, [{"input_ids": [1, 2]}], axes=axes, progress=False).values == {}
    score(parent, [{"input_ids": [1, 2]}], axes=axes, progress=False, device="cpu")
    assert seen == [{META}, {torch.device("cpu")}]


def test_logits_are_not_made_for_all_tokens(original):
    """At 8 rows of 8192 tokens and a usual vocabulary they would take 17 GB."""
    parent, seen = original("nano3"), []
    parent.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    try:
        score(parent, [{"input_ids": [1, 2, 3]}], axes=["hidden"], progress=False)
    finally:
        parent.lm_head._forward_hooks.clear()
    assert seen == [1]


def test_too_little_memory_says_what_to_do(original, monkeypatch):
    def forward(self, **inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(type(original("nano2")), "forward", forward)
    with pytest.raises(
        ElasticConfigError, match="cpu has too little memory .* batches of 8 rows of up to 2 tokens; give"
    ):
        score(original("nano2"), [{"input_ids": [1, 2]}], progress=False)


def test_a_parent_that_was_loaded_here_is_not_there_twice(original, tmp_path, monkeypatch):
    """It lets go of its tensors as they are sorted. One that was given keeps them."""
    parent, loaded = original("granite_tied"), []
    parent.save_pretrained(tmp_path)
    module = sys.modules["hf_elastic.elastification.elastify"]
    monkeypatch.setattr(module, "load_stock", lambda *a, **k: loaded.append(load_stock(*a, **k)) or loaded[0])
    rows, budgets = [{"input_ids": [1, 2, 3]}], {"small": {"hidden": 24, "mamba_heads": 12}}
    made = elastify(tmp_path, rows, budgets=budgets, progress=False)
    assert all(tensor.is_meta for tensor in loaded[0].state_dict().values())
    again = elastify(parent, rows, budgets=budgets, progress=False)
    assert not any(tensor.is_meta for tensor in parent.state_dict().values())
    assert all(torch.equal(tensor, made.state_dict()[key]) for key, tensor in again.state_dict().items())


def test_a_type_is_for_a_parent_that_is_loaded_here(original, tmp_path):
    original("nano2").save_pretrained(tmp_path)
    made = elastify(tmp_path, budgets={"small": {"ffn": 16}}, sort=False, dtype="bfloat16")
    assert made.dtype == made.elastic_config.dtype == torch.bfloat16
    with pytest.raises(ElasticConfigError, match="dtype='bfloat16' is for a parent that is loaded here"):
        elastify(original("nano2"), budgets={"small": {"ffn": 16}}, sort=False, dtype="bfloat16")
