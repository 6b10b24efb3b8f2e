"""What the API reference needs to know of this repository: where `hf_elastic.trainers` lies, and the style of its docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

TRAINERS = Path(__file__).resolve().parents[1] / "trainers"

_REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")
_PARAMETER = re.compile(r"^( +[\w, *]+ )\((.+?)\):(?=\s)", re.MULTILINE)
_OPTIONAL = re.compile(r",? ?\*optional\*.*")
_TYPE = re.compile(r"^( +)`([^`\n]+)`:(?= )", re.MULTILINE)


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

    [`Name`], a reference, becomes code. Types lose the marks that are shown anyway: `x (`int`, *optional*, defaults to 8):` is `x (int):`.
    """
    text = _REFERENCE.sub(r"`\2`", docstring)
    text = _PARAMETER.sub(lambda match: f"{match[1]}({_OPTIONAL.sub('', match[2]).replace('`', '')}):", text)
    return _TYPE.sub(r"\1\2:", text)
