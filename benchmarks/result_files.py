"""Result files as reports and charts read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

SIZES = ("full", "half", "third", "quarter", "between")
WAYS = {
    "family": "one run",
    "router": "one run, sizes learned",
    "alone": "alone",
    "split": "alone, tokens split",
    "scratch": "from scratch",
    "untrained": "not trained",
}
"""Columns of the family's table: names in the result file and in the table."""

Result = Mapping[str, Any]


def load(path: Path) -> Any:
    """A result file; `None` if it was not made yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def by_name(result: Result) -> dict[str, Any]:
    """Its measurements."""
    return {entry["name"]: entry for entry in result.get("measurements", ())}


def phase_tasks(found: Mapping[str, Any]) -> list[str]:
    """Tasks that phase plans were measured on."""
    return list(dict.fromkeys(name.partition(":")[0] for name, entry in found.items() if "escalate_to" in entry))
