"""What `benchmarks/handover_training.py` measures: conversions do what they say, and one pass over solutions tells what generation writes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
STATES = {"keys": (3, 2, 5, 4), "values": (3, 2, 5, 4), "conv": (3, 6, 4), "ssm": (3, 4, 2, 5), "conv.1": (3, 2, 4)}
"""Shapes of states of three texts; no two dimensions of one that could be mistaken for each other are alike."""


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by name from their own folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def drawn(change: Any, count: int = 40) -> list[Any]:
    """Readings of which `small` keeps noise, and `large` what `change` makes of that."""
    generator, made = torch.Generator().manual_seed(0), []
    for _ in range(count):
        given = [{key: torch.randn(shape, generator=generator) for key, shape in STATES.items()}]
        states = {"large": [{key: change(key, tensor) for key, tensor in given[0].items()}]}
        made.append(SimpleNamespace(states=states, converted=lambda s, t, scale=True, given=given: given))
    return made


def test_a_state_is_rows_of_its_channels():
    from handover_conversions import of_rows, rows_of

    for key, shape in STATES.items():
        tensor = torch.arange(float(torch.tensor(shape).prod())).view(shape)
        rows = rows_of(key, tensor)
        assert torch.equal(of_rows(key, rows, tensor), tensor)
    keys, conv, ssm = (torch.randn(STATES[key]) for key in ("keys", "conv", "ssm"))
    # the second text, its fourth token, place or entry of the state
    assert torch.equal(rows_of("keys", keys)[1 * 5 + 3], keys[1, :, 3].flatten())
    assert torch.equal(rows_of("conv", conv)[1 * 4 + 3], conv[1, :, 3])
    assert torch.equal(rows_of("ssm", ssm)[1 * 5 + 3], ssm[1, :, :, 3].flatten())


def test_least_squares_finds_factors_and_matrices():
    from handover_conversions import least_squares, rows_of

    def by_head(key: str, tensor: torch.Tensor) -> torch.Tensor:
        heads = 1 if key.startswith("conv") else tensor.shape[1]
        return tensor * torch.linspace(0.5, 2.0, heads).view(-1, *[1] * (tensor.dim() - 2))

    def by_channel(key: str, tensor: torch.Tensor) -> torch.Tensor:
        along = 2 if key == "ssm" else 3 if key in ("keys", "values") else 1
        return tensor * torch.linspace(0.5, 2.0, tensor.shape[along]).view(-1, *[1] * (tensor.dim() - 1 - along))

    def mixed(key: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.roll(1, dims=1) + 2 * tensor

    for change, kinds in ((by_head, ("head", "channel", "matrix")), (by_channel, ("channel", "matrix"))):
        readings = drawn(change)
        for kind in ("head", "channel", "matrix"):
            found = least_squares(readings[:-1], "small", "large", kind)(readings[-1].converted("small", "large"))
            off = [float((found[0][key] - readings[-1].states["large"][0][key]).abs().max()) for key in STATES]
            assert (max(off) < 1e-2) == (kind in kinds)
    readings = drawn(mixed)
    made = least_squares(readings[:-1], "small", "large", "matrix")(readings[-1].converted("small", "large"))
    for key in STATES:
        torch.testing.assert_close(
            rows_of(key, made[0][key]), rows_of(key, readings[-1].states["large"][0][key]), atol=1e-2, rtol=0
        )


@pytest.mark.slow
def test_one_pass_over_solutions_tells_what_generation_writes():
    from handover_training import Readings, Study, get_task

    from hf_elastic.evaluation.plans import measure_plan
    from hf_elastic.generation import PhasePlan
    from hf_elastic.lab.book_task import BookTask
    from hf_elastic.lab.family import load_family

    model, tokenizer = load_family("book")
    study = Study(SimpleNamespace(steps=1000, problems=16), get_task("book"))
    readings = Readings(model, study.heldout(), ["full", "third", "quarter"])
    seen = set()
    for source, target in (("third", "full"), ("full", "third"), ("full", "quarter")):
        found = {"again": readings.again(source, target)}
        found["cache"] = readings.after(source, target, readings.converted(source, target))
        for way, handover in (("again", "reprefill"), ("cache", "cache")):
            plan = PhasePlan(source, target, handover=handover)
            rates = measure_plan(model, tokenizer, BookTask(count=16, seed=1), plan)["metrics"]
            assert rates["trace"] == 1.0
            assert rates["exact"] == found[way]
            seen.add(rates["exact"])
    assert len(seen) > 2


def test_the_table_says_what_the_result_file_says(tmp_path):
    import report

    def entry(name: str, *runs: float) -> dict[str, Any]:
        about = {"mean": sum(runs) / len(runs), "median": runs[0], "problems": 5, "steps": 7, "seeds": [0, 1]}
        return {"name": name, "runs": list(runs), **about}

    entries = []
    for way, least in (("plain", 0.2), ("both trained", 0.9), ("both trained, always", 0.8)):
        entries += [entry(f"book, {way}: {size} > {size}, again", 1.0, 0.5) for size in ("full", "half")]
        entries += [entry(f"book, {way}: half > full, again", 0.75), entry(f"book, {way}: half > full, cache", least)]
        entries += [entry(f"book, {way}: CPU time of a step", 0.3)]
    ways = ("again", "as is", "formula", "fitted, channel", "fitted, matrix")
    ways += tuple(f"least squares, {kind}" for kind in ("head", "channel", "matrix"))
    entries += [entry(f"book, {way}: full > half", 0.01 * i) for i, way in enumerate(ways)]
    result = {"measurements": entries, "claims": [], "machine": {}, "versions": {}, "commit": "c" * 40}
    (tmp_path / "handover_training.json").write_text(json.dumps(result), encoding="utf-8")
    lines = report.handover_training(tmp_path).splitlines()
    assert "| half | 0.750 (0.500–1.000) | 0.750 (0.500–1.000) | 0.750 (0.500–1.000) |" in lines
    assert "| half → full | 0.750 | 0.200 | 0.750 | 0.900 |" in lines
    assert "| full → half | 0.00 | 0.01 | 0.02 | 0.05 | 0.06 | 0.07 | 0.03 | 0.04 |" in lines
    assert report.handover_training(tmp_path / "nothing") == "Not measured yet.\n"
