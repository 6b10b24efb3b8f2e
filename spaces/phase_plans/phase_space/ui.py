"""The user interface and the API, for any [`Engine`]."""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported: it would look up names at once

import gradio as gr

from hf_elastic import HFElasticError, __version__

from . import chart, view
from .asking import Ask, TextEvent
from .engine import Engine
from .measurements import Measurements
from .pages import HEAD, POINT_CLICK, about, banner, header
from .trace import Trace, follow

logger = logging.getLogger(__name__)

Stream = Callable[[Ask], Generator[TextEvent, None, None]]
FAST: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
FULL = "Queue is full: too many requests are waiting. Try again in a moment."
FAILED = "Something went wrong here, not with your question. The next question will be run as usual."


class Flags:
    """One stop flag per visitor and tab; a flag lives from the press of the button to the end of the run."""

    def __init__(self) -> None:
        self._flags: dict[tuple[str, str], threading.Event] = {}

    def get(self, request: gr.Request | None, tab: str) -> threading.Event:
        return self._flags.setdefault((_session(request), tab), threading.Event())

    def drop(self, request: gr.Request | None, tab: str) -> None:
        self._flags.pop((_session(request), tab), None)

    def __len__(self) -> int:
        return len(self._flags)


def _session(request: gr.Request | None) -> str:
    return str(getattr(request, "session_hash", None))


