"""What visitors see of a trace: chat messages, cards, the ribbon, the comparison, the chart. Pure functions of their arguments, no gradio.

Text of models and visitors goes into chat messages only, which gradio sanitises; everything in HTML here is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape, unescape
from typing import Any

from hf_elastic.budgets import format_bytes, format_count

from .engine import Size
from .trace import Part, Trace

Message = dict[str, Any]
Point = Mapping[str, Any]

TITLES = {"thinking": "Thinking", "answering": "Answer"}
REASONS = {
    "marker": "ended by itself",
    "soft cap": "cut at a sentence near its limit",
    "cap": "cut at its limit",
    "eos": "ended by itself",
    "length": "cut at the end of the context",
    "stopping criteria": "ended",
}


# -- chat ----------------------------------------------------------------------------------------------------------------


def question(text: str) -> Message:
    """A visitor's message; HTML in it is shown, not interpreted."""
    return {"role": "user", "content": escape(text, quote=False)}


def said(history: Sequence[Any]) -> tuple[tuple[str, str], ...]:
    """Roles and texts of a chat as gradio keeps it, without thoughts and notices."""
    turns = []
    for message in history:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part.get("text", "") for part in content if part.get("type") == "text")
        if message["role"] == "user":
            turns.append(("user", unescape(content)))
        elif not (message.get("metadata") or {}).get("title") and content:
            turns.append(("assistant", content))
    return tuple(turns)


def notice(text: str) -> Message:
    """Something that is not an answer: an error, a stop."""
    return {"role": "assistant", "content": escape(text, quote=False), "metadata": {"title": "⚠ Notice"}}


def messages(trace: Trace) -> list[Message]:
    """What the model said: the thought, which can be opened, and the answer."""
    shown: list[Message] = []
    for part in trace.parts:
        if part.name == "answering":
            shown.append({"role": "assistant", "content": part.text})
            continue
        metadata = {
            "title": f"{TITLES.get(part.name, part.name)} · {part.budget}",
            "log": speed(part),
            "status": "pending" if part.state == "running" else "done",
        }
        if part.state != "running":
            metadata["duration"] = part.seconds
        shown.append({"role": "assistant", "content": part.text or "…", "metadata": metadata})
    if trace.stopped:
        shown.append(notice("Stopped." if trace.parts else "Stopped before it began."))
    return shown


def speed(part: Part) -> str:
    """Tokens of a phase, and how fast they came."""
    rate = part.tokens_per_second
    return f"{part.generated} tokens" + (f" · {rate:.0f} tok/s" if rate else "")


# -- who wrote what, and what it took --------------------------------------------------------------------------------------


def panel(trace: Trace | None, sizes: Sequence[Size], plan: Mapping[str, str]) -> str:
    """Ribbon and one card per phase.

    Args:
        trace ([`Trace`], *optional*): `None` or an empty one shows what is planned.
        sizes (`list[Size]`): All sizes, from small to large.
        plan (`dict[str, str]`): Budget by name of the phase.
    """
    parts = {part.name: part for part in trace.parts} if trace else {}
    cards = "".join(_card(name, budget, parts.get(name), sizes) for name, budget in plan.items())
    held = format_bytes(sizes[-1].weight_bytes)
    note = f"Weights held in memory: <b>{held}</b>, the whole checkpoint, whichever submodel runs. "
    note += "Speeds and memory of phases: this request, this machine."
    return f'<div class="pp-panel">{ribbon(trace, sizes)}<div class="pp-cards">{cards}</div><p class="pp-note">{note}</p></div>'


def _card(name: str, budget: str, part: Part | None, sizes: Sequence[Size]) -> str:
    budget = part.budget if part else budget
    state = part.state if part else "idle"
    size = next((size for size in sizes if size.name == budget), None)
    rows = []
    if size:
        rows += [
            ("parameters", format_count(size.total_params)),
            ("active per token", format_count(size.active_params)),
        ]
        rows += [("weights in use", format_bytes(size.weight_bytes))]
    if size and part:
        rows += [("KV and states", format_bytes(size.cache_bytes(part.context)))]
    if part:
        tokens = f"{part.generated}" + (f" + {part.inserted} inserted" if part.inserted else "")
        rows += [("tokens", tokens), ("first token", _seconds(part.first_token_seconds))]
        rate = part.tokens_per_second
        rows += [("speed", f"{rate:.0f} tokens/s" if rate else "–"), ("time", _seconds(part.seconds))]
        if part.handover:
            rows += [
                (
                    "takes over by",
                    {"cache": "the cache", "reprefill": "re-reading"}.get(part.handover, part.handover),
                )
            ]
    body = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in rows)
    why = {"stopped": "stopped", "running": "running", "idle": "planned"}.get(
        state, REASONS.get(part.reason or "", "done") if part else ""
    )
    return (
        f'<section class="pp-card" data-phase="{escape(name)}" data-state="{state}">'
        f'<h4><i class="pp-dot pp-size-{place(budget, sizes)}"></i>{TITLES.get(name, escape(name))} · {escape(budget)}</h4>'
        f'<p class="pp-why">{escape(why)}</p><dl>{body}</dl></section>'
    )


