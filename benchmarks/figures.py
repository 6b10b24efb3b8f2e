"""Charts of the docs, drawn from result files."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from result_files import RESULTS, ROOT, SIZES, WAYS, Result, by_name, load, phase_tasks

ASSETS = ROOT / "docs" / "assets"


def draw(results: Path = RESULTS, folder: Path = ASSETS) -> None:
    """All charts of the docs."""
    draw_family(results, folder / "lab_family.png")
    draw_phases(results, folder)


def draw_phases(results: Path, folder: Path) -> None:
    """Whole answers right against the time of every plan, a chart per task."""
    from hf_elastic.evaluation.pareto_chart import draw_pareto
    from hf_elastic.evaluation.plans import pareto_front

    if (result := load(results / "phases.json")) is None:
        return
    found = by_name(result)
    for task in phase_tasks(found):
        plans = [entry for name, entry in found.items() if name.startswith(f"{task}: ") and "escalate_to" in entry]
        points = [{**entry, "seconds": entry["median"]} for entry in plans]
        about = {"task": f"whole answers, {task}", "by": "seconds", "front": pareto_front(points, "seconds")}
        draw_pareto({**about, "points": points}, folder / f"phases_{task}.png")


def draw_family(results: Path, path: Path) -> None:
    """Exact answers against active parameters, a line per way."""
    from hf_elastic.lab.chart import draw_lines

    if (result := load(results / "lab_family.json")) is None:
        return
    found = by_name(result)
    lines = []
    styles = {"family": "o-", "router": "D-", "alone": "s--", "split": "^--", "scratch": "x:", "untrained": "v:"}
    for way, style in styles.items():
        entries = [
            {"name": size, "active_params": statistics.fmean(_active(found, entry, size)), "exact": entry["mean"]}
            for size in SIZES[:4]
            if (entry := found.get(f"{way}: {size}, exact"))
        ]
        if entries:
            lines.append((WAYS[way], style, entries, "exact"))
    whole = found["family: full, exact"]
    label = f"whole answers right, {whole['problems']} held-out problems, {len(whole['seeds'])} seeds"
    draw_lines(lines, "One checkpoint, all sizes in one run, against other ways", label, path)


def _active(found: Mapping[str, Any], entry: Result, size: str) -> list[int]:
    """Active parameters; those of the family for a way that has the same sizes and does not say them."""
    return entry["active_params"] if "active_params" in entry else found[f"family: {size}, exact"]["active_params"]
