"""Budgets as shares of the parent, what is said of limits that are met from afar, and how sizes print."""

from __future__ import annotations

import copy
import json
import pickle
import re
import warnings

import numpy as np
import pytest
from cases import BUDGETS, parent_config

from hf_elastic import BudgetWarning, ElasticConfig, ElasticConfigError, UnknownBudgetError
from hf_elastic.configuration.budgets import Limit, parse_limit


@pytest.fixture(scope="module")
def config() -> ElasticConfig:
    return ElasticConfig.from_parent(parent_config("nano3"), BUDGETS["nano3"])


@pytest.fixture(scope="module")
def full(config):
    return config.costs()["full"]


SHARES = [
    (0.5, "total", 0.5),
    (np.float32(0.5), "total", 0.5),
    ("0.5", "total", 0.5),
    (".5", "total", 0.5),
    ("5e-1", "total", 0.5),
    ("50%", "total", 0.5),
    (" 50 % ", "total", 0.5),
    ("12.5%", "total", 0.125),
    ("100%", "total", 1.0),
    ("50% total", "total", 0.5),
    ("50% params", "total", 0.5),
    ("50% active", "active", 0.5),
    ("50%active", "active", 0.5),
    ("50% ACTIVE parameters", "active", 0.5),
    ("0.5 active", "active", 0.5),
    ("0.5 total", "total", 0.5),
]


@pytest.mark.parametrize(("written", "quantity", "share"), SHARES, ids=lambda v: repr(v))
def test_shares_are_of_the_parent(written, quantity, share, full):
    limit = parse_limit(written, full)
    assert limit == Limit(quantity, share * getattr(full, f"{quantity}_params"), share=share)
    assert str(limit).startswith(f"{100 * share:g}% of the parent, ")
    assert str(limit.of(0)) == f"0 {'active ' if quantity == 'active' else ''}parameters"


@pytest.mark.parametrize(
    ("written", "value"),
    [(1, 1), (1.0, 1), ("1", 1), ("1.0", 1), ("1 active", 1), (1.5, 1.5), ("0.5k", 500), ("0.5B", 5e8), ("2.B", 2e9)],
    ids=repr,
)
def test_numbers_of_one_or_more_and_numbers_with_units_are_counts(written, value, full):
    limit = parse_limit(written, full)
    assert (limit.value, limit.share) == (value, None)


@pytest.mark.parametrize("share", [0.999, 0.8, 0.62, 0.5])
@pytest.mark.parametrize("quantity", ["total", "active"])
@pytest.mark.filterwarnings("ignore::hf_elastic.BudgetWarning")
def test_a_share_is_the_limit_that_it_comes_to(share, quantity, config, full):
    count = int(share * getattr(full, f"{quantity}_params"))
    found = config.resolve(f"{count} {quantity}")
    assert found == config.resolve(f"{100 * share}% {quantity}") == config.resolve(f"{share} {quantity}")
    assert quantity == "active" or found == config.resolve(share)
    assert config.resolve("100%") == config.resolve("full")


def test_a_name_wins_over_a_share():
    config = ElasticConfig.from_parent(parent_config("nano3"), {"50%": {"expert_ffn": 12}})
    assert config.resolve("50%") == config.submodel("50%")
    with pytest.raises(UnknownBudgetError, match="fits into 50% of the parent"):
        config.resolve(0.5)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (0.0, r"budget 0\.0 must be a positive number of parameters or bytes, or a share of the parent \(0\.5 or '50%'\)"),
        ("0%", "budget '0%' must be a positive number"),
        ("0", "budget '0' must be a positive number"),
        (-0.5, "budget -0.5 must be a positive number"),
        (float("nan"), "budget nan must be a positive number"),
        (10**400, "must be a positive number"),
        ("1e999", "must be a positive number"),
        ("100.1%", r"budget '100\.1%' is more than the whole parent; a share is above 0 and at most 100%"),
        ("150% active", "budget '150% active' is more than the whole parent"),
        ("-50%", r"unknown budget '-50%'; this checkpoint has .*a share of the parent \('50%'\)"),
        ("50%GB", "unknown budget '50%GB'"),
        ("50% of it", "unknown budget '50% of it'"),
        ("nan", "unknown budget 'nan'"),
        ("0.01%", r"no submodel fits into 0\.01% of the parent, \d+ parameters: the smallest, 'small', needs [\d.]+k parameters\.$"),
        (1, r"fits into 1 parameters.*A number of 1 or more counts parameters.* '1B', the whole parent '100%'"),
        (1.0, r"fits into 1 parameters.* the whole parent '100%'"),
        ("50", r"fits into 50 parameters.*billions are written '50B', a share 0\.5 or '50%'"),
        ({"memory": "50%"}, "memory='50%' must be a number of bytes"),
        ({"memory": 0.5}, "memory=0.5 must be a number of bytes"),
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_share_says_so(written, message, config):
    with pytest.raises(ElasticConfigError, match=message):
        config.resolve(written)


