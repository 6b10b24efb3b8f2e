"""Undecided sizes and the router that decides them, against references written from the definitions."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from cases import BUDGETS, build_parent
from routed import CHOICES, PARENTS, RANKING, config_of
from torch.nn import functional as F

from hf_elastic import ElasticConfig, ElasticConfigError, elastify
from hf_elastic.architectures.axes import Cut, TensorRule, dim
from hf_elastic.architectures.cost import CostModel
from hf_elastic.configuration.budgets import Limit
from hf_elastic.routing.router import DEAD_ZONE, BudgetRouter, Schedule
from hf_elastic.submodels.soft import Mixture, SoftUnits, keep_weights

# Products of more float32 factors than in the stencil, in another order; logits are of the order of 1 to 10.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(autouse=True)
def _with_gradients():
    with torch.enable_grad():
        yield


@pytest.fixture
def soft():
    def make(name: str):
        model = elastify(build_parent(name), budgets=BUDGETS[name], sort=False).train()
        return model, SoftUnits(model, model.architecture)

    return make


def hard_mixture(model, submodel) -> Mixture:
    """One-hot probabilities of a submodel, per layer wherever it has sizes per layer."""
    full = model.elastic_config.submodel("full")
    choices, probabilities = {}, {}
    for axis in submodel:
        if axis == "experts_per_token":
            continue
        sizes = tuple(sorted({*submodel.values(axis), *full.values(axis)}, reverse=True))
        choices[axis] = sizes
        per_layer = {None: submodel[axis]} if isinstance(submodel[axis], int) else dict(enumerate(submodel[axis]))
        for layer, size in per_layer.items():
            whole = full[axis] if layer is None else full[axis][layer]
            if whole is not None:
                picked = whole if size is None else size
                probabilities[axis, layer] = torch.tensor([float(s == picked) for s in sizes])
    kept = torch.tensor([float(layer in submodel.layers) for layer in range(submodel.depth)])
    return Mixture(choices, probabilities, kept)


@pytest.mark.parametrize(("name", "budget"), [(n, b) for n in BUDGETS for b in BUDGETS[n]])
def test_a_one_hot_mixture_is_the_submodel_loss_and_gradients(name, budget, soft, ids):
    model, units = soft(name)
    with model.at(budget):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    units.install(hard_mixture(model, model.elastic_config.submodel(budget)))
    mixed = model(ids, labels=ids, use_cache=False).loss
    mixed.backward()
    units.uninstall()
    torch.testing.assert_close(mixed, loss, **CLOSE)
    for key, parameter in model.named_parameters():
        ours = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(ours, expected.get(key, torch.zeros_like(parameter)), **CLOSE, msg=key)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_soft_weights_are_the_mixture_of_the_masks():
    """`I = sum_i pi_i I_i` (A 9), per group."""
    pi = torch.tensor([0.5, 0.3, 0.2])
    mixture = Mixture({"mamba_heads": (12, 8, 4)}, {("mamba_heads", None): pi})
    weights = mixture.weights({"mamba_heads": 12, "ffn": 40}, {"mamba_heads": 2}, 0)
    assert list(weights) == ["mamba_heads"]
    masks = torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2, [1.0] * 2 + [0.0] * 4])
    torch.testing.assert_close(weights["mamba_heads"], sum(p * m for p, m in zip(pi, masks, strict=True)))


def test_soft_norms_are_the_mixture_of_the_corrections():
    """`sum_i pi_i sqrt(k_i/N)` and `sum_i pi_i eps k_i/N`."""
    pi = torch.tensor([0.25, 0.75])
    rule = TensorRule("norm.weight", (dim(Cut("hidden")),), norm=True)
    alive = partial(rule.alive, {"hidden": 48})
    mixture = Mixture({"hidden": (48, 12)}, {("hidden", None): pi})
    share, root = (
        mixture.mean(rule.axes, {"hidden": 48}, None, of) for of in (alive, lambda sizes: math.sqrt(alive(sizes)))
    )
    assert share.item() == pytest.approx(0.25 + 0.75 * 0.25)
    assert root.item() == pytest.approx(0.25 + 0.75 * 0.5)
    assert Mixture({}, {}).mean(rule.axes, {"hidden": 48}, None, alive) == 1.0


def test_layers_are_kept_by_the_cumulative_probability():
    pi = torch.tensor([0.5, 0.3, 0.2])
    kept = keep_weights(pi, (4, 3, 1), [2, 0, 3, 1])
    torch.testing.assert_close(kept, torch.tensor([0.8, 0.5, 1.0, 0.8]))


@pytest.mark.parametrize("name", PARENTS)
def test_gradients_reach_every_network_of_the_router(name, soft, ids):
    model, units = soft(name)
    router = BudgetRouter(config_of(model, name), {"half": 0.5}, per_layer=["shared_expert_ffn"])
    probabilities = router.sample("half", temperature=1.0, generator=torch.Generator().manual_seed(0))
    units.install(router.mixture(probabilities))
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    units.uninstall()
    for network in router.networks.values():
        assert network[2].weight.grad.abs().sum() > 0
    missing = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


@pytest.mark.parametrize("quantity", ["total", "active", "bytes"])
@pytest.mark.parametrize("name", PARENTS)
def test_the_expected_cost_of_a_decided_mixture_is_the_exact_count(name, quantity, soft):
    model, _ = soft(name)
    router = BudgetRouter(config_of(model, name), {"half": 0.5})
    count = CostModel(model.config)
    for budget in BUDGETS[name]:
        submodel = model.elastic_config.submodel(budget)
        limit = Limit(quantity, 1.0)
        expected = router.expected(hard_mixture(model, submodel), limit)
        assert expected.item() == pytest.approx(limit.measure(count(submodel), torch.float32), rel=1e-6)


def test_the_expected_cost_is_the_counter_at_the_expected_sizes(original):
    """Reference: count a plain hidden x ffn model by hand at fractional sizes, and differentiate numerically."""
    model = original("nano2")
    config = ElasticConfig.from_parent(model.config, {}, choices={"ffn": [40, 20], "hidden": [48, 24]})
    router = BudgetRouter(config, {"half": 0.5})
    logits = torch.tensor([0.3, -0.2], requires_grad=True)

    def cost(values):
        pi = values.softmax(-1)
        return router.expected(
            router.mixture({("ffn", None): pi, ("hidden", None): torch.tensor([0.5, 0.5])}), Limit("total", 1)
        )

    pi = logits.detach().softmax(-1)
    ffn, hidden = float(pi @ torch.tensor([40.0, 20.0])), 36.0
    c = model.config
    inner, state = c.mamba_num_heads * c.mamba_head_dim, c.n_groups * c.ssm_state_size
    conv = inner + 2 * state
    mamba = (
        (2 * inner + 2 * state + c.mamba_num_heads) * hidden
        + conv * (c.conv_kernel + 1)
        + 3 * c.mamba_num_heads
        + inner
        + inner * hidden
    )
    attention = 2 * hidden * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
    kinds = c.layers_block_type
    expected = 2 * c.vocab_size * hidden + hidden * (len(kinds) + 1)
    expected += kinds.count("linear_attention") * mamba + kinds.count("full_attention") * attention
    expected += kinds.count("mlp") * 2 * ffn * hidden
    assert cost(logits).item() == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(cost(logits), logits)
    step = torch.tensor([0.5, 0.0])
    numeric = (cost(logits + step) - cost(logits - step)).item()
    assert gradient[0].item() == pytest.approx(numeric, rel=0.05)


def test_the_resource_loss_has_a_dead_zone_and_its_own_rule_for_the_parent(original):
    model = original("nano2")
    config = ElasticConfig.from_parent(model.config, {}, choices={"ffn": [40, 20], "hidden": [48, 24]})
    full = CostModel(model.config).full.total_params
    router = BudgetRouter(config, {"most": 0.98, "half": 0.5})
    largest = {key: F.one_hot(torch.tensor(0), 2).float() for key in (("ffn", None), ("hidden", None))}
    assert router.resource_loss("most", largest).item() == 0.0  # 2 % off, inside the 5 %
    assert router.resource_loss("half", largest).item() == pytest.approx(full / (0.5 * full) - 1)
    assert router.resource_loss("full", largest).item() == 0.0
    other = {**largest, ("ffn", None): torch.tensor([0.6, 0.4])}
    assert router.resource_loss("full", other).item() == pytest.approx(10 * (0.16 + 0.16) / 2 / 2)


def test_samples_follow_gumbel_softmax(original):
    """With many draws at the argmax, choices come as often as the softmax of the logits says."""
    config = ElasticConfig.from_parent(original("nano2").config, {}, choices={"ffn": [40, 30, 20, 10]})
    torch.manual_seed(0)
    router = BudgetRouter(config, {"half": 0.9}, std=0.5)
    generator = torch.Generator().manual_seed(1)
    wanted = router.logits("half")["ffn", None].softmax(-1)
    draws = torch.stack(
        [router.sample("half", 1.0, hard=True, generator=generator)["ffn", None].detach() for _ in range(4000)]
    )
    assert set(draws.flatten().round(decimals=5).tolist()) == {0.0, 1.0}
    # Four standard deviations of a frequency over 4000 draws.
    assert (draws.mean(0) - wanted).abs().max() < 4 * math.sqrt(0.25 / 4000)
    cold = router.sample("half", 0.05, 10.0, generator=generator)["ffn", None]
    assert cold.max() > 0.9


def test_hard_samples_have_the_soft_gradient(original):
    config = ElasticConfig.from_parent(original("nano2").config, {}, choices={"ffn": [40, 20]})
    router = BudgetRouter(config, {"half": 0.9})
    for hard in (False, True):
        router.zero_grad()
        sample = router.sample("half", 1.0, hard=hard, generator=torch.Generator().manual_seed(3))["ffn", None]
        (sample * torch.tensor([1.0, 3.0])).sum().backward()
        gradient = router.networks["ffn"][2].weight.grad
        if not hard:
            soft_gradient = gradient.clone()
    torch.testing.assert_close(gradient, soft_gradient)


@pytest.mark.parametrize("name", PARENTS)
def test_decisions_nest_and_meet_their_targets_by_the_exact_count(name, original):
    model = original(name)
    torch.manual_seed(4)
    router = BudgetRouter(config_of(model, name), {"a": 0.8, "b": 0.6, "c": 0.45}, std=0.5)
    decided = router.decide().submodels
    full = CostModel(model.config).full.total_params
    count = CostModel(model.config)
    larger = model_full = router.full
    for budget, share in (("a", 0.8), ("b", 0.6), ("c", 0.45)):
        assert abs(count(decided[budget]).total_params / (share * full) - 1) <= DEAD_ZONE
        assert decided[budget].nests_in(larger)
        larger = decided[budget]
    assert decided["a"] != model_full
    report = router.decide().report
    assert [row["budget"] for row in report] == ["a", "b", "c"]
    assert all(row["cost"] == count(decided[row["budget"]]).total_params for row in report)
    sizes = {budget: submodel.to_dict() for budget, submodel in decided.items()}
    made = ElasticConfig.from_parent(model.config, sizes, choices=CHOICES[name], layer_ranking=RANKING[name])
    assert list(made.budgets) == ["a", "b", "c"]


def test_decisions_follow_the_likeliest_choices(original):
    """Two ways to the same cost: the router's preference decides."""
    model = original("nano2")
    config = ElasticConfig.from_parent(model.config, {}, choices={"ffn": [40, 4], "mamba_heads": [12, 4]})
    router = BudgetRouter(config, {"less": 0.8})
    for preferred, other in (("ffn", "mamba_heads"), ("mamba_heads", "ffn")):
        with torch.no_grad():
            for (axis, _), network in zip(router.keys, router.networks.values(), strict=True):
                network[0].weight.fill_(1.0)
                network[2].weight.fill_(0.0)
                network[2].weight[0 if axis == preferred else 1] = 0.1
        chosen = router.decide(within=1.0).submodels["less"]
        full = router.full
        assert max(chosen.values(preferred)) == max(full.values(preferred))
        assert max(chosen.values(other)) == 4


