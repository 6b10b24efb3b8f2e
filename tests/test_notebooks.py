"""The notebooks run from top to bottom, compute what their texts say, and store what they print."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

from notebooks import EXAMPLES, VARIES, execute, printed  # noqa: E402 - the folder is on the path only now

from hf_elastic.lab.stories import tell  # noqa: E402
from hf_elastic.lab.tasks import get_task  # noqa: E402

NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def run(name: str, folder: Path, probe: str) -> dict[str, Any]:
    """Run a notebook as a reader does; returns what it computed, once what it prints is seen to be what is stored."""
    stored = nbformat.read(EXAMPLES / name, as_version=4)
    notebook, probed = execute(EXAMPLES / name, folder, f"import json\nprint(json.dumps({probe}))")
    for old, new in zip(stored.cells, notebook.cells, strict=True):
        assert printed(old) == printed(new), f"{name} prints something else than is stored; run `make notebooks`"
    return json.loads(probed)


@pytest.mark.slow
def test_load_switch_plan(tmp_path):
    probe = (
        "{'quarter': quarter.num_parameters(), 'names': list(config.family()), 'whole': family.num_parameters(), 'prompt': STORY,"
        " 'text': write(family), 'small text': write(quarter), 'error': str(typo),"
        " 'phases': [[p.name, p.budget, p.generated[0]] for p in output.phases],"
        " 'plain': [type(plain).__module__, plain.num_parameters()],"
        " 'live': float((live - quarter(ids).logits).detach().abs().max())}"
    )
    found = run("load_switch_plan.ipynb", tmp_path, probe)
    task = get_task("stories")
    problem = tell(["Leo", "Amy"], [18, 14], "pet shop")
    assert found["names"] == ["full", *task.sizes]
    record = json.loads((task.family_folder / "training.json").read_text(encoding="utf-8"))
    sizes = {entry["name"]: entry["total_params"] for entry in record["evaluation"]["budgets"]}
    assert (found["quarter"], found["whole"]) == (sizes["quarter"], sizes["full"])
    assert found["live"] < 1e-4
    assert found["prompt"] == problem.prompt
    solved = f"{problem.thinking}</think>{problem.answer}<eos>"
    assert (found["text"], found["small text"]) == (solved, solved)
    tokenizer = task.build_tokenizer()
    written = [len(tokenizer(text)["input_ids"]) for text in solved.partition("</think>")[::2]]
    assert found["phases"] == [["thinking", "quarter", written[0] + 1], ["answering", "full", written[1]]]
    assert found["plain"] == ["transformers.models.lfm2.modeling_lfm2", found["quarter"]]
    assert "'quater'" in found["error"]
    assert "Did you mean 'quarter'" in found["error"]
    assert json.loads((tmp_path / "made/quarter/config.json").read_text())["model_type"] == "lfm2"


@pytest.mark.slow
def test_make_and_train(tmp_path):
    probe = (
        "{'untrained': untrained, 'trained': trained, 'change': float((before - after).detach().abs().max()), 'exit': exit_code,"
        " 'large': large.num_parameters(), 'steps': history.global_step}"
    )
    found = run("make_and_train.ipynb", tmp_path, probe)
    before, after = found["untrained"], found["trained"]
    assert found["change"] < 1e-3
    assert found["steps"] == 60
    assert before["full"] == {"divergence": 0, "right": 1.0}
    assert before["half"]["right"] < 0.2
    for name in ("large", "half"):  # the text says: a cut does not get far, and both come close
        assert before[name]["right"] < 0.6
        assert after[name]["divergence"] < before[name]["divergence"] / 4
    assert after["large"]["right"] > 0.8
    assert after["full"]["right"] > 0.8
    assert after["full"]["divergence"] < after["half"]["divergence"]
    assert (found["exit"], found["large"]) == (0, 287_768)
    rows = [json.loads(line) for line in (tmp_path / "made/train.jsonl").read_text().splitlines()]
    assert len(rows) == 960
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]


def test_what_is_stored():
    assert [path.stem for path in NOTEBOOKS] == ["load_switch_plan", "make_and_train"]
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert "pip install" in notebook.cells[0].source
        codes = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
        assert codes[0] == 1
        for i in codes:
            cell = notebook.cells[i]
            assert cell.execution_count == codes.index(i) + 1, f"{path.name}: cell {i} was not run in order"
            assert notebook.cells[i - 1].cell_type == "markdown" or VARIES in cell.metadata.get("tags", [])
            assert not any(output.get("name") == "stderr" for output in cell.outputs)
            assert bool(cell.outputs) == ("print(" in cell.source or "main(" in cell.source)
        places = re.findall(
            r"(?:/|[A-Z]:\\\\)(?:home|work|tmp|root|Users|usr|opt|var)\b[^\"]*|site-packages", path.read_text()
        )
        assert not places, f"{path.name} has paths of a machine"
        assert f"({path.name})" in (EXAMPLES / "README.md").read_text()
