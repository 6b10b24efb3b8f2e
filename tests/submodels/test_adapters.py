"""LoRA adapters at a budget: the loss, and the gradient of every A and B, of the masked parent with the merged weights."""

from __future__ import annotations

import math

import pytest
import torch
from adapted import RANK, adapted, adapter_parameters, effective_weights, perturb, targets
from cases import BUDGETS, CASES, IDS, Case, build_parent
from peft import IA3Config, LoraConfig, get_peft_model
from routed import CHOICES
from torch.func import functional_call

from hf_elastic import ElasticConfig, ElasticConfigError, ElasticForCausalLM, ElasticModel, elastify, masked_model
from hf_elastic.architectures.pieces import pieces
from hf_elastic.routing.router import BudgetRouter
from hf_elastic.submodels.adapters import factor_rules
from hf_elastic.submodels.soft import SoftUnits

# float32; adapters here make losses of 4 to 7 and gradients up to 10. The reference adds B A to the weight, the stencil adds its product
# to the activation, so the sums differ in order and in one more rounding; the largest difference seen is 2e-5. A row of B, a column of A
# or a scale that is wrong changes gradients by more than 1e-2.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
NAMES = (
    "nano2-all",
    "nano3-all_and_layers",
    "nano3-all_per_layer",
    "nano3-attention_heads_per_layer",
    "nano3_latent-all",
    "nano3_bias-all",
    "granite-all",
    "granite-all_per_layer",
    "granite_tied-all",
    "granite_dense-all",
)
SIZES = [Case(name, budget, sizes) for name in BUDGETS for budget, sizes in BUDGETS[name].items()]
SIZES += [case for case in CASES if case.id in NAMES]


@pytest.fixture(autouse=True)
def _with_gradients():
    with torch.enable_grad():
        yield


