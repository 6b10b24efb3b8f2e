"""The search against trying everything by hand, and what it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from test_sorting import random_scores

from hf_elastic import ElasticConfigError, UnknownBudgetError
from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.cost import CostModel
from hf_elastic.configuration.budgets import Limit
from hf_elastic.elastification.search import BudgetSearch, default_choices, round_size, sizes_from_spec

CHOICES = {"hidden": [48, 40, 32], "ffn": [40, 24, 8], "mamba_heads": [12, 8, 4], "layers": [8, 7, 6]}


def _worth(scores, config, sizes) -> float:
    """Share of the scores kept, by the definition: averaged over layers, multiplied over axes."""
    worth = 1.0
    for axis, size in sizes.items():
        if axis == "layers":
            ranking = get_architecture(config.model_type).keepable_ranking(config, scores.layer_ranking)
            errors = dict(scores.layers)
            worth *= sum(errors[layer] for layer in ranking[:size]) / sum(errors.values())
            continue
        shares = []
        values = scores.values["mamba_channels" if axis == "mamba_heads" else axis]
        for layer in values:
            v = values[layer]
            if axis == "mamba_heads":
                v = v.sum(1).sqrt().reshape(config.n_groups, -1)
            v = v.reshape(-1, v.shape[-1]) if axis == "mamba_heads" else v[None]
            keep = size // len(v)
            shares.append(sum(sum(sorted(row.tolist(), reverse=True)[:keep]) for row in v) / v.sum().item())
        worth *= sum(shares) / len(shares)
    return worth


@pytest.mark.parametrize(("quantity", "share"), [("total", 0.7), ("total", 0.5), ("active", 0.7), ("bytes", 0.6)])
def test_it_finds_what_trying_everything_finds(quantity, share, original):
    config = original("nano3").config
    architecture = get_architecture("nemotron_h")
    scores, count = random_scores(config), CostModel(config)
    ranking = architecture.keepable_ranking(config, scores.layer_ranking)
    limit = Limit(quantity, share * Limit(quantity, 1).measure(count.full, torch.bfloat16))
    best, best_worth = None, -math.inf
    for sizes in itertools.product(*CHOICES.values()):
        spec = dict(zip(CHOICES, sizes, strict=True))
        layers = sorted(ranking[: spec["layers"]])
        candidate = architecture.submodel(config, {**spec, "layers": layers})
        if (
            limit.measure(count(candidate), torch.bfloat16) <= limit.value
            and _worth(scores, config, spec) > best_worth
        ):
            best, best_worth = candidate, _worth(scores, config, spec)
    found = BudgetSearch(architecture, config, CHOICES, scores, ranking).find(limit, torch.bfloat16)
    assert found == best
    assert found != architecture.full(config)


def test_targets_nest(original):
    config = original("nano3").config
    search = BudgetSearch(get_architecture("nemotron_h"), config, CHOICES, random_scores(config))
    count = CostModel(config)
    within, last = None, math.inf
    for share in (0.9, 0.75, 0.6, 0.5):
        found = search.find(Limit("total", share * count.full.total_params), torch.float32, within)
        assert within is None or found.nests_in(within)
        assert count(found).total_params <= min(share * count.full.total_params, last)
        within, last = found, count(found).total_params


def test_sizes_that_cannot_be_built_are_skipped(original):
    """Granite's hidden has to divide Mamba's inner width: the best choice by importance is one that does."""
    config = original("granite").config
    search = BudgetSearch(
        get_architecture("granitemoehybrid"), config, {"hidden": [48, 36, 24], "mamba_heads": [24, 18, 12]}
    )
    full = CostModel(config).full.total_params
    for share in (0.95, 0.8, 0.6, 0.5):
        found = search.find(Limit("total", share * full), torch.float32)
        assert found.values("mamba_heads")[0] * 8 % found.values("hidden")[0] == 0


def test_a_larger_budget_that_differs_per_layer_stays_the_ceiling(original):
    config = original("nano3").config
    architecture = get_architecture("nemotron_h")
    ceiling = architecture.submodel(config, {"mamba_heads": {0: 8, 4: 10}, "hidden": 40})
    search = BudgetSearch(architecture, config, {"mamba_heads": [12, 10, 6], "hidden": [48, 40, 32]})
    count = CostModel(config)
    found = search.find(Limit("total", 0.97 * count(ceiling).total_params), torch.float32, ceiling)
    assert found.nests_in(ceiling)
    assert found != ceiling


def test_a_target_below_the_smallest_choice_says_what_is_needed(original):
    config = original("nano3").config
    search = BudgetSearch(get_architecture("nemotron_h"), config, {"hidden": [48, 40]})
    with pytest.raises(UnknownBudgetError, match="no choice of hidden fits into 1.00k parameters; the smallest needs"):
        search.find(Limit("total", 1000), torch.float32)


def test_too_many_combinations_are_refused_before_searching(original):
    config = original("nano3").config
    many = {axis: list(range(1, 33)) for axis in ("hidden", "ffn", "expert_ffn", "shared_expert_ffn")}
    with pytest.raises(ElasticConfigError, match="1048576 combinations of choices are too many"):
        BudgetSearch(get_architecture("nemotron_h"), config, many)


def test_shares_become_sizes_that_divide(original):
    config = original("nano3").config  # 2 Mamba groups of 6 heads, hidden 48
    architecture = get_architecture("nemotron_h")
    assert round_size(architecture, config, "hidden", 0.7, 8) == 32
    assert round_size(architecture, config, "hidden", 0.7, 1) == 34
    assert round_size(architecture, config, "mamba_heads", 0.6, 8) == 8
    assert round_size(architecture, config, "mamba_heads", 0.01, 8) == 2
    assert round_size(architecture, config, "experts_per_token", 0.5, 8) == 2
    for bad in (0.0, 1.5, -0.5):
        with pytest.raises(ElasticConfigError, match="a ratio must be in"):
            round_size(architecture, config, "hidden", bad, 8)
    assert default_choices(architecture, config, "layers", 8)[0] == 8


def test_layers_as_a_number_follow_the_ranking(original):
    config = original("nano3").config
    architecture = get_architecture("nemotron_h")
    ranking = [7, 0, 2, 1, 5, 3, 4, 6]
    assert sizes_from_spec(architecture, config, {"layers": 3}, ranking, 8) == {"layers": [0, 2, 7]}
    assert sizes_from_spec(architecture, config, {"layers": 0.5}, ranking, 8) == {"layers": [0, 1, 2, 7]}
    with pytest.raises(ElasticConfigError, match="layers=3 is a number.*list the layers to keep"):
        sizes_from_spec(architecture, config, {"layers": 3}, None, 8)
    with pytest.raises(ElasticConfigError, match="the parent has 8, give 1..8"):
        sizes_from_spec(architecture, config, {"layers": 9}, ranking, 8)


def test_the_best_attention_layer_is_always_kept(original):
    config = original("nano3").config  # ME*EM-*E
    ranking = get_architecture("nemotron_h").keepable_ranking(config, [0, 7, 6, 2, 1, 3, 4, 5])
    assert ranking == [6, 0, 7, 2, 1, 3, 4, 5]
