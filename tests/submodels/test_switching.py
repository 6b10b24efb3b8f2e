"""All budgets live on the storage of what was loaded, and switching between them copies nothing."""

import copy
import pickle

import pytest
import torch
from cases import CASES, IDS
from compare import assert_same_logits, assert_same_weights, logits
from others import exchange
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM

from hf_elastic import ElasticConfig, ElasticConfigError, UnknownBudgetError
from hf_elastic.architectures.pieces import pieces
from hf_elastic.errors import HFElasticError

load = AutoModelForCausalLM.from_pretrained
NAMES = ["nano3", "granite"]
BUDGETS = ["large", "medium", "small"]
each_model = pytest.mark.parametrize("name", NAMES)
each_budget = pytest.mark.parametrize("budget", BUDGETS)


@pytest.fixture(scope="module")
def whole_parent(checkpoint):
    """A parent without named budgets, for tests that go back to everything that is loaded."""
    models = {}

    def get(name):
        if name not in models:
            models[name] = load(checkpoint(name))
        return models[name]

    return get


def storages(model):
    """Address and length of the memory of every tensor."""
    tensors = model.state_dict().values()
    return {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors}


def copied(model):
    """Names of the tensors of the active budget that no view of the parent can give."""
    config = model.elastic_config.parent_config
    found = pieces(model.architecture, config, model.submodel)
    return {piece.target.name for piece in found if not piece.is_view}


def identities(model):
    return {key: (id(tensor), tensor.data_ptr()) for key, tensor in model.state_dict(keep_vars=True).items()}


# Switching


@each_model
def test_every_budget_is_its_slice_in_any_order(name, family, sliced, ids):
    model = family(name)
    for budget in ["small", None, "large", "medium", "small", "large", "FULL", "medium", None]:
        model.set_budget(budget)
        expected = sliced(name, None if budget == "FULL" else budget)
        assert model.budget == ("full" if budget in (None, "FULL") else budget)
        assert_same_weights(model, expected)
        assert_same_logits(logits(model, ids), logits(expected, ids))
        assert model.num_parameters() == expected.num_parameters()
        assert model.config.to_diff_dict() == expected.config.to_diff_dict()


@each_model
def test_at_restores_whatever_happens(name, family, ids):
    model = family(name)
    whole = logits(model, ids)
    model.set_budget("large")
    with model.at("small") as same:
        assert same is model
        assert model.budget == "small"
        with model.at(None):
            assert torch.equal(logits(model, ids), whole)
        assert model.budget == "small"
    assert model.budget == "large"
    with pytest.raises(ZeroDivisionError), model.at("small"):
        _ = 1 / 0
    assert model.budget == "large"
    with model.at("small"):
        model.set_budget("medium")  # the block goes back to what was active before it
    assert model.budget == "large"


@each_model
def test_budgets_in_every_form(name, family):
    model = family(name)
    for name_of_budget, entry in model.budgets.items():
        model.set_budget(None)
        model.set_budget(entry["total_params"])
        assert model.budget == name_of_budget
        model.set_budget(entry["sizes"])
        assert model.budget == name_of_budget
    model.set_budget({"hidden": 24})
    assert model.budget is None
    assert model.config.hidden_size == 24
    assert model.submodel["hidden"] == 24


@each_model
def test_generation_at_every_budget(name, family, sliced, ids):
    model, settings = family(name), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for budget in [*BUDGETS, "small"]:
        with model.at(budget):
            out = model.generate(ids[:, :7], **settings)
        assert torch.equal(out, sliced(name, budget).generate(ids[:, :7], **settings))


def test_numbers_that_the_stock_class_keeps_beside_its_config(family, sliced):
    model = family("granite")
    for budget in (*BUDGETS, {"experts_per_token": 1}, None):
        model.set_budget(budget)
        stock = model.elastic_config.stock_config(model.submodel)
        assert model.vocab_size == stock.vocab_size
        expected = stock.per_layer_config[0]
        assert model.num_experts_per_tok == expected.num_experts_per_tok
        if not isinstance(budget, dict) and budget is not None:
            assert model.num_experts == sliced("granite", budget).num_experts


