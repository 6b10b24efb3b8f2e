"""The README says what the files it is made from say, and links in Markdown files lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_elastic.architectures import ARCHITECTURES
from hf_elastic.cli import COMMANDS

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))
import families  # noqa: E402

README = (ROOT / "README.md").read_text()


def test_results_are_those_of_the_result_files():
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "report.py", "--check"])
    assert done.returncode == 0, "run python benchmarks/report.py"


def test_the_table_of_models_is_the_registry():
    table = README.partition("## Supported models")[2].partition("\n\n##")[0]
    rows = [
        re.findall(r"`(\w+)`", cell)
        for cell in re.findall(r"^\|.*?\|(.*)\|(.*)\|$", table, re.MULTILINE)
        for cell in cell
    ]
    (_, common), *rows = zip(rows[::2], rows[1::2], strict=True)
    found = {name: (group, axes) for group, axes in rows for name in group}
    assert set(found) == set(ARCHITECTURES)
    for group, axes in (row for row in rows if row[0]):
        in_group = {axis.name for name in group for axis in ARCHITECTURES[name].axes}
        assert {*common} <= {*in_group, "layers"}
        assert {*axes} == in_group - {*common}, group


def test_the_page_of_architectures_lists_every_table():
    text = families.PAGE.read_text(encoding="utf-8")
    assert text == families.with_table(text), "run `make map`"


def test_every_command_in_the_readme_exists():
    used = set(re.findall(r"hf-elastic (\w+)", README))
    assert used
    assert used <= set(COMMANDS)


def test_set_up_is_two_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_it_is_read_in_one_go():
    assert README.count("\n") <= 200


def test_versions_and_extras_are_those_of_the_package():
    project = (ROOT / "pyproject.toml").read_text()
    (python,) = re.findall(r'^requires-python = ">=([\d.]+)"', project, re.MULTILINE)
    torch, transformers = (
        re.search(rf'^  "{name}>=([\d.]+)"', project, re.MULTILINE)[1] for name in ("torch", "transformers")
    )
    assert f"Python {python}, torch {torch}, transformers {transformers}, or newer." in README
    table = README.partition("| extra |")[2].partition("\n\n")[0]
    extras = project.partition("[project.optional-dependencies]")[2].partition("[project.scripts]")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) <= set(
        re.findall(r"^(\w+) = ", extras, re.MULTILINE)
    )


MARKDOWN = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("model_cards/*.md"),
    *ROOT.glob("spaces/**/*.md"),
]


def anchors(text: str) -> set[str]:
    """Ids of the headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    heads = (
        re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", head) for head in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    )
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{page.name} links to {target}"
        assert there.is_relative_to(ROOT)
        if anchor and there.suffix == ".md" and "docs/api" not in str(there):
            assert anchor in anchors(there.read_text(encoding="utf-8")), f"{page.name} links to {target}#{anchor}"
