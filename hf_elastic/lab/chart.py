"""Charts of the lab, drawn from its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_BLUE, _AMBER, _GREY = "#3b5bdb", "#e8890c", "#868e96"

Line = tuple[str, str, str, Sequence[Mapping[str, Any]], str]
"""Label, colour, line style, entries with `name` and `active_params`, and which rate of theirs is drawn."""


def accuracy_chart(results: Mapping[str, Any], path: Path) -> None:
    """Accuracy of every budget against its active parameters, as PNG.

    Args:
        results: What `run_zero_shot` returned.
        path (`Path`): File to write.

    Raises:
        `ImportError`: matplotlib is not installed.
    """
    lines: list[Line] = [
        ("whole answer right", _BLUE, "o-", results["budgets"], "exact"),
        ("thinking right", _AMBER, "s--", results["budgets"], "trace"),
        ("code symbols right", _GREY, "^:", results["budgets"], "code"),
    ]
    task = results["task"]
    label = f"share of {task['problems']} held-out problems, n = {task['letters']}"
    _draw(lines, "One checkpoint, cut without training", label, path)


def family_chart(results: Mapping[str, Any], path: Path) -> None:
    """Accuracy of the trained sizes against the same sizes cut without training, as PNG.

    Args:
        results: With `trained` and `untrained`, as `measure_family` returns them, and `task`.
        path (`Path`): File to write.

    Raises:
        `ImportError`: matplotlib is not installed.
    """
    lines: list[Line] = [
        ("one training run", _BLUE, "o-", results["trained"], "exact"),
        ("cut without training", _GREY, "^:", results["untrained"], "exact"),
    ]
    task = results["task"]
    label = f"whole answers right, {task['problems']} held-out problems, n = {task['letters']}"
    _draw(lines, "One checkpoint, all sizes trained at once", label, path)


def _draw(lines: Sequence[Line], title: str, label: str, path: Path) -> None:
    """Rates against active parameters, with the name of every size above it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.2), dpi=150)
    for name, color, style, entries, rate in lines:
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
    for x, entry in zip(active, ordered, strict=True):
        axes.annotate(entry["name"], (x, 1.0), **above)
    axes.set_title(title, fontsize=11, loc="left", pad=18)
    axes.set_xlabel("active parameters (thousands)")
    axes.set_ylabel(label)
    axes.set_ylim(-0.03, 1.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center right")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
