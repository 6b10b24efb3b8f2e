"""Accuracy of phase plans against their price, drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .charts import new_axes, save_axes

_AXES = {
    "cost": "modelled cost per problem, in tokens of the largest size",
    "seconds": "{timed} seconds per problem",
}


def draw_pareto(results: Mapping[str, Any], path: Path, *, largest: float = 1.0, timed: str = "measured") -> None:
    """Plans of one submodel, of two, and those chosen per prompt as points, and the front through the best, as PNG.

    Args:
        results (`dict[str, Any]`): As [`hf_elastic.evaluation.plans.results_file`] makes it.
        path (`Path`): File to write.
        largest (`float`, *optional*): Active parameters of the largest size, by which costs are divided.
        timed (`str`, *optional*, defaults to `"measured"`): How seconds came about.

    Raises:
        `ImportError`: matplotlib is not installed.
    """
    points, by = results["points"], results["by"]
    scale = 1 / largest if by == "cost" else 1.0
    figure, axes = new_axes(4.4)
    kinds = {"one size": ("s", "#868e96"), "two sizes": ("o", "#3b5bdb"), "chosen per prompt": ("^", "#2b8a3e")}
    for label, (marker, color) in kinds.items():
        chosen = [p for p in points if _kind(p) == label]
        if not chosen and label == "chosen per prompt":
            continue
        axes.scatter(
            [p[by] * scale for p in chosen],
            [p["accuracy"] for p in chosen],
            s=26,
            c=color,
            marker=marker,
            label=label,
            alpha=0.75,
        )
    front = [points[i] for i in results["front"]]
    axes.plot(
        [p[by] * scale for p in front],
        [p["accuracy"] for p in front],
        "-",
        color="#c92a2a",
        lw=1,
        zorder=0,
        label="best",
    )
    labelled: list[tuple[float, float]] = []
    for p in front:
        cap = p["max_thinking_tokens"]
        name = p["thinking"] if _kind(p) == "one size" else f"{p['thinking']}→{p['answering']}"
        if p.get("escalate_to") is not None:
            name += f" <{p['confidence']:g}→{p['escalate_to']}"
        at = (p[by] * scale, p["accuracy"])
        x, y = axes.transData.transform(at)
        if any(abs(x - left) < 110 and abs(y - low) < 18 for left, low in labelled):
            continue  # it would lie on the one before
        labelled.append((x, y))
        text = name if cap is None else f"{name} {cap}"
        axes.annotate(text, at, xytext=(4, -10), textcoords="offset points", fontsize=6.5, color="#495057")
    axes.set_title(f"Who thinks and who answers: {results['task']}", fontsize=11, loc="left")
    axes.set_xlabel(_AXES[by].format(timed=timed))
    axes.set_ylabel("accuracy")
    save_axes(figure, axes, path, "lower right")


def _kind(point: Mapping[str, Any]) -> str:
    if point.get("escalate_to") is not None:
        return "chosen per prompt"
    return "one size" if point["thinking"] == point["answering"] else "two sizes"
