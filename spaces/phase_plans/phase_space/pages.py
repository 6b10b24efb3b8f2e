"""Texts of the page, and the little JavaScript there is."""

from __future__ import annotations

from html import escape
from pathlib import Path

from .engine import Engine

POLICY = "<meta http-equiv=\"Content-Security-Policy\" content=\"img-src 'self' data: blob:; media-src 'self' data: blob:\">"
"""Pictures that a model or a visitor names are not fetched from elsewhere."""

HEAD = f"{POLICY}<script>{Path(__file__).with_name('repair.js').read_text(encoding='utf-8')}</script>"

POINT_CLICK = """
const press = target => { const g = target.closest('[data-plan]'); if (g) trigger('click', {plan: g.dataset.plan}); };
element.addEventListener('click', e => press(e.target));
element.addEventListener('keydown', e => { if (e.key === 'Enter' || e.key === ' ') { e.preventDefault(); press(e.target); } });
"""


def header(engine: Engine, version: str) -> str:
    """Title, what is happening here in one sentence, and what runs where."""
    names = [escape(size.name) for size in engine.sizes]
    sizes = f"{', '.join(names[:-1])} and {names[-1]}" if names[1:] else names[0]
    said = (
        f"One model holds {len(names)} sizes of itself ({sizes}): you choose which size <b>thinks</b> about a question and which one writes the "
        "<b>answer</b>, and see who wrote what, how fast, and what it took."
    )
    chips = (f"model: {engine.name}", f"on {engine.device}, {engine.dtype}", f"hf_elastic {version}")
    spans = "".join(f"<span>{escape(chip)}</span>" for chip in chips)
    title = "A small model thinks, a large one answers, and both are one model"
    return f'<header class="pp-head"><h1>{title}</h1><p class="pp-lead">{said}</p><p class="pp-chips">{spans}</p></header>'


def banner(engine: Engine) -> str:
    """A warning where no model runs."""
    if not engine.fake:
        return ""
    return '<p class="pp-banner" role="alert">No model is running. The words, sizes and speeds are made up, to look at and test this page.</p>'


def intro(engine: Engine, small: str, large: str) -> str:
    """What stands in the empty chat: what can be asked, an example to check by hand, what to press."""
    asked = engine.task.intro if engine.task else "Ask a question, or take an example below.\n"
    return f"{asked}\nPress ➤ to watch: **{small}** thinks, **{large}** answers."


def about(engine: Engine) -> str:
    """The page “How it works”."""
    task = engine.task.about if engine.task else ""
    small, large = engine.sizes[0].name, engine.sizes[-1].name
    return f"""## How it works

Language models write in *tokens*: pieces of words, or single characters. A reasoning model first writes its **thinking**, then its **answer**.

All sizes here are **one model**. The weights of a smaller size are a part of the larger one's, the first rows and columns of its matrices. So a change of
size copies nothing and needs no second set of weights. A *phase plan* says which size writes the thinking and which one the answer.

The thinking ends when the model says so. If your limit comes first, it is cut there, and the plan puts the end in. Then the other size takes over.
Either it goes on with what the first size kept in memory (“kept as it is”), where that gives the same result, or it reads the text again (“re-read”).

## The numbers

- **Used per token**: how many parameters work on each token. In a mixture of experts that is fewer than there are.
- **Weights in use** are those of the size that runs. The whole model stays in memory. Only a program that loads one size alone
  (`from_pretrained(repo, budget="{escape(small)}")`) saves the difference.
- **Memory of the text**: what the model keeps of this conversation at its length.
- **Work**: parameters used times tokens written, over both phases.
- **First token after**: changing size, reading, and writing one token. **Speed**: the tokens after that. Both are of this request on this machine.
  In a model as small as the embedded one a step takes the longer the more layers a size has, however wide they are; in large models the width counts, too.
- The tab **Chart** shows plans that were measured beforehand, and nothing else; the line under it says on what.

{task}

## From a program

`POST /gradio_api/call/generate`, or `gradio_client.Client(url).predict(prompt, api_name="/generate")`; `/budgets` lists the sizes. Agents use the same
through MCP at `/gradio_api/mcp/`. In Python: `model.generate(**inputs, phase_plan=PhasePlan(thinking="{escape(small)}", answering="{escape(large)}"))`.
"""
