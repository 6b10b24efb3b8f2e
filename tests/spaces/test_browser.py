"""The Space as a visitor sees it, in headless Chromium, with the engine that needs no model.

States are waited for, never times: everything of ours has an `elem_id`, and cards say `data-state`.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("gradio")
pytest.importorskip("playwright")
pytest.importorskip("axe_playwright_python")

import axe_playwright_python
from playwright.sync_api import BrowserContext, Page, expect, sync_playwright
from space_tools import LOOPBACK, wait_until

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync"]
PATIENCE = 20_000  # milliseconds; on a busy machine
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def browser(chromium) -> Iterator[BrowserContext]:
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=chromium, headless=True, args=ARGUMENTS, viewport={"width": 1280, "height": 860}
        )
        context.set_default_timeout(PATIENCE)
        yield context
        context.close()


@pytest.fixture
def visitor(browser, served) -> Iterator[Any]:
    """Opens pages, and fails if any of them asked another machine for something or wrote an error to its console."""
    faults: list[str] = []
    kept_in: list[str] = []
    pages: list[Page] = []

    def open_page(where: Any = served) -> Page:
        page = browser.new_page()
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("requestfinished", lambda request: went(request.url, None))
        page.on("requestfailed", lambda request: went(request.url, request.failure))
        page.goto(where.url)
        page.locator("#msg textarea").wait_for()
        pages.append(page)
        return page

    def went(url: str, failure: str | None) -> None:
        if urlsplit(url).scheme in ("http", "https") and urlsplit(url).hostname not in LOOPBACK:
            (kept_in if failure == "csp" else faults).append(url)

    yield SimpleNamespace(open=open_page, faults=faults, kept_in=kept_in)
    for page in pages:
        page.close()
    wait_until(lambda: served.engine.running == 0)
    served.engine.sleep = 0.005
    assert faults == []


def ask(page: Page, text: str) -> None:
    expect(page.locator("#msg .submit-button")).to_be_visible()  # nothing runs
    page.locator("#msg textarea").fill(text)
    page.locator("#msg textarea").press("Enter")


def state(page: Page, phase: str, panel: str = "panel") -> Any:
    return page.locator(f"#{panel} [data-phase={phase}]")


def another_request(served: Any) -> None:
    """Somebody else's, through the API; it runs or waits when this returns."""
    body = json.dumps({"data": ["others", "XS", "L", 20, 2, 0.0, 0]}).encode()
    urlopen(Request(f"{served.url}gradio_api/call/generate", body, {"Content-Type": "application/json"})).read()
    wait_until(lambda: served.engine.running)


def test_both_phases_stream_and_the_thought_opens(visitor, served):
    page = visitor.open()
    served.engine.sleep = 0.03
    ask(page, "Why is the sky blue?")
    expect(state(page, "thinking")).to_have_attribute("data-state", "running")
    expect(state(page, "answering")).to_have_attribute("data-state", "idle")
    expect(page.locator("#msg .stop-button")).to_be_visible()
    expect(state(page, "answering")).to_have_attribute("data-state", "done")
    expect(page.locator("#panel [data-tokens]")).to_have_text(["XS 48", "L 12"])
    expect(page.locator("#msg .submit-button")).to_be_visible()
    assert served.engine.most == 1
    expect(page.locator("#chat")).to_contain_text("48 tokens")
    before = page.locator("#chat").inner_text()
    page.locator("#chat").get_by_text("Thinking by XS").click()
    wait_until(lambda: len(page.locator("#chat").inner_text()) > len(before) + 40, page)


def test_a_stop_while_running_and_one_while_waiting(visitor, served):
    """Two visitors: the second one's request waits behind the first one's, is stopped there, and never reaches the engine."""
    served.engine.sleep = 0.2
    first, second = visitor.open(), visitor.open()
    ask(first, "one one one")
    expect(state(first, "thinking")).to_have_attribute("data-state", "running")
    ask(second, "two two two")
    expect(second.locator("#msg .stop-button")).to_be_visible()
    expect(second.locator("#chat")).to_contain_text("queue:")
    second.locator("#msg .stop-button").click()
    served.engine.most = 0
    first.locator("#msg .stop-button").click()
    expect(state(first, "thinking")).to_have_attribute("data-state", "stopped")
    expect(first.locator("#chat")).to_contain_text("Stopped.")
    expect(second.locator("#chat")).to_contain_text("Stopped before it began.")
    assert served.engine.most == 0
    for page in (first, second):
        expect(page.locator("#msg .submit-button")).to_be_visible()
        assert page.locator("#chat .error").count() == 0
    served.engine.sleep = 0.005
    ask(second, "three")  # the next one is served, and nobody sees another's words
    expect(state(second, "answering")).to_have_attribute("data-state", "done")
    assert "one" not in second.locator("#chat").inner_text()


