"""The benchmark harness: what it writes, when it fails, and that the scripts run. Nothing here asserts a time."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scripts import each other by name from their own folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    return harness


@pytest.fixture
def processes(harness: Any) -> Any:
    import processes

    return processes


def options(output: Path | None = None, quick: bool = False) -> argparse.Namespace:
    return argparse.Namespace(output=output, quick=quick)


def check_schema(result: dict[str, Any]) -> None:
    assert set(result) == {"machine", "versions", "commit", "measurements", "claims"}
    assert set(result["machine"]) - {"gpu"} == {"cpu", "cores", "memory_gib", "os"}
    assert set(result["versions"]) == {"python", "torch", "transformers", "safetensors", "hf_elastic"}
    assert result["commit"] == "unknown" or len(result["commit"].removesuffix("-dirty")) == 40
    assert result["claims"]
    for measurement in result["measurements"]:
        assert {"name", "unit", "median", "runs"} <= set(measurement)
    for claim in result["claims"]:
        assert set(claim) == {"name", "value", "limit", "holds"}


def test_report_writes_the_documented_schema(harness: Any, tmp_path: Path) -> None:
    report = harness.Report("demo", [harness.Claim("ratio", 1.5), harness.Claim("moved", 0, "==")])
    report.measure("time", "s", [3.0, 1.0, 2.0], way="slice")
    assert report.settle("ratio", 1.5)
    assert report.settle("moved", 0)
    file = tmp_path / "new" / "demo.json"
    assert report.finish(options(file)) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    check_schema(result)
    assert result["measurements"] == [
        {"name": "time", "unit": "s", "median": 2.0, "runs": [3.0, 1.0, 2.0], "way": "slice"}
    ]
    assert result["claims"][0] == {"name": "ratio", "value": 1.5, "limit": 1.5, "holds": True}


def test_result_names_neither_the_machine_nor_a_path(harness: Any) -> None:
    text = json.dumps([harness.machine(), harness.versions()])
    assert os.uname().nodename not in text
    assert "/" not in harness.machine()["os"]


@pytest.mark.parametrize(
    ("comparison", "value", "holds"),
    [("<=", 1.0, True), ("<=", 1.01, False), (">=", 1.0, True), (">=", 0.9, False), ("==", 1, True), ("==", 2, False)],
)
def test_a_claim_that_does_not_hold_is_an_exit_status(
    harness: Any, tmp_path: Path, comparison: str, value: float, holds: bool
) -> None:
    report = harness.Report("demo", [harness.Claim("good", 1), harness.Claim("asked", 1.0, comparison)])
    report.settle("good", 0)
    assert report.settle("asked", value) is holds
    assert report.finish(options(tmp_path / "demo.json")) == (0 if holds else 1)
    result = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert [claim["holds"] for claim in result["claims"]] == [True, holds]


def test_claims_are_stated_before_and_settled_by_the_end(harness: Any, tmp_path: Path) -> None:
    report = harness.Report("demo", [harness.Claim("ratio", 1)])
    with pytest.raises(KeyError, match="ratio"):
        report.settle("afterthought", 1)
    with pytest.raises(RuntimeError, match="ratio"):
        report.finish(options(tmp_path / "demo.json"))
    assert not (tmp_path / "demo.json").exists()


def test_a_quick_run_leaves_the_published_results_alone(
    harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    report = harness.Report("demo", [])
    report.finish(options(quick=True))
    assert not list(tmp_path.iterdir())
    report.finish(options())
    assert [file.name for file in tmp_path.iterdir()] == ["demo.json"]


@pytest.mark.parametrize(("runs", "median"), [([5.0], 5.0), ([9.0, 1.0, 2.0], 2.0), ([4.0, 1.0, 100.0, 2.0], 3.0)])
def test_medians_are_medians(harness: Any, runs: list[float], median: float) -> None:
    assert harness.Report("demo", []).measure("time", "s", iter(runs)) == median


def test_turns_alternate(harness: Any) -> None:
    order: list[str] = []

    def action(name: str) -> Any:
        return lambda: order.append(name) or len(order)

    results = harness.in_turns({"a": action("a"), "b": action("b")}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert results == {"a": [1, 4, 5], "b": [2, 3, 6]}


ACTIONS = """
import time

