"""What the API reference needs to know of this repository: where `hf_elastic.trainers` lies, and the style of its docstrings."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[1]
TRAINERS = ROOT / "trainers"

_REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")
_PARAMETER = re.compile(r"^( +[\w, *]+ )\((.+?)\):(?=\s)", re.MULTILINE)
_OPTIONAL = re.compile(r",? ?\*optional\*.*")
_TYPE = re.compile(r"^( +)(\[?`[^`\n]+`\]?):(?= )", re.MULTILINE)


class Repository(griffe.Extension):
    """Loaded by mkdocstrings, see `mkdocs.yml`."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Puts the modules of `trainers/` where they are imported from."""
        if pkg.path != "hf_elastic":
            return
        room = self._visit("trainers", TRAINERS / "__init__.py", pkg, loader)
        for file in sorted(TRAINERS.glob("[a-z]*.py")):
            self._visit(file.stem, file, room, loader)
        loader.expand_exports(pkg)
        loader.expand_wildcards(pkg)

    def _visit(self, name: str, file: Path, parent: griffe.Module, loader: griffe.GriffeLoader) -> griffe.Module:
        module = griffe.visit(
            name,
            filepath=file,
            code=file.read_text(encoding="utf-8"),
            extensions=loader.extensions,
            parent=parent,
            docstring_parser=loader.docstring_parser,
            docstring_options=loader.docstring_options,
            lines_collection=loader.lines_collection,
            modules_collection=loader.modules_collection,
        )
        parent.set_member(name, module)
        return module

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)


def plain(docstring: str) -> str:
    """A docstring in the style of Hugging Face's as griffe wants it.

    Types lose the marks that are shown anyway: `x (`int`, *optional*, defaults to 8):` is `x (int):`. [`Name`] leads to the page of that
    name, and is code where it has none.
    """
    text = _PARAMETER.sub(lambda match: f"{match[1]}({_unmarked(_OPTIONAL.sub('', match[2]))}):", docstring)
    text = _TYPE.sub(lambda match: f"{match[1]}{_unmarked(match[2])}:", text)
    return _REFERENCE.sub(_link, text)


def _unmarked(kind: str) -> str:
    return _REFERENCE.sub(r"\2", kind).replace("`", "")


def _link(match: re.Match[str]) -> str:
    name = match[2].rpartition(".")[2]
    return f"[`{name}`][{_listed()[name]}]" if name in _listed() else f"`{match[2]}`"


@cache
def _listed() -> dict[str, str]:
    """What the pages of the reference list, by its last name."""
    pages = (file.read_text(encoding="utf-8") for file in (ROOT / "docs" / "api").glob("*.md"))
    return {path.rpartition(".")[2]: path for page in pages for path in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}
