"""Texts of the page, and the little JavaScript there is."""

from __future__ import annotations

from html import escape

from .engine import Engine

HEAD = "<meta http-equiv=\"Content-Security-Policy\" content=\"img-src 'self' data: blob:; media-src 'self' data: blob:\">"
"""Pictures that a model or a visitor names are not fetched from elsewhere."""

POINT_CLICK = """
const press = target => { const g = target.closest('[data-plan]'); if (g) trigger('click', {plan: g.dataset.plan}); };
element.addEventListener('click', e => press(e.target));
element.addEventListener('keydown', e => { if (e.key === 'Enter' || e.key === ' ') press(e.target); });
"""


def header(engine: Engine, version: str) -> str:
    """Title, and what runs where."""
    chips = (engine.name, f"{engine.device}, {engine.dtype}", f"hf_elastic {version}")
    spans = "".join(f"<span>{escape(chip)}</span>" for chip in chips)
    return f'<header class="pp-head"><h1>One checkpoint, many sizes: a small one thinks, a large one answers</h1><p>{spans}</p></header>'


def banner(engine: Engine) -> str:
    """A warning where no model runs."""
    if not engine.fake:
        return ""
    return '<p class="pp-banner" role="alert">No model is running. The words, sizes and speeds are made up, to look at and test this page.</p>'


def about(engine: Engine) -> str:
    """The page “How it works”."""
    task = engine.task.about if engine.task else ""
    return f"""### Phase plans

All sizes here are **one checkpoint**: a smaller submodel is the first part of the rows and columns of the larger one, seen through views, so switching
costs no copy and no second set of weights. A *phase plan* says which submodel writes the thinking and which the answer. The thinking ends when the
model writes its end marker, or near its token limit at the end of a sentence or line, or at the limit, where the plan inserts the marker. Then the other
submodel takes over: it goes on with the first one's cache where that is exact or was trained for, and reads the text again otherwise. The cards say which.

### The numbers

- **Weights in use** are those of the submodel that runs; **weights held** are the whole checkpoint, which stays in memory. Only a device that loads
  one size alone (`from_pretrained(repo, budget="{escape(engine.sizes[0].name)}")`) saves the difference.
- **KV and states**, the cache of attention and the states of Mamba layers, are what this conversation takes besides, at its length.
- **First token** is switching, taking over, reading, and one token; **speed** is the tokens after that. Both are of this request on this machine.
- The chart **Trade-off** shows measured plans only; the line under it says on what.

{task}

### From a program

`POST /gradio_api/call/generate`, or `gradio_client.Client(url).predict(prompt, api_name="/generate")`; `/budgets` lists the sizes. Agents use the same
through MCP at `/gradio_api/mcp/`. In Python: `model.generate(**inputs, phase_plan=PhasePlan(thinking="{escape(engine.sizes[0].name)}", answering="{escape(engine.sizes[-1].name)}"))`.
"""