def ribbon(trace: Trace | None, sizes: Sequence[Size]) -> str:
    """Who wrote which tokens, to scale; what the plan inserted is hatched."""
    parts = [part for part in trace.parts if part.generated + part.inserted] if trace else []
    if not parts:
        return '<div class="pp-ribbon pp-empty">who wrote which tokens</div>'
    bands = []
    for part in parts:
        label = f"{part.budget} {part.generated}"
        title = f"{TITLES.get(part.name, part.name)}: {part.generated} tokens by {part.budget}, {part.inserted} inserted by the plan"
        bands.append(
            f'<span class="pp-band pp-size-{place(part.budget, sizes)}" style="flex-grow:{part.generated}" title="{escape(title)}" '
            f'data-tokens="{part.generated}">{escape(label)}</span>'
        )
        if part.inserted:
            bands.append(
                f'<span class="pp-band pp-inserted" style="flex-grow:{part.inserted}" title="{escape(title)}"></span>'
            )
    return f'<div class="pp-ribbon" role="img" aria-label="who wrote which tokens">{"".join(bands)}</div>'


def place(budget: str, sizes: Sequence[Size]) -> int:
    """Number of a size's colour."""
    return next((i for i, size in enumerate(sizes) if size.name == budget), len(sizes)) % 8


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


# -- comparison --------------------------------------------------------------------------------------------------------


def difference(a: Trace | None, b: Trace | None, sizes: Sequence[Size]) -> str:
    """One line: what B took, compared with A."""
    if not a or not b or not a.parts or not b.parts:
        return '<p class="pp-difference" data-state="idle">The same question to both plans, A first, then B: side by side on one device they would slow each other down.</p>'
    same = "the same answer" if a.text("answering") == b.text("answering") else "another answer"
    facts = [same, f"{b.tokens - a.tokens:+d} tokens", f"{b.seconds - a.seconds:+.2f} s"]
    costs = [compute(trace, sizes) for trace in (a, b)]
    if costs[0] and costs[1]:
        facts.append(f"{costs[1] / costs[0]:.0%} of A's compute (active parameters × tokens)")
    state = "stopped" if a.stopped or b.stopped else "done"
    return f'<p class="pp-difference" data-state="{state}"><b>B against A:</b> {escape(" · ".join(facts))}</p>'


def compute(trace: Trace, sizes: Sequence[Size]) -> int:
    """Active parameters times tokens written, over all phases; 0 if a size is not known."""
    active = {size.name: size.active_params for size in sizes}
    if any(part.budget not in active for part in trace.parts):
        return 0
    return sum(active[part.budget] * part.generated for part in trace.parts)


# -- chart -------------------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 400, 56, 24, 20, 48
AXES = {"cost": "active parameters × tokens, per problem", "seconds": "median seconds per problem"}


