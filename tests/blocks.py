"""Fenced blocks of Markdown pages, and running them as a reader would: top to bottom, in one folder."""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_elastic.cli import build_parser, main

NOT_RUN = ("needs a real checkpoint", "needs an account", "takes minutes")
"""Titles of blocks that are only checked: what they read does not ship with the package, or they train for longer than a test may."""

WRITE = "HF_ELASTIC_WRITE_DOCS"
"""Environment variable: outputs that differ are written into the page, to be read and committed."""

ROOT = Path(__file__).resolve().parents[1]

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)(?: +title=\"(?P<title>[^\"]*)\")?(?P<rest>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_FILE = re.compile(r"[\w./-]+\.\w+")


@dataclass(frozen=True)
class Block:
    """One fenced block, and the output block that follows it at once."""

    page: str
    line: int
    language: str
    title: str
    text: str
    output: str | None = None

    @property
    def runs(self) -> bool:
        return self.title not in NOT_RUN

    @property
    def file(self) -> bool:
        """Whether the block is the content of a file that later blocks of the page read."""
        return bool(_FILE.fullmatch(self.title))

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(text: str, page: str) -> list[Block]:
    """All fenced blocks of a page, those of output with the block before them."""
    found: list[Block] = []
    end = 0
    for match in _FENCE.finditer(text):
        indent, content = match["indent"], match["text"]
        content = re.sub(f"^{indent}", "", content, flags=re.MULTILINE)
        line = text.count("\n", 0, match.start()) + 1
        assert not match["rest"].strip(), f"{page}:{line}: {match['rest']!r} after ``` is not understood by the site"
        if not match["language"] and found and found[-1].output is None and not text[end : match.start()].strip():
            found[-1] = Block(**{**vars(found[-1]), "output": content})
        else:
            found.append(Block(page, line, match["language"], match["title"] or "", content))
        end = match.end()
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a `sh` block, as words."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def check(block: Block) -> None:
    """Python compiles; `hf-elastic` commands have options that exist."""
    if block.language == "python":
        compile(block.text, str(block), "exec")
    elif block.language == "sh":
        for words in commands(block.text):
            if words[0] == "hf-elastic":
                parse(words[1:], block)


def parse(arguments: list[str], block: Block) -> None:
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
            build_parser().parse_args(arguments)
    except SystemExit as end:
        if end.code:  # `--help` ends with 0
            raise AssertionError(f"{block}: hf-elastic {shlex.join(arguments)}: {errors.getvalue()}") from None


def run(block: Block, namespace: dict[str, Any], folder: Path) -> None:
    """Run a block in the current folder, and compare what it prints with the output that the page shows."""
    if block.file:
        (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
        (folder / block.title).write_text(block.text, encoding="utf-8")
        return
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.enable_grad():
        if block.language == "python":
            # blank lines in front, so that a traceback names the line of the page
            exec(compile("\n" * block.line + block.text, block.page, "exec"), namespace)
        elif block.language == "sh":
            for words in commands(block.text):
                _command(words, block)
    if block.output is not None:
        checker, example = doctest.OutputChecker(), doctest.Example("", block.output)
        got = "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines())
        if checker.check_output(block.output, got, doctest.ELLIPSIS):
            return
        if not os.environ.get(WRITE):
            raise AssertionError(f"{block}: {checker.output_difference(example, got, doctest.ELLIPSIS)}")
        _write(block, got)


def _write(block: Block, got: str) -> None:
    path = ROOT / block.page
    old, new = (f"{block.text}```\n```\n{output}```" for output in (block.output, got))
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{block}: write its output by hand"
    path.write_text(text.replace(old, new), encoding="utf-8")


def _command(words: list[str], block: Block) -> None:
    """`hf-elastic` runs in this process; what sets things up is for CI and is checked by `test_docs.py`; anything else needs the marker."""
    if words[0] == "hf-elastic":
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            code = main(words[1:])
        assert code == 0, f"{block}: {shlex.join(words)}: {errors.getvalue()}"
    else:
        assert words[0] in ("make", "pip", "git", "cd"), (
            f'{block}: {words[0]} does not run here: title="{NOT_RUN[0]}"?'
        )