@each_model
def test_unknown_budgets_change_nothing(name, family, ids):
    model = family(name)
    model.set_budget("medium")
    before, modules = logits(model, ids), identities(model)
    with pytest.raises(UnknownBudgetError, match="unknown budget 'smal'"):
        model.set_budget("smal")
    assert model.budget == "medium"
    assert identities(model) == modules
    assert torch.equal(logits(model, ids), before)


def test_a_slice_only_knows_what_it_nests(sliced):
    model = copy.deepcopy(sliced("nano3", "medium"))
    model.set_budget("small")
    with pytest.raises(UnknownBudgetError, match=r"unknown budget 'large'; this checkpoint has 'medium' .*'small'"):
        model.set_budget("large")
    with pytest.raises(ElasticConfigError, match="hidden=48 is out of range: the parent has 40"):
        model.set_budget({"hidden": 48})


# Storage


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_views_lie_in_the_storage_of_the_parent(case, whole_parent):
    model = whole_parent(case.parent)
    owned = storages(model)
    with model.at(case.submodel):
        names = copied(model)
        for key, tensor in model.state_dict().items():
            inside = (tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()) in owned
            assert inside != (key in names), key


def test_hidden_ffn_and_depth_need_no_copy_at_all(family):
    model = family("nano3")
    sizes = {
        "hidden": 32,
        "ffn": 24,
        "expert_ffn": 8,
        "shared_expert_ffn": 12,
        "mamba_head_dim": 8,
        "layers": [0, 1, 2, 5],
    }
    owned = storages(model)
    model.set_budget(sizes)
    assert not copied(model)
    assert storages(model) <= owned


@each_model
def test_a_warm_switch_makes_nothing_new(name, family, monkeypatch):
    model = family(name)
    first = {}
    for budget in (*BUDGETS, None):
        model.set_budget(budget)
        first[budget] = identities(model)

    def refuse(*args, **kwargs):
        raise AssertionError("a warm switch copies")

    monkeypatch.setattr(torch.Tensor, "copy_", refuse)
    monkeypatch.setattr(torch, "cat", refuse)
    monkeypatch.setattr(torch, "empty", refuse)
    for budget in (None, *BUDGETS[::-1], None, *BUDGETS):
        model.set_budget(budget)
        assert identities(model) == first[budget]


@each_model
@each_budget
def test_changes_in_place_are_seen(name, budget, family, ids, tmp_path):
    """Views see them at once, copies when the budget is set again."""
    model = family(name)
    model.set_budget(budget)
    before = logits(model, ids)
    model.set_budget(None)
    for parameter in model.parameters():
        parameter.mul_(1.25)
    model.save_pretrained(tmp_path)
    expected = load(tmp_path, budget=budget)
    model.set_budget(budget)
    assert_same_weights(model, expected)
    after = logits(model, ids)
    assert_same_logits(after, logits(expected, ids))
    assert not torch.allclose(after, before)


@each_model
def test_changes_while_a_budget_is_active(name, family, ids, tmp_path):
    model = family(name)
    whole = dict(model.named_parameters())
    model.set_budget("small")
    for parameter in whole.values():
        parameter.mul_(1.25)
    model.set_budget("small")  # refreshes the copies
    model.save_pretrained(tmp_path)
    assert_same_weights(model, load(tmp_path, budget="small"))


@each_model
@pytest.mark.parametrize("change", ["assign", "data", "module"])
def test_exchanged_weights_are_noticed(name, change, family, tmp_path):
    """A parameter that is another tensor now would leave the views on memory that nobody uses any more."""
    model = family(name)
    for budget in BUDGETS:
        model.set_budget(budget)
    model.set_budget(None)
    exchange(model, change)
    model.save_pretrained(tmp_path)
    for budget in BUDGETS:
        model.set_budget(budget)
        assert_same_weights(model, load(tmp_path, budget=budget))


@each_model
def test_forgetting_frees_the_copies(name, family, sliced, ids):
    model = family(name)
    owned = storages(model)
    model.set_budget("small")
    assert not storages(model) <= owned
    model.forget_budgets()
    assert model.budget == "full"
    assert storages(model) == owned
    model.set_budget("small")
    assert_same_logits(logits(model, ids), logits(sliced(name, "small"), ids))