class Space:
    """What the event handlers share.

    Args:
        engine ([`Engine`]): Described in the header and the cards.
        measurements ([`Measurements`], *optional*): Points of the chart.
        stream (`Callable`, *optional*): Runs a request; `engine.stream`, or the same on a borrowed GPU.
    """

    def __init__(self, engine: Engine, measurements: Measurements | None = None, stream: Stream | None = None):
        self.engine, self.stream = engine, stream or engine.stream
        self.measurements = measurements or Measurements()
        self.flags = Flags()
        self.demo: gr.Blocks | None = None
        self.names = [size.name for size in engine.sizes]
        self.small, self.large = self.names[0], self.names[-1]
        task = engine.task
        caps = (task.max_thinking_tokens, task.max_answer_tokens) if task else (512, 256)
        self.caps = (min(caps[0], engine.limit), min(caps[1], engine.limit))

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self, ask: Ask, stopped: threading.Event | None = None) -> Generator[Trace | str, None, None]:
        """Traces of a request as it grows; a text is a message that ends it."""
        try:
            with closing(follow(self.stream(ask), stopped.is_set if stopped else lambda: False)) as traces:
                yield from traces
        except HFElasticError as error:
            yield str(error)
        except Exception:  # a visitor gets a sentence, the log the traceback
            logger.exception("a request failed")
            yield FAILED

    def chat(
        self, history: list[Any], thinking: str, answering: str, cap: float, answer_cap: float, temperature: float,
        seed: float, request: gr.Request | None = None,
    ) -> Iterator[tuple[list[Any], str]]:  # fmt: skip
        """Answers the last message of the history."""
        plan = {"thinking": thinking, "answering": answering}
        try:
            settings: Any = _settings(cap, answer_cap, temperature, seed)
            ask = Ask(view.said(history), thinking, answering, **settings)
            trace: Trace | None = None
            for trace_or_text in self.run(ask, self.flags.get(request, "chat")):
                if isinstance(trace_or_text, str):
                    shown = view.messages(trace) if trace else []
                    yield history + shown + [view.notice(trace_or_text)], self.panel(trace, plan)
                else:
                    trace = trace_or_text
                    yield history + view.messages(trace), self.panel(trace, plan)
        finally:
            self.flags.drop(request, "chat")

    def compare(
        self, text: str, think_a: str, answer_a: str, think_b: str, answer_b: str, cap: float, answer_cap: float,
        temperature: float, seed: float, request: gr.Request | None = None,
    ) -> Iterator[tuple[list[Any], str, list[Any], str, str]]:  # fmt: skip
        """The same question to two plans, one after the other."""
        plans: list[Any] = [{"thinking": think_a, "answering": answer_a}, {"thinking": think_b, "answering": answer_b}]
        settings: Any = _settings(cap, answer_cap, temperature, seed)
        chats: list[list[Any]] = [[view.question(text)], [view.question(text)]]
        traces: list[Trace | None] = [None, None]
        flag = self.flags.get(request, "compare")

        def state() -> tuple[list[Any], str, list[Any], str, str]:
            panels = [self.panel(trace, plan) for trace, plan in zip(traces, plans, strict=True)]
            line = view.difference(traces[0] if finished else None, traces[1], self.engine.sizes)
            return chats[0], panels[0], chats[1], panels[1], line

        finished = False
        try:
            for side, plan in enumerate(plans):
                ask = Ask((("user", text),), **plan, **settings)
                for trace_or_text in self.run(ask, flag):
                    if isinstance(trace_or_text, str):
                        chats[side] = [*chats[side], view.notice(trace_or_text)]
                    else:
                        traces[side] = trace_or_text
                        chats[side] = [view.question(text), *view.messages(trace_or_text)]
                    yield state()
            finished = True
            yield state()
        finally:
            self.flags.drop(request, "compare")

    # -- small handlers ------------------------------------------------------------------------------------------------

    def panel(self, trace: Trace | None, plan: dict[str, str]) -> str:
        return view.panel(trace, self.engine.sizes, plan)

    def planned(self, thinking: str, answering: str) -> str:
        return self.panel(None, {"thinking": thinking, "answering": answering})

    def refusal(self, text: str) -> str | None:
        """Why a question would not even get into the queue."""
        return "The prompt is empty. Write a question first." if not text.strip() else FULL if self.is_full() else None

    def arm(
        self, text: str, history: list[Any], runs: int, request: gr.Request | None = None
    ) -> tuple[Any, list[Any], int]:
        """The question is in the chat and can be stopped, also while it waits. It is run when `runs` changes."""
        if why := self.refusal(text):
            return gr.skip(), [*history, view.notice(why)], runs
        self.flags.get(request, "chat")
        return gr.Textbox(value="", submit_btn=False, stop_btn=True), [*history, view.question(text)], runs + 1

    def arm_compare(self, text: str, runs: int, request: gr.Request | None = None) -> tuple[Any, Any, Any, int]:
        """As `arm`, for the comparison."""
        if why := self.refusal(text):
            return gr.skip(), gr.skip(), view.difference_notice(why), runs
        self.flags.get(request, "compare")
        return gr.Button(visible=False), gr.Button(visible=True), gr.skip(), runs + 1

    def is_full(self) -> bool:
        """Whether gradio would refuse one more. Its refusal ends a chain of events without a word, so it is better not to get there."""
        queue = self.demo._queue if self.demo else None
        return queue is not None and queue.max_size is not None and len(queue) >= queue.max_size

    def stop(self, request: gr.Request) -> Any:
        self.flags.get(request, "chat").set()
        return gr.Textbox(submit_btn=True, stop_btn=False)

    def stop_compare(self, request: gr.Request) -> tuple[Any, Any]:
        self.flags.get(request, "compare").set()
        return gr.Button(visible=True), gr.Button(visible=False)

    def problem(self) -> str:
        """A problem that was held out of training."""
        assert self.engine.task is not None
        return self.engine.task.new(random.SystemRandom().randrange(1 << 30))

    def choose(self, event: gr.EventData) -> tuple[Any, ...]:
        """A point of the chart was pressed: its plan goes to the chat."""
        try:
            point = self.measurements.points[int(event.plan)]
        except (AttributeError, ValueError, IndexError):  # not from our chart
            return (gr.skip(),) * 5
        thinking, answering = point["thinking"], point["answering"]
        cap = self.caps[0] if point["max_thinking_tokens"] is None else point["max_thinking_tokens"]
        return thinking, answering, cap, self.planned(thinking, answering), gr.Tabs(selected="chat")


