"""`ElasticConfig` and `Submodel`: what they hold, how they travel, and what a budget means."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
from cases import BUDGETS, CASES, CONFIGS, IDS, granite, nemotron, parent_config, submodel
from nano_v3 import nano_v3
from transformers import AutoConfig, PreTrainedConfig

from hf_elastic import (
    ElasticConfig,
    ElasticConfigError,
    UnknownBudgetError,
    UnsupportedArchitectureError,
    masked_model,
)
from hf_elastic.architectures import ARCHITECTURES, get_architecture
from hf_elastic.architectures.cost import CostModel
from hf_elastic.configuration.budgets import Limit, format_bytes, format_count, parse_limit

NAMES = ["nano3", "granite"]
each_model = pytest.mark.parametrize("name", NAMES)
each_case = pytest.mark.parametrize("case", CASES, ids=IDS)


def family(name, **kwargs):
    return ElasticConfig.from_parent(CONFIGS[name](), BUDGETS[name], **kwargs)


# Travelling


@each_model
@pytest.mark.parametrize("reader", [ElasticConfig, AutoConfig])
def test_round_trip_through_a_file(name, reader, tmp_path):
    config = family(name, choices={"experts": [4], "shared_expert_ffn": [24, 20]})
    config.save_pretrained(tmp_path)
    again = reader.from_pretrained(tmp_path)
    assert type(again) is ElasticConfig
    assert again.elastic == config.elastic
    assert again.parent_config.to_dict() == config.parent_config.to_dict()
    assert again.to_diff_dict() == config.to_diff_dict()
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


@each_model
def test_round_trip_through_dicts(name):
    config = family(name)
    for fields in (config.to_dict(), config.to_diff_dict()):
        again = ElasticConfig.from_dict(copy.deepcopy(fields))
        assert again.elastic == config.elastic
        assert again.parent_config.to_dict() == config.parent_config.to_dict()
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    assert ElasticConfig(**config.to_dict()).elastic == config.elastic


@each_model
def test_a_heterogeneous_parent_travels(name, tmp_path):
    config = family(name)
    medium = config.restrict(config.submodel("medium"))
    assert medium.parent_config.is_heterogeneous
    medium.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.elastic == medium.elastic
    assert again.costs() == medium.costs()
    for i in range(again.architecture.depth(again.parent_config)):
        layer, theirs = (c.parent_config.per_layer_config[i].to_dict() for c in (again, medium))
        assert layer == theirs


@each_model
def test_what_is_written(name, tmp_path):
    family(name).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "elastic"
    assert written["parent_config"]["model_type"] == CONFIGS[name]().model_type
    assert written["elastic"].keys() == {"version", "axes", "budgets"}
    assert written["elastic"]["version"] == 1
    assert list(written["elastic"]["budgets"]["small"]) == ["active_params", "sizes", "total_params"]
    groups = {"nano3": "n_groups", "granite": "mamba_n_groups"}[name]
    assert written["elastic"]["axes"]["mamba_heads"]["policy"] == f"prefix per group of {groups}"
    assert written["elastic"]["axes"]["hidden"]["policy"] == "prefix"
    assert written["elastic"]["axes"]["layers"]["policy"] == "ranking"


def test_counts_may_be_left_out_and_are_filled_in():
    config = family("nano3")
    section = copy.deepcopy(config.elastic)
    for entry in section["budgets"].values():
        del entry["total_params"], entry["active_params"]
    del section["version"]
    assert ElasticConfig(parent_config=config.parent_config, elastic=section).elastic == config.elastic


def test_the_section_is_not_shared_with_what_it_was_made_from():
    config = family("nano3")
    section = copy.deepcopy(config.elastic)
    again = ElasticConfig(parent_config=config.parent_config, elastic=section)
    section["axes"]["hidden"]["choices"].append(1)
    section["budgets"].clear()
    assert again.elastic == config.elastic


def test_budgets_are_ordered_from_large_to_small():
    budgets = dict(reversed(BUDGETS["nano3"].items()))
    config = ElasticConfig.from_parent(CONFIGS["nano3"](), budgets)
    assert list(config.budgets) == ["large", "medium", "small"]
    assert list(config.family()) == list(config.costs()) == ["full", "large", "medium", "small"]
    counts = [entry["total_params"] for entry in config.budgets.values()]
    assert counts == sorted(counts, reverse=True)


def test_a_budget_that_is_the_whole_parent_stands_for_it():
    config = ElasticConfig.from_parent(CONFIGS["nano3"](), {"whole": {}, "small": {"hidden": 32}})
    assert list(config.family()) == ["whole", "small"]
    assert config.name_of(config.resolve(None)) == "whole"
    assert config.resolve("full") == config.resolve("whole") == config.resolve(None)


def test_dtype_comes_from_the_parent():
    assert ElasticConfig.from_parent(nemotron("M*", dtype="bfloat16"), {}).dtype == torch.bfloat16
    assert ElasticConfig.from_parent(nemotron("M*"), {}).dtype is None


def test_choices_of_the_axes():
    config = family("nano3", choices={"ffn": [32]})
    assert config.axes["hidden"]["choices"] == [48, 40, 32]
    assert config.axes["ffn"]["choices"] == [40, 32], "`small` has no layer with that axis left"
    assert config.axes["layers"]["choices"] == [8, 7, 5]
    assert sorted(config.axes["layers"]["ranking"]) == list(range(8))
    assert "attention_heads" not in config.axes


def test_a_number_of_layers_takes_them_off_the_ranking():
    ranking = [2, 0, 1, 6, 7, 5, 3, 4]
    config = ElasticConfig.from_parent(CONFIGS["nano3"](), {"small": {"layers": 4}}, layer_ranking=ranking)
    assert config.submodel("small").layers == (0, 1, 2, 6)
    assert config.axes["layers"]["ranking"] == ranking


# Budgets


@pytest.fixture(scope="module")
def config():
    return family("nano3")


@pytest.mark.parametrize("written", ["small", "SMALL", " Small "])
def test_by_name(config, written):
    assert config.resolve(written) == config.submodel("small")


@pytest.mark.parametrize("written", [None, "full", "FULL"])
def test_the_whole_parent(config, written):
    assert config.resolve(written) == config.architecture.full(config.parent_config)


@each_model
@pytest.mark.parametrize("budget", ["full", "large", "medium", "small"])
def test_by_limits(name, budget):
    """Exactly what a member needs selects it, one less the next smaller one."""
    config = family(name)
    members = list(config.family())
    cost, wanted = config.costs()[budget], config.submodel(budget)
    smaller = members[members.index(budget) + 1] if budget != members[-1] else None

    def check(exactly, less, **kwargs):
        assert config.resolve(exactly, **kwargs) == wanted
        if smaller is not None:
            assert config.resolve(less, **kwargs) == config.submodel(smaller)
        else:
            with pytest.raises(UnknownBudgetError, match=f"the smallest, '{budget}', needs"):
                config.resolve(less, **kwargs)

    total, active = cost.total_params, cost.active_params
    check(total, total - 1)
    check(float(total), total - 0.5)
    check(f"{total}", f"{total - 1}")
    check(f"{total} total", f"{total - 1} params")
    for dtype in (torch.float32, torch.bfloat16):
        size = cost.weight_bytes(dtype)
        check(f"{size / 1000}kB", f"{(size - 1) / 1000}KB", dtype=dtype)
        check(f"{size / 1024}KiB", f"{(size - 1) / 1024}kib", dtype=dtype)
    assert config.costs()[config.name_of(config.resolve(f"{active} active"))].active_params <= active


@pytest.mark.parametrize("kind", [np.int64, np.float32, np.float64])
def test_numbers_of_numpy_are_numbers(kind, config):
    assert config.resolve(kind(10**9)) == config.resolve(10**9)


def test_active_parameters_select_by_active_parameters():
    """A budget with fewer active parameters may have more in total."""
    budgets = {"sparse": {"experts_per_token": 1}, "both": {"experts_per_token": 1, "experts": 6}}
    config = ElasticConfig.from_parent(CONFIGS["nano3"](), budgets)
    costs = config.costs()
    assert costs["sparse"].total_params == costs["full"].total_params
    assert costs["sparse"].active_params < costs["full"].active_params
    assert config.name_of(config.resolve(f"{costs['sparse'].active_params} active")) in ("sparse", "both")
    assert config.name_of(config.resolve(costs["sparse"].total_params - 1)) == "both"


def test_a_name_wins_over_a_number():
    config = ElasticConfig.from_parent(
        nano_v3(), {"12b": {"hidden": 1920, "expert_ffn": 960}, "23b": {"hidden": 2016}}
    )
    for name, total in (("12b", 12_426_655_424), ("23b", 23_680_000_000)):
        assert config.budgets[name]["total_params"] == pytest.approx(total, rel=1e-3)
    assert config.resolve("12b") == config.submodel("12b"), "12.43B parameters are more than 12b, but that is its name"
    assert config.resolve("12.5B") == config.resolve(12.5e9) == config.submodel("12b")
    assert config.resolve("2.1B active") == config.submodel("12b")
    assert config.resolve("25GB", torch.bfloat16) == config.submodel("12b")
    with pytest.raises(UnknownBudgetError, match=r"fits into 12.00B parameters: the smallest, '12b', needs 12.43B"):
        config.resolve(12e9)


@each_case
def test_by_sizes(case):
    config = ElasticConfig.from_parent(parent_config(case.parent), {})
    resolved = config.resolve(case.sizes)
    assert resolved == case.submodel
    assert config.resolve(resolved.to_dict()) == resolved, "what a submodel writes is what it reads"
    assert config.resolve(resolved) == resolved


def test_a_submodel_of_another_parent_is_refused(config):
    other = submodel("nano2", {"ffn": 24})
    with pytest.raises(ElasticConfigError, match="another parent"):
        config.resolve(other)


@pytest.mark.parametrize(
    ("written", "limit"),
    [
        (5, Limit("total", 5)),
        (1.2e9, Limit("total", 1.2e9)),
        ("1.2e9", Limit("total", 1.2e9)),
        ("12.5B", Limit("total", 12.5e9)),
        ("12.5b total", Limit("total", 12.5e9)),
        ("300M active", Limit("active", 300e6)),
        ("300 m ACTIVE", Limit("active", 300e6)),
        ("3k params active", Limit("active", 3e3)),
        ("2.1B active parameters", Limit("active", 2.1e9)),
        ("1T parameters", Limit("total", 1e12)),
        ("24GB", Limit("bytes", 24e9)),
        ("22.5GiB", Limit("bytes", 22.5 * 2**30)),
        ("512 mb", Limit("bytes", 512e6)),
        ("1kb", Limit("bytes", 1e3)),
        ("0.5TB", Limit("bytes", 0.5e12)),
        ({"memory": "24GB"}, Limit("bytes", 24e9)),
        ({"memory": 24e9, "dtype": "float8_e4m3fn"}, Limit("bytes", 24e9, torch.float8_e4m3fn)),
        (
            {
                "memory": "1GiB",
                "context_length": 8,
                "batch_size": 2,
                "dtype": torch.float16,
                "cache_dtype": "bfloat16",
            },
            Limit("bytes", 2**30, torch.float16, 8, 2, torch.bfloat16),
        ),
        ("small", None),
        ("12x", None),
        ("12B idle", None),
        ("-3B", None),
        ("GB", None),
        ("", None),
    ],
)
def test_reading_limits(written, limit):
    assert parse_limit(written) == limit


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"memory": "24GB", "batchsize": 2}, r"unknown key 'batchsize'; .* Did you mean 'batch_size'\?"),
        ({"memory": "12B"}, "memory='12B' must be a number of bytes, or a text such as '24GB'"),
        ({"memory": True}, "memory=True must be"),
        ({"memory": 0}, "must be a positive number"),
        ({"memory": "24GB", "context_length": 0}, "context_length=0 must be a whole number of at least 1"),
        ({"memory": "24GB", "context_length": 1.5}, "context_length=1.5 must be"),
        ({"memory": "24GB", "context_length": 8, "batch_size": True}, "batch_size=True must be"),
        ({"memory": "24GB", "batch_size": 2}, "batch_size says how large caches are, which needs context_length too"),
        ({"memory": "24GB", "dtype": "int8"}, "dtype='int8' must be one of float32, bfloat16"),
        ({"memory": "24GB", "dtype": ["bfloat16"]}, "must be one of"),
    ],
    ids=str,
)
def test_memory_limits_that_are_none(written, message, config):
    for read in (parse_limit, config.resolve):
        with pytest.raises(ElasticConfigError, match=message):
            read(written)


@each_model
def test_by_memory_with_caches(name):
    """A long context makes room for a smaller member only; the numbers are added up from the table's counts."""
    config = family(name)
    tokens, sequences, dtype = 4000, 3, torch.bfloat16
    needs = {
        member: cost.weight_bytes(dtype)
        + sequences * (tokens * 2 * cost.kv_elements + 2 * cost.conv_elements + 4 * cost.ssm_elements)
        for member, cost in config.costs().items()
    }
    for member, value in needs.items():
        limit = {"memory": value, "context_length": tokens, "batch_size": sequences, "dtype": "bfloat16"}
        assert config.name_of(config.resolve(limit)) == member
        assert config.name_of(config.resolve({"memory": value, "dtype": "bfloat16"})) in config.family()
        wide = config.resolve({**limit, "memory": max(needs.values()), "cache_dtype": "float8_e5m2"})
        assert config.name_of(wide) == next(iter(needs))
    with pytest.raises(UnknownBudgetError, match=r"with the caches of 3 x 4000 tokens: the smallest, 'small', needs"):
        config.resolve({**limit, "memory": value - 1})


