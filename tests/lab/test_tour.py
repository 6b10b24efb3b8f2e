"""The lab's tour of the shipped family, and the text, table and chart that it shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from hf_elastic import HFElasticError
from hf_elastic.cli import main
from hf_elastic.lab import tour
from hf_elastic.lab.explained import explain, verdict
from hf_elastic.lab.family import FAMILY, FAMILY_DIR, load_family, make_family
from hf_elastic.lab.parent import load_parent
from hf_elastic.lab.task import BOOK, problems

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """`hf-elastic lab` as `make demo` runs it, with fewer problems: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("lab") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *args, **kwargs: lines.append(" ".join(map(str, args))))
        assert main(["lab", "--output", str(folder), "--problems", "24"]) == 0
    return folder, "\n".join(lines)


@pytest.fixture
def lab(shown):
    return shown[0]


@pytest.mark.slow
def test_results_are_complete_and_plausible(lab):
    results = json.loads((lab / "results.json").read_text())
    assert [entry["name"] for entry in results["budgets"]] == ["full", *FAMILY]
    record = json.loads((FAMILY_DIR / "training.json").read_text())["evaluation"]["budgets"]
    assert [entry["exact"] for entry in results["budgets"]] == pytest.approx([e["exact"] for e in record], abs=0.1)
    assert min(entry["exact"] for entry in record) >= 0.9
    assert results["untrained"]["exact"] <= 0.1  # if the size solves problems before it was trained, it was not cut
    # Reordered float32 sums; logits of this model reach 19.
    assert results["sorted_parent_difference"] < 1e-3
    assert results["export"]["difference"] < 1e-4
    assert (lab / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert (
        json.loads((lab / "parent" / "config.json").read_text())["model_type"] == "nemotron_h"
    )  # what elastify starts from
    assert sorted(p.name for p in (lab / "export").iterdir() if p.suffix in (".json", ".safetensors")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.slow
def test_a_stranger_is_told_the_task_the_steps_and_what_the_numbers_mean(shown):
    folder, text = shown
    results = json.loads((folder / "results.json").read_text())
    assert explain(next(problems("heldout", 5, 0))) in text
    assert re.findall(r"^(\d)/4 ", text, re.MULTILINE) == ["1", "2", "3", "4"]
    for entry in results["budgets"]:
        assert f"{entry['name']}: {round(24 * entry['exact'])} of 24 answers right" in text
        assert re.search(
            rf"^{entry['name']} +{entry['total_params']:,} +{entry['active_params']:,} ", text, re.MULTILINE
        )
    assert re.search(r"^half, only cut +64,464 .* 0.00 ", text, re.MULTILINE)
    assert "active: the parameters that one token uses" in text
    example = results["example"]
    assert len(example["lines"]) == 4
    after = text[text.index("who writes") :]
    for line in example["lines"]:
        assert line["right"] == (line["answer"] == example["answer"])
        verdict_word = "right" if line["right"] else "wrong"
        shown_line = next(row for row in after.splitlines() if row.startswith(f"{line['who']} "))
        assert shown_line.split()[-3:] == [line["thinking"], line["answer"], verdict_word]
    assert not example["lines"][-1]["right"]
    assert max(map(len, text.replace(str(folder), "demo").splitlines())) <= 140


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_can_be_checked_by_hand_with_the_text_alone(seed):
    """The sums, and every code of the answer, follow from the prompt and the printed table."""
    problem = next(problems("heldout", 5, seed))
    text = explain(problem)
    table = dict(re.findall(r"^  ([+-] \d)  ((?:[A-L] ?){10})$", text, re.MULTILINE))
    assert len(table) == len(BOOK)
    value, answer = int(problem.prompt[2]), ""
    for letter, op, k in re.findall(r"([b-t])([+-])(\d)", problem.prompt):
        before, value = value, (value + int(op + k)) % 10
        assert f"{letter} = {before} {op} {k} = {value}" in text
        answer += letter + table[f"{op} {k}"].split()[value]
    assert answer == problem.answer
    assert f"  answer    {answer}\n" in text
    worked = re.search(r"So (\w) = (.)(\d) with the result (\d) is row (. \d), column (\d): (\w\w)\.", text)
    letter, op, k, result, row, column, code = worked.groups()
    assert (row, column) == (f"{op} {k}", result)
    assert code == letter + table[row].split()[int(column)] == answer[:2]


def test_an_answer_is_right_only_as_a_whole():
    problem = next(problems("heldout", 5, 0))
    rest = f"{problem.thinking}</think>{problem.answer}"
    assert verdict(problem, f"{rest}<eos>") == {"thinking": problem.thinking, "answer": problem.answer, "right": True}
    for wrong in (rest, f"{rest}A<eos>", f"{rest[:-1]}<eos>", problem.thinking, ""):
        assert verdict(problem, wrong)["right"] is False


@pytest.mark.slow
def test_the_readme_example_prints_what_the_readme_says(lab, monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text()
    example = re.search(r"<!-- example:begin -->\n```python\n(.*?)```\n```\n(.*?)```", readme, re.DOTALL)
    code, expected = example.groups()
    monkeypatch.chdir(lab.parent)  # the example reads demo/elastic
    capsys.readouterr()
    with torch.no_grad():
        exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == expected


def test_a_live_submodel_that_is_not_the_slice_stops_the_lab(tmp_path, monkeypatch):
    parent, tokenizer = load_parent()
    load = tour.AutoModelForCausalLM.from_pretrained

    def damaged(*args, **kwargs):
        model = load(*args, **kwargs)
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1
        return model

    monkeypatch.setattr(tour.AutoModelForCausalLM, "from_pretrained", damaged)
    untrained = make_family(parent, tokenizer, sort=False)
    with pytest.raises(HFElasticError, match="not the slice from disk"):
        tour.run_tour(parent, untrained, load_family()[0], tokenizer, tmp_path, count=2)


def test_an_export_that_plain_transformers_cannot_load_stops_the_lab(tmp_path):
    elastic, _ = load_family()
    write = elastic._write_stock_config

    def damaged(config, submodel, directory, **options):
        write(config, submodel, directory, **options)
        path = directory / "config.json"
        path.write_text(path.read_text().replace('"hidden_size": 32', '"hidden_size": 44'))

    elastic._write_stock_config = damaged
    with pytest.raises(HFElasticError, match="could not load the export"):
        tour.check_export(elastic, "half", tmp_path / "export", torch.tensor([[1, 2, 3]]))
    assert not list((tmp_path / "export").glob("*.pt"))