def build(engine: Engine, measurements: Measurements | None = None, stream: Stream | None = None) -> gr.Blocks:
    """The whole Space.

    Args:
        engine, measurements, stream: See [`Space`].

    Returns:
        `gr.Blocks`: Not launched; see [`launch`]. `demo.space` is the [`Space`] behind it.
    """
    space = Space(engine, measurements, stream)
    limit = int(os.environ.get("PHASE_CONCURRENCY", "1"))  # of one device; a ZeroGPU Space may raise it
    heavy: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": limit}
    on_page = {**heavy, "trigger_mode": "once", "show_progress": "hidden", "api_visibility": "private"}

    def sizes_radio(label: str, value: str, elem_id: str) -> gr.Radio:
        return gr.Radio(space.names, value=value, label=label, elem_id=elem_id, elem_classes="pp-sizes")

    with gr.Blocks(title="Phase plans", analytics_enabled=False, fill_width=True) as demo:
        demo.space, space.demo = space, demo
        gr.HTML(header(engine, __version__) + banner(engine))
        # Runs are started by a number that changes: a chain of events would go on to a full queue, and stop there without a word.
        runs, comparisons = (gr.Number(0, label=name, visible="hidden") for name in ("runs", "comparisons"))
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Chat", id="chat"), gr.Row():
                with gr.Column(scale=5, min_width=320):
                    bot = gr.Chatbot(label="Chat", elem_id="chat", height=420, show_label=False, buttons=["copy"],
                                     placeholder="Ask; one submodel thinks, another answers.")  # fmt: skip
                    box = gr.Textbox(label="Question", show_label=False, placeholder=f"Such as {engine.task.examples[0]}" if engine.task else "Ask…", submit_btn=True,
                                     elem_id="msg", lines=1, max_lines=6)  # fmt: skip
                    fresh = gr.Button("New problem", size="sm", elem_id="fresh", visible=engine.task is not None)
                    examples = gr.Column()
                with gr.Column(scale=4, min_width=320):
                    think = sizes_radio("Think with", space.small, "think")
                    answer = sizes_radio("Answer with", space.large, "answer")
                    with gr.Accordion("More: token limits, sampling", open=False, elem_id="more"):
                        cap = gr.Slider(1, engine.limit, space.caps[0], step=1, label="Thinking tokens, at most")
                        answer_cap = gr.Slider(1, engine.limit, space.caps[1], step=1, label="Answer tokens, at most")
                        temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: most likely token)")
                        seed = gr.Number(0, precision=0, minimum=0, maximum=2**31 - 1, label="Seed of sampling")
                    panel = gr.HTML(space.planned(space.small, space.large), elem_id="panel")
                with examples:
                    gr.Examples(_examples(space), [box, think, answer], label="Examples (they fill in, they do not run)", elem_id="examples",
                                example_labels=_labels(space), api_visibility="private", cache_examples=False)  # fmt: skip
            with gr.Tab("Compare", id="compare"):
                question = gr.Textbox(
                    label="One question for both plans", elem_id="question", value=_examples(space)[0][0]
                )
                plans = (("A", space.small, space.large), ("B", space.large, space.large))
                choices, shown = [], []
                with gr.Row():
                    for name, thinker, answerer in plans:
                        with gr.Column(min_width=320):
                            choices += [
                                sizes_radio(f"{name}: think with", thinker, f"think-{name.lower()}"),
                                sizes_radio(f"{name}: answer with", answerer, f"answer-{name.lower()}"),
                            ]
                go = gr.Button("Compare", variant="primary", elem_id="go")
                halt = gr.Button("Stop", visible=False, elem_id="halt")
                line = gr.HTML(view.difference(None, None, []), elem_id="difference")
                with gr.Row():
                    for name, thinker, answerer in plans:
                        with gr.Column(min_width=320):
                            talk = gr.Chatbot(label=name, elem_id=f"chat-{name.lower()}", height=260, buttons=[])
                            shown += [talk, gr.HTML(space.planned(thinker, answerer), elem_id=f"panel-{name.lower()}")]
            with gr.Tab("Trade-off", id="tradeoff"):
                points, axes = space.measurements.points, chart.axes_of(space.measurements.points)
                axis = gr.Radio(
                    [(chart.AXES[name], name) for name in axes],
                    value=axes[0] if axes else None,
                    label="Against",
                    visible=len(axes) > 1,
                    elem_id="axis",
                )
                plot = gr.HTML(chart.pareto_svg(points, engine.sizes), elem_id="chart", js_on_load=POINT_CLICK)
                gr.HTML(chart.legend(engine.sizes) + chart.source(space.measurements.about))
            with gr.Tab("How it works", id="about"):
                gr.Markdown(about(engine))

        settings = [cap, answer_cap, temperature, seed]
        box.submit(space.arm, [box, bot, runs], [box, bot, runs], **FAST)
        run = runs.change(space.chat, [bot, think, answer, *settings], [bot, panel], **on_page)
        run.then(lambda: gr.Textbox(submit_btn=True, stop_btn=False), None, box, **FAST)
        box.stop(space.stop, None, box, **FAST)
        fresh.click(space.problem if engine.task else None, None, box, **FAST)
        bot.clear(space.planned, [think, answer], panel, **FAST)
        for radio in (think, answer):
            radio.input(space.planned, [think, answer], panel, **FAST)

        go.click(space.arm_compare, [question, comparisons], [go, halt, line, comparisons], **FAST)
        run = comparisons.change(space.compare, [question, *choices, *settings], [*shown, line], **on_page)
        run.then(lambda: (gr.Button(visible=True), gr.Button(visible=False)), None, [go, halt], **FAST)
        halt.click(space.stop_compare, None, [go, halt], **FAST)
        for radios, html in ((choices[:2], shown[1]), (choices[2:], shown[3])):
            for radio in radios:
                radio.input(space.planned, radios, html, **FAST)

        plot.click(space.choose, None, [think, answer, cap, panel, tabs], **FAST)
        axis.input(lambda name: chart.pareto_svg(points, engine.sizes, name), axis, plot, **FAST)
        _add_api(space, heavy)
    return demo


