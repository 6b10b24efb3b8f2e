"""The parent and the family of `stories` that ship with the package: what their records say, and that a plan joins two sizes."""

import json

import pytest
import torch

from hf_elastic import PhasePlan
from hf_elastic.lab.family import load_family, measure_family
from hf_elastic.lab.parent import load_parent
from hf_elastic.lab.stories_model import SIZES, new_parent, parent_config
from hf_elastic.lab.tasks import get_task

TASK = get_task("stories")


@pytest.fixture(scope="module")
def parent():
    return load_parent("stories")


@pytest.fixture(scope="module")
def family():
    return load_family("stories")


def record_of(folder):
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


def test_the_parent_solves_stories_by_thinking(parent):
    assert TASK.evaluate(*parent, count=20).exact >= 0.9
    # Nor does it solve them at once, so the thinking is what does it.
    assert TASK.evaluate(*parent, count=20, thinking=False).exact <= 0.4


def test_the_parent_is_what_its_record_and_the_code_say(parent):
    model, tokenizer = parent
    record = record_of(TASK.parent_folder)
    assert (record["steps"], record["num_parameters"]) == (TASK.parent_steps, model.num_parameters())
    exact = {(row["people"], row["thinking"]): row["exact"] for row in record["evaluation"]}
    assert set(exact) == {(people, thinking) for people in (1, 3, 5) for thinking in (True, False)}
    assert exact[5, True] >= 0.98
    assert tokenizer.get_vocab() == TASK.build_tokenizer().get_vocab()
    saved, made = (config.to_dict() for config in (model.config, parent_config()))
    for name in ("architectures", "dtype", "_name_or_path", "transformers_version"):
        saved.pop(name, None), made.pop(name, None)
    assert saved == made


def test_weights_of_a_new_parent_depend_on_the_seed_alone():
    torch.manual_seed(3)
    one = new_parent(0).state_dict()
    torch.manual_seed(4)
    again, other = new_parent(0).state_dict(), new_parent(1).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_the_family_does_what_its_record_says(family):
    record = record_of(TASK.family_folder)
    measured = {entry["name"]: entry for entry in record["evaluation"]["budgets"]}
    assert list(measured) == ["full", *SIZES]
    assert {name: cost.active_params for name, cost in family[0].elastic_config.costs().items()} == {
        name: entry["active_params"] for name, entry in measured.items()
    }
    [entry] = measure_family(*family, {"quarter": "quarter"}, task=TASK, count=30)
    assert entry["exact"] == pytest.approx(measured["quarter"]["exact"], abs=0.2)
    assert measured["full"]["exact"] >= 0.98
    assert measured["full"]["exact"] > measured["quarter"]["exact"], "sizes are to differ in this task"
    files = [file for folder in (TASK.family_folder, TASK.parent_folder) for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) < 4_000_000


def test_a_small_size_thinks_and_the_large_one_answers(family):
    """The text of a plan is the thinking that the small size writes alone, and the answer that the large one writes after it."""
    model, tokenizer = family
    problem = next(TASK.problems("heldout", 3, 0))
    inputs = tokenizer(TASK.opening(problem.prompt), return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    with model.at("quarter"):
        alone = tokenizer.decode(model.generate(**inputs)[0, start:])
    thinking = alone.partition("</think>")[0]
    with model.at("full"):
        read = tokenizer(TASK.opening(problem.prompt) + thinking + "</think>", return_tensors="pt")
        answer = tokenizer.decode(model.generate(**read)[0, read["input_ids"].shape[1] :])
    plan = PhasePlan("quarter", "full", handover="reprefill")
    both = tokenizer.decode(model.generate(**inputs, phase_plan=plan, tokenizer=tokenizer)[0, start:])
    assert both == f"{thinking}</think>{answer}"
