"""What is said about a run: who wrote it, what was cut, whether it is right, and which of two plans gained."""

from __future__ import annotations

import re
from itertools import islice

import pytest
import space_tools  # noqa: F401  (the path of the Space)

from hf_elastic.lab.stories import PRICES, problems
from phase_space import comparison, messages
from phase_space.asking import Ask
from phase_space.engine import ElasticEngine
from phase_space.fake import FakeEngine
from phase_space.tasks import STORIES_TASK
from phase_space.trace import Part, Trace, follow

ENGINE = FakeEngine(sleep=0)
PLAN = {"thinking": "XS", "answering": "L"}
SOLUTION = STORIES_TASK.solve(
    "Mia has 7 coins. Tom has 4 more than Mia. All go to the toy shop. What can Mia and Tom buy?"
)
FIRST, SECOND = SOLUTION.parts
WRONG_SECOND = f"{FIRST} {SECOND.replace('11', '12')}"


def run(until: int | None = None, **what) -> Trace:
    trace = Trace()
    for event in list(ENGINE.stream(Ask((("user", "why"),), **PLAN, **what)))[:until]:
        trace.add(event)
    return trace


def written(thinking: str, answer: str | None, sizes=("XS", "L"), seconds=1.0, reasons=("marker", "eos")) -> Trace:
    """A finished run with these texts, at a token per second and size; without an answer the text ended in the thinking."""
    parts = [
        Part("thinking", sizes[0], text=thinking, generated=10, ended=seconds / 2, reason=reasons[0], state="done")
    ]
    if answer is not None:
        ends = {"began": seconds / 2, "ended": seconds, "reason": reasons[1], "state": "done"}
        parts.append(Part("answering", sizes[1], "cache", text=answer, generated=10, **ends))
    return Trace(parts)


# -- messages ------------------------------------------------------------------------------------------------------------


def test_messages_are_a_thought_and_an_answer():
    """The thought spins while it runs, has its counts from the same events, and is closed by the answer."""
    [thought] = messages.messages(run(until=20))
    assert thought["metadata"]["status"] == "pending"
    assert "duration" not in thought["metadata"]
    whole = run()
    thought, answer, _ = messages.messages(whole)
    assert thought["metadata"]["status"] == "done"
    assert thought["metadata"]["log"].startswith("· 48 tokens")
    assert thought["metadata"]["duration"] == whole.parts[0].seconds
    assert answer == {"role": "assistant", "content": whole.parts[1].text}
    cut = run(until=20)
    cut.stop()
    thought, notice = messages.messages(cut)
    assert thought["metadata"]["status"] == "done"  # nothing spins for ever
    assert notice["content"] == "Stopped."
    nothing = Trace()
    nothing.stop()
    assert [message["content"] for message in messages.messages(nothing)] == ["Stopped before it began."]


def test_a_chat_is_read_back_without_thoughts_and_notices():
    text = "a < b && <b>c</b> &amp; `x`"
    history = [messages.question(text), *messages.messages(run()), messages.notice("no"), messages.question("next")]
    assert "<b>" not in history[0]["content"]
    as_gradio_keeps_it = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in history]
    for kept in (history, as_gradio_keeps_it):
        assert messages.said(kept) == (("user", text), ("assistant", run().text("answering")), ("user", "next"))


def test_a_question_can_be_copied_as_it_was_written():
    """Only what would be HTML or a quotation is escaped: a copied problem can be pasted back."""
    assert messages.question("^a6b-1c-5d-4>")["content"] == "^a6b-1c-5d-4>"
    assert messages.question(SOLUTION.prompt)["content"] == SOLUTION.prompt
    assert messages.question("> a\n  >b<i>&lt;")["content"] == "&gt; a\n  &gt;b&lt;i>&amp;lt;"


def test_every_turn_says_which_sizes_wrote_it():
    thought, answer, signature = messages.messages(run())
    assert thought["metadata"]["title"] == "Thinking by XS"
    assert signature["metadata"]["title"] == "Answer by L"
    assert signature["metadata"]["log"].startswith("· 12 tokens")
    assert re.search(r"Thinking by XS: 48 tokens.*; finished by itself\.", signature["content"])
    assert "metadata" not in answer


