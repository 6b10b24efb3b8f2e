"""The chart of measured plans, as SVG with points to press. Pure functions; every text is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hf_elastic.configuration.budgets import format_count
from hf_elastic.evaluation.plans import pareto_front

from .asking import Size
from .view import place

Point = Mapping[str, Any]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 56, 24, 20, 48
AXES = {
    "cost": "modelled cost per problem, in tokens of the largest size",
    "seconds": "seconds per problem, in batches",
}


def axes_of(points: Sequence[Point]) -> list[str]:
    """What the points can be drawn against."""
    return [axis for axis in AXES if points and all(point.get(axis) is not None for point in points)]


def pareto_svg(points: Sequence[Point], sizes: Sequence[Size], axis: str = "cost") -> str:
    """Accuracy of measured plans against what they take. A point's `data-plan` is its place in `points`.

    Args:
        points (`list[dict]`): Of a file of [`phase_space.measurements`]. Where one lacks the axis, nothing is drawn.
        sizes (`list[Size]`): From small to large.
        axis (`str`): `"cost"` or `"seconds"`.
    """
    if axis not in axes_of(points):
        return '<p class="pp-note">No plan of this model has been measured.</p>'
    scale = sizes[-1].active_params if axis == "cost" else 1.0
    prices = [point[axis] / scale for point in points]
    pad = (max(prices) - min(prices) or max(prices) or 1) * 0.06
    low, high = max(0.0, min(prices) - pad), max(prices) + pad
    bottom = min(0.9, math.floor(min(point["accuracy"] for point in points) * 10) / 10)

    def x(price: float) -> float:
        return LEFT + (price - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(accuracy: float) -> float:
        return HEIGHT - BOTTOM - (accuracy - bottom) / (1 - bottom) * (HEIGHT - TOP - BOTTOM)

    drawn = []
    for step in range(6):
        value, along = bottom + (1 - bottom) * step / 5, low + (high - low) * step / 5
        drawn.append(
            f'<line class="pp-grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        drawn.append(_text("pp-tick", LEFT - 8, y(value) + 4, f"{value:.2f}", "end"))
        drawn.append(_text("pp-tick", x(along), HEIGHT - 26, f"{along:.0f}" if along >= 10 else f"{along:.2f}"))
    drawn.append(_text("pp-axis", WIDTH / 2, HEIGHT - 6, AXES[axis]))
    drawn.append(_text("pp-axis", -HEIGHT / 2, 14, "accuracy", turn=True))
    front = pareto_front(points, axis)
    path = " ".join(f"{x(prices[i]):.1f},{y(points[i]['accuracy']):.1f}" for i in front)
    drawn.append(f'<polyline class="pp-frontier" points="{path}"/>')
    places = [(x(price), y(point["accuracy"])) for price, point in zip(prices, points, strict=True)]
    shown = _readable([(i, *places[i], plan_name(points[i])) for i in reversed(front)])
    for i in sorted(range(len(points)), key=lambda i: (i in front, i in shown)):  # those with a label lie on top
        drawn.append(_point(i, points[i], *places[i], sizes, best=i in front, named=i in shown))
    label = escape(f"accuracy against {AXES[axis]}")
    svg = f'<svg class="pp-chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{label}">{"".join(drawn)}</svg>'
    return f'<div class="pp-scroll">{svg}</div>'


def _text(kind: str, x: float, y: float, text: str, anchor: str = "middle", turn: bool = False) -> str:
    turned = ' transform="rotate(-90)"' if turn else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}>{escape(text)}</text>'


def _point(i: int, point: Point, x: float, y: float, sizes: Sequence[Size], best: bool, named: bool) -> str:
    """The left half has the colour of who thinks, the right half that of who answers; those without a name say it when they are looked at."""
    name, tokens = plan_name(point), point["thinking_tokens"] + point["answer_tokens"]
    said = f"{name}: accuracy {point['accuracy']:.3f} on {point['n']} problems, {tokens:.0f} tokens. Press to use it."
    title = escape(said)
    thinker, answerer = (place(point[key], sizes) for key in ("thinking", "answering"))
    kind = "pp-point" + (" pp-best" if best else "") + (" pp-named" if named else "")
    left, baseline, end = _label_place(x, y)
    return (
        f'<g class="{kind}" data-plan="{i}" tabindex="0" role="button" aria-label="{title}">'
        f'<title>{title}</title><circle class="pp-hit" cx="{x:.1f}" cy="{y:.1f}" r="14"/>'
        f'<circle class="pp-fill-{thinker}" cx="{x:.1f}" cy="{y:.1f}" r="7"/>'
        f'<path class="pp-fill-{answerer}" d="M {x:.1f} {y - 7:.1f} A 7 7 0 0 1 {x:.1f} {y + 7:.1f} Z"/>'
        f"{_text('pp-label', left, baseline, name, 'end' if end else 'start')}</g>"
    )


def _label_place(x: float, y: float) -> tuple[float, float, bool]:
    """Where a label starts, or ends: up and to the left, as nothing is there that is cheaper and better, if there is room."""
    return (x - 10, y - 5, True) if x - LEFT > 170 else (x - 7, y - 11, False)


def _readable(labels: Sequence[tuple[int, float, float, str]]) -> list[int]:
    """Which labels (number, place, text) can be read together; the first ones are taken first."""
    taken: list[tuple[float, float, float]] = []
    shown = []
    for i, x, y, text in labels:
        anchor, baseline, end = _label_place(x, y)
        width = 7.0 * len(text)  # about; of 12 pixels
        left = anchor - width if end else anchor
        if all(abs(baseline - b) > 14 or left > r or left + width < start for start, r, b in taken):
            taken.append((left, left + width, baseline))
            shown.append(i)
    return shown


def plan_name(point: Point) -> str:
    """`small → large`, with the cap on thinking if there is one."""
    cap = "" if point["max_thinking_tokens"] is None else f", ≤ {point['max_thinking_tokens']}"
    return f"{point['thinking']} → {point['answering']}{cap}"


def legend(sizes: Sequence[Size]) -> str:
    """Which colour is which size."""
    items = "".join(
        f'<span><i class="pp-dot pp-size-{place(size.name, sizes)}"></i>{escape(size.name)} ({format_count(size.active_params)} active)</span>'
        for size in sizes
    )
    return f'<p class="pp-legend">{items}<span>left half of a point: who thinks; right half: who answers</span></p>'


def source(about: str) -> str:
    """Where the numbers of the chart come from."""
    said = f"Measured, not live: {escape(about)}. Plans that were not measured are not shown."
    return f'<p class="pp-note">{said}</p>' if about else ""
