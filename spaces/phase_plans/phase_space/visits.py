"""What happens when a visitor asks, stops, compares or picks a plan: the handlers of the user interface, for any [`Engine`]."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any

import gradio as gr

from hf_elastic import HFElasticError

from . import comparison, messages, view
from .asking import Ask, TextEvent
from .engine import Engine
from .measurements import Measurements
from .tasks import Solution, TaskError
from .trace import Trace, follow

logger = logging.getLogger(__name__)

Stream = Callable[[Ask], Generator[TextEvent, None, None]]
FULL = "Queue is full: too many requests are waiting. Try again in a moment."
REPEATS, SHORT = 2, 6.0
"""A comparison that took less than so many seconds is timed again so many times, plan by plan in turns."""
FAILED = "Something went wrong here, not with your question. The next question will be run as usual."


class Flags:
    """One stop flag per visitor and tab; a flag lives from the press of the button to the end of the run."""

    def __init__(self) -> None:
        self._flags: dict[tuple[str, str], threading.Event] = {}

    def get(self, request: gr.Request | None, tab: str) -> threading.Event:
        return self._flags.setdefault((_session(request), tab), threading.Event())

    def set(self, request: gr.Request | None, tab: str) -> None:
        """Stop the run that is armed. One that is over has no flag, and gets none: the next run would be stopped by it."""
        if flag := self._flags.get((_session(request), tab)):
            flag.set()

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
        self.large = self.names[-1]
        self.small = self._thinker()
        task = engine.task
        caps = (task.max_thinking_tokens, task.max_answer_tokens) if task else (512, 256)
        self.caps = (min(caps[0], engine.limit), min(caps[1], engine.limit))

    def _thinker(self) -> str:
        """Who thinks at first: with whom the largest is as often right as alone, as measured, for the least work; else the smallest."""
        points = {
            p["thinking"]: p
            for p in self.measurements.points
            if (p["answering"], p["max_thinking_tokens"]) == (self.large, None)
        }
        if self.large not in points:
            return self.names[0]
        good = [p for p in points.values() if p["accuracy"] >= points[self.large]["accuracy"] - 0.01]
        return str(min(good, key=lambda p: p["cost"])["thinking"])

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
            ask = Ask(messages.said(history), thinking, answering, **settings)
            trace: Trace | None = None
            solution = self.solution(ask.messages)
            for trace_or_text in self.run(ask, self.flags.get(request, "chat")):
                if isinstance(trace_or_text, str):
                    shown = messages.messages(trace, solution) if trace else []
                    yield history + shown + [messages.notice(trace_or_text)], self.panel(trace, plan)
                else:
                    trace = trace_or_text
                    yield history + messages.messages(trace, solution), self.panel(trace, plan)
        finally:
            self.flags.drop(request, "chat")

    def compare(
        self, text: str, think_a: str, answer_a: str, think_b: str, answer_b: str, cap: float, answer_cap: float,
        temperature: float, seed: float, request: gr.Request | None = None,
    ) -> Iterator[tuple[list[Any], str, list[Any], str, str]]:  # fmt: skip
        """The same question to two plans, one after the other."""
        text = text.strip()
        plans: list[Any] = [{"thinking": think_a, "answering": answer_a}, {"thinking": think_b, "answering": answer_b}]
        settings: Any = _settings(cap, answer_cap, temperature, seed)
        chats: list[list[Any]] = [[messages.question(text)], [messages.question(text)]]
        traces: list[Trace | None] = [None, None]
        flag, solution = self.flags.get(request, "compare"), self.solution((("user", text),))

        def state() -> tuple[list[Any], str, list[Any], str, str]:
            panels = [self.panel(trace, plan) for trace, plan in zip(traces, plans, strict=True)]
            line = comparison.difference(
                traces[0] if finished else None, traces[1], self.engine.sizes, solution, times
            )
            return chats[0], panels[0], chats[1], panels[1], line

        finished = False
        times: list[list[float]] = [[], []]
        try:
            asks = [Ask((("user", text),), **plan, **settings) for plan in plans]
            for side, ask in enumerate(asks):
                for trace_or_text in self.run(ask, flag):
                    if isinstance(trace_or_text, str):
                        chats[side] = [*chats[side], messages.notice(trace_or_text)]
                    else:
                        traces[side] = trace_or_text
                        chats[side] = [messages.question(text), *messages.messages(trace_or_text, solution)]
                    yield state()
            if all(trace and trace.parts and not trace.stopped for trace in traces):
                yield *state()[:-1], comparison.timing()
                times = self.timed_again(asks, sum(trace.seconds for trace in traces if trace), flag)
            finished = True
            yield state()
        finally:
            self.flags.drop(request, "compare")

    def timed_again(self, asks: list[Ask], seconds: float, stopped: threading.Event) -> list[list[float]]:
        """Seconds of further runs of two requests, in turns, so that whatever else the machine does meets both; none if they took long."""
        times: list[list[float]] = [[], []]
        for turn in range(REPEATS if seconds < SHORT else 0):
            for side in (0, 1) if turn % 2 else (1, 0):
                *_, last = self.run(asks[side], stopped)
                if isinstance(last, str) or last.stopped:
                    return [[], []]
                times[side].append(last.seconds)
        return times

    # -- small handlers ------------------------------------------------------------------------------------------------

    def solution(self, said: tuple[tuple[str, str], ...]) -> Solution | None:
        """What is right for the question, if this model's problems have a solution and the question is one."""
        try:
            return self.engine.task.solve(said[-1][1]) if self.engine.task and said else None
        except TaskError:
            return None

    def prices(self, text: str) -> Any:
        """What is needed to check the question that is being written; once one has it, it stays until another is asked for."""
        sheet = self.engine.task.sheet(text) if self.engine.task else None
        return view.price_list(sheet) if sheet else gr.skip()

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
            return gr.skip(), [*history, messages.notice(why)], runs
        self.flags.get(request, "chat")
        return (
            gr.Textbox(value="", submit_btn=False, stop_btn=True),
            [*history, messages.question(text.strip())],
            runs + 1,
        )

    def arm_compare(self, text: str, runs: int, request: gr.Request | None = None) -> tuple[Any, Any, Any, int]:
        """As `arm`, for the comparison."""
        if why := self.refusal(text):
            return gr.skip(), gr.skip(), comparison.difference_notice(why), runs
        self.flags.get(request, "compare")
        return gr.Button(visible=False), gr.Button(visible=True), gr.skip(), runs + 1

    def is_full(self) -> bool:
        """Whether gradio would refuse one more. Its refusal ends a chain of events without a word, so it is better not to get there."""
        queue = self.demo._queue if self.demo else None
        return queue is not None and queue.max_size is not None and len(queue) >= queue.max_size

    def stop(self, request: gr.Request) -> Any:
        self.flags.set(request, "chat")
        return gr.Textbox(submit_btn=True, stop_btn=False)

    def stop_compare(self, request: gr.Request) -> tuple[Any, Any]:
        self.flags.set(request, "compare")
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


def _settings(cap: Any, answer_cap: Any, temperature: Any, seed: Any) -> dict[str, Any]:
    """What the sliders say, under the names of [`Ask`], which checks it."""
    return {"max_thinking_tokens": cap, "max_answer_tokens": answer_cap, "temperature": temperature, "seed": seed}