@pytest.mark.parametrize(
    ("count", "text"), [(31_577_937_344, "31.58B"), (2_500_000, "2.50M"), (1_000, "1.00k"), (999, "999"), (0, "0")]
)
def test_writing_counts(count, text):
    assert format_count(count) == text


@pytest.mark.parametrize(("count", "text"), [(24e9, "24.00 GB"), (1.5e12, "1.50 TB"), (12e3, "12.00 kB"), (5, "5 B")])
def test_writing_bytes(count, text):
    assert format_bytes(count) == text


# Submodels


@each_case
def test_what_a_submodel_says_of_itself(case):
    config = parent_config(case.parent)
    architecture = get_architecture(config.model_type)
    full, mine = architecture.full(config), case.submodel
    assert mine.nests_in(full)
    assert mine.nests_in(mine)
    assert full.nests_in(mine) == (mine == full)
    assert mine.nests_in(case.middle)
    assert case.middle.nests_in(full)
    assert set(mine.cuts(full)) <= set(case.sizes)
    assert bool(mine.cuts(full)) == bool(case.sizes)
    assert mine.is_homogeneous == (not architecture.config_for(config, mine).is_heterogeneous)
    inner = mine.within(case.middle.layers)
    assert inner.depth == len(case.middle.layers)
    assert len(inner.layers) == len(mine.layers)
    assert json.loads(json.dumps(mine.to_dict())) == mine.to_dict()


