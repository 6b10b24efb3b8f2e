"""What a router decides: sizes within 5 % of every target by the exact count, nested, also per layer, and the submodels between them."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from routed import CHOICES, PARENTS, PER_LAYER, RANKING, config_of

from hf_elastic import ElasticConfig, ElasticConfigError
from hf_elastic.architectures.cost import CostModel
from hf_elastic.configuration.budgets import parse_limit
from hf_elastic.configuration.section import checked_section
from hf_elastic.routing.decisions import DEAD_ZONE, interpolate, render
from hf_elastic.routing.router import BudgetRouter

SHARES = (0.85, 0.7, 0.5)


def memory(value: float) -> dict:
    return {"memory": int(value), "context_length": 40, "batch_size": 2, "dtype": "bfloat16"}


def targets(config: ElasticConfig, quantity: str) -> dict:
    full = CostModel(config.parent_config).full
    if quantity == "total":
        return dict(zip("abc", SHARES, strict=True))
    if quantity == "active":
        return {name: f"{int(share * full.active_params)} active" for name, share in zip("abc", SHARES, strict=True)}
    whole = parse_limit(memory(1)).measure(full, torch.float32)
    return {name: memory(share * whole) for name, share in zip("abc", SHARES, strict=True)}


def routers(original, name, per_layer, quantity, seeds=3):
    config = config_of(original(name), name)
    for seed in range(seeds):
        torch.manual_seed(seed)
        yield config, BudgetRouter(config, targets(config, quantity), per_layer=per_layer, std=0.5)


def section_of(config, router, decided):
    return checked_section(config.parent_config, decided.section(config.axes, router.describe()))


@pytest.mark.parametrize("quantity", ["total", "active", "memory"])
@pytest.mark.parametrize("layers", ["homogeneous", "per layer"])
@pytest.mark.parametrize("name", PARENTS)
def test_decided_sizes_nest_and_meet_their_targets(name, layers, quantity, original):
    per_layer = PER_LAYER[name] if layers == "per layer" else ()
    different = 0
    for config, router in routers(original, name, per_layer, quantity):
        decided = router.decide()
        count, larger = CostModel(config.parent_config), router.full
        for budget, row in zip("abc", decided.report, strict=True):
            submodel = decided.submodels[budget]
            cost = router.limits[budget].measure(count(submodel), torch.float32)
            assert abs(cost / router.limits[budget].value - 1) <= DEAD_ZONE
            assert (row["budget"], row["cost"], row["met"]) == (budget, cost, True)
            assert submodel.nests_in(larger)
            assert submodel != larger
            different += not submodel.is_homogeneous
            larger = submodel
        section_of(config, router, decided)  # nested and exact, as a config.json is checked
    assert bool(different) == (layers == "per layer")


def all_combinations(router, name, larger):
    """Reference: every combination of a homogeneous router, in the order of its log-probability."""
    logits = {axis: values.log_softmax(-1) for (axis, _), values in router.logits(name).items()}
    for picks in itertools.product(*(range(len(router.choices[axis])) for axis in logits)):
        sizes = {axis: router.choices[axis][i] for axis, i in zip(logits, picks, strict=True)}
        yield float(sum(logits[axis][i] for axis, i in zip(logits, picks, strict=True))), sizes


@pytest.mark.parametrize("seed", range(4))
def test_the_likeliest_combination_that_meets_the_target_is_taken(seed, original):
    config = ElasticConfig.from_parent(
        original("nano2").config,
        {},
        choices={"hidden": [48, 40, 32, 24], "ffn": [40, 30, 20, 10], "mamba_heads": [12, 8, 4]},
    )
    torch.manual_seed(seed)
    router = BudgetRouter(config, {"half": 0.55}, std=0.5)
    chosen = router.decide()
    count, full = CostModel(config.parent_config), router.full
    likelier = []
    for log_pi, sizes in sorted(all_combinations(router, "half", full), key=lambda made: -made[0]):
        submodel = config.architecture.submodel(config.parent_config, sizes)
        if abs(count(submodel).total_params / router.limits["half"].value - 1) <= DEAD_ZONE:
            break
        likelier.append(log_pi)
    assert chosen.submodels["half"] == submodel
    (row,) = chosen.report
    assert row["changes"] == len(likelier)
    assert ("the likeliest choice of every axis meets the target" in row["why"]) == (not likelier)
    assert (f"{len(likelier)} likelier combinations were passed over" in row["why"]) == bool(likelier)


def prefer(router, key, choice, by=1.0):
    """Let every budget prefer a choice of one network."""
    axis, layer = key
    network = router.networks[axis if layer is None else f"{axis}:{layer}"]
    with torch.no_grad():
        network[0].weight.fill_(1.0 / router.width)
        network[2].weight.zero_()
        network[2].weight[router.choices[axis].index(choice)] = by


def test_a_repair_changes_the_choice_that_the_router_minds_least(original):
    """Two layers prefer their largest size, one of them hardly: with a target that one of them has to give, it is that one."""
    config = ElasticConfig.from_parent(original("nano2").config, {}, choices={"ffn": [40, 20]})
    count = CostModel(config.parent_config)
    one_cut = config.architecture.submodel(config.parent_config, {"ffn": {1: 40, 4: 20}})
    target = count(one_cut).total_params
    router = BudgetRouter(config, {"less": target}, per_layer=["ffn"])
    for strong, weak in ((1, 4), (4, 1)):
        prefer(router, ("ffn", strong), 40, by=0.9)
        prefer(router, ("ffn", weak), 40, by=0.1)
        decided = router.decide(within=0.001)
        assert decided.submodels["less"].at(strong)["ffn"] == 40
        assert decided.submodels["less"].at(weak)["ffn"] == 20
        assert decided.report[0]["cost"] == target


def test_the_report_says_why(original):
    config = ElasticConfig.from_parent(original("nano2").config, {}, choices={"ffn": [40, 20, 4], "hidden": [48, 24]})
    router = BudgetRouter(config, {"half": 0.9})
    prefer(router, ("ffn", None), 20, by=0.1)
    prefer(router, ("hidden", None), 24, by=0.3)
    decided = router.decide()
    (row,) = decided.report
    assert json.loads(json.dumps(row)) == row
    assert row["sizes"] == {"ffn": 20} or row["sizes"] == {"ffn": 4}
    assert row["target"].endswith("parameters")
    assert row["miss"] == pytest.approx(row["cost"] / row["target_value"] - 1)
    # logits 0.1 and 0 at the final logit scale of 10
    wanted = math.exp(1) / (math.exp(1) + 2) if row["sizes"]["ffn"] == 20 else 1 / (math.exp(1) + 2)
    assert row["probabilities"]["ffn"] == pytest.approx(wanted, rel=1e-5)
    assert row["probabilities"]["hidden"] == pytest.approx(1 / (1 + math.exp(3)), rel=1e-5)
    assert row["argmax_miss"] < -DEAD_ZONE
    text = render(decided.report)
    assert "budget half: target" in text
    assert "likelier combinations were passed over" in text
    assert "  ffn = " in text


def test_a_target_between_two_choices_takes_the_nearest_and_says_so(original):
    config = ElasticConfig.from_parent(original("nano2").config, {}, choices={"hidden": [48, 24]})
    router = BudgetRouter(config, {"most": 0.8})
    (row,) = router.decide().report
    assert row["sizes"] == {"hidden": 24}
    assert not row["met"]
    assert "no combination that was tried comes within 5 %" in row["why"]


def test_a_second_budget_needs_a_smaller_choice(original):
    config = ElasticConfig.from_parent(original("nano2").config, {}, choices={"ffn": [40, 20]})
    count = CostModel(config.parent_config)
    cut = count(config.architecture.submodel(config.parent_config, {"ffn": 20})).total_params
    router = BudgetRouter(config, {"a": cut, "b": cut - 100})
    with pytest.raises(ElasticConfigError, match=r"no choice for budget 'b' is smaller than the budget before it"):
        router.decide()


# Between budgets


def between_by_hand(router, outer, inner, i):
    """Reference: mix the one-hots of two neighbouring budgets by hand, take the argmax, and cut it to lie between them."""
    found = []
    for t in torch.linspace(0, 1, 257)[1:-1]:
        u = torch.zeros(len(router.names))
        u[i], u[i + 1] = 1 - t, t
        sizes = {key: router.choices[key[0]][int(values.argmax())] for key, values in router.logits(u).items()}
        found.append({axis: sizes[axis, None] for axis, _ in sizes})
    return found


@pytest.mark.parametrize("layers", ["homogeneous", "per layer"])
@pytest.mark.parametrize("name", PARENTS)
def test_interpolated_submodels_are_one_chain_with_the_budgets(name, layers, original):
    per_layer = PER_LAYER[name] if layers == "per layer" else ()
    found = 0
    for config, router in routers(original, name, per_layer, "total", seeds=4):
        decided = router.decide()
        made = ElasticConfig(
            parent_config=config.parent_config, elastic=decided.section(config.axes, router.describe())
        )
        chain = [submodel for _, submodel in made.chain()]
        for larger, smaller in itertools.pairwise(chain):
            assert smaller.nests_in(larger)
            assert smaller != larger
        assert len(chain) == 4 + len(decided.interpolated)
        assert made.between() == decided.interpolated == interpolate(router, decided.submodels)
        if layers == "homogeneous":
            assert all(submodel.is_homogeneous for submodel in chain)
            members = [router.full, *decided.submodels.values()]
            for i, (outer, inner) in enumerate(itertools.pairwise(members)):
                raw = between_by_hand(router, outer, inner, i)
                mine = [m for m in decided.interpolated if m.nests_in(outer) and inner.nests_in(m)]
                for submodel in mine:
                    for axis in router.choices:
                        sizes = [len(submodel.layers)] if axis == "layers" else submodel.values(axis)
                        ends = [
                            len(m.layers) if axis == "layers" else max(m.values(axis), default=0)
                            for m in (outer, inner)
                        ]
                        allowed = {min(ends[0], max(ends[1], choice[axis])) for choice in raw}
                        assert set(sizes) <= allowed
        found += len(decided.interpolated)
    assert found > 4


def test_depth_is_interpolated_along_the_ranking(original):
    """A router of depth alone, whose preference goes down with the budget."""
    name = "nano3"
    config = ElasticConfig.from_parent(
        original(name).config, {}, choices={"layers": CHOICES[name]["layers"]}, layer_ranking=RANKING[name]
    )
    count = CostModel(config.parent_config)
    smallest = config.architecture.submodel(config.parent_config, {"layers": sorted(RANKING[name][:5])})
    router = BudgetRouter(config, {"small": count(smallest).total_params})
    with (
        torch.no_grad()
    ):  # logits of depth k are linear in the mix t, with the k-th largest between t = 0.25 (k-1) and 0.25 k
        network = router.networks["layers"]
        network[0].weight.zero_()
        network[0].weight[0, 0] = network[0].weight[1, 1] = 1.0
        network[2].weight.zero_()
        for k, (at_full, at_small) in enumerate(((0.0, -6.0), (-1.0, -3.0), (-3.0, -1.0), (-6.0, 0.0))):
            network[2].weight[k, 0], network[2].weight[k, 1] = at_full, at_small
    decided = router.decide()
    assert decided.submodels["small"] == smallest
    assert [submodel.layers for submodel in decided.interpolated] == [
        tuple(sorted(RANKING[name][:7])),
        tuple(sorted(RANKING[name][:6])),
    ]