def test_budgets_between_are_interpolated(original):
    config = ElasticConfig.from_parent(original("nano2").config, {}, choices={"ffn": [40, 20]})
    router = BudgetRouter(config, {"half": 0.9})
    mean = router.logits(torch.tensor([0.5, 0.5]))["ffn", None]
    network = router.networks["ffn"]
    torch.testing.assert_close(mean, network(torch.tensor([0.5, 0.5])))
    assert not torch.equal(mean, router.logits("half")["ffn", None])


@pytest.mark.parametrize(
    ("written", "kept", "quantity"),
    [
        (0.8, 0.8, "total"),
        ("0.8", 0.8, "total"),
        ("80%", 0.8, "total"),
        ("80% active", "{:.0f} active", "active"),
        ("0.8 active", "{:.0f} active", "active"),
    ],
)
def test_targets_may_be_shares_and_are_kept_as_older_versions_read_them(written, kept, quantity, original):
    config = ElasticConfig.from_parent(original("nano3").config, {}, choices={"expert_ffn": [16, 4], "ffn": [40, 8]})
    router = BudgetRouter(config, {"most": written})
    count = 0.8 * getattr(router.count.full, f"{quantity}_params")
    assert router.limits["most"].quantity == quantity
    assert router.limits["most"].value == pytest.approx(count, abs=1)
    assert router.describe()["targets"] == {"most": kept.format(count // 1) if isinstance(kept, str) else kept}
    assert router.rebuilt(config).limits == router.limits
    assert str(router.limits["most"]).startswith("80% of the parent, " if quantity == "total" else "62.19k active")


def test_schedules_are_linear_and_stop_at_their_ends():
    schedule = Schedule()
    assert schedule.at(0.0) == (1.0, 1.0)
    assert schedule.at(1.0) == schedule.at(7.0) == (pytest.approx(0.05), 10.0)
    assert schedule.at(0.5) == (pytest.approx(0.525), pytest.approx(5.5))


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        ({}, {}, "at least one target"),
        ({"half": 1e12}, {}, "is not below the parent's"),
        ({"half": "lots"}, {}, "must be a share of the parent"),
        ({"full": 0.5}, {}, "'full' is implied"),
        ({"Full": 0.5}, {}, "'full' is implied"),
        ({" half": 0.5}, {}, "a name must be a text without spaces around it"),
        ([0.5], {}, "must be a dict from budget to target"),
        ({"half": [0.5]}, {}, "must be a share of the parent"),
        ({"half": True}, {}, "must be a share of the parent"),
        ({"half": "100%"}, {}, "router target 'half'='100%' is not below the parent's"),
        ({"half": "150%"}, {}, "'150%' is more than the whole parent"),
        ({"half": "0%"}, {}, "must be a positive number"),
        ({"half": 1.0}, {}, "is out of reach.*A number of 1 or more counts parameters"),
        ({"half": 0.01}, {}, "is out of reach: the smallest choices of all axes need"),
        (
            {"half": {"memory": "1TB", "context_length": 9}},
            {},
            r"not below the parent's .* with the caches of 1 x 9 tokens",
        ),
        ({"half": {"memory": "1kB", "context_length": 9}}, {}, "is out of reach"),
        ({"half": {"memory": "1MB", "context": 9}}, {}, "unknown key 'context'"),
        ({"half": 0.5}, {"width": 0}, r"width=0 of the router must be a whole number in 1\.\.1048576"),
        ({"half": 0.5}, {"per_layer": ["hidden"]}, "must be an elastic axis that belongs to layers"),
        ({"half": 0.5}, {"per_layer": ["fnn"]}, "must be an elastic axis that belongs to layers"),
    ],
)
def test_bad_input(targets, options, message, original):
    config = ElasticConfig.from_parent(original("nano2").config, {}, choices={"ffn": [40, 20], "hidden": [48, 24]})
    with pytest.raises(ElasticConfigError, match=message):
        BudgetRouter(config, targets, **options)
    with pytest.raises(ElasticConfigError, match="no axis has more than one choice"):
        BudgetRouter(ElasticConfig.from_parent(original("nano2").config, {}), {"half": 0.5})
    with pytest.raises(ElasticConfigError, match="unknown budget 'third'; the router has full, half"):
        BudgetRouter(config, {"half": 0.5}).logits("third")
