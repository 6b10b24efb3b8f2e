"""The served Space from programs: its API, its queue, MCP, and app.py itself."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
from space_tools import SPACE, made_up_points, wait_until

pytest.importorskip("gradio")
pytest.importorskip("mcp")

from gradio_client import Client
from gradio_client.exceptions import AppError
from gradio_client.utils import QueueError

from hf_elastic.lab.stories import PRICES, SHOPS, problems
from hf_elastic.lab.tasks import get_task
from phase_space import messages
from phase_space.asking import Ask
from phase_space.engine import ElasticEngine, load_engine
from phase_space.fake import FakeEngine
from phase_space.measurements import Measurements
from phase_space.visits import FAILED, Space

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
PLAN = ("XS", "L")


@pytest.fixture(autouse=True)
def _silent_client(monkeypatch):
    """gradio's client, which is not the Space, would ask the Hub."""
    for setting in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setattr(f"huggingface_hub.constants.{setting}", True)


@pytest.fixture
def client(served) -> Client:
    return Client(served.url, verbose=False)


def test_the_api_is_two_documented_endpoints(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(endpoints) == {"/generate", "/budgets"}
    described = {
        p["parameter_name"]: (p["python_type"]["type"], p["parameter_default"])
        for p in endpoints["/generate"]["parameters"]
    }
    assert described == {
        "prompt": ("str", None), "thinking": ("str", "XS"), "answering": ("str", "L"), "max_thinking_tokens": ("int", 512),
        "max_answer_tokens": ("int", 256), "temperature": ("float", 0.0), "seed": ("int", 0),
    }  # fmt: skip
    assert endpoints["/generate"]["returns"]
    assert "submodel" in endpoints["/generate"]["description"]
    assert [size["name"] for size in client.predict(api_name="/budgets")] == ["XS", "S", "M", "L"]


def test_generate_streams_both_phases(client):
    job = client.submit("alpha beta", api_name="/generate")
    seen = list(job)
    assert len(seen) > 2
    assert all(
        later["thinking"].startswith(earlier["thinking"]) for earlier, later in zip(seen, seen[1:], strict=False)
    )
    last = seen[-1]
    assert last["done"]
    assert not any(state["done"] for state in seen[:-2])
    assert [(p["budget"], p["generated_tokens"], p["reason"]) for p in last["phases"]] == [
        ("XS", 48, "marker"),
        ("L", 12, "eos"),
    ]
    assert client.predict("alpha beta", "S", "M", 5, 3, api_name="/generate")["phases"][0]["budget"] == "S"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "empty"),
        (("x", "XXL"), "unknown budget 'XXL'"),
        (("x", *PLAN, 0), "at least 1"),
        (("a\x00b",), "control"),
    ],
    ids=["empty", "budget", "cap", "control"],
)
def test_errors_are_messages_and_the_next_request_is_served(client, caplog, capfd, arguments, message):
    with pytest.raises(AppError, match=message):
        client.submit(*arguments, api_name="/generate").result(timeout=20)
    assert client.predict("next", *PLAN, 2, 2, api_name="/generate")["done"]
    assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_ten_at_once_are_served_or_told_that_the_queue_is_full(served):
    """One runs, four may wait; each that is served has its own words and nobody else's."""
    served.engine.most = 0
    clients = [Client(served.url, verbose=False) for _ in range(10)]
    words = [f"secret{i}" for i in range(10)]
    jobs = [c.submit(word, *PLAN, 40, 12, api_name="/generate") for c, word in zip(clients, words, strict=True)]
    results = []
    for job in jobs:
        try:
            results.append(job.result(timeout=60))
        except (AppError, QueueError) as error:
            results.append(str(error))
    full = [result for result in results if isinstance(result, str)]
    assert all("Queue is full" in message for message in full)
    assert 1 <= len(full) <= 6  # at least those beyond one that runs and four that wait, unless one was done early
    for word, result in zip(words, results, strict=True):
        if not isinstance(result, str):
            text = result["thinking"] + result["answer"]
            assert text.count(word) == 13  # every fourth of 40 and of 12
            assert not [other for other in words if other != word and other in text]
    assert served.engine.most == 1
    assert len(served.space.flags) == 0


