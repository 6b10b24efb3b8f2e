"""Two plans on one question: what came out, what it took, and in plain words whether the one with less work gained anything. No gradio."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .asking import Size
from .messages import is_right
from .tasks import Solution
from .trace import Trace, compute

SAME_TIME = 0.1
"""Times that differ by less than this part are called the same."""

BEFORE = (
    "The same question goes to both plans, first to A, then to B: side by side on one machine they would slow each other down. "
    "Short runs are timed again in turns. Then it says here whether the plan with less work gained anything. "
    "Token limits and sampling are those under “More” in the chat."
)


def difference(
    a: Trace | None,
    b: Trace | None,
    sizes: Sequence[Size],
    solution: Solution | None = None,
    times: Sequence[Sequence[float]] = ((), ()),
) -> str:
    """What came out of both plans, and what that means.

    Args:
        a, b ([`Trace`], *optional*): Both finished or stopped; else it is said what will come.
        sizes (`list[Size]`): All sizes.
        solution ([`Solution`], *optional*): What is right, if that is known.
        times (`Sequence[Sequence[float]]`, *optional*): Seconds of further runs of A and of B, in turns.
    """
    if not a or not b or not a.parts or not b.parts:
        return _paragraph("idle", escape(BEFORE))
    if a.stopped or b.stopped:
        return _paragraph("stopped", "Stopped: two plans are compared when both are through.")
    work = [compute(trace, sizes) for trace in (a, b)]
    took = [min([trace.seconds, *more]) for trace, more in zip((a, b), times, strict=True)]
    facts = [
        _outcome(a, b, solution),
        f"A took {took[0]:.2f} s and wrote {a.tokens} tokens, B {took[1]:.2f} s and {b.tokens}.",
    ]
    if all(work) and work[0] != work[1]:
        small, large = ("A", "B") if work[0] < work[1] else ("B", "A")
        facts.append(f"{small} did {min(work) / max(work):.0%} of {large}'s work (parameters used × tokens written).")
    said = f"<b>{escape(_meaning(a, b, work, took, solution))}</b> {escape(' '.join(facts))}"
    runs = 1 + min(map(len, times))
    clock = f"The shortest of {runs} runs each, in turns." if runs > 1 else "One run each: times vary."
    return _paragraph("done", f"{said} <small>{clock}</small>")


def timing() -> str:
    """Both are through, and are timed again."""
    return _paragraph("timing", "Both are through. They are timed again, in turns.")


def difference_notice(text: str) -> str:
    """Why there is no comparison."""
    return _paragraph("refused", escape(text))


def _outcome(a: Trace, b: Trace, solution: Solution | None) -> str:
    a_is, b_is = is_right(a, solution), is_right(b, solution)
    if a_is is not None and b_is is not None:
        if a_is == b_is:
            return f"Both answers are {'right' if a_is else 'wrong'}."
        return "A's answer is right, B's is wrong." if a_is else "B's answer is right, A's is wrong."
    if a.text("answering") == b.text("answering"):
        return "Both gave the same answer."
    return "The answers differ; which one is better is for you to say."


def _meaning(a: Trace, b: Trace, work: Sequence[int], took: Sequence[float], solution: Solution | None) -> str:
    """One sentence: did the plan with less work gain anything?"""
    if [part.budget for part in a.parts] == [part.budget for part in b.parts]:
        return "Both plans are the same: what differs is chance."
    if not all(work) or work[0] == work[1]:
        return "Both plans did the same work." if all(work) else "What these plans do in work is not known."
    (small, less, short), (large, more, long) = sorted(
        zip("AB", (a, b), took, strict=True), key=lambda plan: work["AB".index(plan[0])]
    )
    if is_right(less, solution) and is_right(more, solution) is False:
        return f"{small} gained: the right answer with less work."
    if is_right(less, solution) is False and is_right(more, solution):
        return f"{large}, the larger plan, was worth its work: only its answer is right."
    if is_right(less, solution) is False:
        return "Nothing was gained: neither plan has the right answer."
    if long < short * (1 - SAME_TIME):
        return f"{large}, the larger plan, was faster: on this machine, less work did not make {small} quicker, so nothing was gained in time."
    if short >= long * (1 - SAME_TIME):
        return f"Nothing was gained in time: {small} did less work and took as long."
    if solution is None and a.text("answering") != b.text("answering"):
        return f"{small} was faster with less work; whether its answer is as good is for you to say."
    return f"{small} gained: the same answer, faster and with less work."


def _paragraph(state: str, html: str) -> str:
    return f'<p class="pp-difference" data-state="{state}" role="status">{html}</p>'
