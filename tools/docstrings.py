"""What the API reference needs to know of this repository: where `hf_elastic.trainers` lies, and what [`Name`] in a docstring points at."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

TRAINERS = Path(__file__).resolve().parents[1] / "trainers"

_REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")


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
        """[`Name`] is how docstrings here, as in all of Hugging Face's, refer to other objects; names without a page are code."""
        if obj.docstring is not None:
            obj.docstring.value = _REFERENCE.sub(r"`\2`", obj.docstring.value)
