"""What a run took, as HTML: the cards and the ribbon. Pure functions of their arguments, no gradio; everything in HTML here is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from hf_elastic.configuration.budgets import format_bytes, format_count

from .asking import Size
from .tasks import Sheet
from .trace import Part, Trace, compute

TITLES = {"thinking": "Thinking", "answering": "Answer"}
REASONS = {
    "marker": "finished by itself",
    "soft cap": "cut at a sentence near its limit",
    "cap": "cut at its limit",
    "skipped": "skipped: no thinking is asked for",
    "eos": "finished by itself",
    "length": "cut: no room was left for more",
    "stopping criteria": "ended",
}


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
    note = f"All sizes are parts of one model, which takes <b>{held}</b> of memory whichever size runs. "
    note += "Speed, time and memory here are those of this request on this machine."
    return f'<div class="pp-panel">{ribbon(trace, sizes, plan)}<div class="pp-cards">{cards}</div>{_total(trace, sizes)}<p class="pp-note">{note}</p></div>'


def _total(trace: Trace | None, sizes: Sequence[Size]) -> str:
    """What a finished run took in all."""
    if not trace or not trace.parts or any(part.state != "done" for part in trace.parts):
        return ""
    said = f"In all: <b>{_seconds(trace.seconds)}</b>, {trace.tokens} tokens"
    if done := compute(trace, sizes):
        said += f", <b>{format_count(done)}</b> of work (parameters used × tokens written)"
    if done < (whole := sizes[-1].active_params * trace.tokens):
        said += f", {done / whole:.0%} of what {escape(sizes[-1].name)} alone does for as many tokens" if done else ""
    return f'<p class="pp-total">{said}.</p>'


def price_list(sheet: Sheet) -> str:
    """What is needed to check an answer by hand."""
    entries = "".join(f"<li><b>{number}</b> {escape(what)}</li>" for number, what in sheet.entries)
    return f'<section class="pp-sheet"><h2>{escape(sheet.title)}</h2><ul>{entries}</ul></section>'


def _card(name: str, budget: str, part: Part | None, sizes: Sequence[Size]) -> str:
    budget = part.budget if part else budget
    state = part.state if part else "idle"
    size = next((size for size in sizes if size.name == budget), None)
    rows = []
    if size:
        rows += [("parameters", format_count(size.total_params)), ("used per token", format_count(size.active_params))]
        rows += [("weights in use", format_bytes(size.weight_bytes))]
    if size and part:
        rows += [("memory of the text", format_bytes(size.cache_bytes(part.context)))]
    if part:
        tokens = f"{part.generated}" + (f" (+{part.inserted} put in)" if part.inserted else "")
        rows += [("tokens written", tokens), ("first token after", _seconds(part.first_token_seconds))]
        rate = part.tokens_per_second
        rows += [("speed", f"{rate:.0f} tokens/s" if rate else "–"), ("time", _seconds(part.seconds))]
        if part.handover:
            taken = {"cache": "kept as it is", "reprefill": f"re-read by {budget}"}.get(part.handover, part.handover)
            rows += [("the text so far", taken)]
    body = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in rows)
    why = {"stopped": "stopped", "running": "writes now", "idle": "comes next" if part else "planned"}.get(
        state, REASONS.get(part.reason or "", "done") if part else ""
    )
    return (
        f'<section class="pp-card" data-phase="{escape(name)}" data-state="{state}">'
        f'<h2><i class="pp-dot pp-size-{place(budget, sizes)}"></i>{escape(title(name, budget))}</h2>'
        f'<p class="pp-why">{escape(why)}</p><dl>{body}</dl></section>'
    )


def title(name: str, budget: str) -> str:
    """Who wrote a phase, or is to write it."""
    return f"{TITLES.get(name, name)} by {budget}"


def ribbon(trace: Trace | None, sizes: Sequence[Size], plan: Mapping[str, str]) -> str:
    """Who wrote which tokens, to scale, and hatched what the plan put in; before that, who is to write."""
    parts = [part for part in trace.parts if part.generated + part.inserted] if trace else []
    if parts:
        said = "Who wrote which tokens: " + ", ".join(f"{title(p.name, p.budget)}, {p.generated}" for p in parts)
        bands = [_bands(part, sizes) for part in parts]
    else:
        said = "Who is to write: " + ", ".join(title(*phase) for phase in plan.items())
        verbs = {"thinking": "thinks", "answering": "answers"}
        bands = [_band(f"{budget} {verbs.get(name, name)}", budget, 1, sizes) for name, budget in plan.items()]
    planned = "" if parts else " pp-planned"
    return f'<div class="pp-ribbon{planned}" role="img" aria-label="{escape(said)}">{"".join(bands)}</div>'


def _bands(part: Part, sizes: Sequence[Size]) -> str:
    said = f"{title(part.name, part.budget)}: {part.generated} tokens, and {part.inserted} that the plan put in"
    more = f'title="{escape(said)}" data-tokens="{part.generated}"'
    band = _band(f"{part.budget} {part.generated}", part.budget, part.generated, sizes, more)
    put_in = f'<span class="pp-band pp-inserted" style="flex-grow:{part.inserted}" title="{escape(said)}"></span>'
    return band + (put_in if part.inserted else "")


def _band(label: str, budget: str, width: int, sizes: Sequence[Size], more: str = "") -> str:
    return (
        f'<span class="pp-band pp-size-{place(budget, sizes)}" style="flex-grow:{width}" {more}>{escape(label)}</span>'
    )


def place(budget: str, sizes: Sequence[Size]) -> int:
    """Number of a size's colour."""
    return next((i for i, size in enumerate(sizes) if size.name == budget), len(sizes)) % 8


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"
