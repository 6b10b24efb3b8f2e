"""What visitors see of a trace: chat messages, cards, the ribbon, the comparison. Pure functions of their arguments, no gradio.

Text of models and visitors goes into chat messages only, which gradio sanitises; everything in HTML here is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape, unescape
from typing import Any

from hf_elastic.configuration.budgets import format_bytes, format_count

from .asking import Size
from .trace import Part, Trace

Message = dict[str, Any]

TITLES = {"thinking": "Thinking", "answering": "Answer"}
REASONS = {
    "marker": "ended by itself",
    "soft cap": "cut at a sentence near its limit",
    "cap": "cut at its limit",
    "skipped": "skipped: no thinking is asked for",
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
        metadata: Message = {
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
            ("active", format_count(size.active_params)),
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


def difference_notice(text: str) -> str:
    """Why there is no comparison."""
    return f'<p class="pp-difference" data-state="refused">{escape(text)}</p>'


def compute(trace: Trace, sizes: Sequence[Size]) -> int:
    """Active parameters times tokens written, over all phases; 0 if a size is not known."""
    active = {size.name: size.active_params for size in sizes}
    if any(part.budget not in active for part in trace.parts):
        return 0
    return sum(active[part.budget] * part.generated for part in trace.parts)