def test_a_full_queue_is_said(visitor, served):
    """One runs and four wait; the visitor after them is told, can go on writing, and is served later."""
    page = visitor.open()
    served.engine.sleep = 0.5
    for _ in range(5):
        another_request(served)
    ask(page, "late")
    expect(page.locator("#chat")).to_contain_text("Queue is full")
    expect(page.locator("#msg textarea")).to_have_value("late")  # not lost, and can be sent again
    expect(page.locator("#msg .submit-button")).to_be_visible()
    page.get_by_role("tab", name="Compare").click()
    page.locator("#go").click()
    expect(page.locator("#difference [data-state]")).to_have_attribute("data-state", "refused")
    page.get_by_role("tab", name="Chat").click()
    served.engine.sleep = 0
    wait_until(lambda: served.engine.running == 0 and not served.space.is_full(), page)
    page.locator("#msg .submit-button").click()
    expect(state(page, "answering")).to_have_attribute("data-state", "done")
    expect(page.locator("#chat")).to_contain_text("late")


def test_a_closed_tab_frees_the_engine(visitor, served):
    served.engine.sleep = 0.2  # the whole would take 12 seconds
    page = visitor.open()
    ask(page, "anybody there")
    expect(state(page, "thinking")).to_have_attribute("data-state", "running")
    page.close()
    wait_until(lambda: served.engine.running == 0, seconds=10)
    assert len(served.space.flags) == 0


def test_compare_runs_one_plan_after_the_other(visitor, served):
    page = visitor.open()
    page.get_by_role("tab", name="Compare").click()
    served.engine.most, served.engine.sleep = 0, 0.03
    another_request(served)  # the comparison waits for it: everything that touches the model is one queue
    page.locator("#go").click()
    wait_until(lambda: served.engine.running == 0, page)
    served.engine.sleep = 0.005
    expect(page.locator("#difference [data-state]")).to_have_attribute("data-state", "done")
    expect(page.locator("#difference")).to_contain_text("of B's work")
    assert served.engine.most == 1
    for side, budgets in (("a", ["XS 48", "L 12"]), ("b", ["L 48", "L 12"])):
        expect(page.locator(f"#panel-{side} [data-tokens]")).to_have_text(budgets)
        expect(page.locator(f"#chat-{side}")).to_contain_text("Why is the sky blue?")
    served.engine.sleep = 0.2
    page.locator("#go").click()
    expect(state(page, "thinking", "panel-a")).to_have_attribute("data-state", "running")
    page.locator("#halt").click()
    expect(page.locator("#go")).to_be_visible()
    expect(page.locator("#chat-b")).to_contain_text("Stopped before it began.")


def test_a_point_of_the_chart_sets_the_plan(visitor):
    page = visitor.open()
    page.get_by_role("tab", name="Chart").click()
    page.locator("#chart [data-plan='3'] .pp-hit").click()
    for radio in ("#think", "#answer"):
        expect(page.locator(f"{radio} input:checked")).to_have_value("M")
    expect(page.locator("#panel")).to_contain_text("Thinking by M")
    expect(page.locator("#msg textarea")).to_be_visible()  # back in the chat
    page.get_by_text("More: token limits").click()
    expect(page.get_by_label("number input for Thinking tokens, at most")).to_have_value("32")
    page.get_by_role("tab", name="Chart").click()
    page.locator("#chart [data-plan='2']").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#think input:checked")).to_have_value("XS")
    page.locator("#examples").get_by_text("large does both").click()
    expect(page.locator("#msg textarea")).to_have_value("Write a limerick about a sled dog.")
    expect(page.locator("#think input:checked")).to_have_value("L")


def test_strange_input_is_shown_or_refused_and_the_next_is_served(visitor):
    page = visitor.open()
    page.evaluate("window.fired = 0")
    html = (
        "<img src=x onerror='window.fired=1'><script>window.fired=2</script> **bold** ![p](https://example.com/p.png)"
    )
    ask(page, html)
    expect(state(page, "answering")).to_have_attribute("data-state", "done")
    expect(page.locator("#chat")).to_contain_text("<script>window.fired=2</script>")
    assert page.evaluate("window.fired") == 0
    # the browser names the picture, twice or more, and does not fetch it
    wait_until(lambda: visitor.kept_in, page)
    assert set(visitor.kept_in) == {"https://example.com/p.png"}
    ask(page, "tab\tis fine, bell\x07is not")
    expect(page.locator("#chat")).to_contain_text("U+0007")
    page.locator("#msg textarea").press("Enter")
    expect(page.locator("#chat")).to_contain_text("The prompt is empty")
    ask(page, "past</think>it")
    expect(page.locator("#chat")).to_contain_text("past the thinking already")
    ask(page, "next")
    expect(page.locator("#chat")).to_contain_text("next", use_inner_text=True)
    expect(state(page, "answering")).to_have_attribute("data-state", "done")
    assert "Traceback" not in page.locator("body").inner_text()
    visitor.faults[:] = [fault for fault in visitor.faults if "Content Security Policy" not in fault]


