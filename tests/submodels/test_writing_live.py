"""Whatever is changed on one side of a live budget reaches the other, copies included, or is refused."""

import copy

import pytest
import torch
from cases import CASES, IDS
from compare import assert_same_weights
from torch import nn
from transformers import AutoModelForCausalLM

from hf_elastic import ElasticConfigError
from hf_elastic.architectures.pieces import pieces
from hf_elastic.errors import HFElasticError

load = AutoModelForCausalLM.from_pretrained
NAMES = ["nano3", "granite"]
each_model = pytest.mark.parametrize("name", NAMES)


def copies(model):
    """Names of the tensors of the active budget that are copies."""
    found = pieces(model.architecture, model.elastic_config.parent_config, model.submodel)
    return [piece.target.name for piece in found if not piece.is_view]


def in_place(tensor, values):
    tensor.copy_(values)


def under_data(tensor, values):
    tensor.data.copy_(values)


def as_data(tensor, values):
    tensor.data = values.clone()


WAYS = {"in place": in_place, ".data": under_data, ".data =": as_data}


@each_model
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("then", ["switch", "save", "deepcopy", "train", "other budget"])
def test_changes_at_a_budget_reach_the_family(name, how, then, family, tmp_path):
    model = family(name)
    model.set_budget("medium")  # bound before, with copies of its own
    model.set_budget("small")
    assert copies(model)
    expected = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        expected[key] = tensor.detach() + 1
        WAYS[how](tensor, expected[key])
    if then == "switch":
        model.set_budget(None)
    elif then == "deepcopy":
        model = copy.deepcopy(model)
    elif then == "train":
        model.train()
        model.eval()
    elif then == "other budget":
        model.set_budget("medium")
    model.save_pretrained(tmp_path)
    assert_same_weights(load(tmp_path, budget="small"), expected)
    medium = load(tmp_path, budget="medium")
    with model.at("medium"):
        assert_same_weights(dict(model.state_dict()), medium)
    with model.at("small"):
        assert_same_weights(dict(model.state_dict()), expected)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_changes_along_every_axis_reach_the_family_and_nothing_else(case, checkpoint, tmp_path):
    """Against indices worked out one by one from masks: inside the budget what was written, outside what was there."""
    model = load(checkpoint(case.parent))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = list(pieces(model.architecture, model.elastic_config.parent_config, model.architecture.submodel(model.elastic_config.parent_config, case.submodel) if isinstance(case.submodel, dict) else case.submodel))  # fmt: skip
    with model.at(case.submodel):
        for tensor in model.state_dict(keep_vars=True).values():
            tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float32).view_as(tensor) + 1000)
        written = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    after = model.state_dict()
    kept = {}
    for piece in found:
        mask = piece.rule.mask(piece.full, piece.kept).bool()
        kept[piece.rule.name] = mask
        tied = piece.rule.tied or piece.rule.name
        assert torch.equal(after[tied][mask], written[piece.target.name].flatten()), piece.rule.name
    for key, tensor in after.items():
        outside = ~kept[key] if key in kept else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(tensor[outside], before[key][outside]), key


@each_model
@pytest.mark.parametrize("how", WAYS)
def test_changes_of_the_family_reach_a_budget_that_was_bound_before(name, how, family, tmp_path):
    """`.data` included, which torch does not count as a change."""
    model = family(name)
    model.set_budget("small")
    model.set_budget(None)
    for tensor in model.state_dict(keep_vars=True).values():
        WAYS[how](tensor, tensor.detach() * 1.25)
    model.save_pretrained(tmp_path)
    model.set_budget("small")
    assert_same_weights(dict(model.state_dict()), load(tmp_path, budget="small"))


@each_model
def test_looking_at_data_copies_nothing(name, family, monkeypatch):
    model = family(name)
    model.set_budget("small")
    values = [tensor.data for tensor in model.state_dict(keep_vars=True).values()]
    model.set_budget(None)
    monkeypatch.setattr(torch.Tensor, "copy_", None)
    model.set_budget("small")
    model.set_budget(None)
    assert all(value.isfinite().all() for value in values)


