"""`elastify` end to end on small parents."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from cases import CONFIGS, VOCAB
from datasets import Dataset
from transformers import AutoModelForCausalLM

from hf_elastic import (
    BudgetWarning,
    ElasticConfigError,
    Scores,
    UnknownBudgetError,
    UnsupportedArchitectureError,
    elastify,
)
from hf_elastic.architectures.cost import CostModel

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # reordered float32 sums


@pytest.fixture(scope="module")
def calibration() -> Dataset:
    generator = torch.Generator().manual_seed(2)
    return Dataset.from_dict(
        {"input_ids": [torch.randint(0, VOCAB, (9,), generator=generator).tolist() for _ in range(6)]}
    )


BUDGETS = {
    "nemotron_h": {
        "large": {"hidden": 0.84, "mamba_heads": 0.7},
        "small": {"hidden": 32, "mamba_heads": 4, "mamba_head_dim": 4, "attention_heads": 4, "layers": 3},
    },
    "granitemoehybrid": {
        "large": {"mamba_heads": 18, "shared_expert_ffn": 0.7},
        "small": {"hidden": 24, "mamba_heads": 12, "attention_heads": 2, "shared_expert_ffn": 8, "layers": 3},
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parent_stays_what_it_was_and_budgets_are_there(name, original, calibration, ids, tmp_path):
    parent = original(name)
    before = {key: tensor.clone() for key, tensor in parent.state_dict().items()}
    elastic = elastify(parent, calibration, budgets=BUDGETS[parent.config.model_type], batch_size=4, progress=False)
    assert all(torch.equal(before[key], tensor) for key, tensor in parent.state_dict().items())
    assert any(not torch.equal(before[key], tensor) for key, tensor in elastic.state_dict().items())
    torch.testing.assert_close(elastic(ids).logits, parent(ids).logits, **TOLERANCE)
    elastic.save_pretrained(tmp_path)
    for budget, entry in elastic.budgets.items():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, budget=budget)
        assert loaded.num_parameters() == entry["total_params"] < parent.num_parameters()
        with elastic.at(budget):
            assert all(torch.equal(elastic.state_dict()[key], tensor) for key, tensor in loaded.state_dict().items())
    ranking = elastic.elastic_config.axes["layers"]["ranking"]
    assert elastic.budgets["small"]["sizes"]["layers"] == sorted(ranking[:3])
    assert elastic.generation_config.to_dict() == parent.generation_config.to_dict()


def test_targets_are_met_by_the_exact_count(original, calibration):
    parent = original("nano3")
    total = parent.num_parameters()
    elastic = elastify(
        parent,
        calibration,
        axes={"hidden": None, "expert_ffn": [1.0, 0.5], "ffn": [40, 16], "layers": [8, 7]},
        budgets={"b": f"{int(0.5 * total)}", "a": 0.8 * total, "tiny": f"{int(1.6 * total) // 1000}kB"},
        depth_samples=2,
        progress=False,
    )
    counts = {name: entry["total_params"] for name, entry in elastic.budgets.items()}
    assert list(counts) == ["a", "b", "tiny"]
    assert counts["a"] <= 0.8 * total
    assert counts["b"] <= 0.5 * total
    assert elastic.elastic_config.costs()["tiny"].weight_bytes(torch.float32) <= int(1.6 * total)
    assert elastic.elastic_config.axes["expert_ffn"]["choices"] == [16, 8]
    for name, count in counts.items():
        with elastic.at(name):
            assert elastic.num_parameters() == count


def test_a_target_of_memory_counts_the_caches(original, calibration):
    def needs(cost):
        return cost.weight_bytes(torch.bfloat16) + cost.cache_bytes(500, 2)

    parent = original("nano2")
    most = int(0.8 * needs(CostModel(parent.config).full))
    target = {"memory": most, "context_length": 500, "batch_size": 2, "dtype": "bfloat16"}
    elastic = elastify(
        parent, calibration, axes=["hidden", "ffn", "mamba_heads"], budgets={"a": target}, progress=False
    )
    found, whole = elastic.elastic_config.costs()["a"], elastic.elastic_config.costs()["full"]
    assert needs(found) <= most < needs(whole)
    assert needs(found) > 0.8 * most


def test_a_target_may_be_a_share_of_the_parent(original):
    parent = original("nano3")
    axes = {"hidden": [48, 44, 40, 36, 32], "expert_ffn": [16, 12, 8, 4], "ffn": [40, 24, 16]}
    full = CostModel(parent.config).full
    for share, as_count in (
        (0.7, f"{int(0.7 * full.total_params)}"),
        ("70%", f"{int(0.7 * full.total_params)} total"),
        ("70% active", f"{int(0.7 * full.active_params)} active"),
    ):
        made, counted = (
            elastify(parent, axes=axes, budgets={"b": b}, sort=False).budgets["b"] for b in (share, as_count)
        )
        assert made == counted
        quantity = "active_params" if "active" in as_count else "total_params"
        assert 0.6 * getattr(full, quantity) < made[quantity] <= 0.7 * getattr(full, quantity)


def test_a_target_that_the_choices_only_come_near_is_said(original):
    with pytest.warns(BudgetWarning) as caught:
        elastify(original("nano2"), axes={"hidden": [48, 32]}, budgets={"most": "98%"}, sort=False)
    (warning,) = caught
    assert warning.filename == __file__
    assert re.fullmatch(
        r"budget 'most'='98%' asks for 98% of the parent, [\d.]+k parameters; what was found within that has [\d.]+k parameters, \d\d% of it\. "
        r"More choices of the axes, or more axes, come nearer\.",
        str(warning.message),
    )


def test_a_target_nests_in_sizes_given_beside_it(original, calibration):
    parent = original("nano3")
    elastic = elastify(
        parent,
        calibration,
        axes=["hidden", "ffn", "expert_ffn"],
        budgets={"wide": {"hidden": 40}, "target": 0.4 * parent.num_parameters()},
        progress=False,
    )
    assert elastic.elastic_config.submodel("target").nests_in(elastic.elastic_config.submodel("wide"))


def test_scores_are_reused(original, calibration, tmp_path):
    parent = original("nano2")
    budgets = {"small": {"ffn": 16, "hidden": 32}}
    first = elastify(parent, calibration, budgets=budgets, progress=False)
    first.importance_scores.save(tmp_path / "scores")
    again = elastify(parent, budgets=budgets, scores=tmp_path / "scores")
    assert all(torch.equal(first.state_dict()[key], tensor) for key, tensor in again.state_dict().items())
    with pytest.raises(ElasticConfigError, match="leave out calibration"):
        elastify(parent, calibration, budgets=budgets, scores=first.importance_scores)
    with pytest.raises(ElasticConfigError, match="leave out calibration"):
        elastify(parent, budgets=budgets, scores=first.importance_scores, samples=3)


def test_a_path_and_another_dtype(original, calibration, tmp_path, ids):
    original("nano2").save_pretrained(tmp_path)
    parent = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    elastic = elastify(parent, calibration, budgets={"small": {"ffn": 16}}, progress=False)
    assert elastic.dtype == elastic.elastic_config.dtype == torch.bfloat16
    assert elastify(tmp_path, calibration, budgets={"small": {"ffn": 16}}, progress=False).dtype == torch.float32


def test_multi_token_prediction_is_not_promised(original, calibration):
    """The stock class drops the MTP block when it loads; a config that still names it would describe missing weights."""
    parent = original("nano2")
    parent.config.num_nextn_predict_layers = 1
    try:
        elastic = elastify(parent, calibration, budgets={"small": {"ffn": 16}}, progress=False)
    finally:
        parent.config.num_nextn_predict_layers = 0
    assert elastic.config.num_nextn_predict_layers == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budgets": None}, ElasticConfigError, "neither budgets nor axes"),
        ({"budgets": {"a": {"ffm": 8}}}, ElasticConfigError, "unknown axis 'ffm'.*Did you mean 'ffn'"),
        (
            {"budgets": {"a": {"experts": 2}}},
            ElasticConfigError,
            "no layer of this nemotron_h parent has axis 'experts'",
        ),
        ({"budgets": {"a": {"ffn": 41}}}, ElasticConfigError, r"ffn\[1\]=41 is out of range: the parent has 40"),
        ({"budgets": {"a": {"mamba_heads": 5}}}, ElasticConfigError, "does not divide into the 2 n_groups"),
        ({"budgets": {"a": "half"}}, ElasticConfigError, "is a target: say with axes="),
        ({"budgets": {"a": "half"}, "axes": ["ffn"]}, ElasticConfigError, "must be a dict of sizes, or a target"),
        ({"budgets": {"a": "1k"}, "axes": ["ffn"]}, UnknownBudgetError, "the smallest needs"),
        ({"budgets": {"a": "20k"}, "axes": "ffn"}, ElasticConfigError, "must be a list of axes"),
        ({"budgets": {"a": {"ffn": 8}, "b": {"ffn": 16, "hidden": 8}}}, ElasticConfigError, "does not nest"),
        ({"budgets": {"a": {"ffn": 8}}, "calibration": None}, ElasticConfigError, "give calibration= or scores="),
        (
            {"budgets": {"a": {"ffn": 8}}, "scores": Scores(), "calibration": None},
            ElasticConfigError,
            "was not scored",
        ),
    ],
)
def test_bad_input(arguments, error, message, original, calibration):
    arguments = {"calibration": calibration, "progress": False, **arguments}
    if arguments["calibration"] is None:
        del arguments["progress"]
    with pytest.raises(error, match=message):
        elastify(original("nano2"), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budgets": {"a": {"ffn": 41}}}, r"ffn\[1\]=41 is out of range"),
        ({"budgets": {"a": {"mamba_heads": 5}}}, "does not divide into the 2 n_groups"),
        ({"budgets": {"a": {"layers": 6}}}, r"layers=6 is out of range: the parent has 5"),
        ({"budgets": {"a": {"ffn": 8}, "b": {"ffn": 16, "hidden": 8}}}, "does not nest"),
        ({"budgets": {"a": {"layers": 3}, " ": {"layers": 2}}}, "a name must be a text without spaces"),
        ({"budgets": {" ": "20k"}, "axes": ["ffn"]}, "a name must be a text without spaces"),
        ({"budgets": {"a": {"ffn": 0.95}}}, r"budget 'a'=\{'ffn': 0\.95\} cuts nothing.*multiples of 8.*multiple_of"),
        ({"budgets": {"a": "half"}, "axes": ["ffn"]}, "must be a dict of sizes, or a target"),
        (
            {"budgets": {"a": "1k", "b": "90 percent"}, "axes": ["ffn"]},
            "budget 'b'='90 percent' must be a dict of sizes, or a target",
        ),
        (
            {"budgets": {"a": "12B"}, "axes": ["ffn"]},
            r"budget 'a'='12B' cuts nothing: the parent has [\d.]+k parameters\. Give a target below that, such as '50%'",
        ),
        ({"budgets": {"a": "100%"}, "axes": ["ffn"]}, "budget 'a'='100%' cuts nothing"),
        ({"budgets": {"a": "100% active"}, "axes": ["ffn"]}, "cuts nothing: the parent has .* active parameters"),
        ({"budgets": {"a": "24GB"}, "axes": ["ffn"]}, r"budget 'a'='24GB' cuts nothing: the parent has .* kB"),
        ({"budgets": {"a": "120%"}, "axes": ["ffn"]}, "'120%' is more than the whole parent"),
        ({"budgets": {"a": 0.0}, "axes": ["ffn"]}, "must be a positive number"),
        (
            {"budgets": {"a": 1.0}, "axes": ["ffn"]},
            "no choice of ffn fits into 1 parameters.*Add smaller choices. A number of 1 or more counts parameters",
        ),
        ({"budgets": {"a": "0.1%"}, "axes": ["ffn"]}, r"fits into 0\.1% of the parent, .*Add smaller choices\.$"),
        ({"budgets": {"a": "1k"}, "axes": ["ffn"]}, "budget 'a': no choice of ffn fits into 1.00k parameters"),
        ({"budgets": [("a", {"ffn": 8})]}, "must be a dict from name to sizes or target"),
        ({"budgets": {}, "axes": []}, "neither budgets nor axes"),
        ({"axes": {"ffn": 8}}, r"axes\['ffn'\]=8 must be a list of sizes"),
        ({"axes": {"ffn": []}}, r"axes\['ffn'\]=\[\] must be a list of sizes"),
        ({"axes": {"ffn": ["8"]}}, r"axes\['ffn'\]=\['8'\] must be a list of sizes"),
        ({"axes": {"ffn": [True]}}, r"axes\['ffn'\]=\[True\] must be a list of sizes"),
        ({"axes": {"ffn": [64]}}, r"choices=\[64, 40\] must go down, without repeats, within 1\.\.40"),
        ({"axes": {"layers": [0]}}, r"choices=\[5, 0\] must go down"),
        ({"axes": {"mamba_heads": [5]}}, "cannot be shared among the 2 groups"),
        ({"axes": {"ffn": [0.5]}, "multiple_of": 0}, "multiple_of=0 must be a whole number"),
        ({"axes": {"ffn": [8]}, "batch_size": 0}, "batch_size=0 must be a whole number"),
        ({"axes": {"ffn": [8]}, "max_length": 0}, "max_length=0 must be a whole number"),
        ({"axes": {"ffn": [8]}, "samples": -1}, "samples=-1 must be a whole number"),
        ({"axes": {"ffn": [8]}, "depth_samples": 0}, "depth_samples=0 must be a whole number"),
        ({"axes": {"ffn": [8]}, "calibration": 5}, "calibration must be a datasets.Dataset or an iterable.*int"),
        ({"axes": {"ffn": [8]}, "calibration": "text.txt"}, "calibration must be a datasets.Dataset.*str"),
        ({"axes": {"ffn": [8]}, "calibration": ["text"]}, "rows must be dicts, not str"),
        ({"axes": {"ffn": [8]}, "calibration": [{"input_ids": []}]}, "no rows with tokens"),
        (
            {"axes": {"ffn": [8]}, "calibration": [{"input_ids": [1, 64]}]},
            "has token 64, the parent's vocabulary has 64",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_mistakes_are_found_before_the_parent_is_scored(arguments, message, original, calibration, monkeypatch):
    parent = original("nano2")

    def refuse(*args, **kwargs):
        raise AssertionError("the parent was run")

    monkeypatch.setattr(parent, "forward", refuse)
    with pytest.raises(ElasticConfigError, match=message):
        elastify(parent, **{"calibration": calibration, "progress": False, **arguments})


def test_scores_of_another_type_are_refused(original):
    with pytest.raises(ElasticConfigError, match=r"scores=\{\} must be Scores, or the path"):
        elastify(original("nano2"), budgets={"a": {"ffn": 8}}, scores={})


def test_a_number_of_layers_beside_a_list_of_them_waits_for_the_ranking(original, calibration):
    """Whether a list nests in a number of layers is known only when they are ranked."""
    options = {"progress": False, "depth_samples": 2}
    first = elastify(original("nano2"), calibration, budgets={"a": {"layers": 4}}, **options)
    kept = first.elastic_config.submodel("a").layers
    inner = next(
        list(layers)
        for layers in itertools.combinations(kept, 3)
        if 3 in layers and layers != tuple(range(3))  # the attention layer, and not the first ones
    )
    made = elastify(original("nano2"), calibration, budgets={"a": {"layers": 4}, "b": {"layers": inner}}, **options)
    assert made.budgets["b"]["sizes"]["layers"] == inner


def test_other_models_are_refused(original, calibration):
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8))
    with pytest.raises(UnsupportedArchitectureError, match="'gpt2'; supported: nemotron_h, granitemoehybrid"):
        elastify(other, calibration, budgets={"a": {"hidden": 4}})
    elastic = elastify(original("nano2"), calibration, budgets={"a": {"ffn": 8}}, progress=False)
    with pytest.raises(ElasticConfigError, match="elastic already"):
        elastify(elastic, calibration, budgets={"a": {"ffn": 8}})