def test_the_first_screen_explains_and_one_press_shows_the_idea(visitor, served_lab):
    """With the embedded family: an example that can be checked by hand is filled in, and what comes of it is judged."""
    page = visitor.open(where=served_lab)
    small, large = served_lab.space.small, served_lab.space.large
    expect(page.locator("header")).to_contain_text("you choose which size thinks about a question")
    task = served_lab.engine.task
    first = task.solve(task.examples[0])
    for line in first.worked:
        expect(page.locator("#chat")).to_contain_text(line)
    expect(page.locator("#prices h2")).to_have_text(task.sheet(first.prompt).title)
    expect(page.locator("#prices li")).to_have_count(19)
    expect(page.locator("#chat")).to_contain_text(f"Press ➤ to watch: {small} thinks, {large} answers.")
    expect(page.locator("#panel .pp-planned")).to_have_text(f"{small} thinks{large} answers")
    check_order_of_keys(page)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#chat")).to_contain_text(f"✓ Right. Answer by {large}")
    expect(page.locator("#chat")).to_contain_text(f"Thinking by {small}")
    expect(page.locator("#panel .pp-total")).to_contain_text("of work (parameters used × tokens written)")
    expect(page.locator("#prices h2")).to_have_text(task.sheet(first.prompt).title)  # also when the box is empty again
    ask(page, "hello there, what is this?")
    expect(page.locator("#chat")).to_contain_text("This small model cannot read that: a story has")
    own = "Zoe has 6 coins. Ben has 3 more than Zoe. All go to the pet shop. What can Zoe and Ben buy?"
    page.locator("#msg textarea").fill(own)
    expect(page.locator("#prices h2")).to_contain_text("pet shop")
    ask(page, own)
    expect(page.locator("#chat")).to_contain_text("Ben owns 9 coins, at the pet shop that buys a")
    page.get_by_text("More: token limits").click()
    page.get_by_label("number input for Thinking tokens, at most").fill("3")
    page.get_by_label("number input for Thinking tokens, at most").press("Tab")
    ask(page, first.prompt)
    expect(page.locator("#chat")).to_contain_text("The thinking was cut at its limit of 3 tokens")
    expect(page.locator("#chat")).to_contain_text("✗ Wrong.")
    page.get_by_role("button", name="New problem").click()
    expect(page.locator("#msg textarea")).to_have_value(re.compile(r"What can \w+ and \w+ buy\?$"))


@pytest.mark.slow
def test_everybody_can_read_and_press_every_tab(visitor, served_lab, tmp_path):
    """axe finds nothing serious on any tab, in light and dark; nothing is wider than a phone; the screenshots are for looking at."""
    page = visitor.open(where=served_lab)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#chat")).to_contain_text("✓ Right.")
    thought = page.locator("#chat").get_by_role("button", name="Thinking by").first
    expect(thought).to_have_attribute("aria-expanded", "false")
    thought.press(" ")  # by keyboard
    expect(thought).to_have_attribute("aria-expanded", "true")
    ask(page, "no problem?")
    expect(page.locator("#chat")).to_contain_text("cannot read that")
    page.get_by_text("More: token limits").click()
    page.get_by_text("What does the problem mean?").click()
    page.get_by_role("tab", name="Compare").click()
    page.locator("#go").click()
    expect(page.locator("#difference [data-state]")).to_have_attribute("data-state", "done")
    page.set_viewport_size({"width": 390, "height": 844})
    page.evaluate((Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = []
    for tab in ("Chat", "Compare", "Chart", "How it works"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
        found += page.evaluate(SERIOUS, ["light", tab == "Chat"])  # the rest of the page is the same on the other tabs
        page.screenshot(path=tmp_path / f"{tab}.png", full_page=True)
        found += page.evaluate(SERIOUS, ["dark", tab == "Chat"])
    assert found == []


SERIOUS = """async ([theme, whole]) => {  // rule, place and message; dark differs by its colours only
    document.body.classList.toggle('dark', theme == 'dark');
    const rules = theme == 'dark' ? {runOnly: ['color-contrast']} : {};
    const tab = [...document.querySelectorAll('[role=tabpanel]')].find(panel => panel.checkVisibility());
    const found = await axe.run(whole ? document : tab, {resultTypes: ['violations'], iframes: false, preload: false, ...rules});
    return found.violations.filter(rule => ['serious', 'critical'].includes(rule.impact)).flatMap(
        rule => rule.nodes.map(node => [theme, rule.id, node.html.slice(0, 200), node.failureSummary]));
}"""


def check_order_of_keys(page: Page) -> None:
    """The tab key goes through the page in the order that it is read in: every stop has a name, and none is above the last one of its column."""
    stops = []
    for _ in range(14):
        page.keyboard.press("Tab")
        stops.append(page.evaluate(FOCUSED))
    assert [name for name, _, _ in stops][:8] == [
        *("Chat", "Compare", "Chart", "How it works", "Question", "Send", "New problem", "What does the problem mean?")
    ]
    assert all(name for name, _, _ in stops)
    for left in (True, False):
        heights = [y for _, x, y in stops[4:] if (x < 700) is left]
        assert heights == sorted(heights)


FOCUSED = """() => {
    const e = document.activeElement, box = e.getBoundingClientRect();
    const label = e.getAttribute('aria-label') || e.innerText || e.closest('label')?.innerText || '';
    return [label.trim().split('\\n')[0], box.x, Math.round(box.y + scrollY)];
}"""
