"""Training at a budget: the same loss and gradients as through masks, on the parent's own parameters."""

from __future__ import annotations

import math

import pytest
import torch
from cases import BUDGETS, build_parent
from torch.func import functional_call

from hf_elastic import elastify, masked_model
from hf_elastic.architectures.pieces import pieces

# float32; gradients here reach 0.4, and the sums behind them run in another order.
CLOSE = {"rtol": 1e-4, "atol": 2e-6}
CASES = [(name, budget) for name in BUDGETS for budget in BUDGETS[name]]


@pytest.fixture(autouse=True)
def _with_gradients():
    with torch.enable_grad():
        yield


@pytest.fixture
def family():
    def make(name: str, checkpointing: bool = False):
        model = elastify(build_parent(name), budgets=BUDGETS[name], sort=False).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    return make


def masked_gradients(name: str, submodel, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the parent's parameters through masks, by autograd: `w * mask`, norms corrected."""
    parent = build_parent(name)
    free = {key: p.detach().clone().requires_grad_() for key, p in parent.named_parameters()}
    used = dict(free)
    architecture = elastify(parent, budgets=BUDGETS[name], sort=False).architecture
    for piece in pieces(architecture, parent.config, submodel):
        if piece.rule.buffer or piece.rule.tied:
            continue
        weight = free[piece.rule.name] * piece.rule.mask(piece.full, piece.kept)
        if piece.rule.norm:
            weight = weight * math.sqrt(math.prod(piece.shape) / piece.rule.count(piece.full))
        used[piece.rule.name] = weight
    model = masked_model(parent, submodel).train()
    loss = functional_call(model, used, (), {"input_ids": ids, "labels": ids, "use_cache": False}).loss
    loss.backward()
    return loss.detach(), {key: p.grad for key, p in free.items() if p.grad is not None}


def assert_gradients(model, expected: dict[str, torch.Tensor]) -> None:
    for key, parameter in model.named_parameters():
        ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        theirs = expected.get(key, torch.zeros_like(parameter))
        torch.testing.assert_close(ours, theirs, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("name", "budget"), CASES, ids=["-".join(case) for case in CASES])
def test_loss_and_every_gradient_are_those_of_the_masked_step(name, budget, checkpointing, family, ids):
    model = family(name, checkpointing)
    with model.at(budget):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
    expected_loss, expected = masked_gradients(name, model.elastic_config.submodel(budget), ids)
    torch.testing.assert_close(loss.detach(), expected_loss, **CLOSE)
    assert_gradients(model, expected)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 0.01


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", BUDGETS)
def test_kept_layers_are_computed_again_in_backward_if_checkpointed(name, checkpointing, family, ids):
    """Gradients alone do not show whether anything is recomputed."""
    model = family(name, checkpointing)
    with model.at("small"):
        counts: dict[int, int] = {}
        units = {id(unit.module): unit for unit in model._stencils[model.submodel]}
        layers = [units[id(layer)].stencil for layer in model.model.layers]
        assert None in layers
        for layer, stencil in enumerate(layers):
            for part in () if stencil is None else stencil.children():
                part.register_forward_hook(lambda *_, layer=layer: counts.update({layer: counts.get(layer, 0) + 1}))
        loss = model(ids, labels=ids, use_cache=checkpointing).loss  # checkpointed layers leave caches out
        first = dict(counts)
        loss.backward()
    kept = [layer for layer, stencil in enumerate(layers) if stencil is not None]
    assert list(first) == kept
    assert all((counts[layer] > first[layer]) == checkpointing for layer in kept)


@pytest.mark.parametrize("name", BUDGETS)
def test_gradients_accumulate_over_budgets(name, family, ids):
    model = family(name)
    total: dict[str, torch.Tensor] = {}
    for budget in [None, *BUDGETS[name]]:
        with model.at(budget):
            model(ids, labels=ids, use_cache=False).loss.backward()
        _, gradients = masked_gradients(name, model.elastic_config.resolve(budget), ids)
        for key, gradient in gradients.items():
            total[key] = total.get(key, 0) + gradient
    assert_gradients(model, total)


@pytest.mark.parametrize("name", BUDGETS)
def test_both_modes_compute_the_same_and_train_and_eval_keep_the_budget(name, family, ids):
    model = family(name)
    whole = model(ids, use_cache=False).logits
    for budget in BUDGETS[name]:
        model.set_budget(budget)
        training = model(ids, use_cache=False).logits
        parameters = model.num_parameters()
        model.eval()
        assert model.budget == budget
        assert model.num_parameters() == model.budgets[budget]["total_params"] < parameters
        # The same modules on the same numbers; views and fresh narrows differ in strides only.
        torch.testing.assert_close(model(ids, use_cache=False).logits, training, rtol=1e-5, atol=1e-5)
        model.train()
        assert model.num_parameters() == parameters
        assert (training - whole).abs().max() > 0.01
    model.set_budget(None)
    assert torch.equal(model(ids, use_cache=False).logits, whole)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", BUDGETS)
def test_a_step_at_a_budget_changes_only_what_it_keeps_and_the_slice_follows(name, family, ids, tmp_path):
    model = family(name)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with model.at("small"):
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    submodel = model.elastic_config.submodel("small")
    masks = {
        piece.rule.name: piece.rule.mask(piece.full, piece.kept).bool()
        for piece in pieces(model.architecture, model.elastic_config.parent_config, submodel)
    }
    changed = 0
    for key, parameter in model.named_parameters():
        moved = parameter.detach() != before[key]
        kept = masks.get(key, torch.zeros_like(moved))
        assert not (moved & ~kept).any(), key
        changed += int(moved.sum())
    assert changed > 1000
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, budget="small")
    with torch.no_grad(), model.at("small"):
        trained = model(ids, use_cache=False).logits
        torch.testing.assert_close(loaded(ids).logits, trained, rtol=1e-5, atol=1e-5)


