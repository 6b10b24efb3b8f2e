"""What a prompt and a cap of 0 say about thinking, against loops of the stock `generate`."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from phased import END, EOS, NARROW, NEWLINE, PAD, POINT, THINK, Script
from transformers import PreTrainedTokenizerFast

from hf_elastic import ElasticForCausalLM, Phase, PhasePlan, PhasePlanError, PhaseTextStreamer

CAP, ANSWER = 4, 5
CLOSING = [POINT, NEWLINE, END, NEWLINE, NEWLINE]
TEXT = [30, 31, 32, 33]
PROMPTS = {
    "mentioned": ([20, THINK, 21, END, 22, 23], [THINK]),
    "mentioned the other way round in a turn before": ([20, END, 21, THINK, 22, EOS, 23], [THINK]),
    "the start mentioned in a turn before": ([20, THINK, 22, EOS, 23], [THINK]),
    "thoughts of a turn before": ([20, EOS, THINK, 21, END, 22, EOS, 23], [THINK]),
    "thoughts of a turn before, without special tokens": ([20, THINK, 21, END, 22, 23], [THINK]),
    "no thoughts in a turn before": ([20, EOS, THINK, END, 22, EOS, 23], [THINK]),
    "opened": ([20, EOS, THINK, 21, END, 22, EOS, 23, THINK], []),
    "opened with a line break": ([20, THINK, 21, END, 22, THINK, NEWLINE], []),
    "opened and begun": ([20, THINK, 21], []),
    "none": ([20, 21, THINK, END], None),
    "none, with line breaks": ([20, THINK, 21, END, 22, EOS, THINK, NEWLINE, NEWLINE, END, NEWLINE, NEWLINE], None),
    "none, without a start": ([20, 21, EOS, END], None),
}
"""Prompts, and what a plan puts behind them before the thinking; `None` where none is asked for."""


def alone(model: ElasticForCausalLM, prompt: list[int], budget: Any, opening: list[int] | None, answer: int = ANSWER):
    """Thinking of `budget` and an answer of the whole, by the stock `generate`; without an opening the answer only."""

    def write(ids: list[int], **kwargs: Any) -> list[int]:
        kwargs |= {"do_sample": False, "pad_token_id": PAD}
        return model.generate(torch.tensor([ids]), **kwargs)[0].tolist()

    text = list(prompt)
    if opening is not None:
        with model.at(budget):
            text = write(text + opening, max_new_tokens=CAP, eos_token_id=END)
        text += CLOSING if text[-1] != END else []
    return write(text, max_new_tokens=answer, eos_token_id=None)[len(prompt) :]


def plan(parent: str, handover: str = "reprefill", **kwargs: Any) -> PhasePlan:
    kwargs = {"max_thinking_tokens": CAP, "max_answer_tokens": ANSWER} | kwargs
    options = {"grace_tokens": 0} if kwargs["max_thinking_tokens"] else {}
    return PhasePlan(NARROW[parent], handover=handover, thinking_options=options, **kwargs)  # type: ignore[arg-type]


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[PAD] * (longest - len(ids)) + ids for ids in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]),
    }


@pytest.mark.parametrize("parent", ["nano3", "granite"])
def test_a_batch_of_all_kinds_of_prompts_is_each_of_them_alone(family, tokenizer, parent):
    """Also: what is streamed and recorded says which sequences did not think."""
    model = family(parent)
    prompts = [prompt for prompt, _ in PROMPTS.values()]
    kwargs = {**padded(prompts), "phase_plan": plan(parent), "tokenizer": tokenizer, "do_sample": False}
    kwargs |= {"eos_token_id": None, "return_dict_in_generate": True}
    out = model.generate(**kwargs)
    events = list(model.stream_phases(**kwargs))
    thinking, answering = out.phases
    for row, (prompt, opening) in enumerate(PROMPTS.values()):
        expected = alone(model, prompt, NARROW[parent], opening)
        new = out.sequences[row, kwargs["input_ids"].shape[1] :].tolist()
        assert new == expected + [PAD] * (len(new) - len(expected))
        single = model.generate(
            torch.tensor([prompt]), **{k: v for k, v in kwargs.items() if k not in ("input_ids", "attention_mask")}
        )
        assert single.sequences[0, len(prompt) :].tolist() == expected
        assert [e.token_id for e in events if e.kind == "token" and e.row == row] == expected
        reasons = [e.reason for e in events if e.kind == "end" and e.row == row]
        assert reasons == [thinking.reasons[row], "cap"]
        assert (thinking.reasons[row] == "skipped") == (opening is None)
        assert (thinking.generated[row] == 0) == (opening is None)
        assert answering.generated[row] == ANSWER
    assert [e.phase for e in events if e.kind == "start"] == [0, 1]
    assert {"skipped", "cap"} <= set(thinking.reasons)


@pytest.mark.parametrize("parent", ["nano3", "granite"])
@pytest.mark.parametrize("unread", [3, 8])
def test_a_sequence_that_skips_is_read_where_others_hand_over_their_cache(family, tokenizer, parent, unread):
    """Two lengths: one at which it has as many unread tokens as those that hand over have, which are other kinds of rows."""
    model = family(parent)
    skips = [*range(20, 18 + unread), THINK, END]
    thinks = [50, 51, 52]
    each = []
    for prompt in (skips, thinks):
        kwargs: dict[str, Any] = {"phase_plan": plan(parent, "cache"), "tokenizer": tokenizer, "do_sample": False}
        kwargs |= {"eos_token_id": None, "return_dict_in_generate": True}
        each.append(model.generate(torch.tensor([prompt]), **kwargs))
    assert each[0].sequences[0, len(skips) :].tolist() == alone(model, skips, None, None)
    assert [out.phases[1].handover for out in each] == ["reprefill", "cache"]
    both = model.generate(**padded([skips, thinks]), **kwargs)
    assert both.phases[1].handover == "cache"
    for row, (out, prompt) in enumerate(zip(each, (skips, thinks), strict=True)):
        new = out.sequences[0, len(prompt) :].tolist()
        assert both.sequences[row, max(len(skips), 3) :].tolist()[: len(new)] == new


def test_what_ends_with_its_own_thinking_is_refused(family, tokenizer):
    for prompt in ([20, EOS, THINK, 21, END], [20, THINK, 21, END, NEWLINE], [20, END]):
        with pytest.raises(PhasePlanError, match="prompt 0 is past phase 'thinking'.*at its end"):
            family("nano3").generate(torch.tensor([prompt]), phase_plan=plan("nano3"), tokenizer=tokenizer)


def test_later_phases_look_at_the_newest_turn_too(family, tokenizer):
    """A marker in a turn before, or one that a user spoke of, does not open a phase."""
    phases = [Phase(name="a", max_new_tokens=1), Phase(name="b", start="t9", max_new_tokens=2)]
    model, script = family("nano3"), TEXT * 2
    for prompt, inserted in (([20, 9, EOS, 21], 1), ([20, 21, 9], 0)):
        out = scripted(model, tokenizer, script, PhasePlan(phases=phases), prompt)
        assert out.phases[1].inserted == [inserted]


# -- a cap of 0 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "markers"),
    [
        ([20, 21], [THINK, END]),
        ([20, 21, THINK], [END]),
        ([20, 21, THINK, NEWLINE], [END]),
        ([20, 21, THINK, END], []),
        ([20, THINK, 21, END, 22], [THINK, END]),
    ],
)
@pytest.mark.parametrize("handover", ["cache", "reprefill"])
def test_a_cap_of_0_is_no_thinking(family, tokenizer, prompt, markers, handover):
    """The answering submodel writes what it writes after the markers."""
    model = family("nano3")
    expected = markers + alone(model, prompt + markers, None, None)
    out = model.generate(
        torch.tensor([prompt]), phase_plan=plan("nano3", handover, max_thinking_tokens=0), tokenizer=tokenizer,
        do_sample=False, eos_token_id=None, return_dict_in_generate=True,
    )  # fmt: skip
    assert out.sequences[0, len(prompt) :].tolist() == expected
    thinking, answering = out.phases
    assert (thinking.generated, thinking.reasons, thinking.inserted) == ([0], ["skipped"], [len(markers)])
    assert (answering.generated, answering.inserted, answering.handover) == ([ANSWER], [0], "reprefill")


TEMPLATE = (
    "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}t7{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def test_no_thinking_is_said_as_the_chat_template_says_it(family, tokenizer):
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=TEMPLATE, **{
        f"{kind}_token": getattr(tokenizer, f"{kind}_token") for kind in ("pad", "eos", "unk")})  # fmt: skip
    empty = [THINK, NEWLINE, NEWLINE, END, NEWLINE, NEWLINE]
    message = [{"role": "user", "content": "t20"}]
    kwargs: dict[str, Any] = {"add_generation_prompt": True, "return_dict": False}
    asked, not_asked = (own.apply_chat_template(message, enable_thinking=think, **kwargs) for think in (False, True))
    assert asked == [*not_asked, *empty]
    for ids, cap, inserted in ((not_asked, 0, 6), (asked, CAP, 0)):
        out = family("nano3").generate(
            torch.tensor([ids]), phase_plan=plan("nano3", max_thinking_tokens=cap), tokenizer=own,
            do_sample=False, eos_token_id=None, return_dict_in_generate=True,
        )  # fmt: skip
        assert out.phases[0].inserted == [inserted]
        assert out.sequences[0].tolist() == asked + alone(family("nano3"), asked, None, None)


def test_a_closing_of_the_plan_stands_for_no_thinking_too(family, tokenizer):
    closing = PhasePlan(max_thinking_tokens=0, max_answer_tokens=1, thinking_options={"closing": "t9</think>"})
    out = family("nano3").generate(torch.tensor([[20]]), phase_plan=closing, tokenizer=tokenizer, do_sample=False)
    assert out[0, 1:4].tolist() == [THINK, 9, END]


def test_a_phase_in_the_middle_can_be_skipped(family, tokenizer):
    """What it would have got from the phase before is not handed on to the one after it: that reads everything."""
    model, narrow = family("nano3"), NARROW["nano3"]
    phases = [
        Phase(narrow, "a", max_new_tokens=3),  # type: ignore[arg-type]
        Phase(None, "b", max_new_tokens=0, start="<think>", end="</think>", handover="cache"),
        Phase(None, "c", max_new_tokens=4, handover="cache"),
    ]
    with model.at(narrow):
        text = model.generate(torch.tensor([[20, 21]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    text = torch.cat([text, torch.tensor([[THINK, END]])], dim=1)
    expected = model.generate(text, max_new_tokens=4, do_sample=False, eos_token_id=None)
    out = model.generate(
        torch.tensor([[20, 21]]), phase_plan=PhasePlan(phases=phases), tokenizer=tokenizer, do_sample=False,
        eos_token_id=None, return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(out.sequences, expected)
    assert [record.reasons for record in out.phases] == [["cap"], ["skipped"], ["cap"]]


def test_the_printed_text_says_that_thinking_was_skipped(family, tokenizer):
    printed = io.StringIO()
    out = family("nano3").generate(
        torch.tensor([[20]]), phase_plan=PhasePlan("small", max_thinking_tokens=0, max_answer_tokens=2),
        tokenizer=tokenizer, do_sample=False, streamer=PhaseTextStreamer(tokenizer, printed),
    )  # fmt: skip
    text = tokenizer.decode(out[0, 3:])
    assert printed.getvalue() == f"[thinking - small]\n<think></think>(skipped)\n[answering - full]\n{text}\n"


@pytest.mark.parametrize(("prompt", "cap"), [(127, 4), (126, 0), (127, 0)])
def test_what_a_plan_inserts_may_fill_the_context(family, tokenizer, prompt, cap):
    """Nothing is written behind it: the model has no place to read it from."""
    out = family("nano3").generate(  # 128 tokens
        torch.tensor([[20] * prompt]), phase_plan=plan("nano3", max_thinking_tokens=cap), tokenizer=tokenizer,
        do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    inserted = [THINK] if cap else [THINK, END]
    assert out.sequences[0, prompt:].tolist() == inserted
    assert [record.generated for record in out.phases] == [[0], [0]]
    assert "length" in [record.reasons[0] for record in out.phases]
    assert len(out.scores) == len(inserted)


def test_a_forced_end_may_fill_the_context(family, tokenizer):
    script = [0, A[0], END, A[1], THINK, A[2], A[3], *A[:20]]
    reopening = PhasePlan("small", max_thinking_tokens=4, thinking_options={"grace_tokens": 0})
    out = scripted(family("nano3"), tokenizer, script, reopening, [20] * 119)
    assert out.sequences[0, 119:].tolist() == [THINK, A[0], END, A[1], THINK, A[2], A[3], POINT, NEWLINE]
    assert out.phases[1].reasons == ["length"]


# -- thinking that is opened again --------------------------------------------------------------------------------------


def scripted(model, tokenizer, script: list[int], plan: PhasePlan, prompt: list[int], **kwargs: Any):
    return model.generate(
        torch.tensor([prompt]), phase_plan=plan, tokenizer=tokenizer, return_dict_in_generate=True, do_sample=False,
        logits_processor=[Script({prompt[0]: script}, len(prompt))], **kwargs,
    )  # fmt: skip


A = list(range(30, 60))
REOPENED = {
    # the script, the cap, what comes out, thinking tokens in both phases, inserted tokens of the answer
    "cut": (
        [0, A[0], END, A[1], THINK, A[2], A[3], *[0] * 5, A[4], A[5]],
        4,
        [THINK, A[0], END, A[1], THINK, A[2], A[3], *CLOSING, A[4], A[5]],
        (2, 2),
        5,
    ),
    "closed in time": (
        [0, A[0], END, A[1], THINK, A[2], END, A[3], A[4], A[5], A[6]],
        4,
        [THINK, A[0], END, A[1], THINK, A[2], END, A[3], A[4]],
        (2, 2),
        0,
    ),
    "nothing left": (
        [0, A[0], END, A[1], THINK, 0, 0, 0, A[2], A[3], A[4], A[5]],
        2,
        [THINK, A[0], END, A[1], THINK, END, NEWLINE, NEWLINE, A[2], A[3], A[4], A[5]],
        (2, 0),
        3,
    ),
    "twice": (
        [0, A[0], END, THINK, END, THINK, A[1], *[0] * 5, A[2], A[3]],
        4,
        [THINK, A[0], END, THINK, END, THINK, A[1], *CLOSING, A[2], A[3]],
        (2, 2),
        5,
    ),
    "without a cap": (
        [0, A[0], END, A[1], THINK, A[2], END, A[3], A[4]],
        None,
        [THINK, A[0], END, A[1], THINK, A[2], END, A[3], A[4]],
        (2, 2),
        0,
    ),
}


@pytest.mark.parametrize("case", REOPENED)
def test_thinking_that_is_opened_again_counts_against_its_cap(family, tokenizer, case):
    script, cap, expected, thoughts, inserted = REOPENED[case]
    answer = len(expected) - inserted - 3
    options = {"grace_tokens": 0} if cap else {}
    reopening = PhasePlan("small", max_thinking_tokens=cap, max_answer_tokens=answer, thinking_options=options)
    out = scripted(family("nano3"), tokenizer, script, reopening, [20, 21])
    assert out.sequences[0, 2:].tolist() == expected
    thinking, answering = out.phases
    assert (thinking.generated[0], answering.reopened[0], answering.inserted[0]) == (*thoughts, inserted)
    assert answering.generated == [answer]


def test_opened_again_in_one_sequence_of_a_batch(family, tokenizer):
    """The others go on as they would alone, and so does it when its thinking was closed for it."""
    model = family("nano3")
    script, cap, expected, _, _ = REOPENED["cut"]
    prompts = torch.tensor([[20, 21], [22, 23]])
    lines = {20: script + A, 22: [0, A[0], END, *A[8:25]]}
    reopening = PhasePlan("small", max_thinking_tokens=cap, max_answer_tokens=8, thinking_options={"grace_tokens": 0})
    out = model.generate(
        prompts, phase_plan=reopening, tokenizer=tokenizer, do_sample=False, return_dict_in_generate=True,
        logits_processor=[Script(lines, 2)], output_scores=True,
    )  # fmt: skip
    assert out.sequences[0, 2 : 2 + len(expected)].tolist() == expected
    assert out.sequences[1, 2:13].tolist() == [THINK, A[0], END, *A[8:16]]
    forced = [step for step, scores in enumerate(out.scores) if not scores[0].count_nonzero()]
    assert forced == [0, 7, 8, 9, 10, 11]


def test_total_thinking_never_exceeds_the_cap(family, tokenizer):
    """Counted from the tokens as they are told, for models that open and close at random."""
    model = family("nano3")
    generator = torch.Generator().manual_seed(3)
    most = 0
    for cap in range(7):
        for _ in range(3):
            choice = torch.tensor([THINK, END, 30, 31, 32])[torch.randint(5, (60,), generator=generator)].tolist()
            events = model.stream_phases(
                torch.tensor([[20, 21]]), phase_plan=PhasePlan("small", max_thinking_tokens=cap, max_answer_tokens=12),
                tokenizer=tokenizer, do_sample=False, logits_processor=[Script({20: choice}, 2)],
            )  # fmt: skip
            inside, written, answered = False, 0, 0
            for event in events:
                if event.kind == "token":
                    written += inside and not event.inserted
                    answered += event.phase == 1 and not event.inserted
                    inside = event.token_id == THINK or (inside and event.token_id != END)
            assert written <= cap
            assert answered == 12
            most = max(most, written)
    assert most == 6
