"""What is shown, as pure functions."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from space_tools import SPACE, made_up_points

from phase_space import chart, view
from phase_space.asking import Ask
from phase_space.engine import ElasticEngine
from phase_space.fake import FakeEngine
from phase_space.measurements import read_measurements
from phase_space.trace import Trace, follow

ENGINE = FakeEngine(sleep=0)
PLAN = {"thinking": "XS", "answering": "L"}


def run(until: int | None = None, **what) -> Trace:
    ask = Ask((("user", "why"),), **PLAN, **what)
    trace = Trace()
    for event in list(ENGINE.stream(ask))[:until]:
        trace.add(event)
    return trace


def test_messages_are_a_thought_and_an_answer():
    """The thought spins while it runs, has its counts from the same events, and is closed by the answer."""
    [thought] = view.messages(run(until=20))
    assert thought["metadata"]["status"] == "pending"
    assert "duration" not in thought["metadata"]
    whole = run()
    thought, answer = view.messages(whole)
    assert thought["metadata"]["title"] == "Thinking · XS"
    assert thought["metadata"]["status"] == "done"
    assert thought["metadata"]["log"].startswith("48 tokens")
    assert thought["metadata"]["duration"] == whole.parts[0].seconds
    assert answer == {"role": "assistant", "content": whole.parts[1].text}
    cut = run(until=20)
    cut.stop()
    thought, notice = view.messages(cut)
    assert thought["metadata"]["status"] == "done"  # nothing spins for ever
    assert notice["content"] == "Stopped."
    nothing = Trace()
    nothing.stop()
    assert [message["content"] for message in view.messages(nothing)] == ["Stopped before it began."]


def test_a_chat_is_read_back_without_thoughts_and_notices():
    text = "a < b && <b>c</b> &amp; `x`"
    history = [view.question(text), *view.messages(run()), view.notice("no"), view.question("next")]
    assert "<b>" not in history[0]["content"]
    as_gradio_keeps_it = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in history]
    for kept in (history, as_gradio_keeps_it):
        assert view.said(kept) == (("user", text), ("assistant", run().text("answering")), ("user", "next"))


@pytest.mark.parametrize(
    ("until", "states"), [(0, ("idle", "idle")), (20, ("running", "idle")), (None, ("done", "done"))]
)
def test_cards_have_states_for_everybody_to_wait_for(until, states):
    html = view.panel(run(until), ENGINE.sizes, PLAN)
    assert re.findall(r'data-phase="(\w+)" data-state="(\w+)"', html) == list(zip(PLAN, states, strict=True))
    assert "Weights held in memory: <b>4.40 GB</b>" in html  # the whole, whatever runs
    assert ("680.00 MB" in html, "4.40 GB</dd>" in html) == (True, True)
    assert ("KV and states" in html) == (until != 0)
    assert len(html) < 4000  # it is sent whole at every yield


def test_the_ribbon_is_to_scale():
    html = view.ribbon(run(), ENGINE.sizes)
    assert re.findall(r'data-tokens="(\d+)">([^<]*)<', html) == [("48", "XS 48"), ("12", "L 12")]
    assert re.findall(r"flex-grow:(\d+)", html) == ["48", "1", "12"]  # the start marker was inserted
    assert "pp-empty" in view.ribbon(None, ENGINE.sizes)


def test_names_are_escaped_everywhere():
    evil = '"><script>alert(1)</script>'
    sizes = [replace(ENGINE.sizes[0], name=evil), *ENGINE.sizes[1:]]
    trace = run()
    trace.parts[0].budget = trace.parts[0].name = trace.parts[0].handover = trace.parts[0].reason = evil
    point = made_up_points()[0] | {"thinking": evil}
    shown = [
        view.panel(trace, sizes, {evil: evil}),
        view.panel(None, sizes, {"thinking": evil}),
        view.ribbon(trace, sizes),
        chart.pareto_svg([point], sizes),
        chart.legend(sizes),
        chart.source(evil),
        view.notice(evil)["content"],
    ]
    assert not [html for html in shown if "<script>" in html]
    assert sum("&lt;script&gt;" in html for html in shown) == len(shown)


def test_the_difference_counts_compute():
    cheap, dear = run(), run()
    dear.parts[0].budget = "L"
    active = {size.name: size.active_params for size in ENGINE.sizes}
    assert view.compute(cheap, ENGINE.sizes) == 48 * active["XS"] + 12 * active["L"]
    ratio = 60 * active["L"] / (48 * active["XS"] + 12 * active["L"])
    assert f"{ratio:.0%} of A&#x27;s compute" in view.difference(cheap, dear, ENGINE.sizes)
    assert "the same answer" in view.difference(cheap, dear, ENGINE.sizes)
    dear.parts[1].text += "!"
    assert "another answer" in view.difference(cheap, dear, ENGINE.sizes)
    dear.parts[0].budget = "hidden=40"  # sizes without a name: nothing is made up
    assert "compute" not in view.difference(cheap, dear, ENGINE.sizes)
    assert 'data-state="idle"' in view.difference(None, None, [])


def test_the_chart_has_every_measured_plan_and_no_other():
    """The front is what nothing beats; positions rise with price and accuracy."""
    points = made_up_points()
    svg = chart.pareto_svg(points, ENGINE.sizes)
    assert sorted(re.findall(r'data-plan="(\d)"', svg)) == ["0", "1", "2", "3"]
    assert re.findall(r'pp-best[^"]*" data-plan="(\d)"', svg) == ["0", "2", "3"]
    assert "M → M, ≤ 32" in svg
    places = {
        i: (float(x), float(y))
        for i, x, y in re.findall(r'data-plan="(\d)".*?pp-hit" cx="([\d.]+)" cy="([\d.]+)"', svg)
    }
    assert sorted(places, key=lambda i: places[i][0]) == ["0", "1", "2", "3"]  # from cheap to dear
    assert sorted(places, key=lambda i: -places[i][1]) == ["1", "0", "2", "3"]  # upwards
    assert chart.axes_of(points) == ["cost"]  # nobody timed them
    assert "been measured" in chart.pareto_svg(points, ENGINE.sizes, "seconds")
    assert all(f">{chart.plan_name(point)}</text>" in svg for point in points)
    close = [points[2] | {"cost": 20 + i, "accuracy": 0.8 + i / 1000} for i in range(3)]
    far = points[3] | {"cost": 400}
    svg = chart.pareto_svg(
        [points[0], *close, far], ENGINE.sizes
    )  # three names would cover each other: the best one has its
    assert sorted(re.findall(r'pp-best pp-named" data-plan="(\d)"', svg)) == ["0", "3", "4"]
    timed = [point | {"seconds": 1.5} for point in points]
    assert chart.axes_of(timed) == ["cost", "seconds"]
    assert re.findall(r'pp-best[^"]*" data-plan="(\d)"', chart.pareto_svg(timed, ENGINE.sizes, "seconds")) == ["3"]


def test_the_shipped_measurements_are_of_the_shipped_model(tmp_path):
    """Costs hold against active parameters and tokens; points of other models are left out; a damaged file is refused."""
    sizes = {size.name: size for size in ElasticEngine.lab().sizes}
    file = SPACE / "data" / "measurements.json"
    measured = read_measurements(file, list(sizes))
    assert {(p["thinking"], p["answering"]) for p in measured.points} == {(a, b) for a in sizes for b in sizes}
    for point in measured.points:
        written = sizes[point["thinking"]].active_params * point["thinking_tokens"]
        written += sizes[point["answering"]].active_params * point["answer_tokens"]
        assert written <= point["cost"] <= 1.2 * written  # what is read is added, at a 16th each
        assert 0 <= point["accuracy"] <= 1
        if point["max_thinking_tokens"]:
            assert point["thinking_tokens"] <= point["max_thinking_tokens"]
    assert "task book" in measured.about
    only = read_measurements(file, ["quarter"]).points
    assert only == [p for p in measured.points if p["thinking"] == p["answering"] == "quarter"]
    damaged = tmp_path / "m.json"
    damaged.write_text(json.dumps({"points": [{"thinking": "full"}]}))
    with pytest.raises(ValueError, match="point 0 lacks plan, answering"):
        read_measurements(damaged, list(sizes))
    damaged.write_text("[]")
    with pytest.raises(ValueError, match="plans.json of hf-elastic evaluate"):
        read_measurements(damaged, list(sizes))


def test_a_followed_run_is_shown_a_few_times_only():
    """Yields are bounded by time and phases, not by tokens."""
    ask = Ask((("user", "why"),), **PLAN)
    assert len(list(follow(ENGINE.stream(ask)))) <= 6