def masked_gradients(name: str, wrapped, submodel, ids) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of A and B through `(W + s B A) * mask` in a stock parent, by autograd; norms corrected."""
    parent = build_parent(name)
    used = effective_weights(wrapped)
    architecture = wrapped.get_base_model().architecture
    for piece in pieces(architecture, parent.config, submodel):
        if piece.rule.buffer or piece.rule.tied:
            continue
        used[piece.rule.name] = used[piece.rule.name] * piece.rule.mask(piece.full, piece.kept)
        if piece.rule.norm:
            used[piece.rule.name] = used[piece.rule.name] * math.sqrt(
                math.prod(piece.shape) / piece.rule.count(piece.full)
            )
    model = masked_model(parent, submodel).train()
    loss = functional_call(model, used, (), {"input_ids": ids, "labels": ids, "use_cache": False}).loss
    loss.backward()
    return loss.detach(), taken_gradients(wrapped.get_base_model())


def taken_gradients(model) -> dict[str, torch.Tensor]:
    """Gradients of the adapters, which have none afterwards."""
    gradients = {
        key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in adapter_parameters(model).items()
    }
    model.zero_grad(set_to_none=True)
    return gradients


def assert_gradients(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for key, gradient in expected.items():
        torch.testing.assert_close(ours[key], gradient, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


def test_all_sizes_named_here_exist():
    assert len(SIZES) == 6 + len(NAMES)


@pytest.mark.parametrize("case", SIZES, ids=IDS)
def test_loss_and_the_gradient_of_every_factor_are_those_of_the_merged_masked_step(case, ids):
    wrapped = adapted(case.parent)
    model = wrapped.get_base_model()
    before = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
    with model.at(case.submodel):
        loss = wrapped(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    ours = taken_gradients(model)
    expected_loss, expected = masked_gradients(case.parent, wrapped, case.submodel, ids)
    torch.testing.assert_close(loss.detach(), expected_loss, **CLOSE)
    assert_gradients(ours, expected)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 0.1
    kept = {str(layer) for layer in case.submodel.layers}
    moved = {key for key, gradient in expected.items() if gradient.abs().max() > 0}
    assert {key.split("layers.")[1].split(".")[0] for key in moved} == kept
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters() if key in before)
    with wrapped.disable_adapter(), torch.no_grad():
        plain = wrapped(input_ids=ids, labels=ids, use_cache=False).loss
    assert (plain - loss).abs() > 1e-2


@pytest.mark.parametrize("name", BUDGETS)
def test_checkpointing_changes_no_gradient_and_budgets_add_up(name, ids):
    wrapped = adapted(name)
    model = wrapped.get_base_model()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for budget in [None, *BUDGETS[name]]:
            with model.at(budget):
                wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append(taken_gradients(model))
    total = {key: torch.zeros_like(gradient) for key, gradient in found[0].items()}
    for budget in [None, *BUDGETS[name]]:
        _, expected = masked_gradients(name, wrapped, model.elastic_config.resolve(budget), ids)
        total = {key: gradient + expected[key] for key, gradient in total.items()}
    for gradients in found:
        assert_gradients(gradients, total)


@pytest.mark.parametrize("name", ["nano3", "granite"])
def test_factors_lie_expert_by_expert_in_a_and_rank_by_rank_in_b(name, ids):
    """From the definition, expert by expert; the other order of B has the same shape and is wrong."""
    wrapped = adapted(name)
    model = wrapped.get_base_model()
    submodel = model.elastic_config.submodel("small")
    layer = next(i for i, part in enumerate(submodel["experts"]) if part)
    wrappers = [
        (path, module)
        for path, module in model.named_modules()
        if hasattr(module, "parameter_name") and module.num_experts > 1 and f".{layer}." in path
    ]
    assert len(wrappers) == 2
    for path, wrapper in wrappers:
        name = f"{path.replace('.base_layer', '')}.{wrapper.parameter_name}"
        piece = next(p for p in pieces(model.architecture, model.config, submodel) if p.rule.name == name)
        rank, count, scale = wrapper.r["default"], wrapper.num_experts, wrapper.scaling["default"]
        a, b = wrapper.lora_A["default"].weight.detach(), wrapper.lora_B["default"].weight.detach()
        delta = torch.stack([scale * b[:, e::count] @ a[e * rank : (e + 1) * rank] for e in range(count)])
        torch.testing.assert_close(wrapper.get_delta_weight("default").detach(), delta, rtol=1e-5, atol=1e-6)
        rule_a, rule_b = factor_rules(piece.rule, rank)
        less_a, less_b = rule_a.narrow(a, piece.full, piece.kept), rule_b.narrow(b, piece.full, piece.kept)
        kept = len(less_a) // rank
        assert kept == piece.shape[0] < count
        wanted = piece.narrow(delta)
        for right, columns in ((True, strided), (False, blocks)):
            rows = [scale * less_b[:, columns(e, kept, rank)] @ less_a[blocks(e, kept, rank)] for e in range(kept)]
            difference = (torch.stack(rows) - wanted).abs().max()
            assert difference < 1e-6 if right else difference > 0.1


def strided(expert: int, count: int, rank: int) -> slice:
    return slice(expert, None, count)


def blocks(expert: int, count: int, rank: int) -> slice:
    return slice(expert * rank, (expert + 1) * rank)


@pytest.mark.parametrize("name", BUDGETS)
def test_base_models_have_adapters_too(name, ids):
    config = ElasticConfig.from_parent(build_parent(name).config, BUDGETS[name])
    model = ElasticModel(config)
    wrapped = perturb(get_peft_model(model, targets(name, task_type="FEATURE_EXTRACTION"))).train()
    with torch.no_grad():
        plain = model(ids, use_cache=False).last_hidden_state
        with model.at("small"):
            live = model(ids, use_cache=False).last_hidden_state
        with wrapped.merge_and_unload().at("small"):
            torch.testing.assert_close(model(ids, use_cache=False).last_hidden_state, live, **CLOSE)
    assert live.shape[-1] < plain.shape[-1]


@pytest.mark.parametrize("name", BUDGETS)
def test_a_merged_family_has_the_slices_that_were_trained(name, ids, tmp_path):
    wrapped = adapted(name)
    model = wrapped.get_base_model()
    scores = {}
    for budget in [None, *BUDGETS[name]]:
        with model.at(budget), torch.no_grad():
            scores[budget] = wrapped(input_ids=ids, use_cache=False).logits
    merged = wrapped.merge_and_unload().eval()
    assert merged is model
    merged.save_pretrained(tmp_path)
    for budget, logits in scores.items():
        loaded = ElasticForCausalLM.from_pretrained(tmp_path, budget=budget)
        with torch.no_grad(), merged.at(budget):
            for other in (loaded, merged):
                torch.testing.assert_close(other(ids, use_cache=False).logits, logits, **CLOSE)


def test_copies_made_before_training_do_not_survive_merging(ids):
    """peft merges through `.data`, which no version counter sees."""
    model = elastify(build_parent("nano3"), budgets=BUDGETS["nano3"], sort=False)
    with torch.no_grad(), model.at("small"):
        before = model(ids, use_cache=False).logits
    wrapped = perturb(get_peft_model(model, targets("nano3"))).train()
    with model.at("small"), torch.no_grad():
        trained = wrapped(input_ids=ids, use_cache=False).logits
    merged = wrapped.merge_and_unload().eval()
    with torch.no_grad(), merged.at("small"):
        after = merged(ids, use_cache=False).logits
    torch.testing.assert_close(after, trained, **CLOSE)
    assert (after - before).abs().max() > 0.1


def test_dropout_is_pefts(ids):
    model = elastify(build_parent("nano3"), budgets=BUDGETS["nano3"], sort=False)
    config = LoraConfig(r=RANK, lora_dropout=0.5, target_modules=["q_proj", "in_proj"], task_type="CAUSAL_LM")
    wrapped = perturb(get_peft_model(model, config)).train()
    with torch.no_grad():
        with model.at("small"):
            dropped = [wrapped(input_ids=ids, use_cache=False).logits for _ in range(2)]
        wrapped.eval()
        with model.computing("small"):
            logits = wrapped(input_ids=ids, use_cache=False).logits
        with wrapped.merge_and_unload().at("small"):
            torch.testing.assert_close(model(ids, use_cache=False).logits, logits, **CLOSE)
    assert (dropped[0] - dropped[1]).abs().max() > 1e-2


def test_stencils_follow_the_state_of_the_adapters(ids):
    wrapped = adapted("nano3")
    model = wrapped.get_base_model()

    def logits() -> torch.Tensor:
        with torch.no_grad(), model.at("small"):
            return wrapped(input_ids=ids, use_cache=False).logits

    plain = elastify(build_parent("nano3"), budgets=BUDGETS["nano3"], sort=False).train()
    with torch.no_grad(), plain.at("small"):
        without = plain(ids, use_cache=False).logits
    changed = logits()
    assert (changed - without).abs().max() > 0.1
    with wrapped.disable_adapter():
        assert torch.equal(logits(), without)
    assert torch.equal(logits(), changed)
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(), changed, **CLOSE)
    with wrapped.disable_adapter():  # unmerges, as in peft
        torch.testing.assert_close(logits(), without, **CLOSE)
    torch.testing.assert_close(logits(), changed, **CLOSE)
    wrapped.add_adapter("second", targets("nano3"))
    perturb(wrapped, seed=8)
    wrapped.set_adapter("second")
    second = logits()
    assert (second - changed).abs().max() > 0.1
    wrapped.set_adapter("default")
    again = logits()
    wrapped.delete_adapter("second")
    assert torch.equal(logits(), again)
    wrapped.unload()
    with model.at("small"), torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, without, **CLOSE)


@pytest.mark.parametrize("name", BUDGETS)
def test_mixtures_of_an_undecided_router_are_those_of_the_merged_weights(name, ids):
    """Gradients of A and B by the chain rule from those of the merged weights."""
    found = []
    for merge in (False, True):
        wrapped = adapted(name)
        model = wrapped.get_base_model()
        deltas = effective_weights(wrapped, delta=True)
        adapters = adapter_parameters(model)
        if merge:
            wrapped.merge_and_unload().requires_grad_(True)
        config = ElasticConfig.from_parent(model.config, {}, choices=CHOICES[name])
        router = seeded_router(config)
        units = SoftUnits(model, model.architecture)
        units.install(
            router.mixture(router.sample("half", temperature=1.0, generator=torch.Generator().manual_seed(0)))
        )
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        units.uninstall()
        if merge:
            weights = dict(model.named_parameters())
            total = sum((delta * weights[key].grad).sum() for key, delta in deltas.items())
            torch.autograd.backward([total])
        found.append((loss.detach(), {key: p.grad for key, p in adapters.items()}, router))
    (loss, ours, router), (expected_loss, expected, other) = found
    torch.testing.assert_close(loss, expected_loss, **CLOSE)
    assert_gradients(ours, expected)
    for mine, theirs in zip(router.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)


def seeded_router(config: ElasticConfig) -> BudgetRouter:
    torch.manual_seed(0)
    return BudgetRouter(config, {"half": 0.5})


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "dora": (LoraConfig(target_modules=["q_proj"], use_dora=True), "DoraLinearVariant cannot follow a budget"),
    "bias": (LoraConfig(target_modules=["q_proj"], lora_bias=True), "lora_bias=True cannot follow a budget"),
    "ia3": (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "ia3.layer.Linear cannot follow a budget"),
    "saved": (LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]), "ModulesToSaveWrapper cannot follow"),
    "head": (LoraConfig(target_modules=["lm_head"]), "adapter of lm_head is not supported: .* no head"),
    "embeddings": (LoraConfig(target_modules=["embed_tokens"]), "lora.layer.Embedding cannot follow a budget"),
    "out_proj": (
        LoraConfig(target_modules=["out_proj"]),
        "adapter of .*out_proj is not supported: the stock code hands",
    ),
    "conv1d": (LoraConfig(target_modules=[], target_parameters=["conv1d.weight"]), "adapter of .*conv1d is not"),
    "all": (LoraConfig(target_modules="all-linear"), "adapter of .*out_proj is not supported"),
    "out_proj_weight": (
        LoraConfig(target_modules=[], target_parameters=["out_proj.weight"]),
        "hands this weight to kernels",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_cannot_follow_are_refused_by_name(case):
    config, message = REFUSED[case]
    model = elastify(build_parent("granite"), budgets=BUDGETS["granite"], sort=False).train()
    get_peft_model(model, config)
    with pytest.raises(ElasticConfigError, match=message):
        model.set_budget("small")
    assert model.budget == "full"
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("target", ["out_proj", "conv1d", "all-linear"])
def test_pefts_own_guard_knows_the_elastic_class_of_nemotron(target):
    model = elastify(build_parent("nano3"), budgets=BUDGETS["nano3"], sort=False)
    with pytest.raises(ValueError, match="is incompatible with Mamba-based models"):
        get_peft_model(model, LoraConfig(target_modules=target if "-" in target else [target]))


def test_evaluation_at_a_budget_asks_for_merging(ids):
    wrapped = adapted("nano3").eval()
    model = wrapped.get_base_model()
    whole = model(ids, use_cache=False).logits
    with pytest.raises(ElasticConfigError, match=r"adapters are attached.*merge_and_unload\(\)"):
        model.set_budget("small")
    assert model.budget == "full"
    assert torch.equal(model(ids, use_cache=False).logits, whole)


def test_views_bound_before_adapters_are_not_used_without_them():
    model = elastify(build_parent("nano3"), budgets=BUDGETS["nano3"], sort=False)
    with model.at("small"):
        pass
    get_peft_model(model, targets("nano3"))
    with pytest.raises(ElasticConfigError, match="adapters are attached"):
        model.set_budget("small")


def test_adapters_attached_while_a_budget_is_active_are_not_passed_by(ids):
    model = elastify(build_parent("nano3"), budgets=BUDGETS["nano3"], sort=False).train()
    model.set_budget("small")
    get_peft_model(model, targets("nano3"))
    with pytest.raises(ElasticConfigError, match="attached to .* while a budget was active"):
        model(ids, use_cache=False)
    model.set_budget(None)
    model.set_budget("small")
    model(ids, use_cache=False)


def test_a_refused_evaluation_mode_changes_nothing(ids):
    model = elastify(build_parent("nano3"), budgets=BUDGETS["nano3"], sort=False).train()
    get_peft_model(model, targets("nano3"))
    model.set_budget("small")
    before = model(ids, use_cache=False).logits
    with pytest.raises(ElasticConfigError, match=r"do not follow a budget in evaluation mode.*merge_and_unload"):
        model.eval()
    assert (model.budget, model.training) == ("small", True)
    assert torch.equal(model(ids, use_cache=False).logits, before)


def test_adapters_of_a_view_are_not_left_behind():
    """In evaluation mode the modules of a budget are not those of the parent."""
    model = elastify(build_parent("nano3"), budgets=BUDGETS["nano3"], sort=False)
    model.set_budget("small")
    get_peft_model(model, targets("nano3"))
    for leave in (lambda: model.set_budget(None), model.train):
        with pytest.raises(ElasticConfigError, match="adapters are attached"):
            leave()


def test_saving_a_family_with_adapters_attached_is_refused(tmp_path):
    model = adapted("nano3").get_base_model()
    for save in (model.save_pretrained, model.export):
        with pytest.raises(ElasticConfigError, match=r"adapters are attached.*merge_and_unload\(\)"):
            save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