def frontier(points: Sequence[Point], axis: str) -> list[Point]:
    """Points that no other beats in both: from cheap to dear, each more accurate than all before it."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p[axis], -p["accuracy"])):
        if not best or point["accuracy"] > best[-1]["accuracy"]:
            best.append(point)
    return best


def pareto_svg(points: Sequence[Point], sizes: Sequence[Size], axis: str = "cost") -> str:
    """Accuracy of measured plans against what they take. A point's `data-plan` is its place in `points`.

    Args:
        points (`list[dict]`): Of [`read_measurements`][.measurements]; those without a value on the axis are left out.
        axis (`str`): `"cost"` or `"seconds"`.
    """
    placed = [(i, point) for i, point in enumerate(points) if point.get(axis) is not None]
    if not placed:
        return '<p class="pp-note">No plan of this model has been measured.</p>'
    shown = [point for _, point in placed]
    low, high = min(p[axis] for p in shown), max(p[axis] for p in shown)
    pad = (high - low or high or 1) * 0.06
    low, high = max(0.0, low - pad), high + pad
    floor = math.floor(min(p["accuracy"] for p in shown) * 10) / 10
    bottom = max(0.0, floor if floor < 1 else 0.9)

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - bottom) / (1 - bottom) * (_HEIGHT - _TOP - _BOTTOM)

    svg = [
        f'<svg class="pp-chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="group" aria-label="accuracy against {escape(AXES[axis])}">'
    ]
    for step in range(6):
        value = bottom + (1 - bottom) * step / 5
        svg.append(
            f'<line class="pp-grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        svg.append(
            f'<text class="pp-tick" x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>'
        )
        along = low + (high - low) * step / 5
        tick = format_count(along) if axis == "cost" else f"{along:.2f}"
        svg.append(f'<text class="pp-tick" x="{x(along):.1f}" y="{_HEIGHT - 26}" text-anchor="middle">{tick}</text>')
    svg.append(
        f'<text class="pp-axis" x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(AXES[axis])}</text>'
    )
    svg.append(
        f'<text class="pp-axis" transform="translate(14 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">accuracy</text>'
    )
    best = frontier(shown, axis)
    path = " ".join(f"{x(p[axis]):.1f},{y(p['accuracy']):.1f}" for p in best)
    svg.append(f'<polyline class="pp-frontier" points="{path}"/>')
    for i, point in sorted(placed, key=lambda item: any(item[1] is p for p in best)):  # the labelled ones lie on top
        svg.append(_dot(i, point, x(point[axis]), y(point["accuracy"]), sizes, any(point is p for p in best)))
    return "".join(svg) + "</svg>"


def _dot(i: int, point: Point, cx: float, cy: float, sizes: Sequence[Size], on_frontier: bool) -> str:
    name = plan_name(point)
    title = f"{name}: accuracy {point['accuracy']:.3f} on {point['n']} problems, {point['tokens']:.0f} tokens. Press to use this plan."
    left = cx > _WIDTH * 0.8
    label = (
        f'<text class="pp-label" x="{cx + (-11 if left else 11):.1f}" y="{cy + 4:.1f}" text-anchor="{"end" if left else "start"}">{escape(name)}</text>'
        if on_frontier
        else ""
    )
    thinker, answerer = (place(point[key], sizes) for key in ("thinking", "answering"))
    return (
        f'<g class="pp-point{" pp-best" if on_frontier else ""}" data-plan="{i}" tabindex="0" role="button" aria-label="{escape(title)}">'
        f'<title>{escape(title)}</title><circle class="pp-hit" cx="{cx:.1f}" cy="{cy:.1f}" r="14"/>'
        f'<circle class="pp-fill-{thinker}" cx="{cx:.1f}" cy="{cy:.1f}" r="7"/>'
        f'<path class="pp-fill-{answerer}" d="M {cx:.1f} {cy - 7:.1f} A 7 7 0 0 1 {cx:.1f} {cy + 7:.1f} Z"/>{label}</g>'
    )


def plan_name(point: Point) -> str:
    """`small → large`, with the cap on thinking if there is one."""
    cap = f", ≤ {point['max_thinking_tokens']}" if point.get("max_thinking_tokens") else ""
    return f"{point['thinking']} → {point['answering']}{cap}"


def legend(sizes: Sequence[Size]) -> str:
    """Which colour is which size."""
    items = "".join(
        f'<span><i class="pp-dot pp-size-{place(s.name, sizes)}"></i>{escape(s.name)} ({format_count(s.active_params)} active)</span>'
        for s in sizes
    )
    return f'<p class="pp-legend">{items}<span>left half of a point: who thinks; right half: who answers</span></p>'


def source(points: Sequence[Point]) -> str:
    """Where the numbers of the chart come from."""
    if not points:
        return ""
    kinds = sorted({(p["n"], p["device"], p["dtype"], p["commit"], p.get("task", "")) for p in points}, key=str)
    said = "; ".join(
        f"{task + ', ' if task else ''}{n} problems, {device}, {dtype}, commit {commit}"
        for n, device, dtype, commit, task in kinds
    )
    return f'<p class="pp-note">Measured, not live: {escape(said)}. Plans that were not measured are not shown.</p>'
