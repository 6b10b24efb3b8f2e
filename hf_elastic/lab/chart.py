"""Charts of the lab, drawn from its results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BLUE, _AMBER, _GREY = "#3b5bdb", "#e8890c", "#868e96"


def family_chart(results: Mapping[str, Any], path: Path) -> None:
    """Accuracy of the trained sizes against the same sizes cut without training, as PNG.

    Args:
        results: With `trained` and `untrained`, as `measure_family` returns them, and `task`.
        path (`Path`): File to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.2), dpi=150)
    for key, label, color, style in (
        ("trained", "one training run", _BLUE, "o-"),
        ("untrained", "cut without training", _GREY, "^:"),
    ):
        entries = sorted(results[key], key=lambda entry: entry["active_params"])
        active = [entry["active_params"] / 1e3 for entry in entries]
        axes.plot(active, [entry["exact"] for entry in entries], style, color=color, label=label, markersize=5)
    for x, entry in zip(active, entries, strict=True):
        axes.annotate(
            entry["name"],
            (x, 1.0),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
            color="#495057",
        )
    task = results["task"]
    axes.set_title("One checkpoint, all sizes trained at once", fontsize=11, loc="left", pad=18)
    axes.set_xlabel("active parameters (thousands)")
    axes.set_ylabel(f"whole answers right, {task['problems']} held-out problems, n = {task['letters']}")
    axes.set_ylim(-0.03, 1.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center right")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def accuracy_chart(results: Mapping[str, Any], path: Path) -> None:
    """Accuracy of every budget against its active parameters, as PNG.

    Args:
        results: What `run_zero_shot` returned.
        path (`Path`): File to write.

    Raises:
        `ImportError`: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    budgets = sorted(results["budgets"], key=lambda entry: entry["active_params"])
    active = [entry["active_params"] / 1e3 for entry in budgets]
    figure, axes = plt.subplots(figsize=(7.2, 4.2), dpi=150)
    for key, label, color, style in (
        ("exact", "whole answer right", _BLUE, "o-"),
        ("trace", "thinking right", _AMBER, "s--"),
        ("code", "code symbols right", _GREY, "^:"),
    ):
        axes.plot(active, [entry[key] for entry in budgets], style, color=color, label=label, markersize=5)
    for x, entry in zip(active, budgets, strict=True):
        axes.annotate(
            entry["name"],
            (x, 1.0),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
            color="#495057",
        )
    task = results["task"]
    axes.set_title("One checkpoint, cut without training", fontsize=11, loc="left", pad=18)
    axes.set_xlabel("active parameters (thousands)")
    axes.set_ylabel(f"share of {task['problems']} held-out problems, n = {task['letters']}")
    axes.set_ylim(-0.03, 1.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center right")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
