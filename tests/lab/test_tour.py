"""The lab's tour of the shipped family, and the text, table and chart that it shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from hf_elastic import HFElasticError
from hf_elastic.cli import main
from hf_elastic.lab import stories, tour
from hf_elastic.lab.explained import explain
from hf_elastic.lab.family import load_family, make_family
from hf_elastic.lab.parent import load_parent
from hf_elastic.lab.task import BOOK, problems
from hf_elastic.lab.tasks import TASKS, get_task

ROOT = Path(__file__).parents[2]


def run_lab(folder, *options):
    """`hf-elastic lab` as `make demo` runs it, with fewer problems: its folder, and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *args, **kwargs: lines.append(" ".join(map(str, args))))
        assert main(["lab", "--output", str(folder), "--problems", "24", *options]) == 0
    return folder, "\n".join(lines)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {
        name: run_lab(tmp_path_factory.mktemp(name) / "demo", *([] if name == TASKS[0] else ["--task", name]))
        for name in TASKS
    }


@pytest.fixture
def lab(runs):
    return runs["stories"][0]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "architecture"), [("stories", "lfm2"), ("book", "nemotron_h")])
def test_results_are_complete_and_plausible(runs, name, architecture):
    lab, task = runs[name][0], get_task(name)
    results = json.loads((lab / "results.json").read_text())
    assert [entry["name"] for entry in results["budgets"]] == ["full", *task.sizes]
    assert results["task"] == {"name": name, task.unit: task.measured, "problems": 24, "seed": 0}
    record = json.loads((task.family_folder / "training.json").read_text())["evaluation"]["budgets"]
    assert [entry["exact"] for entry in results["budgets"]] == pytest.approx([e["exact"] for e in record], abs=0.2)
    assert results["untrained"]["exact"] <= 0.1  # if the size solves problems before it was trained, it was not cut
    # Reordered float32 sums; logits of these models reach 19.
    assert results["sorted_parent_difference"] < 1e-3
    assert results["export"]["difference"] < 1e-4
    assert (lab / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((lab / "parent" / "config.json").read_text())
    assert config["model_type"] == architecture  # what elastify starts from
    assert sorted(p.name for p in (lab / "export").iterdir() if p.suffix in (".json", ".safetensors")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_stranger_is_told_the_task_the_steps_and_what_the_numbers_mean(runs, name):
    (folder, text), task = runs[name], get_task(name)
    results = json.loads((folder / "results.json").read_text())
    assert task.explain(next(task.problems("heldout", task.shown, 0))) in text
    assert re.findall(r"^(\d)/4 ", text, re.MULTILINE) == ["1", "2", "3", "4"]
    for entry in results["budgets"]:
        assert f"{entry['name']}: {round(24 * entry['exact'])} of 24 answers right" in text
        assert re.search(
            rf"^{entry['name']} +{entry['total_params']:,} +{entry['active_params']:,} ", text, re.MULTILINE
        )
    assert re.search(r"^half, only cut +[\d,]+ .* 0.0", text, re.MULTILINE)
    assert "active: the parameters that one token uses" in text
    clock = results["clock"]
    assert f"{clock['alone_seconds']:.2f} s for a question" in text
    assert f"{clock['plan_seconds']:.2f} s if" in text
    assert max(map(len, text.replace(str(folder), "demo").splitlines())) <= 190


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_the_example_is_shown_as_it_was_solved_and_what_it_cost(runs, name):
    (folder, text), task = runs[name], get_task(name)
    example = json.loads((folder / "results.json").read_text())["example"]
    problem = next(task.problems("heldout", task.shown, 0))
    assert (example["prompt"], example["answer"]) == (problem.prompt, problem.answer)
    assert len(example["lines"]) == 4
    assert not example["lines"][-1]["right"]
    for line in example["lines"]:
        assert line["right"] == (line["answer"] == example["answer"])
        after = text[text.index(example["prompt"], text.index("4/4")) :]
        assert line["who"] in after
        assert line["thinking"][:110] in after
        assert line["answer"][:110] in after
    full, small, both, _ = (line["cost"] for line in example["lines"])
    costs = load_family(name)[0].elastic_config.costs()
    share = list(costs.values())[-1].active_params / costs["full"].active_params
    assert full == pytest.approx(1.0)
    if example["lines"][1]["right"]:
        assert small == pytest.approx(share)
        tokenizer = task.build_tokenizer()
        thought, answered = (
            len(tokenizer(t)["input_ids"]) for t in (f"{problem.thinking}</think>", f"{problem.answer}<eos>")
        )
        assert both == pytest.approx((thought * share + answered) / (thought + answered))


def test_a_story_can_be_checked_by_hand_with_the_text_alone():
    """The sums are in the thinking, and what is bought is in the printed list."""
    problem = next(stories.problems("heldout", 3, 1))
    text = stories.explain(problem)
    listed = dict(re.findall(r"(?:^  |  +)(\d+) ([a-z]+(?: [a-z]+)?)(?=  |$)", text, re.MULTILINE))
    bought = re.findall(r"owns (\d+) coins, at the [a-z]+ shop that buys a ([a-z ]+)\.", problem.answer)
    assert len(bought) == 2
    assert len(listed) == 19
    assert all(listed[coins] == thing for coins, thing in bought)
    assert problem.prompt in text
    assert problem.thinking in text
    assert problem.answer in text


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
    task = get_task("book")
    problem = next(task.problems("heldout", 5, 0))
    verdict = task.verdict
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