def allocate(size):
    block = b"x" * size  # every page is written
    time.sleep(0.1)
    return len(block)

def fail():
    raise ValueError("on purpose")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_action(processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is gone when the action returns is in the peak; the interpreter and its libraries are not."""
    (tmp_path / "child_actions.py").write_text(ACTIONS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    import child_actions

    run = processes.in_child(child_actions.allocate, 64 << 20)
    assert run.result == 64 << 20
    assert 64 << 20 <= run.peak_anonymous_bytes < 80 << 20
    assert run.seconds >= 0.1
    with pytest.raises(RuntimeError, match="on purpose"):
        processes.in_child(child_actions.fail)


@pytest.mark.skipif(sys.platform != "linux", reason="posix_fadvise")
def test_page_cache_is_dropped(processes: Any, tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(os.urandom(8 << 20))
    try:
        processes.drop_page_cache([file])
    except RuntimeError:
        pytest.skip("the temporary folder lives in memory")
    assert processes.cached_share([file]) <= 0.02
    assert processes.cached_share([file]) <= 0.02  # looking reads nothing
    file.read_bytes()
    assert processes.cached_share([file]) > 0.9


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "script",
    [
        "loading",
        "switching",
        "training",
        "lab_family",
        "baselines",
        "handover",
        "handover_training",
        "quantization_codec",
        "quantization_activations",
        "quantization_accuracy",
    ],
)
def test_scripts_run(script: str, tmp_path: Path) -> None:
    """The exit status may be 1: small sizes on a busy machine need not keep every claim about time, and read buffers of fixed size count for
    much of the memory of a small slice."""
    output = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--quick", "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(output.read_text(encoding="utf-8"))
    check_schema(result)
    assert done.returncode == (0 if all(claim["holds"] for claim in result["claims"]) else 1)
    if script == "switching":
        exact = [claim for claim in result["claims"] if "time" not in claim["name"]]
        assert exact
        assert all(claim["holds"] for claim in exact)


def test_tables_say_what_the_result_files_say(harness: Any, tmp_path: Path) -> None:
    """Means and ranges over seeds, shares of the parent's active parameters, and a column only where there is a measurement."""
    import report

    def entry(name: str, runs: list[float], active: int) -> dict[str, Any]:
        about = {"active_params": [active] * 2, "seeds": [0, 1], "steps": 10, "problems": 5}
        sizes = {"hidden": active, "expert_ffn": 2, "shared_expert_ffn": 3, "mamba_heads": 4}
        return {"name": f"{name}, exact", "runs": runs, "mean": sum(runs) / 2, "sizes": [sizes] * 2, **about}

    active = {"full": 100, "half": 50, "third": 35, "quarter": 20, "between": 40}
    entries = [entry(f"family: {size}", [0.5, 1.0], count) for size, count in active.items()]
    entries += [entry(f"router: {size}", [0.25, 0.25], active[size]) for size in ("half", "third", "quarter")]
    entries += [entry("split: half", [0.0, 0.5], 50)]
    result = {
        "measurements": entries,
        "claims": [],
        "machine": {"cpu": "x"},
        "versions": {"torch": "1"},
        "commit": "c" * 40,
    }
    (tmp_path / "lab_family.json").write_text(json.dumps(result), encoding="utf-8")
    lines = report.family(tmp_path).splitlines()
    assert lines[0].startswith("| size (active) | one run | one run, sizes learned | alone | alone, tokens split |")
    assert lines[3] == "| half (50%) | 0.75 (0.50–1.00) | 0.25 |  | 0.25 (0.00–0.50) |  |  |"
    assert lines[6] == "| between (40%) | 0.75 (0.50–1.00) |  |  |  |  |  |"
    assert "third hidden 35, expert_ffn 2, shared_expert_ffn 3, mamba_heads 4" in report.family(tmp_path)
    assert report.family(tmp_path / "nothing") == "Not measured yet.\n"


def _outcome(tokens: int = 10, **when: dict[str, tuple[int, float, float]]) -> dict[str, Any]:
    """What a way of `baselines.py` gives: per moment and size its active parameters, exact answers and divergence."""

    def entry(name: str, active: int, exact: float, kl: float) -> dict[str, Any]:
        cost = {"active_params": active, "total_params": 2 * active, "sizes": {"hidden": active}}
        return {"name": name, "exact": exact, "trace": 1.0, "code": 1.0, "kl": kl, **cost}

    return {"tokens": tokens, **{key: [entry(n, *v) for n, v in sizes.items()] for key, sizes in when.items()}}


def test_baselines_compare_what_was_run_with_the_same_seed(
    harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of `alone` has a seed that `one-run` has not, and `depth` has no quarter: neither is compared, and all that is missing is said."""
    import baseline_ways
    import baselines
    import report

    def one(exact: float) -> dict[str, Any]:
        sizes = {"full": (100, 1.0, 0.0), "half": (50, exact, 0.1), "quarter": (25, 0.5, 0.2)}
        return _outcome(trained=sizes)

    kept = {
        ("one-run", 0): one(0.8),
        ("one-run", 1): one(1.0),
        ("random", 0): _outcome(trained={"half": (50, 0.5, 0.4)}),
        ("one-shot", 2): _outcome(importance={"half": (50, 0.125, 1.5)}, random={"half": (50, 0.0, 3.0)}),
        ("alone", 1): _outcome(trained={"half": (50, 0.25, 0.5), "quarter": (25, 0.0, 1.0)}),
        ("alone", 2): _outcome(trained={"half": (50, 1.0, 0.5)}),
        ("depth", 0): _outcome(trained={"full": (100, 1.0, 0.0), "half": (56, 0.125, 0.75)}),
    }

    class Kept(baseline_ways.Bench):
        def is_kept(self, way: str, seed: int) -> bool:
            return (way, seed) in kept

        def run(self, way: str, seed: int) -> Any:
            return kept[way, seed]

    monkeypatch.setattr(baselines, "Bench", Kept)
    file = tmp_path / "baselines_book.json"
    assert baselines.main(["--kept", "--runs", str(tmp_path / "runs"), "--output", str(file)]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    check_schema(result)
    values = {claim["name"]: claim["value"] for claim in result["claims"]}
    assert values == pytest.approx(
        {
            "one run - alone: half, exact": 0.75,  # seed 1 alone
            "one run - alone: quarter, exact": 0.5,
            "one run - depth: half, exact": 0.675,  # seed 0
            "mean divergence without training, sorted by importance / random": 0.5,
            "mean divergence after training, sorted by importance / random": 0.25,
        }
    )
    text = report.baselines(tmp_path)
    lines = text.splitlines()
    assert lines[0] == "|  | full (100%) | half (50%) | quarter (25%) | seeds |"
    assert "| one run for all sizes | 1.00 · 0.000 | 0.90 (0.80–1.00) · 0.100 | 0.50 · 0.200 | 2 |" in lines
    assert "| one run, layers dropped | 1.00 · 0.000 | 0.12 · 0.750 (56%) |  | 1 |" in lines
    assert "| half |  | 0.00 · 3.000 | 0.12 · 1.500 | 0.90 (0.80–1.00) · 0.100 |" in lines
    assert "seed 0 of each size alone" in text
    assert "seeds 0, 1, 2 of prune and distil size after size" in text
    assert report.baselines(tmp_path / "nothing") == "Not measured yet.\n"


@pytest.mark.slow
def test_sizes_pruned_one_after_another_are_those_of_the_family(harness: Any) -> None:
    """Every step of the chain is cut from the one before, yet has the size that was asked for; the parent that taught it is as it was."""
    import baseline_ways
    import torch
    from lab_runs import Runs

    from hf_elastic.lab.tasks import get_task

    task = get_task("book")
    bench = baseline_ways.Bench(Runs(options(quick=True)), task, quick=True)
    before = {name: tensor.clone() for name, tensor in bench.parent.state_dict().items()}
    with torch.enable_grad():
        outcome = baseline_ways.sequential(bench, 0)
    wanted = {
        name: bench.count(bench.cut(bench.parent, {name: sizes}, 0).elastic_config.resolve(name))
        for name, sizes in task.sizes.items()
    }
    assert {entry["name"]: entry["total_params"] for entry in outcome["trained"]} == {
        name: cost.total_params for name, cost in wanted.items()
    }
    assert all(torch.equal(before[name], tensor) for name, tensor in bench.parent.state_dict().items())
    assert all(parameter.requires_grad for parameter in bench.parent.parameters())
    shuffled = baseline_ways.in_random_order(bench, 0, task.sizes)
    whole, half = (entry["kl"] for entry in bench.measure(shuffled, {"full": None, "half": "half"}))
    sorted_half = bench.measure(bench.cut(bench.parent, task.sizes, 0), {"half": "half"})[0]["kl"]
    assert whole < 1e-5
    assert abs(half - sorted_half) > 0.01  # other channels are kept


def test_only_the_text_between_markers_changes(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import report

    monkeypatch.setattr(report, "_BLOCKS", {"family": lambda results: "new\n"})
    text = "a\n<!-- family:begin -->\nold\n<!-- family:end -->\nb <!-- bytes:begin -->\nkept\n<!-- bytes:end -->\n"
    assert report.written(text) == text.replace("old", "new")


def test_plans_are_chosen_on_other_problems_than_they_are_reported_on(
    harness: Any, capsys: pytest.CaptureFixture
) -> None:
    """The gain is that of the plan that validation problems prefer, on held-out ones, where another plan happens to be better."""
    import phases

    def plan(label: str, who: str, seconds: float, validation: float, accuracy: float) -> dict[str, Any]:
        thinking, answering, *larger = who.split()
        rates = {"validation": validation, "accuracy": accuracy, "seconds": seconds}
        return {"label": label, "thinking": thinking, "answering": answering, "escalate_to": "".join(larger), **rates}

    points = [
        plan("small", "s s", 1.0, 0.40, 0.38),
        plan("large", "l l", 3.0, 0.90, 0.91),
        plan("two", "s l", 2.0, 0.80, 0.70),
        plan("other two", "l s", 2.5, 0.70, 0.90),
        plan("chosen", "s s l", 1.5, 0.90, 0.905),
    ]
    report = harness.Report("demo", [harness.Claim(phases.GOAL.format("t"), 1.0, ">=")])
    phases.goal(report, "t", points)
    found = {entry["name"]: entry for entry in report.measurements}
    two = found["t: two sizes: more answers right at no more time"]
    assert (two["plan"], two["median"]) == ("two", pytest.approx(0.70 - 0.38))
    assert two["validation"] == pytest.approx(0.80 - 0.40)
    saved = found["t: per prompt: time of one size / time, as often right"]
    assert (saved["plan"], saved["one_size"], saved["median"]) == ("chosen", "large", 2.0)
    assert saved["holds"]  # 0.005 less is none
    assert found["t: two sizes: time of one size / time, as often right"]["plan"] == "two"  # half as fast as `small`
    assert report.values[phases.GOAL.format("t")] == pytest.approx(max((0.905 - 0.38) / 0.1, 2.0 / 1.5))
    assert phases.auroc([0.9, 0.5, 0.5, 0.1], [True, True, False, False]) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