@pytest.mark.parametrize(
    ("texts", "title", "said"),
    [
        ((SOLUTION.thinking, SOLUTION.answer), "✓ Right. Answer by L", f"It is right:\n\n- {SOLUTION.worked[0]}"),
        ((SOLUTION.thinking, WRONG_SECOND), "✗ Wrong. Answer by L", f"1 of 2 sentences are right. Right is: {SOLUTION.answer}"),
        ((SOLUTION.thinking, WRONG_SECOND), "✗ Wrong. Answer by L", "The thinking was right, so the answer went wrong on its own."),
        (("Mia owns 8.", WRONG_SECOND), "✗ Wrong. Answer by L", f"The thinking was wrong already. Right is: {SOLUTION.thinking}"),
        (("Mia owns 7.", SECOND), "✗ Wrong. Answer by L", "0 of 2 sentences are right"),
        (("Mia owns 7.", FIRST), "✗ Wrong. Answer by L", "right as far as it went, and not finished"),
    ],
)  # fmt: skip
def test_right_or_wrong_is_said_where_it_is_known(texts, title, said):
    signature = messages.messages(written(*texts), SOLUTION)[-1]
    assert signature["metadata"]["title"] == title
    assert said in signature["content"]
    assert messages.messages(written(*texts))[-1]["metadata"]["title"] == "Answer by L"


def test_a_cut_is_said_and_what_to_do():
    _, cut, _, signature = messages.messages(run(max_thinking_tokens=7))
    assert cut["content"] == (
        "The thinking was cut at its limit of 7 tokens, before XS had ended it: the answer had to do with what there was. "
        "To allow more, raise “Thinking tokens, at most” under “More”."
    )
    assert "cut at its limit" in signature["content"]
    *_, cut, _ = messages.messages(run(max_answer_tokens=5))
    assert "The answer was cut at its limit of 5 tokens, before L had ended it: its end is missing." in cut["content"]
    assert len(messages.messages(run())) == 3  # nothing was cut
    [_, full] = messages.messages(written("a6", None, reasons=("length",)))
    assert "no room for a longer text" in full["content"]
    [_, early] = messages.messages(written("a6", None, reasons=("eos",)))
    assert "XS ended the text while it was thinking, so there is no answer" in early["content"]


def test_the_real_engine_is_judged():
    """The example of the first screen is right with the plan of the first screen; a cap makes it wrong, and that is said."""
    lab = ElasticEngine.lab()
    small, large = lab.sizes[0].name, lab.sizes[-1].name
    for cap, right in ((128, True), (3, False)):
        ask = Ask((("user", STORIES_TASK.examples[0]),), small, large, max_thinking_tokens=cap)
        trace = list(follow(lab.stream(ask)))[-1]
        assert messages.is_right(trace, STORIES_TASK.solve(STORIES_TASK.examples[0])) is right
        assert bool(messages.cut_notice(trace.parts[0])) is not right


# -- the task ------------------------------------------------------------------------------------------------------------


def test_the_solution_is_the_labs():
    for problem in islice(problems("train", (1, 10), 1), 50):
        solution = STORIES_TASK.solve(problem.prompt)
        assert (solution.prompt, solution.thinking, solution.answer) == (
            problem.prompt,
            problem.thinking,
            problem.answer,
        )
        assert solution.right_parts(problem.answer) == len(solution.parts) == min(2, len(solution.worked))
        sums = [
            re.fullmatch(r"\w+: (?:(\d+) ([+-]) (\d+) = )?(\d+) coins.*", line).groups() for line in solution.worked
        ]
        for (*_, before), (had, sign, change, has) in zip(sums, sums[1:], strict=False):
            assert had == before
            assert int(has) == int(had) + int(sign + change)


def test_the_example_can_be_checked_by_hand():
    """What the first screen says about it, against the price list beside it."""
    assert SOLUTION.worked[1] == f"Tom: 7 + 4 = 11 coins; in the toy shop that buys a {PRICES['toy shop', 11]}"
    assert (11, PRICES["toy shop", 11]) in STORIES_TASK.sheet(SOLUTION.prompt).entries
    for prompt in STORIES_TASK.examples:
        entries = dict(STORIES_TASK.sheet(prompt).entries)
        for line in STORIES_TASK.solve(prompt).worked[-2:]:
            coins, thing = re.search(r"(\d+) coins; in the .* that buys a (.*)", line).groups()
            assert entries[int(coins)] == thing
    assert all(line in STORIES_TASK.intro for line in STORIES_TASK.solve(STORIES_TASK.examples[0]).worked)
    assert STORIES_TASK.sheet("Mia has 7") is None