def test_a_client_that_goes_away_frees_the_engine(served, client):
    served.engine.sleep = 0.2  # of a token: the whole would take 12 seconds
    try:
        job = client.submit("a b c", api_name="/generate")
        wait_until(lambda: served.engine.running == 1)
        job.cancel()
        wait_until(lambda: served.engine.running == 0, seconds=10)
    finally:
        served.engine.sleep = 0.005
    assert client.predict("next", *PLAN, 2, 2, api_name="/generate")["done"]


def test_mcp_answers(served):
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def talk():
        async with (
            streamablehttp_client(f"{served.url}gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            [generate] = [tool for name, tool in tools.items() if name.endswith("generate")]
            result = await session.call_tool(generate.name, {"prompt": "hello agent", "max_thinking_tokens": 4})
            return tools, generate, "".join(part.text for part in result.content)

    tools, generate, text = asyncio.run(talk())
    assert len(tools) == 2
    assert "submodel" in generate.description
    assert "Cap on the thinking" in generate.inputSchema["properties"]["max_thinking_tokens"]["description"]
    assert "hello" in text
    assert "answer" in text


# -- without a server ----------------------------------------------------------------------------------------------------


def test_the_chat_on_the_real_engine():
    """A turn, an error, the next turn; the thought closes and the answer is the solution."""
    space = Space(ElasticEngine.lab())
    problem = next(problems("heldout", 3, 1))
    settings = ("half", "full", 64, 64, 0.0, 0)
    *growing, (history, panel) = space.chat([messages.question(problem.prompt)], *settings)
    assert [message["role"] for message in history] == ["user", "assistant", "assistant", "assistant"]
    assert (history[1]["content"], history[2]["content"]) == (problem.thinking, problem.answer)
    assert history[3]["metadata"]["title"] == "✓ Right. Answer by full"
    assert panel.count('data-state="done"') == 2
    assert growing
    *_, (refused, _) = space.chat([*history, messages.question("<b>hi</b>")], *settings)
    assert "cannot read that" in refused[-1]["content"]
    *_, (history, _) = space.chat([*refused, messages.question(problem.prompt)], *settings)
    assert history[-2]["content"] == problem.answer
    assert space.arm(" \n", refused, 3)[2] == 3  # nothing to run
    assert len(space.flags) == 0
    *_, (a, _, b, _, line) = space.compare(problem.prompt, "half", "full", "full", "full", 64, 64, 0.0, 0)
    assert a[-2]["content"] == b[-2]["content"] == problem.answer
    assert "Both answers are right." in line
    assert "The shortest of 3 runs each, in turns." in line
    *_, (a, _, _, _, line) = space.compare(" hi ", "half", "full", "full", "full", 64, 64, 0.0, 0)
    assert "This small model cannot read that" in a[-1]["content"]
    assert 'data-state="idle"' in line


def test_short_runs_are_timed_again_in_turns_and_long_ones_are_not(monkeypatch):
    """Two more of each, and the order alternates; a stop ends it."""
    space, asked = Space(FakeEngine(sleep=0)), []
    stream = space.stream
    space.stream = lambda ask: (asked.append(ask.thinking), stream(ask))[1]
    plans = ("XS", "L", "L", "L")
    *_, (*_, before), (*_, line) = space.compare("why is it", *plans, 8, 8, 0.0, 0)
    assert 'data-state="timing"' in before
    assert "The shortest of 3 runs each" in line
    assert asked == ["XS", "L", "L", "XS", "XS", "L"]
    monkeypatch.setattr("phase_space.visits.SHORT", 0.0)
    *_, (*_, line) = space.compare("why is it", *plans, 8, 8, 0.0, 0)
    assert len(asked) == 8
    assert "One run each" in line


def test_the_size_that_thinks_at_first_is_the_least_that_leaves_answers_right():
    """By the measurements; without those of the largest alone it is the smallest."""
    engine = FakeEngine(sleep=0)
    assert Space(engine).small == "XS"
    [point] = [p for p in made_up_points() if p["answering"] == "L"]
    points = [point | {"thinking": name, "accuracy": accuracy, "cost": cost}
              for name, accuracy, cost in (("XS", 0.90, 1), ("S", 0.96, 2), ("M", 0.97, 3), ("L", 0.965, 4))]  # fmt: skip
    assert Space(engine, Measurements(points)).small == "S"
    assert Space(engine, Measurements(points[:3])).small == "XS"


def test_the_price_list_follows_the_question():
    """Of the shop that is written; where none is, the list that is there stays."""
    space = Space(ElasticEngine.lab())
    for shop in SHOPS:
        html = space.prices(f"They go to the {shop}")
        assert f"What the {shop} sells" in html
        assert html.count("<li>") == 19
        assert f"<b>20</b> {PRICES[shop, 20]}</li>" in html
    assert not isinstance(space.prices("Mia has 7"), str)


def test_a_stop_that_comes_too_late_stops_no_other_run():
    space, visitor = Space(FakeEngine(sleep=0)), SimpleNamespace(session_hash="a")
    asked, settings = [messages.question("why is it")], ("XS", "L", 8, 8, 0.0, 0, visitor)
    space.arm("why is it", [], 0, visitor)
    list(space.chat(asked, *settings))
    space.stop(visitor)
    space.stop_compare(visitor)
    assert len(space.flags) == 0
    space.arm("why is it", [], 1, visitor)
    space.arm_compare("why is it", 0, visitor)
    assert not space.flags.get(visitor, "chat").is_set()
    assert not space.flags.get(visitor, "compare").is_set()
    *_, (_, panel) = space.chat(asked, *settings)
    assert panel.count('data-state="done"') == 2
    space.stop_compare(visitor)  # in time
    assert space.flags.get(visitor, "compare").is_set()


def test_a_bug_is_not_shown_to_visitors(caplog):
    engine = ElasticEngine.lab()

    def broken(ask):
        yield from ()
        raise RuntimeError("secret detail")

    space = Space(engine, stream=broken)
    with caplog.at_level(logging.ERROR):
        *_, (history, _) = space.chat([messages.question(engine.task.examples[0])], "full", "full", 8, 8, 0.0, 0)
    assert history[-1]["content"] == FAILED
    assert "secret detail" in caplog.text


def load_app(monkeypatch, package):
    """app.py under a name of its own, with this in place of the package `spaces`."""
    monkeypatch.setenv("PHASE_ENGINE", "fake")
    monkeypatch.setitem(sys.modules, "spaces", package)
    spec = importlib.util.spec_from_file_location("phase_plans_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_app_borrows_a_gpu_on_zerogpu(monkeypatch):
    """Per request, for the time that it says it takes; not for one that is refused."""
    borrowed = []

    def decorate(duration):
        def wrap(function):
            def run(ask):
                borrowed.append(duration(ask))
                yield from function(ask)

            return run

        return wrap

    module = load_app(monkeypatch, SimpleNamespace(GPU=decorate))
    module.engine.sleep = 0
    space = module.demo.space
    *_, (history, _) = space.chat([messages.question("hello")], "S", "XXL", 100, 100, 0.0, 0)
    assert "unknown budget 'XXL'" in history[-1]["content"]
    assert borrowed == []
    *_, (history, _) = space.chat([messages.question("hello")], "S", "L", 100, 100, 0.0, 0)
    assert history[-2]["content"].startswith("hello")
    assert borrowed == [20]


def test_app_runs_where_a_folder_passes_for_the_package(monkeypatch):
    module = load_app(monkeypatch, ModuleType("spaces"))
    assert not hasattr(sys.modules["spaces"], "GPU")
    assert module.demo.space.engine.fake
    monkeypatch.setenv("PHASE_ENGINE", "feak")
    with pytest.raises(ValueError, match="'fake' or 'elastic'"):
        module.load_engine()


def test_any_elastic_repository_is_served(monkeypatch):
    """With its chat template, what was said before, and caps within its context."""
    monkeypatch.delenv("PHASE_ENGINE", raising=False)
    monkeypatch.setenv("PHASE_REPO", str(get_task("stories").family_folder))
    engine = load_engine()
    space = Space(engine)
    assert (engine.task, space.caps) == (None, (256, 256))
    problem = next(problems("heldout", 2, 1))
    history = [messages.question(problem.prompt)]
    for _ in range(2):
        *_, (history, _) = space.chat(history, "half", "full", *space.caps, 0.0, 0)
        history.append(messages.question(problem.prompt))
    assert history[2]["content"] == problem.answer
    asked = Ask(messages.said(history[:5]), "half", "full")
    text = engine.tokenizer.decode(engine._encode(asked)["input_ids"][0])
    assert (
        text
        == f"<|user|>{problem.prompt}<|assistant|>{problem.answer}<eos><|user|>{problem.prompt}<|assistant|><think>"
    )


def test_no_file_hides_the_package():
    assert not list(SPACE.parent.glob("__init__.py")) + list(SPACE.glob("__init__.py"))
