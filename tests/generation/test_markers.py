"""Markers around the thinking, found in a model's chat template and tokens, wherever a plan is used."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from cases import VOCAB
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_elastic import ElasticConfigError, Phase, PhasePlan, PhasePlanError
from hf_elastic.cli import main
from hf_elastic.evaluation import plans
from hf_elastic.evaluation.lm_eval import LmEvalTask
from hf_elastic.generation.binding import bind
from hf_elastic.generation.markers import find_markers
from hf_elastic.lab.family import FAMILY_DIR

PAIRS = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|thinking_start|>", "<|thinking_end|>"),
    ("◁think▷", "◁/think▷"),
    ("<reasoning>", "</reasoning>"),
]
OTHER = ["<tool_call>", "</tool_call>", "<|im_start|>", "<|im_end|>", "thinking", "<rethink"]


def made(*pairs, template=None, extra=()):
    """A tokenizer with these markers as tokens, `t17` and others that are none."""
    symbols = ["<pad>", "<eos>", *(m for pair in pairs for m in pair), *OTHER, *extra]
    symbols += [f"t{i}" for i in range(len(symbols), VOCAB - 1)] + ["<unk>"]
    backend = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[<\[◁][^>\]▷]*[>\]▷]|t\d+|[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("pair", PAIRS, ids=[start for start, _ in PAIRS])
@pytest.mark.parametrize("template", ["opening", "both", None])
def test_the_pair_of_a_model_is_found(pair, template):
    """Whether its template opens the thinking for the model, takes it out of old turns, or there is none."""
    text = {"opening": f"{{{{ '{pair[0]}' }}}}", "both": f"{{% if '{pair[1]}' in x %}} {pair[0]}", None: None}[
        template
    ]
    assert find_markers(made(pair, template=text)) == pair
    assert find_markers(made(pair, template=text), start=pair[0]) == pair
    assert find_markers(made(pair, template=text), end=pair[1]) == pair


def test_the_template_decides_between_several():
    two = PAIRS[0], PAIRS[4]
    assert find_markers(made(*two, template=f"... {PAIRS[4][0]}")) == PAIRS[4]
    assert find_markers(made(*two)) == PAIRS[0]  # nothing is said, and what most models use is there
    assert find_markers(made(*two, template={"default": PAIRS[4][1], "tools": ""}["default"])) == PAIRS[4]
    both = made(PAIRS[2], PAIRS[4], template=f"{PAIRS[2]} {PAIRS[4]}")
    with pytest.raises(
        PhasePlanError, match=r"several pairs.*<\|START_THINKING\|> \.\.\. .*\[THINK\].*--start and --end"
    ):
        find_markers(both)
    assert find_markers(both, end="[/THINK]") == PAIRS[2]


def test_what_is_no_marker_is_not_taken_for_one():
    for tokenizer in (made(), made(("<think>",)), made(template="<tool_call> thinking"), None):
        assert find_markers(tokenizer) == ("<think>", "</think>")


def test_a_plan_thinks_between_the_markers_of_the_model(family, tokenizer, prompts):
    """The same tokens under other names write the same text; what is given wins, and what is stored is what was used."""
    model = family("nano3")
    ids, mask = prompts
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12}
    plan = PhasePlan("small", "full", max_thinking_tokens=5)
    expected = model.generate(**inputs, phase_plan=plan, tokenizer=tokenizer)
    assert (expected == 2).any()
    assert (expected == 3).any()
    # ids 2 and 3, like those of `tokenizer`; its ends of lines and sentences are no tokens here
    other = made(PAIRS[4], template=PAIRS[4][0])
    bound = bind(model, plan, other)[0]
    assert (bound.phase.start, bound.phase.end) == PAIRS[4]
    assert (bound.start_id, bound.end_id) == (2, 3)
    closing = {"closing": PAIRS[4][1], "grace_tokens": 0}
    explicit = PhasePlan(
        "small", "full", max_thinking_tokens=5, start=PAIRS[4][0], end=PAIRS[4][1], thinking_options=closing
    )
    found = model.generate(**inputs, phase_plan=plan, tokenizer=other)
    assert torch.equal(found, model.generate(**inputs, phase_plan=explicit, tokenizer=other))
    events = list(model.stream_phases(**inputs, phase_plan=plan, tokenizer=other))
    assert 2 in {event.token_id for event in events if event.token_id is not None}
    assert plan.with_markers(other).to_dict()["phases"][0]["end"] == PAIRS[4][1]
    assert plan == PhasePlan("small", "full", max_thinking_tokens=5)  # and stays so
    assert plan != PhasePlan("small", "full", max_thinking_tokens=5, start="<think>", end="</think>")


def test_markers_that_are_given_are_kept():
    other = made(PAIRS[0], PAIRS[4], template=PAIRS[4][0])
    for plan in (
        PhasePlan(start="<think>", end="</think>"),
        PhasePlan(phases=[Phase(name="a", start="<think>", end="</think>"), Phase(name="b")]),
        PhasePlan(thinking_options={"start": "<think>", "end": "</think>"}),
    ):
        assert plan.with_markers(other) == plan
    (first, _) = PhasePlan(start=None).with_markers(made(PAIRS[4], template=PAIRS[4][0])).phases
    assert (first.start, first.end) == (None, PAIRS[4][1])
    (first, _) = PhasePlan(end="</answer>").with_markers(other).phases
    assert (first.start, first.end) == ("<think>", "</answer>")


@pytest.mark.parametrize("given", [{}, {"start": None}, {"end": "[/THINK]"}, {"start": "[THINK]", "end": "</x>"}])
def test_a_plan_that_is_stored_still_finds_its_markers(given):
    other, plan = made(PAIRS[2], template=PAIRS[2][0]), PhasePlan("half", "full", **given)
    stored = plan.to_dict()
    assert [stored["phases"][0].get(key) for key in ("start", "end")] == [
        given.get(key, "auto") for key in ("start", "end")
    ]
    for again in (PhasePlan.from_dict(json.loads(json.dumps(stored))), eval(repr(plan))):
        assert again == plan
        assert again.with_markers(other) == plan.with_markers(other)
    found = plan.with_markers(other)
    assert PhasePlan.from_dict(found.to_dict()) == found
    assert (found == plan) == (len(given) == 2)
    old = {"phases": [{"name": "thinking", "start": "<think>", "end": "</think>"}, {"name": "answering"}]}
    assert PhasePlan.from_dict(old).with_markers(other).to_dict() == old, "what is stored by name is meant"


def test_auto_is_no_name_of_a_marker():
    with pytest.raises(PhasePlanError, match="phase 'b': end='auto' is no marker"):
        PhasePlan.from_dict({"phases": [{"name": "a", "max_new_tokens": 2}, {"name": "b", "end": "auto"}]})


@pytest.fixture
def reasoning(tmp_path):
    """The lab's family with a tokenizer whose markers are called otherwise."""
    folder = shutil.copytree(FAMILY_DIR, tmp_path / "family")
    for name in ("tokenizer.json", "chat_template.jinja"):
        path = folder / name
        path.write_text(path.read_text().replace("think>", "reason>"))
    return folder


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ("<reason>", "</reason>")),
        (["--start", "none", "--end", "</reason>"], (None, "</reason>")),
        (["--start", "^", "--end", ">"], ("^", ">")),
    ],
)
@pytest.mark.parametrize("task", ["book", "words"])
def test_evaluate_takes_or_finds_the_markers(task, options, expected, reasoning, monkeypatch):
    seen = []

    def measure(model, tokenizer, task, plan, **kwargs):
        seen.append((plan, task))
        raise ElasticConfigError("seen")

    monkeypatch.setattr(plans, "measure_plan", measure)
    monkeypatch.setattr("hf_elastic.evaluation.lm_eval.find_tasks", lambda *args: None)
    arguments = ["evaluate", str(reasoning), "--task", task, "--thinking", "third", "--answering", "half", *options]
    assert main(arguments) == 2
    [(plan, asked)] = seen
    assert (plan.phases[0].start, plan.phases[0].end) == expected
    assert not isinstance(asked, LmEvalTask) or asked.think_end_token == expected[1]


def test_evaluate_without_a_task_is_for_models_of_the_lab(reasoning, capsys):
    """With another tokenizer, which may read the problems or may not, scores would say nothing."""
    for tokenizer in (made(), made(extra=[c for c in "^a4b+3c-1>" if c not in "a4"])):
        tokenizer.save_pretrained(reasoning)
        assert main(["evaluate", str(reasoning)]) == 2
        error = capsys.readouterr().err
        assert "book is a task of the embedded lab" in error
        assert "Give --data FILE" in error
        assert "or --task NAME" in error


def test_generate_takes_or_finds_the_markers(reasoning, capsys):
    plan = ["generate", str(reasoning), "^a4b+3c-1d+5>", "--thinking", "third", "--answering", "half"]
    for options in ([], ["--start", "<reason>", "--end", "</reason>"]):
        capsys.readouterr()
        assert main([*plan, *options]) == 0
        assert "bHcBdF" in capsys.readouterr().out
    assert main([*plan, "--end", "</think>"]) == 2
    assert "marker '<think>', which the tokenizer" in capsys.readouterr().err
    assert main(["generate", str(reasoning), "^a4>", "--end", "</reason>"]) == 2
    assert "--end needs --thinking or --answering" in capsys.readouterr().err