# -- comparison ----------------------------------------------------------------------------------------------------------


def test_the_difference_counts_compute():
    cheap, dear = run(), run()
    dear.parts[0].budget = "L"
    active = {size.name: size.active_params for size in ENGINE.sizes}
    assert comparison.compute(cheap, ENGINE.sizes) == 48 * active["XS"] + 12 * active["L"]
    ratio = 60 * active["L"] / (48 * active["XS"] + 12 * active["L"])
    assert f"A did {1 / ratio:.0%} of B&#x27;s work" in comparison.difference(cheap, dear, ENGINE.sizes)
    assert "Both gave the same answer." in comparison.difference(cheap, dear, ENGINE.sizes)
    dear.parts[1].text += "!"
    assert "The answers differ" in comparison.difference(cheap, dear, ENGINE.sizes)
    dear.parts[0].budget = "hidden=40"  # sizes without a name: nothing is made up
    assert "did" not in comparison.difference(cheap, dear, ENGINE.sizes)
    assert 'data-state="idle"' in comparison.difference(None, None, [])


RIGHT, WRONG = SOLUTION.answer, WRONG_SECOND
SMALL, LARGE = ("XS", "L"), ("L", "L")


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ((RIGHT, SMALL, 1.0), (RIGHT, LARGE, 2.0), "A gained: the same answer, faster and with less work."),
        ((RIGHT, LARGE, 2.0), (RIGHT, SMALL, 1.0), "B gained: the same answer, faster and with less work."),
        ((RIGHT, SMALL, 2.0), (RIGHT, LARGE, 1.0), "B, the larger plan, was faster"),
        ((RIGHT, SMALL, 1.0), (RIGHT, LARGE, 1.01), "Nothing was gained in time: A did less work and took as long."),
        (
            (WRONG, SMALL, 1.0),
            (RIGHT, LARGE, 2.0),
            "B, the larger plan, was worth its work: only its answer is right.",
        ),
        ((RIGHT, SMALL, 2.0), (WRONG, LARGE, 1.0), "A gained: the right answer with less work."),
        ((WRONG, SMALL, 1.0), (WRONG, LARGE, 2.0), "Nothing was gained: neither plan has the right answer."),
        ((None, SMALL, 1.0), (RIGHT, LARGE, 2.0), "B, the larger plan, was worth its work"),
        ((RIGHT, SMALL, 1.0), (RIGHT, SMALL, 2.0), "Both plans are the same: what differs is chance."),
        ((RIGHT, SMALL, 1.0), (RIGHT, ("L", "XS"), 2.0), "Both plans did the same work."),
    ],
)
def test_a_comparison_says_who_gained(a, b, said):
    traces = [written(SOLUTION.thinking, answer, sizes, seconds, ("eos",) if answer is None else ("marker", "eos"))
              for answer, sizes, seconds in (a, b)]  # fmt: skip
    html = comparison.difference(*traces, ENGINE.sizes, SOLUTION)
    assert f"<b>{said}" in html


def test_where_nothing_is_known_to_be_right_the_visitor_judges():
    html = comparison.difference(written("t", "one"), written("t", "two", LARGE, 2.0), ENGINE.sizes)
    assert "A was faster with less work; whether its answer is as good is for you to say." in html
    assert "A took 1.00 s and wrote 20 tokens, B 2.00 s and 20." in html


def test_the_clock_is_the_shortest_of_all_runs():
    """A's one slow run does not count against it; with one run each that is said."""
    a, b = written(SOLUTION.thinking, RIGHT, SMALL, 9.0), written(SOLUTION.thinking, RIGHT, LARGE, 2.0)
    assert "<b>B, the larger plan, was faster" in comparison.difference(a, b, ENGINE.sizes, SOLUTION)
    again = comparison.difference(a, b, ENGINE.sizes, SOLUTION, [[1.0, 5.0], [2.5, 3.0]])
    assert "<b>A gained: the same answer, faster and with less work." in again
    assert "A took 1.00 s and wrote 20 tokens, B 2.00 s and 20." in again
    assert "The shortest of 3 runs each, in turns." in again


def test_a_stopped_comparison_is_none():
    stopped = run(until=20)
    stopped.stop()
    assert 'data-state="stopped"' in comparison.difference(run(), stopped, ENGINE.sizes)
