"""What a table costs: lines of its file, and where else the package names its model. `make map` writes it into CONTRIBUTING.md, from what git tracks."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from hf_elastic.architectures.registry import TABLES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
FOLDER = "hf_elastic/architectures"
REGISTRY, TINY = f"{FOLDER}/registry.py", "hf_elastic/testing/tiny.py"
MOST = 80

BEGIN, END = "<!-- made by `make map`, from git -->\n", "<!-- end of the tables -->\n"


def files() -> dict[str, list[str]]:
    """Every file of tables of this package, and the `model_type`s in it."""
    found: dict[str, list[str]] = {}
    for model_type, place in TABLES.items():
        found.setdefault(f"{FOLDER}/{place.partition(':')[0]}.py", []).append(model_type)
    return found


def lines_of(source: str) -> int:
    """Lines that are neither blank nor of imports or docstrings; comments count."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        ):
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return sum(bool(line.strip()) for i, line in enumerate(source.splitlines(), 1) if i not in left_out)


def tracked() -> list[str]:
    """The modules of the package that git knows."""
    done = subprocess.run(["git", "ls-files", "hf_elastic/*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def named_elsewhere(file: str, model_types: Iterable[str], modules: Iterable[str]) -> Counter[str]:
    """Lines of code of other modules that say one of these names as a string, registration and tiny models aside."""
    names = re.compile("|".join(rf"[\"']{re.escape(name)}[\"']" for name in model_types))
    found: Counter[str] = Counter()
    for module in modules:
        if module not in (file, REGISTRY, TINY):
            found[module] += len(names.findall((ROOT / module).read_text(encoding="utf-8")))
    return +found


def render() -> str:
    """One row per file, the shortest first."""
    rows, modules = ["| file | tables | lines | edits elsewhere |", "|---|---|---|---|"], tracked()
    sources = {file: (ROOT / file).read_text(encoding="utf-8") for file in files()}
    for file, model_types in sorted(files().items(), key=lambda item: (lines_of(sources[item[0]]), item[0])):
        edits = ["registration"]
        edits += [
            f"{count} in `{at.removeprefix('hf_elastic/')}`"
            for at, count in sorted(named_elsewhere(file, model_types, modules).items())
        ]
        tables = ", ".join(f"`{name}`" for name in model_types)
        rows.append(f"| `{Path(file).name}` | {tables} | {lines_of(sources[file])} | {', '.join(edits)} |")
    return "\n".join(rows) + "\n"


def with_tables(text: str) -> str:
    """CONTRIBUTING with the table as it has to be."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{render()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
