"""Charts of the lab, drawn from its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.charts import new_axes, save_axes

_COLORS = ("#3b5bdb", "#e8890c", "#868e96", "#2b8a3e", "#c92a2a", "#ae3ec9")

Line = tuple[str, str, Sequence[Mapping[str, Any]], str]
"""Label, line style, entries with `name` and `active_params`, and which rate of theirs is drawn."""


def accuracy_chart(results: Mapping[str, Any], path: Path) -> None:
    """Accuracy of every budget against its active parameters, as PNG.

    Args:
        results: What `run_tour` returned.
        path (`Path`): File to write.

    Raises:
        `ImportError`: matplotlib is not installed.
    """
    lines: list[Line] = [
        ("whole answer right", "o-", results["budgets"], "exact"),
        ("thinking right", "s--", results["budgets"], "trace"),
        ("parts of answers right", "^:", results["budgets"], "code"),
        ("whole answer right, only cut", "x", [results["untrained"]], "exact"),
    ]
    task = results["task"]
    label = f"share of {task['problems']} held-out problems, {_length(task)}"
    draw_lines(lines, "One checkpoint, all sizes trained at once", label, path)


def family_chart(results: Mapping[str, Any], path: Path) -> None:
    """Accuracy of the trained sizes against the same sizes cut without training, as PNG.

    Args:
        results: With `trained` and `untrained`, as `measure_family` returns them, and `task`.
        path (`Path`): File to write.

    Raises:
        `ImportError`: matplotlib is not installed.
    """
    lines: list[Line] = [
        ("one training run", "o-", results["trained"], "exact"),
        ("cut without training", "^:", results["untrained"], "exact"),
    ]
    task = results["task"]
    label = f"whole answers right, {task['problems']} held-out problems, {_length(task)}"
    draw_lines(lines, "One checkpoint, all sizes trained at once", label, path)


def _length(task: Mapping[str, Any]) -> str:
    """`5 people`: what a record of a task says beside its name, its problems and its seed."""
    [(unit, size)] = [(key, value) for key, value in task.items() if key not in ("name", "problems", "seed")]
    return f"{size} {unit}"


def draw_lines(lines: Sequence[Line], title: str, label: str, path: Path) -> None:
    """Rates against active parameters as PNG, with the names of the first line's sizes above it.

    Raises:
        `ImportError`: matplotlib is not installed.
    """
    figure, axes = new_axes(4.2)
    for color, (name, style, entries, rate) in zip(_COLORS, lines, strict=False):
        ordered = sorted(entries, key=lambda entry: entry["active_params"])
        active = [entry["active_params"] / 1e3 for entry in ordered]
        axes.plot(active, [entry[rate] for entry in ordered], style, color=color, label=name, markersize=5)
    above: dict[str, Any] = {
        "xytext": (0, 8),
        "textcoords": "offset points",
        "ha": "center",
        "fontsize": 7.5,
        "color": "#495057",
    }
    for entry in lines[0][2]:
        axes.annotate(entry["name"], (entry["active_params"] / 1e3, 1.0), **above)
    axes.set_title(title, fontsize=11, loc="left", pad=18)
    axes.set_xlabel("active parameters (thousands)")
    axes.set_ylabel(label)
    axes.set_ylim(-0.03, 1.12)
    save_axes(figure, axes, path, "center right")
