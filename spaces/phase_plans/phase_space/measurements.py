"""Measured plans, for the chart: the `plans.json` that `hf-elastic evaluate` writes (see [`hf_elastic.evaluation.plans.results_file`]).

Used are `task`, `versions`, optionally `commit`, and of every point:

| key | what |
|---|---|
| `plan` | `PhasePlan.to_dict()` |
| `thinking`, `answering` | names of the budgets |
| `max_thinking_tokens` | cap on the thinking, or null |
| `accuracy`, `n` | share of what was right, and of how many problems |
| `thinking_tokens`, `answer_tokens` | written by the submodels, mean per problem |
| `cost` | modelled: active parameters times tokens written, and a part of those read |
| `seconds` | optional, mean per problem in batches; leave it out if the machine had other things to do |
| `device`, `dtype` | what it was measured with |
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_elastic import PhasePlan

KEYS = [
    *("plan", "thinking", "answering", "max_thinking_tokens", "accuracy", "n", "thinking_tokens", "answer_tokens"),
    *("cost", "device", "dtype"),
]


@dataclass(frozen=True)
class Measurements:
    """Points of the chart, and in a few words what they are of."""

    points: list[dict[str, Any]] = field(default_factory=list)
    about: str = ""


def read_measurements(file: Path, budgets: Sequence[str]) -> Measurements:
    """The points whose budgets this model has.

    Raises:
        `ValueError`: the file is not what the module says.
        `PhasePlanError`: a plan in it is none.
    """
    results = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(results, dict) or not isinstance(results.get("points"), list):
        raise ValueError(f"{file} must be a plans.json of hf-elastic evaluate, with a list of points.")
    for i, point in enumerate(results["points"]):
        if missing := [key for key in KEYS if key not in point]:
            raise ValueError(f"{file}: point {i} lacks {', '.join(missing)}.")
        PhasePlan.from_dict(point["plan"])
    fixed = [point for point in results["points"] if point.get("escalate_to") is None]  # visitors say who answers
    points = [point for point in fixed if point["thinking"] in budgets and point["answering"] in budgets]
    kinds = sorted({(f"{p['n']} problems", p["device"], p["dtype"]) for p in points})
    versions = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
    commit = f"commit {results['commit']}" if "commit" in results else ""
    said = [_task(results.get("task", "not named"), points), *(", ".join(kind) for kind in kinds), versions, commit]
    return Measurements(points, "; ".join(part for part in said if part))


def _task(name: str, points: Sequence[dict[str, Any]]) -> str:
    """Its name, and which of its rates the accuracy is."""
    rates = [
        rate
        for rate in (points[0].get("metrics", {}) if points else {})
        if all(p["metrics"][rate] == p["accuracy"] for p in points)
    ]
    return f"task {name}" + (f", “right” is its rate “{rates[0]}”" if rates else "")
