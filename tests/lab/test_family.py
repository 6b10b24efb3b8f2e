"""The lab's second chapter: rows, training and measuring of the family. That it learns is shown by the benchmark, not here."""

from __future__ import annotations

import importlib.util
import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_elastic import ElasticForCausalLM
from hf_elastic.architectures.cost import CostModel
from hf_elastic.cli import main
from hf_elastic.configuration.budgets import parse_limit
from hf_elastic.lab import tour
from hf_elastic.lab.book import evaluate, training_batches, training_dataset
from hf_elastic.lab.family import (
    BETWEEN,
    FAMILY,
    FAMILY_DIR,
    ROUTER_TARGETS,
    load_family,
    make_family,
    measure_family,
    train_family,
)
from hf_elastic.lab.family import main as train_command
from hf_elastic.lab.parent import load_parent


@pytest.fixture(scope="module")
def parent():
    return load_parent()


def test_rows_are_those_of_the_batches(parent):
    _, tokenizer = parent
    batch = next(training_batches(tokenizer, 3, batch_size=8))
    rows = list(itertools.islice(training_dataset(tokenizer, 3, batch_size=8), 8))
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        assert row["input_ids"] == batch["input_ids"][i, :length].tolist()
        assert row["labels"] == batch["labels"][i, :length].tolist()
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)


def test_the_family_has_the_shares_it_is_described_by(parent):
    family = make_family(*parent)
    costs = family.elastic_config.costs()
    shares = {name: cost.active_params / costs["full"].active_params for name, cost in costs.items()}
    assert shares == pytest.approx({"full": 1.0, "half": 0.53, "third": 0.35, "quarter": 0.24}, abs=0.01)
    between = family.elastic_config.resolve(BETWEEN)
    assert family.elastic_config.submodel("third").nests_in(between)
    assert between.nests_in(family.elastic_config.submodel("half"))
    assert list(FAMILY) == ["half", "third", "quarter"]


def test_the_routers_targets_are_what_the_family_costs(parent):
    costs = make_family(*parent, sort=False).elastic_config.costs()
    assert list(ROUTER_TARGETS) == list(FAMILY)
    for name, target in ROUTER_TARGETS.items():
        assert parse_limit(target).quantity == "active"
        assert parse_limit(target).value == pytest.approx(costs[name].active_params, rel=0.005)


@pytest.mark.slow
def test_a_few_steps_bring_every_budget_nearer_to_the_parent(parent, tmp_path):
    """Also that a run is repeatable: the second one ends in the same weights."""
    model, tokenizer = parent
    states = []
    for run in range(2):
        family = make_family(model, tokenizer)
        options = {"steps": 24, "per_device_train_batch_size": 8, "progress": False}
        history = train_family(family, tokenizer, tmp_path / str(run), **options)
        states.append({key: tensor.clone() for key, tensor in family.state_dict().items()})
        first, last = {}, {}
        for entry in history:
            for key in entry:
                if key.endswith("/kl"):
                    first.setdefault(key, entry[key])
                    last[key] = entry[key]
        for name in FAMILY:
            assert last[f"{name}/kl"] < 0.8 * first[f"{name}/kl"]
        assert not family.training
    assert all(torch.equal(states[1][key], tensor) for key, tensor in states[0].items())


def test_measures_are_those_of_the_slice(parent):
    model, tokenizer = parent
    family = make_family(model, tokenizer)
    entries = measure_family(family, tokenizer, {"full": None, "custom": {"expert_ffn": 24}}, count=6, size=5)
    assert [entry["name"] for entry in entries] == ["full", "custom"]
    whole = evaluate(family, tokenizer, letters=5, count=6)
    assert (entries[0]["exact"], entries[0]["code"]) == (whole.exact, whole.code)
    counted = CostModel(model.config)(family.elastic_config.resolve({"expert_ffn": 24}))
    assert entries[1]["total_params"] == counted.total_params
    assert entries[1]["sizes"]["expert_ffn"] == 24
    assert family.budget == "full"


@pytest.fixture
def export_unchecked(monkeypatch):
    """The export is not loaded in another process here, which takes seconds; `test_tour` has that."""
    monkeypatch.setattr(tour, "check_export", lambda *args: 0.0)