@each_model
def test_a_single_new_parameter_reaches_the_family(name, family):
    model = family(name)
    model.set_budget("small")
    for key in copies(model)[:3]:
        owner, _, leaf = key.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(torch.full_like(getattr(module, leaf), 7.0))
    expected = dict(model.state_dict())
    model.set_budget(None)
    assert any((tensor == 7.0).any() for tensor in model.state_dict().values())
    model.set_budget("small")
    assert_same_weights(dict(model.state_dict()), expected)


@each_model
def test_what_is_frozen_at_a_budget_is_frozen_in_the_family(name, family):
    model = family(name)
    model.set_budget("small")
    model.lm_head.weight.requires_grad_(False)
    model.train()
    assert not model.lm_head.weight.requires_grad
    with torch.enable_grad():
        model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert model.lm_head.weight.grad is None
    assert model.model.layers[0].input_layernorm.weight.grad is not None if name == "granite" else True


def shorter(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight[:-1].clone())


def another_type(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.half())


def another_head(model):
    model.lm_head = copy.deepcopy(model.lm_head)


def another_layer(model):
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])


def another_child(model):
    name, child = next(iter(model.model.layers[1].named_children()))
    setattr(model.model.layers[1], name, copy.deepcopy(child))


@each_model
@pytest.mark.parametrize("exchange", [shorter, another_type, another_head, another_layer, another_child])
@pytest.mark.parametrize("leave", ["set_budget", "save", "train"])
def test_what_has_no_place_in_the_family_is_refused_and_can_be_dropped(exchange, leave, name, family, tmp_path):
    model = family(name)
    whole = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.set_budget("small")
    exchange(model)
    act = {
        "set_budget": lambda: model.set_budget(None),
        "save": lambda: model.save_pretrained(tmp_path / "saved"),
        "train": lambda: model.train(),
    }[leave]
    with pytest.raises(
        ElasticConfigError, match=r"exchanged .*while a budget was active.*forget_budgets\(\), which drops"
    ):
        act()
    assert model.budget == "small"
    assert not (tmp_path / "saved").exists()
    model.forget_budgets()
    assert model.budget == "full"
    assert_same_weights(dict(model.state_dict()), whole)
    model.set_budget("small")
    model.save_pretrained(tmp_path / "saved")
    assert_same_weights(load(tmp_path / "saved"), whole)


@each_model
@pytest.mark.parametrize("what", ["input", "output"])
def test_embeddings_are_exchanged_at_the_whole_family_only(what, name, family, tmp_path):
    model = family(name)
    with model.at("small"):
        embeddings = copy.deepcopy(getattr(model, f"get_{what}_embeddings")())
        with pytest.raises(HFElasticError, match=rf"set_{what}_embeddings needs everything that is loaded"):
            getattr(model, f"set_{what}_embeddings")(embeddings)
    embeddings = copy.deepcopy(getattr(model, f"get_{what}_embeddings")())
    embeddings.weight.add_(1)
    getattr(model, f"set_{what}_embeddings")(embeddings)
    model.save_pretrained(tmp_path)
    expected = load(tmp_path, budget="small")
    with model.at("small"):
        assert_same_weights(dict(model.state_dict()), expected)


def test_one_tensor_with_two_values_is_refused(original, tmp_path):
    from hf_elastic import ElasticConfig

    original("granite_tied").save_pretrained(tmp_path)
    ElasticConfig.from_parent(original("granite_tied").config, {"small": {"hidden": 24}}).save_pretrained(tmp_path)
    model = load(tmp_path)
    model.set_budget("small")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    with pytest.raises(ElasticConfigError, match="are one tensor of the family, and were given different values"):
        model.set_budget(None)
    model.model.embed_tokens.weight = model.lm_head.weight
    expected = dict(model.state_dict())
    model.set_budget(None)
    with model.at("small"):
        assert_same_weights(dict(model.state_dict()), expected)
