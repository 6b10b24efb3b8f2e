"""The chat: a trace as messages, with who wrote them, what was cut, and whether it is right where that is known. No gradio.

Text of models and visitors goes into chat messages only, which gradio sanitises.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape, unescape
from typing import Any

from .tasks import Solution
from .trace import Part, Trace
from .view import REASONS, TITLES, title

Message = dict[str, Any]

ENDINGS = ("eos", "length", "stopping criteria")
"""Reasons that end the text, and not only a phase."""


def question(text: str) -> Message:
    """A visitor's message. HTML in it is shown, not interpreted; what needs no escape for that stays, so that it can be copied."""
    return {"role": "user", "content": _plain(text)}


def _plain(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"^(\s*)>", r"\1&gt;", text, flags=re.MULTILINE)  # which would be a quotation


def said(history: Sequence[Any]) -> tuple[tuple[str, str], ...]:
    """Roles and texts of a chat as gradio keeps it, without thoughts, signatures and notices."""
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
    """Something that is not an answer: an error, a cut, a stop."""
    return {"role": "assistant", "content": escape(text, quote=False), "metadata": {"title": "⚠ Notice"}}


def messages(trace: Trace, solution: Solution | None = None) -> list[Message]:
    """What the model said: the thought, which can be opened, the answer, and under it who wrote it.

    Args:
        trace ([`Trace`]): As far as it has come.
        solution ([`Solution`], *optional*): What is right, if it is known; then the answer is marked.
    """
    shown: list[Message] = []
    for part in trace.parts:
        if part.name == "answering":
            shown.append({"role": "assistant", "content": part.text})
        else:
            shown.append(_thought(part))
        if cut := cut_notice(part):
            shown.append(notice(cut))
        if part.name == "answering" and part.state == "done":
            shown.append(_signature(trace, part, solution))
    if trace.stopped:
        shown.append(notice("Stopped." if trace.parts else "Stopped before it began."))
    return shown


def _thought(part: Part) -> Message:
    metadata: Message = {
        "title": title(part.name, part.budget),
        "log": f"· {speed(part)}",
        "status": "pending" if part.state == "running" else "done",
    }
    if part.state != "running":
        metadata["duration"] = part.seconds
    return {"role": "assistant", "content": part.text or "…", "metadata": metadata}


def _signature(trace: Trace, part: Part, solution: Solution | None) -> Message:
    """Who wrote the answer above, and whether it is right; opened, it says why."""
    mark = {True: "✓ Right. ", False: "✗ Wrong. ", None: ""}[is_right(trace, solution)]
    lines = [f"{title(p.name, p.budget)}: {speed(p)}; {REASONS.get(p.reason or '', 'done')}." for p in trace.parts]
    metadata = {
        "title": mark + title(part.name, part.budget),
        "log": f"· {speed(part)}",
        "status": "done",
        "duration": part.seconds,
    }
    return {"role": "assistant", "content": "\n\n".join([*_correction(trace, solution), *lines]), "metadata": metadata}


def _correction(trace: Trace, solution: Solution | None) -> list[str]:
    """What is right, worked out; and which phase went wrong."""
    if solution is None:
        return []
    answer, thinking = trace.text("answering"), trace.text("thinking")
    worked = "\n".join(f"- {line}" for line in solution.worked)
    if answer == solution.answer:
        return [f"It is right:\n\n{worked}"]
    right = f"{solution.right_parts(answer)} of {len(solution.parts)} sentences are right. Right is: {solution.answer}\n\n{worked}"
    if thinking == solution.thinking:
        return [right, "The thinking was right, so the answer went wrong on its own."]
    so_far = "right as far as it went, and not finished" if solution.thinking.startswith(thinking) else "wrong already"
    return [right, f"The thinking was {so_far}. Right is: {solution.thinking}"]


def is_right(trace: Trace, solution: Solution | None) -> bool | None:
    """Whether an answer is right; `None` if that is not known, or it is not finished."""
    if solution is None or any(part.state != "done" for part in trace.parts):
        return None
    if any(part.name == "answering" for part in trace.parts):
        return trace.text("answering") == solution.answer
    return False if ended_early(trace) else None


def ended_early(trace: Trace) -> bool:
    """Whether the text ended in the thinking."""
    return bool(trace.parts) and trace.parts[-1].name != "answering" and trace.parts[-1].reason in ENDINGS


def cut_notice(part: Part) -> str:
    """That a phase was cut, and by what; empty if it was not, or if the text ended before there was an answer."""
    who = TITLES.get(part.name, part.name)
    cut = f"The {who.lower()} was cut at its limit of {part.generated} tokens, before {part.budget} had ended it"
    if part.reason in ("cap", "soft cap"):
        rest = "its end is missing" if part.name == "answering" else "the answer had to do with what there was"
        return f"{cut}: {rest}. To allow more, raise “{who} tokens, at most” under “More”."
    if part.reason == "length":
        return f"The {who.lower()} was cut after {part.generated} tokens by {part.budget}: the model has no room for a longer text."
    if part.reason in ENDINGS and part.name != "answering":
        return f"{part.budget} ended the text while it was thinking, so there is no answer. Try another size or another question."
    return ""


def speed(part: Part) -> str:
    """Tokens of a phase, and how fast they came."""
    rate = part.tokens_per_second
    return f"{part.generated} tokens" + (f" · {rate:.0f} per second" if rate else "")
