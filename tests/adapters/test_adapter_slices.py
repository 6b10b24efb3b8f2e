"""Adapters of a parent cut to its sizes: merged then sliced = sliced then merged, in float32 and in plain peft."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys

import pytest
import torch
from adapted import targets
from cases import BUDGETS, build_parent
from compare import assert_same_logits, logits
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from hf_elastic import ElasticConfig, ElasticConfigError, ElasticForCausalLM, ElasticModel, elastify
from hf_elastic.adapters.slices import load_adapter, slice_adapter
from hf_elastic.testing.adapting import perturb

LAYERED = {"layers_to_transform": [0, 2, 7], "rank_pattern": {"layers.2.mixer.q_proj": 3, "in_proj": 2}}
KINDS = {
    "all": lambda name: targets(name),
    "dora": lambda name: LoraConfig(r=3, use_dora=True, target_modules=["q_proj", "in_proj", "o_proj"]),
    "layers": lambda name: LoraConfig(
        r=4, target_modules=["q_proj", "in_proj"], alpha_pattern={"q_proj": 5}, **LAYERED
    ),
    "regex": lambda name: LoraConfig(
        r=2, target_modules=r".*layers\.[27]\.(mixer|self_attn)\.(q_proj|up_proj|in_proj)"
    ),
    "ends": lambda name: LoraConfig(
        r=3,
        target_modules=["embeddings", "embed_tokens", "lm_head", "q_proj"],
        modules_to_save=["norm_f", "model.norm"],
    ),
    "bias": lambda name: LoraConfig(r=3, target_modules=["q_proj"], lora_bias=True),
}
CASES = [
    *(("nano3", kind, "small") for kind in KINDS if kind != "bias"),
    ("nano3", "all", "medium"),
    *(("granite", kind, "small") for kind in ("all", "dora", "bias")),
    ("granite_tied", "all", {"hidden": 24, "mamba_heads": 15, "experts": 5}),
    ("nano3_latent", "all", {"hidden": 32, "experts": 6, "expert_ffn": 8}),
]


def family_of(name: str) -> ElasticForCausalLM:
    return elastify(build_parent(name), budgets=BUDGETS.get(name, {"other": {"shared_expert_ffn": 8}}), sort=False)


def made(name: str, config: LoraConfig) -> PeftModel:
    """A family with adapters of which every tensor is random."""
    wrapped = perturb(get_peft_model(family_of(name), config)).eval()
    generator = torch.Generator().manual_seed(3)
    for key, parameter in wrapped.named_parameters():  # as if trained
        if "modules_to_save" in key:
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter by plain saving, with its family beside: folders of both, and the PeftModel; not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    with torch.no_grad():
        wrapped = made("nano3", targets("nano3"))
        wrapped.save_pretrained(folder / "adapter")
        family_of("nano3").save_pretrained(folder / "family")
    return wrapped, folder / "adapter", folder / "family"


@pytest.mark.parametrize(("name", "kind", "budget"), CASES, ids=str)
def test_merged_then_sliced_is_sliced_then_merged(name, kind, budget, tmp_path, ids):
    """By peft's own merging on both sides; the slice is cut from unadapted weights."""
    wrapped = made(name, KINDS[kind](name))
    plain = family_of(name)
    config, state = slice_adapter(wrapped, budget, tmp_path / "adapter")
    plain.save_pretrained(tmp_path / "slice", budget=budget)
    small = ElasticForCausalLM.from_pretrained(tmp_path / "slice")
    without = logits(small, ids)
    adapted = PeftModel.from_pretrained(small, tmp_path / "adapter").eval()
    loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.items())
    live = logits(adapted, ids)
    sliced_then_merged = adapted.merge_and_unload()
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged", budget=budget)
    merged_then_sliced = ElasticForCausalLM.from_pretrained(tmp_path / "merged")
    expected = merged_then_sliced.state_dict()
    assert expected.keys() == sliced_then_merged.state_dict().keys()
    for key, tensor in sliced_then_merged.state_dict().items():  # float32: sums of r products in another order
        torch.testing.assert_close(
            tensor, expected[key], rtol=1e-5, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}"
        )
    assert_same_logits(live, logits(merged_then_sliced, ids), atol=1e-4)
    assert (live - without).abs().max() > 0.05
    assert config.inference_mode