@pytest.mark.slow
def test_the_command_trains_saves_and_tells(export_unchecked, tmp_path, capsys):
    arguments = ["lab", "--task", "book", "--train", "--steps", "4", "--problems", "2", "--letters", "4", "--json"]
    capsys.readouterr()
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    saved = json.loads((tmp_path / "family.json").read_text())
    assert printed["family"] == saved
    assert [entry["name"] for entry in saved["trained"]] == ["full", *FAMILY, "between"]
    assert (tmp_path / "family.png").read_bytes().startswith(b"\x89PNG")
    assert printed["budgets"][0]["sizes"] == saved["trained"][0]["sizes"]
    assert main(["plan", str(tmp_path / "elastic"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in plan["budgets"]] == ["full", *FAMILY]
    trained, shipped = (
        AutoModelForCausalLM.from_pretrained(p).lm_head.weight for p in (tmp_path / "elastic", FAMILY_DIR)
    )
    assert not torch.equal(trained, shipped)  # what the lab showed was trained here


@pytest.mark.slow
def test_the_command_learns_the_sizes_and_keeps_the_router(export_unchecked, tmp_path, capsys):
    arguments = [
        "lab",
        "--task",
        "book",
        "--train",
        "--learn-sizes",
        "--steps",
        "4",
        "--problems",
        "2",
        "--letters",
        "4",
    ]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "learned.json").read_text())
    assert [entry["name"] for entry in saved["trained"]] == ["full", *ROUTER_TARGETS]
    assert saved["router_steps"] == 1
    family = ElasticForCausalLM.from_pretrained(tmp_path / "learned")
    costs = family.elastic_config.costs()
    assert family.router.names == ["full", *ROUTER_TARGETS]
    assert [row["budget"] for row in saved["report"]] == list(ROUTER_TARGETS)
    for row, entry in zip(saved["report"], saved["trained"][1:], strict=True):
        name, target = row["budget"], float(ROUTER_TARGETS[row["budget"]].partition("k")[0]) * 1e3
        assert entry["active_params"] == row["cost"] == costs[name].active_params
        assert row["miss"] == pytest.approx(costs[name].active_params / target - 1)
        line = next(line for line in printed.splitlines() if line.startswith(name) and f"{target:,.0f} active" in line)
        assert f"{entry['active_params']:,}" in line
        assert f"{row['miss']:+.1%}" in line
        assert f"{name}: {row['why']}" in printed
    assert (tmp_path / "family.json").exists()


def test_a_model_from_scratch_needs_a_family_of_its_own(tmp_path, monkeypatch, capsys):
    """The family in the package is of the model in the package: with another one the sizes are trained, too."""
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "trl" else find(name, *rest))
    assert main(["lab", "--from-scratch", "--output", str(tmp_path / "out")]) == 2
    assert "training needs trl: pip install 'hf-elastic[train]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sizes_are_learned_in_training(tmp_path, capsys):
    assert main(["lab", "--task", "book", "--learn-sizes", "--output", str(tmp_path)]) != 0
    assert "--learn-sizes needs --train" in capsys.readouterr().err


def test_the_shipped_family_does_what_its_record_says():
    """The smallest size alone, and every size's count; a family without training has 0.00 here."""
    family, tokenizer = load_family()
    record = json.loads((FAMILY_DIR / "training.json").read_text(encoding="utf-8"))
    measured = {entry["name"]: entry for entry in record["evaluation"]["budgets"]}
    assert set(measured) == {"full", *FAMILY}
    assert {name: cost.active_params for name, cost in family.elastic_config.costs().items()} == {
        name: entry["active_params"] for name, entry in measured.items()
    }
    [entry] = measure_family(family, tokenizer, {"quarter": "quarter"}, count=25)
    assert measured["quarter"]["exact"] >= 0.9
    assert entry["exact"] == pytest.approx(measured["quarter"]["exact"], abs=0.1)
    files = [file for file in FAMILY_DIR.iterdir() if file.name != "training.json"]
    assert sum(file.stat().st_size for file in files) < 1_000_000


@pytest.mark.slow
def test_the_command_that_trains_it(tmp_path):
    train_command(["--output", str(tmp_path), "--steps", "4", "--problems", "1"])
    record = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert record["steps"] == 4
    assert {entry["name"] for entry in record["evaluation"]["budgets"]} == {"full", *FAMILY}
    assert [entry["step"] for entry in record["history"] if len(entry) > 1]
    assert {file.name for file in FAMILY_DIR.iterdir()} == {file.name for file in tmp_path.iterdir()}
    assert ElasticForCausalLM.from_pretrained(tmp_path, budget="third").elastic_config.parent_config.hidden_size == 24