def test_a_share_needs_a_parent():
    with pytest.raises(ElasticConfigError, match="budget '50%' is a share, and nothing here says of what"):
        parse_limit("50%")


# Far from what was asked for


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("12B", r"budget '12B' asks for 12\.00B parameters, and the whole parent, which it gives, has [\d.]+k parameters\. Sizes of this "
         r"checkpoint: 'full' \([\d.]+k\), 'large'"),
        (12e9, "budget 12000000000.0 asks for 12.00B parameters, and the whole parent"),
        ("12B active", "asks for 12.00B active parameters, and the whole parent, which it gives, has .*k active parameters"),
        (0.5, r"budget 0\.5 asks for 50% of the parent, [\d.]+k parameters; what was found within that has [\d.]+k parameters, \d\d% of it\. "
         r"The next larger is 'medium', "),
        ("50%", "budget '50%' asks for 50% of the parent"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_limit_that_is_met_from_afar_is_said(budget, message, config):
    with pytest.warns(BudgetWarning, match=message) as caught:
        config.resolve(budget)
    assert [warning.filename for warning in caught] == [__file__], "it points at the user's line"


def test_a_next_larger_size_may_have_no_name():
    sizes = {"large": {"expert_ffn": 12}, "small": {"expert_ffn": 4}}
    config = ElasticConfig.from_parent(parent_config("nano3"), sizes, choices={"expert_ffn": [12, 8, 4]})
    section = {key: config.elastic[key] for key in ("axes", "budgets")}
    config = ElasticConfig(
        parent_config=config.parent_config, elastic={**section, "interpolated": [{"sizes": {"expert_ffn": 8}}]}
    )
    asked = config.budgets["small"]["total_params"] / 0.85
    assert asked < config.interpolated[0]["total_params"]
    with pytest.warns(BudgetWarning, match="The next larger is one without a name, "):
        config.resolve(asked)


def test_limits_that_are_met_and_amounts_of_memory_say_nothing(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, cost in config.costs().items():
            assert config.name_of(config.resolve(1.08 * cost.total_params)) == name
            assert config.name_of(config.resolve(f"{cost.active_params} active")) == name
        assert config.name_of(config.resolve("24GB")) == "full"
        config.resolve("300kB")
        config.resolve("100%")
        config.resolve("small")


# How sizes print

LINES = [
    r"  full    [\d,]+ parameters  [\d,]+ active",
    r"  large  +[\d,]+ parameters  +[\d,]+ active",
    "  medium",
    "  small ",
]


def assert_lines(text: str, lines: list[str]) -> None:
    for line, expected in zip(text.splitlines(), lines, strict=True):
        assert re.match(expected, line), line


def test_a_config_prints_its_sizes(config, full):
    head, *lines = repr(config).splitlines()
    assert head == "ElasticConfig of nemotron_h with the sizes"
    assert_lines("\n".join(lines[:4]), LINES)
    assert f"{full.total_params:,} parameters" in lines[0]
    assert f"{full.active_params:,} active" in lines[0]
    assert lines[4].startswith("ElasticConfig {"), "and the rest as ever"
    assert json.loads("\n".join(lines[4:]).removeprefix("ElasticConfig ")) == json.loads(config.to_json_string())


def test_budgets_print_as_a_table_and_are_a_dict(config):
    assert_lines(repr(config.budgets), LINES[1:])
    assert str(ElasticConfig.from_parent(config.parent_config, {}).budgets) == "{}"
    plain = {name: dict(entry) for name, entry in config.budgets.items()}
    assert config.budgets == plain
    assert json.loads(json.dumps(config.budgets)) == plain
    assert copy.deepcopy(config.budgets) == pickle.loads(pickle.dumps(config.budgets)) == plain
    again = ElasticConfig.from_dict(config.to_dict())
    assert_lines(repr(again.budgets), LINES[1:])