def _add_api(space: Space, heavy: dict[str, Any]) -> None:
    """Endpoints for programs and, through MCP, for agents; the argument descriptions become their schema."""

    def generate(
        prompt: str,
        thinking: str = space.small,
        answering: str = space.large,
        max_thinking_tokens: int = space.caps[0],
        max_answer_tokens: int = space.caps[1],
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[dict]:
        """Answer a prompt with one submodel thinking and another answering.

        Args:
            prompt: The question.
            thinking: Budget that thinks: a name from /budgets, or a limit such as "1.2B" or "24GB".
            answering: Budget that answers.
            max_thinking_tokens: Cap on the thinking, from 1.
            max_answer_tokens: Cap on the answer, from 1.
            temperature: 0 takes the most likely token.
            seed: Seed of sampling.

        Returns:
            As far as it has come: thinking and answer as text, done, and per phase budget, tokens, seconds, tokens per second and why it ended.
        """
        ask = Ask((("user", prompt),), thinking, answering, max_thinking_tokens, max_answer_tokens, temperature, seed)
        for trace in space.run(ask):
            if isinstance(trace, str):
                raise gr.Error(trace, print_exception=False)
            yield {
                "thinking": trace.text("thinking"),
                "answer": trace.text("answering"),
                "done": all(part.state == "done" for part in trace.parts) and len(trace.parts) == 2,
                "phases": [part.to_dict() for part in trace.parts],
            }

    def budgets() -> list[dict]:
        """List the budgets that can think and answer, from the smallest to the largest, with parameters and bytes."""
        return [vars(size) for size in space.engine.sizes]

    gr.api(generate, api_name="generate", **heavy)
    gr.api(budgets, api_name="budgets", queue=False)


def launch(demo: gr.Blocks, **options: Any) -> gr.Blocks:
    """Start serving. `PHASE_QUEUE` (8) is how many requests may wait; who comes later is told that the queue is full.

    Args:
        options: As for `Blocks.launch`, instead of the ones here or besides them.
    """
    fonts: Any = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # nothing to fetch
    defaults: dict[str, Any] = {
        "theme": gr.themes.Soft(primary_hue="indigo", **fonts),
        "css_paths": Path(__file__).with_name("style.css"),
        "head": HEAD,
        "footer_links": ["api"],
        "run_history": False,
        "mcp_server": True,
        "state_session_capacity": 100,
        "max_file_size": "1mb",
    }
    demo.queue(max_size=int(os.environ.get("PHASE_QUEUE", "8"))).launch(**defaults | options)
    return demo


def _settings(cap: Any, answer_cap: Any, temperature: Any, seed: Any) -> dict[str, Any]:
    """What the sliders say, under the names of [`Ask`], which checks it."""
    return {"max_thinking_tokens": cap, "max_answer_tokens": answer_cap, "temperature": temperature, "seed": seed}


def _examples(space: Space) -> list[list[str]]:
    task = space.engine.task
    prompts = (
        task.examples
        if task
        else ("Why is the sky blue?", "What is 17 times 23?", "Write a limerick about a sled dog.")
    )
    plans = ((space.small, space.large), (space.small, space.small), (space.large, space.large))
    return [[prompt, *plan] for prompt, plan in zip(prompts, plans, strict=True)]


def _labels(space: Space) -> list[str]:
    names = ("small thinks, large answers", "small does both", "large does both: the baseline")
    return [
        f"{prompt if len(prompt) < 24 else prompt[:22] + '…'} ({name})"
        for (prompt, *_), name in zip(_examples(space), names, strict=True)
    ]
