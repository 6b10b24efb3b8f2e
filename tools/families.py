"""The table of supported architectures in docs/architectures.md: what their modules say of themselves, and their axes.

`make map` writes it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hf_elastic.architectures import ARCHITECTURES, Architecture

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architectures.md"

BEGIN, END = "<!-- made by `make map`, from the tables -->\n", "<!-- end of the table -->\n"


def render_table() -> str:
    """One row per architecture of this package, in the order of the registry."""
    rows = ["| `model_type` | layers | axes |", "|---|---|---|"]
    for table in ARCHITECTURES.values():
        module = sys.modules[type(table).__module__]
        if module.__name__.startswith("hf_elastic.") and module.__doc__:
            rows.append(f"| `{table.model_type}` | {module.__doc__.splitlines()[0]} | {_axes(table)} |")
    return "\n".join(rows) + "\n"


def _axes(table: Architecture) -> str:
    names = [f"`{axis.name}`" + (" (in groups)" if axis.groups else "") for axis in table.axes]
    return ", ".join([*names, "`layers`"])


def with_table(text: str) -> str:
    """The page with the table as it has to be."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{render_table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
