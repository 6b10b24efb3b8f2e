"""Every block of README and docs runs, or says that it needs a real checkpoint; every public name has a page; the README's commands exist."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from blocks import WRITE, Block, blocks, check, commands, run

import hf_elastic
from hf_elastic import errors, trainers
from hf_elastic.architectures import ARCHITECTURES, Architecture, Axis
from hf_elastic.architectures.axes import TensorRule
from hf_elastic.lab.tasks import get_task

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))
import docstrings  # noqa: E402

PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}
BLOCKS = {page: blocks(path.read_text(encoding="utf-8"), page) for page, path in PAGES.items()}
RUN = {page: [block for block in found if block.runs] for page, found in BLOCKS.items()}
LANGUAGES = {"python", "sh", "yaml", "json", "jsonl", "toml", "text", "mermaid", ""}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What every page finds: `demo` and `book`, as the lab writes them for its tasks: the trained family, and the plain model it was made from."""
    for task, folder in (("stories", "demo"), ("book", "book")):
        found = get_task(task)
        shutil.copytree(found.family_folder, tmp_path / folder / "elastic")
        ignored = shutil.ignore_patterns("training.json")
        shutil.copytree(found.parent_folder, tmp_path / folder / "parent", ignore=ignored)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # nobody waits for a Hub that is not there
    monkeypatch.chdir(tmp_path)
    for found in ("_places", "_loaded"):  # what a page registers is gone afterwards
        monkeypatch.setattr(ARCHITECTURES, found, dict(getattr(ARCHITECTURES, found)))
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language in ("python", "sh") for b in RUN[page])])
def test_blocks_run_and_print_what_the_page_shows(page, folder):
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in RUN[page]:
        run(block, namespace, folder)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_that_need_a_real_checkpoint_are_sound(page):
    for block in BLOCKS[page]:
        check(block)
        assert block.language in LANGUAGES, f"{block}: {block.language}"
        assert not block.runs or block.file or not block.title, f"{block}: {block.title}"


def test_most_blocks_run():
    """Those that do not are counted here: one more is a decision."""
    code = [block for found in BLOCKS.values() for block in found if block.language in ("python", "sh")]
    assert sum(not block.runs for block in code) <= 23
    assert sum(block.runs for block in code) >= 50


def test_commands_that_set_things_up_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = re.search(
        r"^\[project.optional-dependencies\]\n(.*?)^\[", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    assert extras
    for block in (b for found in BLOCKS.values() for b in found if b.language == "sh"):
        for words in commands(block.text):
            if words[0] == "make":
                assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), f"{block}: make {words[1]}"
            if words[0] == "pip":
                for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
                    for name in extra.split(","):
                        assert re.search(rf"^{name} = ", extras[1], re.MULTILINE), f"{block}: [{name}]"


def test_the_nav_has_every_page():
    listed = re.findall(r"^ +- .*?: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.removeprefix("docs/") for page in PAGES if page.startswith("docs/"))


# -- the reader of blocks itself ---------------------------------------------------------------------------------------

PAGE = """\
Text.

```yaml title="a/recipe.yaml"
steps: 1
```

```python
from pathlib import Path
text = Path("a/recipe.yaml").read_text()
print(text, 1.25)
```
```
steps: 1
 1...
```

1. In a list:

    ```python title="needs a real checkpoint"
    model = load("org/model")
    ```
"""


def test_a_page_is_read_and_run(tmp_path, monkeypatch):
    found = blocks(PAGE, "page.md")
    assert [(b.language, b.line, b.runs, b.file) for b in found] == [
        ("yaml", 3, True, True),
        ("python", 7, True, False),
        ("python", 19, False, False),
    ]
    assert found[2].text == 'model = load("org/model")\n'
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in found[:2]:
        run(block, namespace, tmp_path)
    assert namespace["text"] == "steps: 1\n"


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Block("p", 1, "python", "", "print(1)", "2\n"), "Expected"),
        (Block("p", 1, "sh", "", "hf-elastic lab --steps 1"), "--steps=1 must be"),
        (Block("p", 1, "sh", "", "vllm serve x"), "does not run here"),
    ],
)
def test_what_a_page_says_wrongly_is_found(block, message, tmp_path, monkeypatch):
    monkeypatch.delenv(WRITE, raising=False)
    with pytest.raises(AssertionError, match=message):
        run(block, {}, tmp_path)


def test_options_that_do_not_exist_are_found():
    with pytest.raises(AssertionError, match="unrecognized arguments: --nonsense"):
        check(Block("p", 1, "sh", "needs a real checkpoint", "hf-elastic plan org/model --nonsense 1"))
    with pytest.raises(SyntaxError):
        check(Block("p", 1, "python", "needs a real checkpoint", "x ="))


def test_every_public_name_is_on_a_page_of_the_reference():
    pages = [path.read_text(encoding="utf-8") for page, path in PAGES.items() if page.startswith("docs/api/")]
    listed = {path for page in pages for path in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}
    public = {f"hf_elastic.{name}" for name in hf_elastic.__all__ if name[0] != "_"}
    public |= {f"hf_elastic.trainers.{name}" for name in trainers.__all__}
    public |= {f"hf_elastic.{place}.{name}" for name, place in hf_elastic._ELSEWHERE.items()}
    assert {name for name in public if name not in listed and name.rpartition(".")[0] not in listed} == set()


def test_every_error_is_explained():
    page = PAGES["docs/errors.md"].read_text(encoding="utf-8")
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, (errors.HFElasticError, Warning)) and name[0] != "_":
            assert f"| `{name}` |" in page or value is errors.HFElasticError, name
            assert f"\n## {name}\n" in page or value is errors.HFElasticError, name


def test_what_an_architecture_declares_is_on_its_page():
    page = PAGES["docs/add-an-architecture.md"].read_text(encoding="utf-8")
    named = set(re.findall(r"\*\*`(\w+)`\*\*", page))
    assert named <= set(dir(Architecture))
    assert Architecture.__abstractmethods__ <= named
    [rows] = re.findall(r"## What else a table can say\n\n(.*?)\n\n", page, re.DOTALL)
    said = set(re.findall(r"`(\w+)`", rows)) - {"config.json"}
    assert said <= set(dir(Architecture)) | set(Architecture.__annotations__) | set(
        TensorRule.__dataclass_fields__
    ) | set(Axis.__dataclass_fields__)


def test_docstrings_are_read_in_the_style_of_the_house():
    text = """Does.

    Args:
        model ([`ElasticForCausalLM`]): What.
        a, b (`int` or `dict[str, int]`, *optional*, defaults to `f(8)`): See [`~x.y`] and [`PhasePlan`].

    Returns:
        `dict`: What (`a`).
    """
    assert docstrings.plain(text) == text.replace("[`ElasticForCausalLM`]", "ElasticForCausalLM").replace(
        "`int` or `dict[str, int]`, *optional*, defaults to `f(8)`", "int or dict[str, int]"
    ).replace("[`~x.y`]", "`x.y`").replace("[`PhasePlan`]", "[`PhasePlan`][hf_elastic.PhasePlan]").replace(
        "`dict`:", "dict:"
    )
