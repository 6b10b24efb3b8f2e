"""What is shown, as pure functions."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from space_tools import SPACE, made_up_points

from phase_space import chart, messages, view
from phase_space.asking import Ask
from phase_space.engine import ElasticEngine
from phase_space.fake import FakeEngine
from phase_space.measurements import read_measurements
from phase_space.trace import Trace, follow

ENGINE = FakeEngine(sleep=0)
LAB_SIZES = ElasticEngine.lab().sizes
PLAN = {"thinking": "XS", "answering": "L"}


def run(until: int | None = None, **what) -> Trace:
    ask = Ask((("user", "why"),), **PLAN, **what)
    trace = Trace()
    for event in list(ENGINE.stream(ask))[:until]:
        trace.add(event)
    return trace


@pytest.mark.parametrize(
    ("until", "states"), [(0, ("idle", "idle")), (20, ("running", "idle")), (None, ("done", "done"))]
)
def test_cards_have_states_for_everybody_to_wait_for(until, states):
    html = view.panel(run(until), ENGINE.sizes, PLAN)
    assert re.findall(r'data-phase="(\w+)" data-state="(\w+)"', html) == list(zip(PLAN, states, strict=True))
    assert "takes <b>4.40 GB</b> of memory whichever size runs" in html  # the whole, whatever runs
    assert ("680.00 MB" in html, "4.40 GB</dd>" in html) == (True, True)
    assert ("memory of the text" in html) == (until != 0)
    assert len(html) < 4000  # it is sent whole at every yield


def test_the_ribbon_is_to_scale():
    html = view.ribbon(run(), ENGINE.sizes, PLAN)
    assert re.findall(r'data-tokens="(\d+)">([^<]*)<', html) == [("48", "XS 48"), ("12", "L 12")]
    assert re.findall(r"flex-grow:(\d+)", html) == ["48", "1", "12"]  # the start marker was inserted
    assert 'aria-label="Who wrote which tokens: Thinking by XS, 48, Answer by L, 12"' in html


def test_before_a_run_the_panel_says_who_is_to_write():
    html = view.panel(None, ENGINE.sizes, PLAN)
    assert re.findall(r'flex-grow:1" >([^<]*)<', html) == ["XS thinks", "L answers"]
    assert "Who is to write: Thinking by XS, Answer by L" in html


@pytest.mark.parametrize(("handover", "said"), [("reprefill", "re-read by L"), ("cache", "kept as it is")])
def test_a_card_says_what_became_of_the_text_so_far(handover, said):
    trace = run()
    trace.parts[1].handover = handover
    html = view.panel(trace, ENGINE.sizes, PLAN)
    assert f"<dt>the text so far</dt><dd>{said}</dd>" in html
    assert html.count("the text so far") == 1  # not of the first


def test_names_are_escaped_everywhere():
    evil = '"><script>alert(1)</script>'
    sizes = [replace(ENGINE.sizes[0], name=evil), *ENGINE.sizes[1:]]
    trace = run()
    trace.parts[0].budget = trace.parts[0].name = trace.parts[0].handover = trace.parts[0].reason = evil
    point = made_up_points()[0] | {"thinking": evil}
    shown = [
        view.panel(trace, sizes, {evil: evil}),
        view.panel(None, sizes, {"thinking": evil}),
        view.ribbon(trace, sizes, {}),
        view.ribbon(None, sizes, {evil: evil}),
        chart.pareto_svg([point], sizes),
        chart.legend(sizes),
        chart.source(evil),
        messages.notice(evil)["content"],
    ]
    assert not [html for html in shown if "<script>" in html]
    assert sum("&lt;script&gt;" in html for html in shown) == len(shown)


def test_the_chart_has_every_measured_plan_and_no_other():
    """The front is what nothing beats; positions rise with price and accuracy."""
    points = made_up_points()
    svg = chart.pareto_svg(points, ENGINE.sizes)
    assert sorted(re.findall(r'data-plan="(\d)"', svg)) == ["0", "1", "2", "3"]
    assert re.findall(r'pp-best[^"]*" data-plan="(\d)"', svg) == ["0", "2", "3"]
    assert "M → M, ≤ 32" in svg
    places = {
        i: (float(x), float(y)) for x, y, i in re.findall(r'<svg x="([\d.]+)%" y="([\d.]+)".*?data-plan="(\d)"', svg)
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
    assert ("XS thinks, L answers: 80.0% right" in svg, "Press to use it" in svg) == (True, True)
    timed = [point | {"seconds": 1.5} for point in points]
    assert chart.axes_of(timed) == ["cost", "seconds"]
    assert re.findall(r'pp-best[^"]*" data-plan="(\d)"', chart.pareto_svg(timed, ENGINE.sizes, "seconds")) == ["3"]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (10.2, 94.4, [0, 20, 40, 60, 80, 100]),
        (0.433, 1.0, [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        (0.97, 1.0, [0.97, 0.98, 0.99, 1.0]),
        (0.98, 1.0, [0.98, 0.985, 0.99, 0.995, 1.0]),
        (5, 5, [5, 6, 7, 8, 9, 10]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (1234, 5678, [1000, 2000, 3000, 4000, 5000, 6000]),
    ],
)
def test_ticks_are_round_and_hold_everything(low, high, ticks):
    found = chart.round_ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert found == pytest.approx(ticks)


def test_the_chart_has_no_width_of_its_own():
    """Across, everything is in per cent: it fits any screen; names that are shown fit a phone."""
    points = read_measurements(SPACE / "data" / "measurements.json", [s.name for s in LAB_SIZES]).points
    svg = chart.pareto_svg(points, LAB_SIZES)
    assert "viewBox" not in svg
    close = [points[0] | {"accuracy": a, "cost": c} for a, c in ((0.98, 1e6), (1.0, 2e6))]
    assert re.findall(r">([\d.]+%)</text>", chart.pareto_svg(close, LAB_SIZES)) == [
        "98%",
        "98.5%",
        "99%",
        "99.5%",
        "100%",
    ]
    assert re.findall(r'<(?:svg|line|text)[^>]* x\d?="([^"%]+)"', re.sub(r'x="-\d+"', "", svg)) == []
    for x, name in re.findall(r'<svg x="([\d.]+)%[^>]*><g class="[^"]*pp-named.*?pp-label"[^>]*>([^<]*)<', svg):
        left = float(x) / 100 * chart.NARROW
        assert (6.5 * len(name) <= left) if float(x) > 50 else (left + 6.5 * len(name) <= chart.NARROW + 20)


def test_the_legend_says_what_can_be_done():
    html = chart.legend(ENGINE.sizes)
    assert "Press a point" in html
    assert "left half has the colour of the size that thinks" in html


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
    assert "task stories" in measured.about
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
