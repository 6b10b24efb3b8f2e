"""The house: which room of the repository may import from which, what really imports what, and the map of it in CONTRIBUTING.md.

`make map` writes the map, from the first line of every module's docstring, and prints the numbers of the import graph.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors", "_version", "model_cards"),
    ("architectures",),
    ("storage",),
    ("configuration",),
    ("configuration_elastic",),
    ("quantization",),
    ("generation",),
    ("submodels",),
    ("routing",),
    ("checkpoints",),
    ("hub",),
    ("modeling_elastic",),
    ("elastification", "evaluation", "adapters"),
    ("testing",),
    ("hf_elastic",),
    ("trainers",),
    ("lab",),
    ("commands",),
    ("cli", "phase_space", "benchmarks"),
)
"""Rooms from the ground. A module imports from its own room, or from rooms of lower levels. `hf_elastic` is what `import hf_elastic` gives."""

PACKAGES = {
    "hf_elastic": "hf_elastic",
    "hf_elastic.trainers": "trainers",
    "hf_elastic.model_cards": "model_cards",
    "phase_space": "spaces/phase_plans/phase_space",
    "benchmarks": "benchmarks",
}
"""Packages, and the folders that they lie in. Scripts in `benchmarks/` import each other by their bare names."""

ALLOWED: Mapping[tuple[str, str], str] = {}
"""Imports inside of functions that may go upward: importing module, imported module, and the reason."""

BEGIN, END = "<!-- made by `make map`, from docstrings -->\n", "<!-- end of the map -->\n"


@dataclass(frozen=True)
class Import:
    """One module imports another; `lazy` if only a function does, when it is called."""

    source: str
    target: str
    line: int
    lazy: bool


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module by its full name. What is under `assets` is data."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            if "assets" not in parts and not path.is_symlink():
                found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def room(module: str) -> str:
    """The part of the house that a module is in."""
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] if top == "hf_elastic" and rest else top


def imports(found: Mapping[str, Path]) -> list[Import]:
    """All imports between them, also those for types only, and those inside of functions."""
    return [entry for name, path in found.items() for entry in _imports_of(name, path, found)]


def _imports_of(name: str, path: Path, found: Mapping[str, Path]) -> Iterator[Import]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets = {full if (full := f"{base}.{alias.name}") in found else base for alias in node.names}
        else:
            continue
        for target in sorted(targets):
            target = (
                f"benchmarks.{target}" if room(name) == "benchmarks" and f"benchmarks.{target}" in found else target
            )
            if target in found and target != name:
                yield Import(name, target, node.lineno, id(node) in inside)


def upward(graph: Iterable[Import]) -> list[Import]:
    """Imports that leave their room and do not go down."""
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    return [
        entry
        for entry in graph
        if (here := room(entry.source)) != (there := room(entry.target))
        and level[there] >= level[here]
        and not (entry.lazy and (entry.source, entry.target) in ALLOWED)
    ]


def circles(graph: Iterable[Import]) -> list[list[str]]:
    """Groups of modules that import each other, directly or by way of others, whatever the import is for."""
    return _groups(_edges((entry.source, entry.target) for entry in graph))


def depth(graph: Iterable[Import]) -> int:
    """How many rooms of the package stand on top of each other: the longest way down, where rooms in a circle count as one."""
    pairs = [(room(entry.source), room(entry.target)) for entry in graph if entry.source.startswith("hf_elastic")]
    group = {name: names[0] for names in _groups(_edges(pairs)) for name in names}
    below = _edges((group.get(here, here), group.get(there, there)) for here, there in pairs)
    height: dict[str, int] = {}
    for name in TopologicalSorter(below).static_order():
        height[name] = 1 + max((height[other] for other in below.get(name, ())), default=0)
    return max(height.values(), default=0)


def _edges(pairs: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    edges: dict[str, set[str]] = {}
    for here, there in pairs:
        if here != there:
            edges.setdefault(here, set()).add(there)
    return edges


def _groups(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Names that reach each other."""
    reached = {name: _reach(name, edges) for name in edges}
    rounds = (frozenset(other for other in reached[name] if name in reached.get(other, ())) for name in edges)
    return sorted(sorted(names) for names in {*rounds} if names)


def _reach(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        new = edges.get(todo.pop(), set()) - seen
        seen |= new
        todo += new
    return seen


def numbers(root: Path = ROOT) -> str:
    """What the house is like, in a few lines."""
    found = modules(root)
    graph = imports(found)
    package = [name for name in found if name.startswith("hf_elastic")]
    top = [name for name in package if found[name].parent == root / "hf_elastic"]
    rounds = circles(graph)
    return "\n".join(
        [
            f"modules of the package: {len(package)}, on top of it: {len(top)}",
            f"rooms: {len({room(name) for name in package})}, on {depth(graph)} levels",
            f"imports: {len({(entry.source, entry.target) for entry in graph})}",
            f"circles: {len(rounds)}",
            *(f"  {', '.join(names)}" for names in rounds),
        ]
    )


def render_map(root: Path = ROOT) -> str:
    """The map: rooms from the ground, and the first line of what every module says of itself."""
    found = modules(root)
    lines = []
    for name in (name for names in LEVELS for name in names):
        if name in ("benchmarks", "hf_elastic"):  # described by hand; what users import
            continue
        inside = [module for module in found if room(module) == name]
        head = next((module for module in inside if found[module].name == "__init__.py"), None)
        if head is None and len(inside) > 1:  # folders of Spaces have no __init__.py
            lines.append(f"- **`{PACKAGES[name]}/`**")
        for module in sorted(inside, key=lambda module: (module != head, module)):
            path = found[module].relative_to(root)
            if module == head:
                lines.append(f"- **`{path.parent}/`**: {_first_line(found[module])}")
            elif len(inside) == 1:
                lines.append(f"- **`{path}`**: {_first_line(found[module])}")
            else:
                lines.append(f"  - `{path.name}`: {_first_line(found[module])}")
    return "\n".join(lines) + "\n"


def _first_line(path: Path) -> str:
    words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not words:
        raise ValueError(f"{path} has no docstring, which the map in CONTRIBUTING.md is made from; give it one.")
    return words.splitlines()[0]


def with_map(text: str, root: Path = ROOT) -> str:
    """CONTRIBUTING.md with the map as it has to be."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{render_map(root)}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, help="another checkout, of which only the numbers are printed")
    root = parser.parse_args().root
    if root is None:
        file = ROOT / "CONTRIBUTING.md"
        file.write_text(with_map(file.read_text(encoding="utf-8")), encoding="utf-8")
    print(numbers(root or ROOT))


if __name__ == "__main__":
    main()
