"""The chart of measured plans, as SVG with points to press. Pure functions; every text is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from hf_elastic.configuration.budgets import format_count
from hf_elastic.evaluation.plans import pareto_front

from .asking import Size
from .view import place

Point = Mapping[str, Any]

HEIGHT, TOP, BOTTOM = 400, 24, 28
AXES = {
    "cost": "work per problem, counted in tokens of the largest size",
    "seconds": "seconds per problem",
}
NARROW = 300
"""Width of the smallest plot in pixels, which a phone shows; what can be read there can be read everywhere."""


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
    along = round_ticks(min(prices), max(prices))
    up = round_ticks(min(point["accuracy"] for point in points), max(point["accuracy"] for point in points))

    def x(price: float) -> float:  # in per cent, so that the plot is as wide as there is room
        return 100 * (price - along[0]) / (along[-1] - along[0])

    def y(accuracy: float) -> float:
        return HEIGHT - BOTTOM - (accuracy - up[0]) / (up[-1] - up[0]) * (HEIGHT - TOP - BOTTOM)

    drawn = [f'<line class="pp-grid" x1="0%" x2="100%" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>' for tick in up]
    drawn += [
        f'<text class="pp-tick" x="-8" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:g}%</text>' for tick in up
    ]
    drawn += [
        f'<text class="pp-tick" x="{x(tick):.2f}%" y="{HEIGHT - 6}" text-anchor="middle">{tick:g}</text>'
        for tick in along
    ]
    places = [(x(price), y(point["accuracy"])) for price, point in zip(prices, points, strict=True)]
    front = pareto_front(points, axis)
    for (x1, y1), (x2, y2) in pairwise(places[i] for i in front):
        drawn.append(f'<line class="pp-frontier" x1="{x1:.2f}%" y1="{y1:.1f}" x2="{x2:.2f}%" y2="{y2:.1f}"/>')
    shown = _readable([(i, *places[i], plan_name(points[i])) for i in reversed(front)])
    for i in sorted(range(len(points)), key=lambda i: (i in front, i in shown)):  # those with a label lie on top
        drawn.append(_point(i, points[i], *places[i], sizes, best=i in front, named=i in shown))
    label = escape(f"share that is right, against {AXES[axis]}; every point is a button")
    svg = f'<svg class="pp-chart" width="100%" height="{HEIGHT}" role="group" aria-label="{label}">{"".join(drawn)}</svg>'
    titles = '<p class="pp-axis">↑ share that is right</p>', f'<p class="pp-axis pp-along">{escape(AXES[axis])} →</p>'
    return f'{titles[0]}<div class="pp-plot">{svg}</div>{titles[1]}'


def round_ticks(low: float, high: float) -> list[float]:
    """A few round numbers, evenly spaced, the first not above `low` and the last not below `high`."""
    span = high - low or abs(high) or 1.0
    high = max(high, low + span)
    size = 10.0 ** math.floor(math.log10(span / 4))
    step = next(size * part for part in (1, 2, 5, 10) if span / (size * part) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _point(i: int, point: Point, x: float, y: float, sizes: Sequence[Size], best: bool, named: bool) -> str:
    """The left half has the colour of who thinks, the right half that of who answers; those without a name say it when they are looked at."""
    name, tokens = plan_name(point), point["thinking_tokens"] + point["answer_tokens"]
    cut = (
        ""
        if point["max_thinking_tokens"] is None
        else f", the thinking is cut at {point['max_thinking_tokens']} tokens"
    )
    said = f"{point['thinking']} thinks, {point['answering']} answers{cut}: {point['accuracy']:.1%} right on {point['n']} problems, "
    title = escape(f"{said}{tokens:.0f} tokens. Press to use it in the chat.")
    thinker, answerer = (place(point[key], sizes) for key in ("thinking", "answering"))
    kind = "pp-point" + (" pp-best" if best else "") + (" pp-named" if named else "")
    to_the_left = _label_is_left(x)
    label = f'x="{-10 if to_the_left else -7}" y="{-5 if to_the_left else -11}" text-anchor="{"end" if to_the_left else "start"}"'
    return (
        f'<svg x="{x:.2f}%" y="{y:.1f}" overflow="visible"><g class="{kind}" data-plan="{i}" tabindex="0" role="button" aria-label="{title}">'
        f'<title>{title}</title><circle class="pp-hit" r="14"/><circle class="pp-fill-{thinker}" r="7"/>'
        f'<path class="pp-fill-{answerer}" d="M 0 -7 A 7 7 0 0 1 0 7 Z"/><text class="pp-label" {label}>{escape(name)}</text></g></svg>'
    )


def _label_is_left(x: float) -> bool:
    """Up and to the left, as nothing is there that is cheaper and better, if there is room; else above."""
    return x > 50


def _readable(labels: Sequence[tuple[int, float, float, str]]) -> list[int]:
    """Which labels (number, place, text) can be read together on a phone; the first ones are taken first."""
    taken: list[tuple[float, float, float]] = []
    shown = []
    for i, x, y, text in labels:
        width = 6.5 * len(text)  # about; of 12 pixels
        to_the_left = _label_is_left(x)
        left = x / 100 * NARROW + (-10 - width if to_the_left else -7)
        baseline = y - (5 if to_the_left else 11)
        if all(abs(baseline - b) > 14 or left > r or left + width < start for start, r, b in taken):
            taken.append((left, left + width, baseline))
            shown.append(i)
    return shown


def plan_name(point: Point) -> str:
    """`small → large`, with the cap on thinking if there is one."""
    cap = "" if point["max_thinking_tokens"] is None else f", ≤ {point['max_thinking_tokens']}"
    return f"{point['thinking']} → {point['answering']}{cap}"


def legend(sizes: Sequence[Size]) -> str:
    """What the points are, that they can be pressed, and which colour is which size."""
    items = "".join(
        f'<span><i class="pp-dot pp-size-{place(size.name, sizes)}"></i>{escape(size.name)} ({format_count(size.active_params)} parameters per token)</span>'
        for size in sizes
    )
    said = (
        "Every point is a plan that was measured: <b>the left half has the colour of the size that thinks, the right half that of the one that answers</b>. "
        "Further up is better, further left is less work; nothing beats the joined points. “≤ 17” means that the thinking was cut after 17 tokens. <b>Press a point to use its plan in the chat.</b>"
    )
    return f'<p class="pp-lead">{said}</p><p class="pp-legend">{items}</p>'


def source(about: str) -> str:
    """Where the numbers of the chart come from."""
    said = f"Measured beforehand, not live: {escape(about)}. Plans that were not measured are not shown."
    return f'<p class="pp-note">{said}</p>' if about else ""
