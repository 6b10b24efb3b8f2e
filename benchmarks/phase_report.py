"""What `report.py` says of phase plans, from the result file of `phases.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_tables import conditions, table
from result_files import Result, by_name, load, phase_tasks


def phases(results: Path) -> str:
    """Per task: whole answers by who thinks and who answers, plans chosen per prompt, and what both gain."""
    if (result := load(results / "phases.json")) is None:
        return "Not measured yet.\n"
    found = by_name(result)
    points = [entry for entry in found.values() if "escalate_to" in entry]
    parts = [_phases_of(task, found, points) for task in phase_tasks(found)]
    if not parts:
        return "Not measured yet.\n"
    return "\n\n".join([*parts, conditions(result)]) + "\n"


def _phases_of(task: str, found: Mapping[str, Any], points: Sequence[Result]) -> str:
    plans = [p for p in points if p["name"].startswith(f"{task}: ")]
    whole = {(p["thinking"], p["answering"]): p for p in plans if not (p["max_thinking_tokens"] or p["escalate_to"])}
    sizes = list(dict.fromkeys(thinking for thinking, _ in whole))
    rows = [
        [f"{thinking} thinks", *(_right_and_time(whole[thinking, answering]) for answering in sizes)]
        for thinking in sizes
    ]
    parts = [table([f"`{task}`", *(f"{size} answers" for size in sizes)], rows)]
    chosen = [p for p in plans if p["escalate_to"]]
    if chosen:
        fixed = [p for p in plans if not p["escalate_to"]]
        rows = [
            [
                f"{p['thinking']} thinks, {p['answering']} answers, {p['escalate_to']} below {p['confidence']:.4g}",
                f"`{p['signal']}`",
                f"{p['escalated']:.0%}",
                _right_and_time(p),
                _best_within(p, fixed),
            ]
            for p in sorted(chosen, key=lambda p: p["median"])
        ]
        parts.append(
            table(["chosen per prompt", "signal", "escalates", "right · time", "best other in that time"], rows)
        )
    signals = [name for name in found if name.startswith(f"{task}: ") and name.endswith(TELLS)]
    if signals:
        told = [(*name.removesuffix(TELLS).split(": ")[1:], found[name]) for name in signals]
        names = list(dict.fromkeys(signal for _, signal, _ in told))
        rows = []
        for size in dict.fromkeys(size for size, _, _ in told):
            entries = [entry for of, _, entry in told if of == size]
            cells = [
                "" if not 3 <= entry["wrong"] <= entry["problems"] - 3 else f"{entry['median']:.2f}"
                for entry in entries
            ]
            rows.append([f"{size} ({entries[0]['wrong']} of {entries[0]['problems']} wrong)", *cells])
        parts.append(table(["right told from wrong by", *(f"`{name}`" for name in names)], rows))
    parts.append(" ".join(_gains(task, kind, found) for kind in ("two sizes", "per prompt")))
    return "\n\n".join(parts)


TELLS = " tells right answers from wrong ones"


def _right_and_time(plan: Result) -> str:
    return f"{plan['accuracy']:.3f} · {plan['median']:.3g} s"


def _best_within(plan: Result, others: Sequence[Result]) -> str:
    affordable = [p for p in others if p["median"] <= plan["median"]]
    if not affordable:
        return "none"
    best = max(affordable, key=lambda p: (p["accuracy"], -p["median"]))
    cap = f", at most {best['max_thinking_tokens']} tokens" if best["max_thinking_tokens"] else ""
    return f"{_right_and_time(best)} ({best['thinking']} thinks, {best['answering']} answers{cap})"


def _gains(task: str, kind: str, found: Mapping[str, Any]) -> str:
    gained = found[f"{task}: {kind}: more answers right at no more time"]
    saved = found[f"{task}: {kind}: time of one size / time, as often right"]
    what = {"two sizes": "Plans of two sizes", "per prompt": "Plans chosen per prompt"}[kind]
    text = (
        f"{what}: {gained['median']:+.3f} whole answers right at no more time than one size ({_plan(gained['plan'])})"
    )
    if saved["plan"] is None:
        return f"{text}; none is as often right as one size on the problems that plans are chosen on."
    held = "" if saved["holds"] else ", but not on held-out problems"
    return (
        f"{text}; {saved['median']:.2f} times as fast as one size ({_plan(saved['one_size'])}) that is as often right "
        f"({_plan(saved['plan'])}: {saved['difference']:+.3f}){held}."
    )


def _plan(label: str | None) -> str:
    """A plan such as `quarter - half - None` in words."""
    if label is None:
        return "none"
    thinking, answering, *rest = label.split(" - ")
    if len(rest) > 1:
        return f"{thinking} thinks, {answering} answers, {rest[0]} where `{rest[1]}` is below {float(rest[2]):.4g}"
    cap = "" if rest[0] == "None" else f", at most {rest[0]} thinking tokens"
    return f"{thinking}{cap}" if thinking == answering else f"{thinking} thinks, {answering} answers{cap}"
