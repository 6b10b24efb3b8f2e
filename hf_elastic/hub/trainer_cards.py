"""READMEs that trl's trainers generate: known again if nobody changed them, and what they say of the run.

Such a README is no one's words, and as a card it is wrong: "a fine-tuned version of None". Everything in it has to be of trl's template, or it
counts as written by somebody.
"""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import ModelCard

_BADGE = r"\[<img [^\n]*?/>\]\((?:[^()\n]*)\)"
_GENERATED = re.compile(
    r"\s*# Model Card for [^\n]*\n+"
    r"This model is a fine-tuned version of \[[^\]\n]*\]\([^)\n]*\)(?: on the \[(?P<data>[^\]\n]*)\]\([^)\n]*\) dataset)?\.\s+"
    r"It has been trained using \[TRL\]\(https://github\.com/huggingface/trl\)\.\s+"
    r"## Quick start\s+```python\n"
    r"from transformers import pipeline\n\nquestion = [^\n]*\ngenerator = pipeline\([^\n]*\)\noutput = generator\([^\n]*\)\[0\]\nprint\([^\n]*\)\n```\s+"
    rf"## Training procedure\s+(?P<badges>(?:{_BADGE}\s*)*)"
    r"This model was trained with (?P<method>[^\n]*?)(?:, a method introduced in (?P<paper>\[[^\n]*\]\(https://huggingface\.co/papers/[^)\n]*\)))?\.\s+"
    r"### Framework versions\s+(?P<versions>(?:- [\w ]+: [^\s]+\n)+)\s*"
    r"## Citations?\s+(?:Cite [^\n]* as:\s+```bibtex\n(?:(?!```)[^\n]*\n)+```\s*)+"
)
_LINK = re.compile(r'alt="Visualize in (?P<name>[^"]*)"[^\n]*?/>\]\((?P<url>[^()\s]+)\)')

_OWN = {"base_model", "datasets", "tags", "model_name"}
_FILLED = {"library_name": "transformers", "licence": "license"}
"""Keys that trl writes: with what it knows, and with the same words always. `licence` is its spelling."""


def added(card: ModelCard) -> dict[str, Any]:
    """What somebody added to the metadata of a generated README, or filled in: a license, a language, a gate."""
    data = {k: v for k, v in card.data.to_dict().items() if k not in _OWN and _FILLED.get(k) != v}
    if "licence" in data:
        data.setdefault("license", data.pop("licence"))
    return data


def run_facts(card: ModelCard | None) -> str | None:
    """What a generated README says of the run, as lines of a list; `None` if it is no such README, or somebody changed its text."""
    if card is None or "generated_from_trainer" not in (getattr(card.data, "tags", None) or []):
        return None
    found = _GENERATED.fullmatch(card.text.rstrip() + "\n")
    if found is None:
        return None
    method = found["method"] + (f" ({found['paper']})" if found["paper"] else "")
    on = f" on [{found['data']}](https://huggingface.co/datasets/{found['data']})" if found["data"] else ""
    lines = [f"- Trained with [TRL](https://github.com/huggingface/trl), {method}{on}."]
    links = [f"[{link['name']}]({link['url']})" for link in _LINK.finditer(found["badges"])]
    if links:
        lines.append(f"- The run: {', '.join(links)}.")
    versions = ", ".join(line.removeprefix("- ").replace(": ", " ") for line in found["versions"].splitlines())
    return "\n".join([*lines, f"- Versions of the run: {versions}."])