@each_case
def test_costs_of_a_restricted_config_are_the_same(case):
    """Counted from the parent or from the slice's own config: the same numbers."""
    config = ElasticConfig.from_parent(parent_config(case.parent), {})
    inner = config.restrict(case.submodel)
    assert CostModel(config.parent_config)(case.submodel) == inner.costs()["full"]


@each_model
def test_restriction_keeps_what_nests(name):
    config = family(name)
    medium = config.restrict(config.submodel("medium"))
    assert list(medium.budgets) == ["medium", "small"]
    for key in medium.budgets:
        assert medium.costs()[key] == config.costs()[key]
    assert max(medium.axes["hidden"]["choices"]) == medium.parent_config.hidden_size
    small = medium.restrict(medium.submodel("small"))
    direct = config.restrict(config.submodel("small"))
    assert small.elastic["budgets"] == direct.elastic["budgets"]
    assert small.parent_config.to_dict() == direct.parent_config.to_dict()
    assert config.restrict(config.resolve(None)).elastic == config.elastic


def test_restriction_renumbers_the_layers():
    config = family("nano3")
    medium = config.restrict(config.submodel("medium"))
    assert sorted(medium.axes["layers"]["ranking"]) == list(range(7))
    assert medium.submodel("small").layers == (0, 1, 2, 5, 6)


