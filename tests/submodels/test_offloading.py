"""accelerate: `device_map`, `max_memory`, offloading and dispatching, of slices and of whole families that switch."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from cases import BUDGETS
from compare import assert_same_logits, assert_same_weights, logits
from transformers import AutoModel, AutoModelForCausalLM

from hf_elastic import ElasticConfig, ElasticConfigError

load = AutoModelForCausalLM.from_pretrained
SETTINGS = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


def offloaded(model) -> int:
    return sum(parameter.is_meta for parameter in model.parameters())


def on_disk(folder, cls=load, **kwargs):
    """Half of the weights in main memory if nothing else is said, the rest on disk."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return cls(folder, device_map="auto", max_memory={"cpu": kwargs.pop("memory", size // 2)}, **kwargs)


@pytest.mark.parametrize("name", BUDGETS)
def test_a_slice_is_spread_as_any_model(name, family_folder, sliced, tmp_path, ids):
    for memory in ("1GB", "60KB"):
        model = on_disk(family_folder(name), memory=memory, budget="small", offload_folder=tmp_path)
        assert bool(offloaded(model)) == (memory == "60KB")
        assert_same_logits(logits(model, ids), logits(sliced(name, "small"), ids))
        with model.at({"hidden": 24}), sliced(name, "small").at({"hidden": 24}):  # what a slice nests
            assert_same_logits(logits(model, ids), logits(sliced(name, "small"), ids))


HOWS = {
    "auto": lambda folder, scratch: load(folder, device_map="auto"),
    "one": lambda folder, scratch: load(folder, device_map={"": "cpu"}, max_memory={"cpu": "1GB"}),
    "disk": lambda folder, scratch: on_disk(folder, offload_folder=scratch),
    "disk_offload": lambda folder, scratch: disk_offload(load(folder), scratch, execution_device="cpu"),
    "cpu_offload": lambda folder, scratch: cpu_offload(load(folder), execution_device="cpu", offload_buffers=True),
    "dispatch": lambda folder, scratch: dispatch_model(load(folder), {"": "cpu"}, force_hooks=True),
}


@pytest.mark.parametrize(("name", "how"), [("granite", "disk"), *(("nano3", how) for how in HOWS)])
def test_a_family_switches_wherever_it_lies(name, how, family_folder, sliced, tmp_path, ids):
    model = HOWS[how](family_folder(name), tmp_path)
    away = offloaded(model)
    assert bool(away) == ("disk" in how or "cpu" in how)
    for budget in ("small", "medium", None, "small"):
        model.set_budget(budget)
        expected = sliced(name, budget)
        assert_same_logits(logits(model, ids), logits(expected, ids))
        assert torch.equal(model.generate(ids[:, :5], **SETTINGS), expected.generate(ids[:, :5], **SETTINGS))
        hooked = [module for module in model.model.modules() if hasattr(module, "_hf_hook")]
        assert bool(hooked) == (how not in ("auto", "one"))
        assert bool(offloaded(model)) == bool(away)  # nothing that was fetched stays
    member = model._members[model.submodel]
    logits(model, ids)
    model.set_budget(None)
    model.set_budget("small")
    assert model._members[model.submodel] is member, "made anew though nothing changed"


def test_hooks_go_with_what_they_fetched(family_folder, sliced, tmp_path, ids):
    """A budget that was made with hooks is not used without them."""
    model = disk_offload(load(family_folder("nano3")), tmp_path, execution_device="cpu")
    with model.at("small"):
        logits(model, ids)
    remove_hook_from_submodules(model)
    assert offloaded(model) == 0
    for parameter in model.parameters():
        parameter.zero_()
    with model.at("small"):
        assert not logits(model, ids).any()


def test_other_models_and_settings(original, family_folder, tmp_path, ids):
    """The base model, tied weights, and a spread family that is saved at a size."""
    base = on_disk(family_folder("granite"), AutoModel.from_pretrained, offload_folder=tmp_path / "a")
    assert offloaded(base)
    with base.at("small"):
        found = base(ids, use_cache=False).last_hidden_state
    alone = AutoModel.from_pretrained(family_folder("granite"), budget="small")
    assert_same_logits(found, alone(ids, use_cache=False).last_hidden_state)
    original("granite_tied").save_pretrained(tmp_path / "tied")
    ElasticConfig.from_parent(original("granite_tied").config, {"small": {"hidden": 24}}).save_pretrained(
        tmp_path / "tied"
    )
    tied = on_disk(tmp_path / "tied", offload_folder=tmp_path / "b")
    assert offloaded(tied)
    with tied.at("small"):
        assert_same_logits(logits(tied, ids), logits(load(tmp_path / "tied", budget="small"), ids))
    family = on_disk(family_folder("nano3"), offload_folder=tmp_path / "c")
    with pytest.warns(UserWarning, match="offloaded modules"):
        family.save_pretrained(tmp_path / "small", budget="small")
    assert_same_weights(load(tmp_path / "small"), load(family_folder("nano3"), budget="small"))


def test_what_has_no_weights_at_all_and_training_are_refused(family_folder, tmp_path, ids):
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(ElasticConfig.from_pretrained(family_folder("nano3"))).eval()
    with pytest.raises(ElasticConfigError, match=r"no storage and no hook.*load the whole parent"):
        empty.set_budget("small")
    assert empty.budget == "full"
    model = on_disk(family_folder("nano3"), offload_folder=tmp_path)
    before = logits(model, ids)
    model.train()
    with pytest.raises(ElasticConfigError, match="weights are offloaded, and a budget in training mode"):
        model.set_budget("small")
    assert model.budget == "full"
    assert torch.equal(logits(model.eval(), ids), before)
