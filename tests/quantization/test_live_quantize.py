"""`quantize`: a live family becomes codes, those that a quantised checkpoint of it has."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from quantized import quantizable_family, quantizable_parent, stored
from transformers import AutoModelForCausalLM

from hf_elastic import ElasticConfigError, ElasticForCausalLM, quantize, quantize_checkpoint
from hf_elastic.submodels.packed import is_packed


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A family, and that family quantised; not to be changed."""
    root = tmp_path_factory.mktemp("live")
    quantizable_family("nemotron", root / "family")
    quantize_checkpoint(root / "family", root / "quantized", "nvfp4", progress=False)
    return {"family": root / "family", "quantized": root / "quantized"}


def load(folder: Path, **arguments) -> ElasticForCausalLM:
    return ElasticForCausalLM.from_pretrained(folder, **arguments)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("granite", "nvfp4"), ("nemotron", {"attention": "nvfp4", "mamba": "nvfp4", "experts": "fp8"})],
)
def test_it_is_the_quantised_checkpoint_at_every_size(name, recipe, tmp_path, ids):
    quantizable_family(name, tmp_path / "family")
    quantize_checkpoint(tmp_path / "family", tmp_path / "quantized", recipe, progress=False)
    live, packed = load(tmp_path / "family"), load(tmp_path / "quantized", packed=True)
    assert quantize(live, recipe) is live
    assert live.elastic_config.elastic == packed.elastic_config.elastic
    assert not live.training
    for budget in (None, "mid", "small"):
        live.set_budget(budget)
        packed.set_budget(budget)
        ours, theirs = live.state_dict(), packed.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert torch.equal(live(ids).logits, packed(ids).logits)
    live.save_pretrained(tmp_path / "saved")
    ours, theirs = stored(tmp_path / "saved"), stored(tmp_path / "quantized")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key].view(torch.uint8), theirs[key].view(torch.uint8)) for key in ours)


def test_weights_are_gone_one_after_the_other(folders, monkeypatch):
    from hf_elastic.submodels import quantizing

    model = load(folders["family"])
    weights = [
        weakref.ref(parameter) for name, parameter in model.named_parameters() if name.endswith(".experts.up_proj")
    ]
    there, encode = [], quantizing.encode

    def watched(*args, **kwargs):
        there.append(sum(weight() is not None for weight in weights))
        return encode(*args, **kwargs)

    monkeypatch.setattr(quantizing, "encode", watched)
    quantize(model, {"experts": "fp8"})
    assert there == [3, 3, 2, 2, 1, 1]  # up and down of three layers
    assert sum(weight() is not None for weight in weights) == 0


def test_what_is_kept_stays_and_weights_that_were_codes_are_quantised_if_asked(folders):
    model = load(folders["family"])
    before = model.state_dict()
    quantize(model, "fp8", keep=["attention", "*.layers.0.*"])
    after = model.state_dict()
    kept = [name for name in before if "q_proj" in name or name.startswith("model.layers.0.")]
    assert len(kept) > 5
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert "model.layers.4.mixer.in_proj.weight" not in after
    again = load(folders["quantized"])
    assert is_packed(quantize(again, "fp8", again=True))


def _adapted(folders):
    return get_peft_model(load(folders["family"]), LoraConfig(r=2, target_modules=["q_proj"]))


def _cut(folders):
    model = load(folders["family"])
    model.set_budget("mid")
    return model


def _poisoned(folders):
    model = load(folders["family"])
    model.get_parameter("model.layers.7.mixer.experts.down_proj")[3, 0, 0] = float("inf")
    return model


REFUSED = {
    "packed": (lambda folders: load(folders["quantized"], packed=True), "this model is quantised already"),
    "twice": (lambda folders: quantize(load(folders["family"]), "fp8"), "this model is quantised already"),
    "decoded": (lambda folders: load(folders["quantized"]), r"were codes in .*quantized.*again=True"),
    "slice": (lambda folders: load(folders["quantized"], budget="mid"), "were codes in"),
    "cut": (_cut, "the active size is mid, .*set_budget"),
    "adapted": (_adapted, "adapters are attached.*merge_and_unload"),
    "injected": (lambda folders: _adapted(folders).get_base_model(), "adapters are attached"),
    "plain": (lambda folders: quantizable_parent("nemotron"), "not NemotronHForCausalLM: make one .*elastify"),
    "path": (lambda folders: str(folders["family"]), "not str"),
    "poisoned": (_poisoned, r"layers\.7\.mixer\.experts\.down_proj has elements that are NaN or infinite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_quantised_is_refused_and_not_changed(case, folders):
    make, said = REFUSED[case]
    model = make(folders)
    state = model.state_dict() if isinstance(model, torch.nn.Module) else {}
    before = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(ElasticConfigError, match=said):
        quantize(model, "nvfp4")
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.items())
    if case in ("cut", "adapted", "injected", "plain", "poisoned"):
        assert not is_packed(model)
        assert state.keys() == model.state_dict().keys()


def test_weights_on_disk_are_refused_with_what_to_do(folders, tmp_path):
    place = {"model.embeddings": "cpu", "model.layers": "disk", "model.norm_f": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folders["family"], device_map=place, offload_folder=tmp_path)
    with pytest.raises(ElasticConfigError, match=r"have no storage.*quantize_checkpoint\(\) quantises files"):
        quantize(model, "fp8")
    with pytest.raises(ElasticConfigError, match="Did you mean 'experts'"):
        quantize(load(folders["family"]), {"expert": "fp8"})