def test_sizes_that_follow_from_others():
    """Granite computes attention's head_dim and Mamba's width from hidden; the slice has to keep the parent's."""
    config = ElasticConfig.from_parent(granite(), {})
    stock = config.stock_config(config.resolve({"hidden": 24, "attention_heads": 2}))
    assert stock.head_dim == 8
    assert stock.mamba_expand * stock.hidden_size == stock.mamba_n_heads * stock.mamba_d_head == 192
    assert "head_dim" not in granite().to_dict()


def test_stock_config_keeps_everything_else():
    parent = nemotron("ME*-", time_step_min=0.02, routed_scaling_factor=3.5, architectures=["NemotronHForCausalLM"])
    config = ElasticConfig.from_parent(parent, {})
    stock = config.stock_config(config.resolve({"hidden": 32, "layers": [0, 2]}))
    changed = {key for key, value in stock.to_dict().items() if parent.to_dict().get(key) != value}
    assert changed == {"hidden_size", "layers_block_type"}
    assert parent.hidden_size == 48


def test_multi_token_prediction_is_left_out():
    """The stock class ignores that block when loading, so a slice must not announce it."""
    parent = nemotron("M*", num_nextn_predict_layers=1)
    config = ElasticConfig.from_parent(parent, {})
    assert config.stock_config(config.resolve(None)).num_nextn_predict_layers == 0


# Architectures


