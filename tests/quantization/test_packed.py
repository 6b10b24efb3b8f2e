"""Packed models: codes in memory, the decoded model's numbers at every size, and what they cannot do is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from coded import write_family
from peft import LoraConfig, get_peft_model

import hf_elastic
from hf_elastic import ElasticConfigError, ElasticForCausalLM
from hf_elastic.lab.quantized import load_block_family
from hf_elastic.submodels.packed import PackedModule, is_packed

load = ElasticForCausalLM.from_pretrained
IDS = torch.tensor([[5, 7, 9, 11, 2, 3, 8]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Quantised families; not to be changed."""
    made = {}
    for name, recipe in (("nemotron", "fp8"), ("granite", "nvfp4")):
        made[name] = tmp_path_factory.mktemp("packed") / name
        write_family(made[name], name, recipe)
    return made


@pytest.fixture(scope="module")
def models(folders) -> dict[str, tuple[ElasticForCausalLM, ElasticForCausalLM]]:
    """Packed, and decoded with the same experts; both go back to everything that is loaded."""
    return {
        name: (load(folder, packed=True), load(folder, experts_implementation="eager"))
        for name, folder in folders.items()
    }


def logits(model: ElasticForCausalLM) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("name", ["nemotron", "granite"])
def test_it_computes_and_writes_what_the_decoded_model_does(name, models):
    packed, decoded = models[name]
    for budget in (None, "half", "small"):
        with packed.at(budget), decoded.at(budget), torch.no_grad():
            assert torch.equal(logits(packed), logits(decoded))
            one, other = (m.generate(IDS, max_new_tokens=6, do_sample=False) for m in (packed, decoded))
            assert torch.equal(one, other)
            assert packed.num_parameters() == decoded.num_parameters()
    drafted = [m.generate(IDS, draft_budget="half", max_new_tokens=6, do_sample=False) for m in (packed, decoded)]
    assert torch.equal(*drafted)
    small = packed.sized("half").sized("small")
    with decoded.at("small"), torch.no_grad():
        assert torch.equal(logits(small), logits(decoded))


def test_sizes_are_views_of_codes_and_follow_them(folders):
    packed = load(folders["nemotron"], packed=True)
    held = packed.get_memory_footprint()
    whole = {name: buffer for name, buffer in packed.named_buffers() if name.endswith("_codes")}
    assert whole
    assert all(buffer.dtype == torch.uint8 for buffer in whole.values())
    packed.set_budget("half")
    for name, part in packed.named_buffers():
        if name in whole:
            assert part.untyped_storage().data_ptr() == whole[name].untyped_storage().data_ptr(), name
            assert part.numel() <= whole[name].numel()
    assert packed.get_memory_footprint() == held < 0.6 * load(folders["nemotron"]).get_memory_footprint()
    before = logits(packed)
    for buffer in whole.values():
        buffer.zero_()
    assert not torch.equal(logits(packed), before)


def test_copies_change_with_what_they_were_copied_from(folders):
    packed = load(folders["granite"], packed=True)
    packed.set_budget("half")
    before = logits(packed)
    packed.set_budget(None)
    for name, buffer in packed.named_buffers():
        if name.endswith("gate_up_proj_codes"):
            buffer.zero_()
    packed.set_budget("half")
    assert not torch.equal(logits(packed), before)
    assert not any(buffer.any() for name, buffer in packed.named_buffers() if name.endswith("gate_up_proj_codes"))


def test_casts_do_not_touch_codes(folders, models):
    packed = copy.deepcopy(models["granite"][0])
    before = {name: buffer.clone() for name, buffer in packed.named_buffers() if "_proj_" in name or "weight_" in name}
    packed.float()
    assert all(torch.equal(packed.get_buffer(name), buffer) for name, buffer in before.items())
    wide = load(folders["granite"], dtype=torch.float32, experts_implementation="eager")
    for budget in (None, "small"):
        with packed.at(budget), wide.at(budget), torch.no_grad():
            assert torch.equal(logits(packed), logits(wide))
    assert not torch.equal(logits(wide), logits(models["granite"][0]).float())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles(models, again):
    packed = models["granite"][0]
    with packed.at("half"):
        expected = logits(packed)
        other = again(packed)
    assert other.budget == "half"
    assert is_packed(other)
    assert torch.equal(logits(other), expected)


