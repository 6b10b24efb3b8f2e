"""Phase plans measured: what is recorded, what it is modelled to cost, and which plans are kept as the best."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria

from hf_elastic import ElasticForCausalLM, PhasePlan, PhasePlanError
from hf_elastic.cli import main
from hf_elastic.evaluation.plans import Task, measure_plan, pareto_front, plan_matrix, planned
from hf_elastic.lab.book import evaluate
from hf_elastic.lab.book_task import BookTask
from hf_elastic.lab.family import make_family
from hf_elastic.lab.parent import load_parent
from hf_elastic.lab.task import problems


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> tuple[ElasticForCausalLM, Any, str]:
    """The untrained lab family with a size that still works, and its folder."""
    parent, tokenizer = load_parent()
    family = make_family(parent, tokenizer, {"ffn": {"expert_ffn": 24, "shared_expert_ffn": 48}})
    folder = str(tmp_path_factory.mktemp("lab") / "family")
    family.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return family, tokenizer, folder


def test_a_plan_is_followed_recorded_and_priced(lab):
    """Tokens and cost against those counted from the events of the same problems."""
    family, tokenizer, _ = lab
    task = BookTask(letters=4, count=6, batch_size=4)
    plan = PhasePlan("ffn", None, max_thinking_tokens=9, handover="reprefill")
    point = measure_plan(family, tokenizer, task, plan, prefill_speed=8.0)
    with planned(family, plan, tokenizer, task) as recorded:
        metrics = task.score(family, tokenizer)[2]
    assert "generate" not in vars(family)
    assert point["metrics"] == metrics
    assert point["accuracy"] == metrics["code"]
    assert metrics["trace"] == 0  # nine tokens are not enough
    assert [len(prompts) for prompts in recorded.prompts] == [4, 2]
    active = {name: cost.active_params for name, cost in family.elastic_config.costs().items()}
    cost = thinking = 0.0
    for phases, prompts in zip(recorded.phases, recorded.prompts, strict=True):
        for row, prompt in enumerate(prompts):
            first, second = phases
            assert first.generated[row] == 9
            assert first.inserted[row] == 1
            assert first.reasons[row] == "cap"
            thinking += 9
            cost += active["ffn"] * (9 + (prompt + 1) / 8)  # the marker that ends the thinking has to be read, too
            cost += active["full"] * (second.generated[row] + (prompt + 10) / 8)
    assert point["cost"] == pytest.approx(cost / 6)
    assert point["thinking_tokens"] == thinking / 6
    assert (point["thinking"], point["answering"], point["max_thinking_tokens"]) == ("ffn", "full", 9)
    assert PhasePlan.from_dict(point["plan"]) == plan.with_markers(tokenizer)
    assert point["prompt_tokens"] == sum(map(sum, recorded.prompts)) / 6


def test_no_thinking_is_priced_as_what_it_is(lab):
    """The thinker reads and writes nothing; the answerer reads the prompt with both markers, whatever the hand-over is called."""
    family, tokenizer, _ = lab
    task = BookTask(letters=4, count=3)
    active = family.elastic_config.costs()["full"].active_params
    for handover in ("cache", "reprefill"):
        plan = PhasePlan("ffn", None, max_thinking_tokens=0, handover=handover)
        point = measure_plan(family, tokenizer, task, plan, prefill_speed=8.0)
        assert (point["thinking_tokens"], point["max_thinking_tokens"]) == (0, 0)
        assert point["handover"] == "reprefill"
        prompt = len(tokenizer(next(problems("heldout", 4, 0)).prompt + "<think></think>")["input_ids"])
        assert point["cost"] == pytest.approx(active * (point["answer_tokens"] + prompt / 8))
    with planned(family, PhasePlan("ffn", None), tokenizer, task) as recorded:
        evaluate(family, tokenizer, letters=4, count=3, thinking=False)
    thinking, answering = recorded.phases[0]
    assert thinking.reasons == ["skipped"] * 3
    assert sum(answering.generated) / 3 == point["answer_tokens"]


class Remembers(StoppingCriteria):
    """What a criterion of lm-eval is shown."""

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        self.seen = input_ids[0].tolist()
        return torch.ones(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    ("prompt", "written", "seen"),
    [
        ("^<think>a</think>b><think>", "a4", None),  # markers of the prompt are none of the text's
        ("^<think>a</think>b><think>", "a4</think>bH", "bH"),
        ("^<think></think>", "bH", "bH"),
        ("^><think>", "a4</think>b<think>c", None),
        ("^><think>", "a4</think>b<think>c</think>d", "d"),
    ],
)
def test_criteria_of_a_task_see_the_answer_alone(lab, prompt, written, seen):
    from hf_elastic.evaluation.lm_eval import LmEvalTask

    tokenizer, criterion = lab[1], Remembers()
    prompts = tokenizer(prompt, return_tensors="pt")["input_ids"]
    kwargs = {"input_ids": prompts, "stopping_criteria": [criterion]}
    LmEvalTask("any").follow(PhasePlan(), tokenizer, kwargs)
    (only,) = kwargs["stopping_criteria"]
    text = tokenizer(prompt + written, return_tensors="pt")["input_ids"]
    assert only(text, None).tolist() == [seen is not None]
    if seen is not None:
        end = tokenizer.convert_tokens_to_ids("</think>")
        assert tokenizer.decode([i for i in criterion.seen if i != end]) == seen


def test_full_thinking_solves_what_a_cut_does_not(lab):
    family, tokenizer, _ = lab
    task = BookTask(letters=4, count=8, metric="exact")
    scores = [
        measure_plan(family, tokenizer, task, plan)["accuracy"] for plan in plan_matrix(["ffn"], [None], [None, 2])
    ]
    assert scores[0] >= 0.9
    assert scores[1] <= 0.3


def test_the_front_is_what_nothing_beats():
    """Against the definition, on random points with ties."""
    rng = random.Random(0)
    for _ in range(50):
        points = [{"cost": rng.randrange(5), "accuracy": rng.randrange(5)} for _ in range(8)]
        front = [points[i] for i in pareto_front(points)]
        best = {
            (p["cost"], p["accuracy"])
            for p in points
            if not any(q["cost"] <= p["cost"] and q["accuracy"] >= p["accuracy"] and q != p for q in points)
        }
        assert [(p["cost"], p["accuracy"]) for p in front] == sorted(best)


def test_matrix_is_everybody_with_everybody():
    plans = plan_matrix(["a", "b"], ["c"], [None, 5], handover="cache")
    assert [(p.phases[0].budget, p.phases[1].budget, p.phases[0].max_new_tokens) for p in plans] == [
        ("a", "c", None), ("b", "c", None), ("a", "c", 5), ("b", "c", 5)]  # fmt: skip
    assert {p.phases[1].handover for p in plans} == {"cache"}


def test_a_task_that_writes_nothing_is_refused(lab):
    class Likelihoods(Task):
        name = "choices"

        def score(self, model, tokenizer):
            model(torch.tensor([[2, 3]]))
            return "acc", 1, {"acc": 1.0}

    with pytest.raises(PhasePlanError, match="'choices' compares likelihoods"):
        measure_plan(lab[0], lab[1], Likelihoods(), PhasePlan())


def test_stop_strings_end_the_text(lab):
    family, tokenizer, _ = lab
    inputs = tokenizer("^a4b+3c-1><think>", return_tensors="pt")
    out = family.generate(**inputs, phase_plan=PhasePlan("ffn"), tokenizer=tokenizer, stop_strings=["="])
    assert tokenizer.decode(out[0]) == "^a4b+3c-1><think>a4b4+3="


def test_command(lab, tmp_path, capsys):
    out = tmp_path / "results"
    argv = ["evaluate", lab[2], "--count", "2", "--letters", "3", "--thinking", "ffn", "--max-thinking-tokens", "5"]
    assert main([*argv, "--max-thinking-tokens", "none", "--output", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "plans.json").read_text())
    assert [(p["thinking"], p["answering"], p["max_thinking_tokens"]) for p in printed["points"]] == [
        ("ffn", "full", 5), ("ffn", "ffn", 5), ("ffn", "full", None), ("ffn", "ffn", None)]  # fmt: skip
    assert printed["front"] == pareto_front(printed["points"])
    assert (out / "plans.png").read_bytes().startswith(b"\x89PNG")
    assert main([*argv, "--by", "seconds"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[:3] == ["thinking", "answering", "cap"]


LINES = """\
task: lines
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["<eos>", "="], max_gen_toks: 7, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow
def test_a_task_of_lm_eval(lab, tmp_path, capsys, monkeypatch):
    """Its stop string occurs in every line of thinking, and its length is that of the answer: neither may end the thinking."""
    pytest.importorskip("lm_eval")
    for offline in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(offline, "1")
    source = problems("heldout", 4, 3)
    lines = [json.dumps({"prompt": p.prompt, "answer": p.answer}) for p in itertools.islice(source, 3)]
    (tmp_path / "data.json").write_text("\n".join(lines))
    (tmp_path / "lines.yaml").write_text(LINES.format(data=tmp_path / "data.json"))
    argv = [
        "evaluate",
        lab[2],
        "--task",
        "lines",
        "--include-path",
        str(tmp_path),
        "--thinking",
        "ffn",
        "--answering",
        "full",
    ]
    capsys.readouterr()
    assert main([*argv, "--max-thinking-tokens", "none", "--max-thinking-tokens", "3", "--json"]) == 0
    whole, cut = json.loads(capsys.readouterr().out)["points"]
    assert (whole["accuracy"], whole["thinking_tokens"], whole["answer_tokens"], whole["n"]) == (1.0, 21, 7, 3)
    assert (cut["accuracy"] < 1, cut["thinking_tokens"]) == (True, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metric", "acc"], "--metric='acc' must be code or exact"),
        (
            ["--max-thinking-tokens", "-1"],
            "--max-thinking-tokens='-1' must be a whole number (0 is no thinking), or none",
        ),
        (["--thinking", "fnn"], "fnn"),
        (["--confidence", "0.9"], "--escalate-to BUDGET and --confidence THRESHOLD need each other"),
        (["--escalate-to", "full", "--confidence", "2"], "confidence=2.0 must be a number from 0"),
        (
            ["--answering", "full", "--escalate-to", "full", "--confidence", "0.9"],
            "--escalate-to full is the only one of --answering",
        ),
        (["--count", "0"], "--count=0 must be at least 1"),
        (["--prefill-speed", "-1"], "--prefill-speed=-1.0 must be a positive number"),
    ],
)
def test_command_refuses(lab, tmp_path, capsys, options, message):
    out = tmp_path / "results"
    assert main(["evaluate", lab[2], "--output", str(out), *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_plan_chosen_per_prompt_is_followed_and_priced(lab, tmp_path, capsys):
    """Drafts that were thrown away are paid for; the table says who answers when."""
    family, tokenizer, folder = lab
    task = BookTask(letters=4, count=6, batch_size=4)
    plan = PhasePlan("ffn", "ffn", escalate_to="full", confidence=0.9, handover="reprefill")
    point = measure_plan(family, tokenizer, task, plan, prefill_speed=8.0)
    with planned(family, plan, tokenizer, task) as recorded:
        task.score(family, tokenizer)
    active = {name: cost.active_params for name, cost in family.elastic_config.costs().items()}
    cost, escalated, drafted = 0.0, 0, 0
    for phases, prompts in zip(recorded.phases, recorded.prompts, strict=True):
        for row, prompt in enumerate(prompts):
            thinking, small, large = phases
            read = prompt + thinking.generated[row]
            cost += active["ffn"] * (thinking.generated[row] + prompt / 8)
            cost += active["ffn"] * (small.generated[row] + small.drafted[row] + read / 8)
            if large.reasons[row] is not None:
                escalated, drafted = escalated + 1, drafted + small.drafted[row]
                assert small.generated[row] == 0
                cost += active["full"] * (large.generated[row] + read / 8)
    assert 0 < escalated < 6
    assert point["cost"] == pytest.approx(cost / 6)
    assert (point["escalated"], point["drafted_tokens"]) == (escalated / 6, drafted / 6)
    assert (point["answering"], point["escalate_to"], point["confidence"]) == ("ffn", "full", 0.9)
    fixed = measure_plan(family, tokenizer, task, PhasePlan("ffn", "full", handover="reprefill"))
    assert point["answer_tokens"] == pytest.approx(fixed["answer_tokens"], abs=1)
    assert "escalated" not in fixed
    options = ["--thinking", "ffn", "--answering", "ffn", "--escalate-to", "full", "--confidence", "0.5"]
    sizes = ["--letters", "2", "--count", "2", "--signal", "answer_first"]
    assert main(["evaluate", folder, *options, *sizes, "--output", str(tmp_path / "out")]) == 0
    assert "ffn; full below 0.5 (answer_first)" in capsys.readouterr().out
    kept = json.loads((tmp_path / "out" / "plans.json").read_text(encoding="utf-8"))["points"]
    assert [p.get("escalate_to") for p in kept] == [None, "full"]


def test_matrix_has_plans_chosen_per_prompt_at_its_end():
    plans = plan_matrix(
        ["a"], ["a", "b"], [None], escalate_to="b", confidences=[0.5, 0.9], signals=["answer_min", "answer_first"]
    )
    assert plans[:2] == plan_matrix(["a"], ["a", "b"], [None])
    chosen = [PhasePlan("a", "a", escalate_to="b", confidence=c, signal=s) for s in ("answer_min", "answer_first") for c in (0.5, 0.9)]  # type: ignore[arg-type]  # fmt: skip
    assert plans[2:] == chosen