def test_tied_embeddings_stay_tied(original, tmp_path):
    original("granite_tied").save_pretrained(tmp_path)
    ElasticConfig.from_parent(original("granite_tied").config, {"small": {"hidden": 24}}).save_pretrained(tmp_path)
    model = load(tmp_path)
    for budget in ("small", None, "small"):
        model.set_budget(budget)
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


# Moving and copying while switched


@each_model
@each_budget
@pytest.mark.parametrize("move", ["to", "half", "bfloat16", "double"])
def test_casting_while_switched(name, budget, move, family):
    model = family(name)
    model.set_budget(budget)
    dtype = {"to": torch.bfloat16, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}[move]
    moved = model.to(dtype) if move == "to" else getattr(model, move)()
    assert moved is model
    assert model.budget == budget
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.set_budget(None)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    owned = storages(model)
    model.set_budget(budget)
    assert_same_weights(model, weights)
    outside = {
        (t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in model.state_dict().values()
    } - owned
    assert len(outside) <= len(copied(model))


@each_model
@each_budget
def test_moving_to_the_same_place_while_switched(name, budget, family, ids):
    model = family(name)
    model.set_budget(budget)
    before = logits(model, ids)
    model.to("cpu")
    model.cpu()
    assert model.budget == budget
    assert torch.equal(logits(model, ids), before)


@each_model
@each_budget
def test_state_dict_is_that_of_the_budget(name, budget, family, sliced, original):
    model = family(name)
    model.set_budget(budget)
    assert_same_weights(dict(model.state_dict()), sliced(name, budget))
    model.set_budget(None)
    assert_same_weights(model, original(name))


@each_model
@each_budget
@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_dict_while_switched_reaches_the_parent(name, budget, assign, family, tmp_path):
    """Views are the parent's memory; copies, and tensors that were put in their place, are written back."""
    model = family(name)
    model.set_budget(budget)
    expected = {k: v + 1 for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.clone() for k, v in expected.items()}, assign=assign)
    model.save_pretrained(tmp_path)
    assert_same_weights(dict(model.state_dict()), expected)
    assert_same_weights(load(tmp_path, budget=budget), expected)
    model.set_budget(None)
    model.set_budget(budget)
    assert_same_weights(dict(model.state_dict()), expected)


@each_model
@each_budget
def test_saving_while_switched_keeps_everything(name, budget, family, original, tmp_path):
    model = family(name)
    model.set_budget(budget)
    model.save_pretrained(tmp_path)
    assert model.budget == budget
    again = load(tmp_path)
    assert_same_weights(again, original(name))
    assert list(again.budgets) == BUDGETS


@each_model
@each_budget
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_made_while_switched(name, budget, how, family, sliced, original, ids):
    model = family(name)
    model.set_budget(budget)
    twin = how(model)
    for one in (model, twin):
        assert one.budget == budget
        assert_same_weights(one, sliced(name, budget))
        assert_same_logits(logits(one, ids), logits(sliced(name, budget), ids))
        one.set_budget(None)
        assert_same_weights(one, original(name))
    assert not storages(model) & storages(twin)


# Settings


@each_model
@pytest.mark.parametrize("active", [None, "small"])
def test_settings_reach_every_budget(name, active, family, ids):
    """Also the budgets that were in use before, and the parent when set while a smaller one was active."""
    model = family(name)
    for budget in BUDGETS:
        model.set_budget(budget)
    model.set_budget(active)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    assert model.budget == (active or "full")
    for budget in (*BUDGETS, None):
        model.set_budget(budget)
        assert model.config._attn_implementation == "eager"
        assert model.config._experts_implementation == "eager"
        configs = {id(m.config) for m in model.modules() if hasattr(m, "config")}
        assert configs == {id(model.config)}
        assert model(ids, output_attentions=True).attentions


@each_model
def test_config_fields_reach_every_budget(name, family, ids):
    model = family(name)
    for budget in BUDGETS:
        model.set_budget(budget)
    model.set_budget(None)
    model.config.use_cache = False
    for budget in (*BUDGETS, None):
        model.set_budget(budget)
        assert model.config.use_cache is False
        assert model(ids).past_key_values is None


