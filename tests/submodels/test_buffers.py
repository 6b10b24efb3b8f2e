"""Buffers that are not saved are those of the config after every load, and those of its own size in every budget."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, IDS, build_parent
from transformers import AutoConfig, AutoModelForCausalLM, GraniteMoeHybridForCausalLM
from transformers.initialization import no_init_weights
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite

from hf_elastic import CheckpointError, ElasticConfig, ElasticForCausalLM, elastify
from hf_elastic.checkpoints.loading import load_stock
from hf_elastic.submodels.buffers import constant_buffers, fresh_buffers
from hf_elastic.submodels.slicing import build_meta
from hf_elastic.testing.models import random_model
from hf_elastic.testing.tiny import TINY

MESSAGE = r"other values in model\.rotary_emb\.inv_freq"


@pytest.fixture
def left_as_it_lies(monkeypatch):
    """An architecture whose buffers upstream does not fill, so that they are what memory holds."""
    stock = granite.GraniteMoeHybridPreTrainedModel._init_weights

    def wrong(self, module):
        stock(self, module)
        if isinstance(module, granite.GraniteMoeHybridRotaryEmbedding):
            module.inv_freq.fill_(7)

    return lambda: monkeypatch.setattr(granite.GraniteMoeHybridPreTrainedModel, "_init_weights", wrong)


def test_every_load_sets_them(left_as_it_lies, family_folder, tmp_path):
    folder = family_folder("granite")
    family = ElasticForCausalLM.from_pretrained(folder)
    family.save_pretrained(tmp_path / "nested", layout="nested")
    parent = build_parent("granite")
    parent.save_pretrained(tmp_path / "parent")
    wanted = parent.get_buffer("model.rotary_emb.inv_freq").clone()
    left_as_it_lies()
    config = ElasticConfig.from_pretrained(folder)
    broken = AutoModelForCausalLM.from_pretrained(tmp_path / "parent")
    assert not torch.equal(broken.get_buffer("model.rotary_emb.inv_freq"), wanted)
    for load in (
        lambda: ElasticForCausalLM.from_pretrained(folder),
        lambda: ElasticForCausalLM.from_pretrained(folder, budget="small"),
        lambda: ElasticForCausalLM.from_pretrained(tmp_path / "nested", budget="medium"),
        lambda: ElasticForCausalLM.from_pretrained(None, config=config, state_dict=parent.state_dict()),
        lambda: load_stock(tmp_path / "parent"),
        lambda: elastify(tmp_path / "parent", budgets={"small": {"expert_ffn": 8}}, sort=False),
    ):
        assert torch.equal(load().get_buffer("model.rotary_emb.inv_freq"), wanted)
    with pytest.raises(CheckpointError, match=MESSAGE):
        elastify(broken, budgets={"small": {"expert_ffn": 8}}, sort=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_are_those_of_a_newly_built_model(dtype, family_folder):
    family = ElasticForCausalLM.from_pretrained(family_folder("granite"), dtype=dtype)
    fresh = dict(GraniteMoeHybridForCausalLM(family.config).named_buffers())
    names = [name for name, *_ in constant_buffers(family)]
    assert "model.rotary_emb.inv_freq" in names
    assert all(torch.equal(family.get_buffer(name), fresh[name]) for name in names)
    for budget in ("large", "medium", "small"):
        family.set_budget(budget)
        assert all(family.get_buffer(name).data_ptr() == buffer.data_ptr() for name, buffer in family.named_buffers())
        assert all(torch.equal(family.get_buffer(name), fresh[name]) for name in names)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_without_a_model_they_are_the_same(case, original):
    """What is built from a config alone: the same buffers as in the whole model, of every size."""
    parent = original(case.parent)
    family = elastify(parent, budgets={"cut": case.sizes} if case.sizes else {"cut": {"hidden": 24}}, sort=False)
    config = family.elastic_config.stock_config(case.submodel)
    fresh = fresh_buffers(build_meta(family.architecture, config, type(family)))
    with no_init_weights():
        whole = type(family)(config)
    assert fresh.keys() == {name for name, *_ in constant_buffers(whole)}
    assert all(torch.equal(value, whole.get_buffer(name)) for name, value in fresh.items())


def test_a_budget_has_those_of_its_own_size(monkeypatch):
    stock = granite.GraniteMoeHybridDecoderLayer.__init__

    def sized(self, config, layer_idx):
        stock(self, config, layer_idx)
        width = torch.arange(config.hidden_size, dtype=torch.float32) / config.hidden_size
        self.register_buffer("width", width + layer_idx, persistent=False)

    monkeypatch.setattr(granite.GraniteMoeHybridDecoderLayer, "__init__", sized)
    family = elastify(
        build_parent("granite"), budgets={"small": {"hidden": 24, "mamba_heads": 12, "layers": [0, 3]}}, sort=False
    )
    wanted = [torch.arange(24) / 24 + layer for layer in range(2)]
    family.set_budget("small")
    for layer, width in zip(family.model.layers, wanted, strict=True):
        assert torch.equal(layer.width, width)
    family.set_budget(None)
    family.train().set_budget("small")
    stencils = [unit.stencil for unit in family._stencils[family.submodel] if hasattr(unit.stencil, "width")]
    for layer, width in zip(stencils, wanted, strict=True):
        assert torch.equal(layer.width, width)


def test_sizes_that_differ_by_one_rounding_have_their_own_in_bfloat16():
    """The root of 1024 is 32, that of 1016 is 31.875 in bfloat16: one step below."""
    one = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    fields = TINY["gemma3_text"][0] | one | {"hidden_size": 1024, "num_attention_heads": 8}
    parent = random_model(AutoConfig.for_model("gemma3_text", **fields))
    family = elastify(parent, budgets={"near": {"hidden": 1016}}, sort=False).to(torch.bfloat16)
    assert float(family.model.embed_tokens.embed_scale) == 32
    with family.at("near") as view:
        assert float(view.model.embed_tokens.embed_scale) == 31.875
