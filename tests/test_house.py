"""The house stands: imports go down, there are no circles, few modules lie on top of the package, and CONTRIBUTING's map is right."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))
import house  # noqa: E402


@pytest.fixture(scope="module")
def found():
    return house.modules()


@pytest.fixture(scope="module")
def graph(found):
    return house.imports(found)


def test_imports_go_down(found, graph):
    print(house.numbers())
    rooms = {house.room(module) for module in found}
    listed = [name for names in house.LEVELS for name in names]
    assert sorted(listed) == sorted(rooms), "every room has one level"
    assert [f"{entry.source}:{entry.line} imports {entry.target}" for entry in house.upward(graph)] == []


def test_no_module_imports_itself_by_way_of_others(graph):
    assert house.circles(graph) == []


def test_imports_that_may_go_upward_are_still_there(graph):
    assert house.ALLOWED.keys() <= {(entry.source, entry.target) for entry in graph if entry.lazy}


def test_few_modules_lie_on_top_of_the_package():
    assert len(list((ROOT / "hf_elastic").glob("*.py"))) <= 12


def test_the_map_is_what_the_modules_say_of_themselves():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert text == house.with_map(text), "run `make map`"


def test_every_folder_is_installed():
    (listed,) = re.findall(
        r"^packages = (\[.*?\])", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S
    )
    own = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "hf_elastic").rglob("__init__.py")}
    assert set(ast.literal_eval(listed)) == own | {"hf_elastic.trainers", "hf_elastic.model_cards"}


SOURCES = {
    "errors": "",
    "architectures/__init__": "",
    "architectures/axes": "from ..errors import HFElasticError",
    "hub/__init__": "",
    "hub/cards": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import pushing",
    "hub/pushing": "def push():\n    import hf_elastic.hub.cards",
}


@pytest.fixture
def sketch(tmp_path):
    """A small package of which everything may be changed."""

    def write(changed: dict[str, str]) -> list[house.Import]:
        for name, source in {**SOURCES, **changed}.items():
            file = tmp_path / "hf_elastic" / f"{name}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
        return house.imports(house.modules(tmp_path))

    return write


@pytest.mark.parametrize(
    "source",
    [
        "from ..hub.cards import render",
        "from ..hub import cards",
        "from .. import hub",
        "import hf_elastic.hub.cards as cards",
        "from hf_elastic.hub.cards import render",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..hub.cards import Card",
        "def later():\n    from ..hub.cards import render",
        "class Late:\n    def method(self):\n        from ..hub import cards",
    ],
)
def test_an_upward_import_is_found_however_it_is_written(sketch, source):
    assert house.upward(sketch({})) == []
    (entry,) = house.upward(sketch({"architectures/axes": source}))
    assert entry.source == "hf_elastic.architectures.axes"
    assert entry.target in ("hf_elastic.hub.cards", "hf_elastic.hub")


def test_only_listed_imports_of_functions_may_go_upward(sketch, monkeypatch):
    pair = ("hf_elastic.architectures.axes", "hf_elastic.hub.cards")
    monkeypatch.setattr(house, "ALLOWED", {pair: "a reason"})
    assert house.upward(sketch({"architectures/axes": "def later():\n    from ..hub import cards"})) == []
    assert house.upward(sketch({"architectures/axes": "from ..hub import cards"})) != []


def test_circles_of_types_and_of_functions_are_found(sketch):
    assert house.circles(sketch({})) == [["hf_elastic.hub.cards", "hf_elastic.hub.pushing"]]
    assert house.circles(sketch({"hub/pushing": "import json"})) == []


def test_scripts_that_tests_import_have_names_of_their_own():
    """Tests put both folders on the path: of two modules of one name the second would be hidden."""
    names = [path.stem for folder in ("tools", "benchmarks") for path in (ROOT / folder).glob("*.py")]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
