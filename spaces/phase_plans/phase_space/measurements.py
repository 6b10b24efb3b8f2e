"""Measured plans, for the chart.

The file is a JSON list of objects:

| key | what |
|---|---|
| `plan` | `PhasePlan.to_dict()` |
| `thinking`, `answering` | names of the budgets |
| `max_thinking_tokens` | cap on the thinking, or null |
| `accuracy`, `n` | share of right answers, of how many problems |
| `tokens` | tokens that submodels wrote, mean per problem |
| `cost` | active parameters times those tokens, summed over phases, mean per problem |
| `seconds` | median seconds of one problem at batch size 1, or null if nobody measured it on a quiet machine |
| `device`, `dtype`, `commit` | what it was measured with |
| `model`, `task` | optional: of what |
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_elastic import PhasePlan

KEYS = (
    "plan",
    "thinking",
    "answering",
    "max_thinking_tokens",
    "accuracy",
    "n",
    "tokens",
    "cost",
    "seconds",
    "device",
    "dtype",
    "commit",
)


def read_measurements(file: Path, budgets: Sequence[str]) -> list[dict[str, Any]]:
    """The points whose budgets this model has.

    Raises:
        `ValueError`: the file is not what the module says.
    """
    points = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(points, list):
        raise ValueError(f"{file} must hold a list of measured plans.")
    for i, point in enumerate(points):
        if missing := [key for key in KEYS if key not in point]:
            raise ValueError(f"{file}: measurement {i} lacks {', '.join(missing)}.")
        PhasePlan.from_dict(point["plan"])
    return [point for point in points if point["thinking"] in budgets and point["answering"] in budgets]
