"""The user interface and the API, for any [`Engine`]."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported: it would look up names at once

import gradio as gr

from hf_elastic import __version__

from . import chart, comparison
from .asking import Ask
from .engine import Engine
from .measurements import Measurements
from .pages import HEAD, POINT_CLICK, about, banner, header, intro
from .visits import Space, Stream

READABLE = {
    "background_fill_primary": "*neutral_50",  # of Soft, which `set` would lose
    "body_text_color_subdued": "*neutral_600",
    "body_text_color_subdued_dark": "*neutral_300",
    "input_placeholder_color": "*neutral_600",
    "input_placeholder_color_dark": "*neutral_300",
    "block_label_text_color": "*primary_700",
    "block_title_text_color": "*primary_700",
    "checkbox_label_background_fill_selected": "*primary_600",
    "button_primary_background_fill": "*primary_600",
    "button_primary_background_fill_hover": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_700",
    "link_text_color": "*primary_700",
    "link_text_color_visited": "*primary_700",
    "link_text_color_dark": "*primary_300",
    "link_text_color_visited_dark": "*primary_300",
}
"""Colours of the theme that have less contrast than 4.5 to 1 in the original."""
FAST: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


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
        with gr.Tabs(elem_id="tabs", overflow_behavior="wrap") as tabs:
            with gr.Tab("Chat", id="chat"), gr.Row():
                with gr.Column(scale=5, min_width=320):
                    bot = gr.Chatbot(label="Chat", elem_id="chat", height=430, show_label=False, buttons=["copy"],
                                     placeholder=intro(engine, space.small, space.large))  # fmt: skip
                    box = gr.Textbox(
                        _examples(space)[0][0], label="Question", show_label=False, placeholder="Your question", elem_id="msg",
                        submit_btn=True, lines=1, max_lines=6,
                    )  # fmt: skip
                    prices = [gr.HTML(_prices(space), elem_id="prices", visible=engine.task is not None)]
                    fresh = gr.Button("New problem", size="sm", elem_id="fresh", visible=engine.task is not None)
                    with gr.Accordion("What does the problem mean?", open=False, visible=engine.task is not None, elem_id="meaning"):  # fmt: skip
                        gr.Markdown(engine.task.intro if engine.task else "")
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
                    gr.Examples(_examples(space), [box, think, answer], label="Examples: press one, then ➤", elem_id="examples",
                                example_labels=_labels(space), api_visibility="private", cache_examples=False)  # fmt: skip
            with gr.Tab("Compare", id="compare"):
                question = gr.Textbox(
                    label="One question for both plans", elem_id="question", value=_examples(space)[0][0]
                )
                prices.append(gr.HTML(_prices(space), elem_id="prices-compare", visible=engine.task is not None))
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
                line = gr.HTML(comparison.difference(None, None, []), elem_id="difference")
                with gr.Row():
                    for name, thinker, answerer in plans:
                        with gr.Column(min_width=320):
                            talk = gr.Chatbot(label=name, elem_id=f"chat-{name.lower()}", height=260, buttons=[])
                            shown += [talk, gr.HTML(space.planned(thinker, answerer), elem_id=f"panel-{name.lower()}")]
            with gr.Tab("Chart", id="chart-tab"):
                points, axes = space.measurements.points, chart.axes_of(space.measurements.points)
                axis = gr.Radio(
                    [(chart.AXES[name], name) for name in axes],
                    value=axes[0] if axes else None,
                    label="Against",
                    visible=len(axes) > 1,
                    elem_id="axis",
                )
                gr.HTML(chart.legend(engine.sizes) if points else "")
                plot = gr.HTML(chart.pareto_svg(points, engine.sizes), elem_id="chart", js_on_load=POINT_CLICK)
                gr.HTML(chart.source(space.measurements.about))
            with gr.Tab("How it works", id="about"):
                gr.Markdown(about(engine), elem_id="how")

        settings = [cap, answer_cap, temperature, seed]
        box.submit(space.arm, [box, bot, runs], [box, bot, runs], **FAST)
        run = runs.change(space.chat, [bot, think, answer, *settings], [bot, panel], **on_page)
        run.then(lambda: gr.Textbox(submit_btn=True, stop_btn=False), None, box, **FAST)
        box.stop(space.stop, None, box, **FAST)
        fresh.click(space.problem if engine.task else None, None, box, **FAST)
        for written, sheet in zip((box, question), prices, strict=True):
            if engine.task:
                written.change(space.prices, written, sheet, **FAST)
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
        """Answer a prompt with one size of the model (a submodel) thinking and another answering.

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
    fonts: dict[str, Any] = {
        "font": ["system-ui", "sans-serif"],
        "font_mono": ["ui-monospace", "monospace"],
    }  # nothing to fetch
    defaults: dict[str, Any] = {
        "theme": gr.themes.Soft(primary_hue="indigo", **fonts).set(**READABLE),
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


def _examples(space: Space) -> list[list[str]]:
    task = space.engine.task
    prompts = (
        task.examples
        if task
        else ("Why is the sky blue?", "What is 17 times 23?", "Write a limerick about a sled dog.")
    )
    plans = ((space.small, space.large), (space.small, space.small), (space.large, space.large))
    return [[prompt, *plan] for prompt, plan in zip(prompts, plans, strict=True)]


def _prices(space: Space) -> str:
    """Of the question that is there at first."""
    return str(space.prices(_examples(space)[0][0])) if space.engine.task else ""


def _labels(space: Space) -> list[str]:
    names = ("small thinks, large answers", "small does both", "large does both")
    return [
        f"{prompt if len(prompt) < 42 else prompt[:40] + '…'} ({name})"
        for (prompt, *_), name in zip(_examples(space), names, strict=True)
    ]