def test_embeddings_that_peft_saves_along_are_left_out(tmp_path):
    wrapped = made("nano3", KINDS["ends"]("nano3"))
    wrapped.save_pretrained(tmp_path)
    assert any(key.endswith("base_layer.weight") for key in load_file(tmp_path / "adapter_model.safetensors"))
    _, expected = slice_adapter(wrapped, "small")
    _, state = slice_adapter(tmp_path, "small", family=wrapped.get_base_model().elastic_config)
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())


def test_lengths_of_rows_are_not_those_of_the_parent(tmp_path):
    """The rows of a slice are shorter; the parent's lengths would stretch them."""
    wrapped = made("nano3", KINDS["dora"]("nano3"))
    _, state = slice_adapter(wrapped, {"hidden": 32})
    key = "base_model.model.model.layers.2.mixer.q_proj.lora_magnitude_vector"
    whole = get_peft_model_state_dict(wrapped)[key]
    share = state[key] / whole
    assert ((share > 0.5) & (share < 0.95)).all()
    wrapped.save_pretrained(tmp_path)
    config = wrapped.get_base_model().elastic_config
    with pytest.raises(ElasticConfigError, match=r"length of rows of weights \(DoRA\).*Pass the live model"):
        slice_adapter(tmp_path, {"hidden": 32}, tmp_path / "out", family=config)
    assert not (tmp_path / "out").exists()
    _, rows = slice_adapter(tmp_path, {"mamba_heads": 6}, family=config)  # of which none gets shorter
    assert torch.equal(rows[key], whole)
    family = family_of("nano3")
    again = slice_adapter(tmp_path, {"hidden": 32}, family=family)[1]
    assert all(torch.equal(tensor, state[k]) for k, tensor in again.items())


@pytest.mark.slow
def test_a_saved_adapter_runs_on_an_exported_slice_in_plain_peft(saved, tmp_path, ids):
    """Of half the layers' kinds: experts, routers, rank patterns; in a process that never imports this package."""
    wrapped, adapter, family = saved
    budget = {"hidden": 32, "experts": 8, "expert_ffn": 8, "mamba_heads": 6, "layers": [0, 1, 2, 6, 7]}
    slice_adapter(adapter, budget, tmp_path / "adapter", family=family)
    ElasticForCausalLM.from_pretrained(family, budget=budget).export(tmp_path / "slice")
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    code = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from peft import PeftModel
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("slice"), "adapter").eval()
assert not any(name.startswith("hf_elastic") for name in sys.modules)
with torch.no_grad():
    save_file({"logits": model(load_file("ids.safetensors")["ids"], use_cache=False).logits.contiguous()}, "out.safetensors")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    merged = made("nano3", targets("nano3")).merge_and_unload()
    with merged.at(budget):
        expected = logits(merged, ids)
    assert_same_logits(load_file(tmp_path / "out.safetensors")["logits"], expected, atol=1e-4)


def test_an_adapter_fits_only_the_size_it_was_trained_at(saved, tmp_path, ids):
    wrapped, adapter, family = saved
    slice_adapter(adapter, "small", tmp_path / "small", family=family)
    slice_adapter(adapter, {"hidden": 24}, tmp_path / "other", family=family)
    model = ElasticForCausalLM.from_pretrained(family)
    before = logits(model, ids)
    with pytest.raises(
        ElasticConfigError, match=r"does not fit this model.*It was trained at 'small': load that size"
    ):
        load_adapter(model, tmp_path / "small")
    with pytest.raises(
        ElasticConfigError, match=r"\(2, 24\) in the adapter, \(2, 48\) here. It was trained on another"
    ):
        load_adapter(model, tmp_path / "other")
    assert not any("lora" in key for key in model.state_dict())
    assert torch.equal(logits(model, ids), before)
    with pytest.raises(ElasticConfigError, match=r"needs an adapter of the whole family.*trained at 'small'"):
        slice_adapter(tmp_path / "small", "small", tmp_path / "out", family=family)
    small = ElasticForCausalLM.from_pretrained(family, budget="small")
    with pytest.raises(ElasticConfigError, match="cut it to this one with slice_adapter"):
        load_adapter(small, adapter)
    with wrapped.get_base_model().computing("small"):
        expected = logits(wrapped, ids)
    assert_same_logits(logits(load_adapter(small, tmp_path / "small").eval(), ids), expected, atol=1e-4)
    assert_same_logits(logits(load_adapter(model, adapter).eval(), ids), logits(wrapped, ids))