@pytest.mark.parametrize("layout", ["stock", "nested"])
def test_codes_are_saved_as_they_are(models, layout, tmp_path):
    packed, decoded = models["granite"]
    resized = copy.deepcopy(packed)
    resized.resize_token_embeddings(packed.config.vocab_size + 8)
    for model, name in ((packed, "as it was"), (resized, "resized")):
        model.save_pretrained(tmp_path / name, layout=layout)
        again, plain = load(tmp_path / name, packed=True), load(tmp_path / name, experts_implementation="eager")
        state, other = model.state_dict(), again.state_dict()
        assert state.keys() == other.keys()
        assert all(torch.equal(state[key], other[key]) for key in state)
        for budget in (None, "small"):
            with again.at(budget), plain.at(budget), decoded.at(budget), torch.no_grad():
                assert torch.equal(logits(again), logits(plain))
                assert torch.equal(logits(again)[..., : decoded.config.vocab_size], logits(decoded))


def test_no_gradients_and_no_training(models):
    packed = models["nemotron"][0]
    assert any(parameter.requires_grad for parameter in packed.parameters())
    assert not packed(IDS, labels=IDS).loss.requires_grad  # nor would decoded weights be kept for them
    for refused in (packed.train, lambda: packed.computing("small").__enter__()):
        with pytest.raises(ElasticConfigError, match="it is packed, for inference"):
            refused()
    assert not packed.training


def test_what_needs_weights_is_refused(models, folders, tmp_path):
    packed = copy.deepcopy(models["nemotron"][0])
    before = logits(packed)
    with pytest.raises(ElasticConfigError, match="adapter.*packed"):
        get_peft_model(packed, LoraConfig(target_modules=["in_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ElasticConfigError, match="experts_implementation"):
        packed.set_experts_implementation("grouped_mm")
    packed.set_experts_implementation("eager")
    assert torch.equal(logits(packed), before)
    for arguments in ({"experts_implementation": "grouped_mm"}, {"device_map": "auto"}):
        with pytest.raises(ElasticConfigError, match="packed=True"):
            load(folders["nemotron"], packed=True, **arguments)
    models["nemotron"][1].save_pretrained(tmp_path)
    with pytest.raises(ElasticConfigError, match="not quantised"):
        load(tmp_path, packed=True)


def test_offloaded_codes_have_no_sizes(models):
    packed = copy.deepcopy(models["nemotron"][0])
    before = logits(packed)
    cpu_offload(packed, execution_device=torch.device("cpu"), offload_buffers=True)
    assert torch.equal(logits(packed), before)
    with pytest.raises(ElasticConfigError, match="codes were offloaded"):
        packed.set_budget("small")


def test_it_says_that_it_is_packed(models):
    shown = repr(models["granite"][0])
    assert "gate_up_proj: nvfp4, down_proj: nvfp4" in shown
    assert "bias=False, weight: nvfp4" in shown
    assert sum(isinstance(module, PackedModule) for module in models["granite"][0].modules()) > 10


def test_phases_hand_caches_over_between_sizes_of_codes(tmp_path):
    """One size thinks, the whole answers, with a family that can do it."""
    family, tokenizer = load_block_family()
    hf_elastic.quantize(family, "nvfp4")
    family.save_pretrained(tmp_path)
    decoded = load(tmp_path, dtype=torch.float32, experts_implementation="eager")
    inputs = tokenizer("^a6b-1c-5d-4>", return_tensors="pt")
    plan = hf_elastic.PhasePlan(thinking="half", answering="full", max_thinking_tokens=64)
    written = [
        model.generate(**inputs, phase_plan=plan, tokenizer=tokenizer, return_dict_in_generate=True)
        for model in (family, decoded)
    ]
    assert torch.equal(written[0].sequences, written[1].sequences)
    assert [(phase.budget, phase.generated) for phase in written[0].phases] == [("half", [21]), ("full", [7])]
    assert tokenizer.decode(written[0].sequences[0]).endswith("</think>bLcLdJ<eos>")