@each_model
def test_eval_and_train(name, family, ids):
    model = family(name)
    model.set_budget("small")
    expected = logits(model, ids)
    model.train()
    assert model.budget == "small"
    assert model.training
    assert all(module.training for module in model.modules())
    model.eval()
    assert model.budget == "small"
    assert not any(module.training for module in model.modules())
    assert_same_logits(logits(model, ids), expected)


@each_model
@each_budget
def test_in_inference_mode(name, budget, family, sliced, ids):
    """A budget that was first used in inference mode works outside, and sees changes."""
    model = family(name)
    with torch.inference_mode():
        model.set_budget(budget)
        out = logits(model, ids)
    assert_same_logits(out, logits(sliced(name, budget), ids))
    assert_same_logits(logits(model, ids), logits(sliced(name, budget), ids))
    model.set_budget(None)
    for parameter in model.parameters():
        parameter.mul_(0.5)
    model.set_budget(budget)
    assert_same_weights(model, {k: v * 0.5 if k in dict(sliced(name, budget).named_parameters()) else v for k, v in sliced(name, budget).state_dict().items()})  # fmt: skip


def test_loaded_in_inference_mode(family_folder, sliced, ids):
    with torch.inference_mode():
        model = load(family_folder("nano3"))
        for budget in (*BUDGETS, None, "small"):
            model.set_budget(budget)
        assert_same_logits(logits(model, ids), logits(sliced("nano3", "small"), ids))


# Where it cannot work


@each_model
def test_base_models_switch(name, family_folder, sliced, ids):
    model = AutoModel.from_pretrained(family_folder(name))
    for budget in (*BUDGETS, None, "small"):
        model.set_budget(budget)
    expected = sliced(name, "small").model
    assert_same_weights(model, expected)
    out, theirs = (m(ids, use_cache=False).last_hidden_state for m in (model, expected))
    assert_same_logits(out, theirs)


@each_model
def test_gradients_of_a_live_budget_are_refused_in_evaluation_mode(name, family, ids):
    """They would end in the views, and be lost for the family; those for inputs are as good as ever."""
    model = family(name).eval()
    with model.at("small"), torch.enable_grad():
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(inputs_embeds=embedded).logits.square().sum(), embedded)
        assert gradient.abs().max() > 0
        with pytest.raises(HFElasticError, match=r"would not reach the weights.*model\.train\(\)"):
            model(ids).logits.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())


@each_model
@pytest.mark.parametrize("where", ["at the parent", "at the budget", "parameter by parameter"])
def test_freezing_the_family_freezes_every_budget(where, name, family, ids):
    """Whatever was frozen when: then `backward` is about inputs, and no gradient of a weight is lost."""
    model = family(name).eval()
    model.set_budget("small")
    if where != "at the budget":
        model.set_budget(None)
    for asks in (False, True):
        if where == "parameter by parameter":
            for parameter in model.parameters():
                parameter.requires_grad_(asks)
        else:
            assert model.requires_grad_(asks) is model
        model.set_budget(None)
        assert {parameter.requires_grad for parameter in model.parameters()} == {asks}
        model.set_budget("small")
        assert {parameter.requires_grad for parameter in model.parameters()} == {asks}
        with torch.enable_grad():
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            loss = model(inputs_embeds=embedded).logits.square().sum()
            if asks:
                with pytest.raises(HFElasticError, match="would not reach the weights"):
                    loss.backward()
            else:
                loss.backward()
                assert embedded.grad.abs().max() > 0
        if where != "at the budget":
            model.set_budget(None)


@each_model
def test_the_last_position_of_a_prompt_is_multiplied_without_a_copy_of_the_head(name, family, ids):
    """Torch multiplies it by an expanded copy of a matrix that asks for no gradient; see `bound.view_parameter`."""
    model = family(name).eval()

    class Batched(TorchDispatchMode):
        shapes: list[tuple[int, ...]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.bmm.default:
                self.shapes.append(tuple(args[1].shape))
            return func(*args, **(kwargs or {}))

    with model.at("small"), torch.no_grad(), Batched() as batched:
        model(ids, logits_to_keep=1)
    assert all(shape[-1] != model.config.vocab_size for shape in batched.shapes)