def test_a_step_refreshes_the_copies_of_budgets_bound_before(family, ids):
    """Cuts per group need copies in evaluation; after a step they must not be stale."""
    model = family("nano3")
    model.eval()
    with model.at("small"), torch.no_grad():
        stale = model(ids, use_cache=False).logits
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    model.eval()
    fresh = elastify_copy(model)
    with torch.no_grad(), model.at("small"), fresh.at("small"):
        logits = model(ids, use_cache=False).logits
        assert torch.equal(logits, fresh(ids, use_cache=False).logits)
    assert (logits - stale).abs().max() > 1e-3


def elastify_copy(model):
    """The same weights in a family that has never bound a budget."""
    made = type(model)(model.elastic_config).eval()
    made.load_state_dict(model.state_dict())
    return made


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_computing_nests_and_stays_when_the_mode_changes(training, family, ids):
    model = family("nano3").train(training)
    expected = {}
    for budget in (None, *BUDGETS["nano3"]):
        with model.computing(budget):
            expected[budget] = model(ids, use_cache=False).logits
    modules = list(model.modules())
    with model.computing("small"):
        for mode in (not training, training):
            model.train(mode)
            assert torch.equal(model(ids, use_cache=False).logits, expected["small"])
            with model.computing("large"), model.computing(None):
                assert torch.equal(model(ids, use_cache=False).logits, expected[None])
            assert torch.equal(model(ids, use_cache=False).logits, expected["small"])
        assert all(ours is theirs for ours, theirs in zip(model.modules(), modules, strict=True))
    assert torch.equal(model(ids, use_cache=False).logits, expected[None])
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_hooks_of_the_parents_layers_fire(family, ids):
    model = family("nano3")
    seen: list[int] = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda module, args, output, i=i: seen.append(i))
    with model.at("small"):
        model(ids, use_cache=False)
    assert seen == list(range(len(model.model.layers)))


def test_saving_while_training_at_a_budget(family, tmp_path, ids):
    model = family("nano3")
    model.set_budget("small")
    model.save_pretrained(tmp_path / "family")
    model.save_pretrained(tmp_path / "small", budget="small")
    assert model.budget == "small"
    assert model.training
    direct = type(model).from_pretrained(tmp_path / "family", budget="small")
    saved = type(model).from_pretrained(tmp_path / "small")
    assert all(torch.equal(saved.state_dict()[key], tensor) for key, tensor in direct.state_dict().items())


def test_casting_while_training_at_a_budget(family, ids):
    model, reference = family("granite"), family("granite")
    model.set_budget("small")
    model.to(torch.bfloat16)
    reference.to(torch.bfloat16).set_budget("small")
    assert model.budget == "small"
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        assert logits.dtype == torch.bfloat16
        assert torch.equal(logits, reference(ids, use_cache=False).logits)