def test_a_slice_of_a_slice_of_an_adapter(saved, tmp_path):
    wrapped, adapter, family = saved
    slice_adapter(adapter, "medium", tmp_path / "medium", family=family)
    ElasticForCausalLM.from_pretrained(family, budget="medium").save_pretrained(tmp_path / "slice")
    _, twice = slice_adapter(tmp_path / "medium", "small", family=tmp_path / "slice")
    _, once = slice_adapter(wrapped, "small")
    assert twice.keys() == once.keys()
    assert all(torch.equal(tensor, once[key]) for key, tensor in twice.items())


def test_adapters_of_the_base_model(family_folder, tmp_path, ids):
    """Their names lack the prefix of the causal model's."""
    family, small = (ElasticModel.from_pretrained(family_folder("nano3"), budget=budget) for budget in (None, "small"))
    plain = small(ids, use_cache=False).last_hidden_state
    wrapped = perturb(get_peft_model(family, targets("nano3", task_type="FEATURE_EXTRACTION"))).eval()
    _, state = slice_adapter(wrapped, "small", tmp_path)
    assert all(key.startswith("base_model.model.layers.") for key in state)
    found = load_adapter(small, tmp_path).eval()(ids, use_cache=False).last_hidden_state
    with wrapped.merge_and_unload().at("small"):
        assert_same_logits(found, family(ids, use_cache=False).last_hidden_state, atol=1e-4)
    assert (found - plain).abs().max() > 0.05


REFUSED = {
    "tokens": (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]), "embed_tokens cannot be cut"),
    "out_proj": (LoraConfig(target_modules=["out_proj"]), "out_proj cannot be cut: the stock code hands"),
    "embedding_lengths": (
        LoraConfig(target_modules=["embed_tokens"], use_dora=True),
        "DoraEmbeddingVariant has no slice",
    ),
    "pissa": (LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "'pissa' changes the weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_is_refused_by_name(case, tmp_path):
    config, message = REFUSED[case]
    family = family_of("granite")
    with pytest.raises(ElasticConfigError, match=message):
        slice_adapter(get_peft_model(family, config), "small", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_and_nameless_adapters(saved, tmp_path):
    wrapped, adapter, family = saved
    with pytest.raises(ElasticConfigError, match="does not say which family it was trained on; pass family="):
        slice_adapter(adapter, "small")
    with pytest.raises(ElasticConfigError, match="no LoRA adapter of the model; it has default"):
        slice_adapter(wrapped, "small", adapter_name="other")
    with pytest.raises(ElasticConfigError, match="drops every layer that the adapter is in"):
        slice_adapter(made("nano3", LoraConfig(target_modules=r".*layers\.3\.mixer.*up_proj")), {"layers": [0, 1, 2]})
    shutil.copytree(adapter, tmp_path / "damaged")
    state = load_file(adapter / "adapter_model.safetensors")
    lost = sorted(state)[5]
    save_file({k: v for k, v in state.items() if k != lost}, tmp_path / "damaged" / "adapter_model.safetensors")
    with pytest.raises(ElasticConfigError, match=f"{lost}: not there in the adapter"):
        slice_adapter(tmp_path / "damaged", "small", family=family)
    (tmp_path / "damaged" / "adapter_model.safetensors").rename(tmp_path / "damaged" / "adapter_model.bin")
    with pytest.raises(OSError, match="holds no adapter_model.safetensors; pickled adapters"):
        slice_adapter(tmp_path / "damaged", "small", family=family)


@pytest.mark.parametrize("name", ["nano3", "granite"])
def test_peft_sees_the_stock_model_type(name, family_folder):
    """Its guards and its default targets go by it, on a slice as on the family."""
    for budget in (None, "small"):
        model = ElasticForCausalLM.from_pretrained(family_folder(name), budget=budget)
        assert model.config.model_type == ElasticConfig.from_pretrained(family_folder(name)).parent_config.model_type
        if name == "nano3":
            with pytest.raises(ValueError, match="is incompatible with Mamba-based models"):
                get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear"))
            wrapped = get_peft_model(model, LoraConfig())
            assert wrapped.peft_config["default"].target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