def test_registry():
    assert all(name == ARCHITECTURES[name].model_type for name in ARCHITECTURES)
    with pytest.raises(
        UnsupportedArchitectureError,
        match=rf"model_type 'nemotron'; supported: {', '.join(ARCHITECTURES)}\. Did you mean 'nemotron_h'\? CONTRIB",
    ):
        get_architecture("nemotron")


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_of_the_whole_parent(name):
    config = CONFIGS[name]()
    architecture = get_architecture(config.model_type)
    full = architecture.full(config)
    for axis in architecture.available_axes(config):
        assert full.size(axis.name) == getattr(config, axis.field)
    assert full.is_homogeneous
    assert full.cuts(full) == []


def test_axes_that_a_parent_does_not_have():
    for name in ("nano2", "granite_dense"):
        config = CONFIGS[name]()
        axes = {axis.name for axis in get_architecture(config.model_type).available_axes(config)}
        assert not axes & {"experts", "experts_per_token", "expert_ffn"}


def test_it_is_a_stock_config_class():
    assert issubclass(ElasticConfig, PreTrainedConfig)
    assert AutoConfig.for_model("elastic", parent_config=nemotron("M*"), elastic={}).budgets == {}


@pytest.mark.parametrize(
    ("budgets", "ranking", "message"),
    [
        ({"a": {"layers": 9}}, [*range(8)], r"budget 'a': layers=9 is out of range: the parent has 8, give 1\.\.8"),
        ({"a": {"layers": 0}}, [*range(8)], "budget 'a': layers=0 is out of range"),
        ({"a": {"layers": -2}}, [2, 0, 1, 3, 4, 5, 6, 7], "budget 'a': layers=-2 is out of range"),
        ({"a": {"layers": True}}, [2, 0, 1, 3, 4, 5, 6, 7], "layers=True must list the indices"),
        ({"a": {"layers": 2}}, [2, 0], r"layer_ranking=\[2, 0\] must list every layer 0\.\.7 once"),
        ({"a": {"layers": 2}}, None, "layers=2 must list the indices"),
        (None, None, "budgets=None must be a dict from name to sizes"),
        (["a"], None, r"budgets=\['a'\] must be a dict"),
        ({"a": 3}, None, "budget 'a'=3 must be a dict from axis to size"),
    ],
    ids=str,
)
def test_what_no_config_can_be_made_of(budgets, ranking, message):
    with pytest.raises(ElasticConfigError, match=message):
        ElasticConfig.from_parent(parent_config("nano3"), budgets, layer_ranking=ranking)


def test_a_parent_that_is_no_config():
    with pytest.raises(ElasticConfigError, match="must be the stock config of the parent"):
        ElasticConfig.from_parent({"model_type": "nemotron_h"}, {})


def test_an_unknown_name_is_an_error_of_ours(config):
    with pytest.raises(
        UnknownBudgetError, match=r"no budget is called 'smal'; this checkpoint has .*Did you mean 'small'"
    ):
        config.submodel("smal")


def test_masks_need_a_submodel(original):
    with pytest.raises(ElasticConfigError, match="submodel='small' must be a Submodel"):
        masked_model(original("nano2"), "small")


def test_what_is_remembered_of_a_section_is_that_section():
    """Sections that differ in a size, a type or their parent are checked anew, and nobody gets what another one holds."""
    parent = parent_config("nano3")
    first = ElasticConfig.from_parent(parent, BUDGETS["nano3"])
    kept = copy.deepcopy(first.elastic)
    first.elastic["budgets"]["small"]["sizes"]["hidden"] = 40
    again = ElasticConfig(parent_config=parent, elastic=copy.deepcopy(kept))
    assert again.elastic == kept
    wrong = copy.deepcopy(kept)
    wrong["budgets"]["small"]["sizes"]["hidden"] = 40
    with pytest.raises(ElasticConfigError, match="total_params"):
        ElasticConfig(parent_config=parent, elastic=wrong)
    for value in (True, "32", 32.0):
        wrong["budgets"]["small"]["sizes"]["hidden"] = value
        with pytest.raises(ElasticConfigError):
            ElasticConfig(parent_config=parent, elastic=wrong)
    wider = copy.deepcopy(parent)
    wider.vocab_size += 1
    with pytest.raises(ElasticConfigError, match="total_params"):
        ElasticConfig(parent_config=wider, elastic=copy.deepcopy(kept))


def test_the_text_of_a_config_is_there_while_upstream_logs_it(tmp_path):
    """It is left out only where nobody sees the log."""
    ElasticConfig.from_parent(parent_config("nano3"), BUDGETS["nano3"]).save_pretrained(tmp_path)
    logger = logging.getLogger("transformers.configuration_utils")
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    try:
        logger.setLevel(logging.INFO)
        config = ElasticConfig.from_pretrained(tmp_path)
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    assert any("medium" in text and "n_routed_experts" in text for text in texts)
    assert "medium" in repr(config)
