"""Plans that are chosen per prompt, against plans without a choice and confidences from plain forward passes."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
import torch
from phased import END, NARROW, THINK, Script

from hf_elastic import HandoverError, Phase, PhasePlan, PhasePlanError, PhaseTextStreamer, UnknownBudgetError

SIGNALS = ["answer_min", "answer_first", "thinking_mean", "thinking_min"]
ANSWER = 6


def plan_of(parent: str, handover: str, **last: Any) -> PhasePlan:
    """A narrow submodel thinks; who answers is in `last`."""
    narrow: Any = NARROW[parent]
    first = Phase(narrow, name="thinking", max_new_tokens=5)
    return PhasePlan(phases=[first, Phase(name="answering", max_new_tokens=ANSWER, handover=handover, **last)])  # type: ignore[arg-type]


def probabilities(model: Any, budget: Any, ids: list[int], start: int) -> list[float]:
    """What a submodel gives to every token from `start` on, in one pass over the text."""
    with model.at(budget), torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return torch.softmax(logits.double(), -1)[range(start - 1, len(ids) - 1), ids[start:]].tolist()


def streamed(model: Any, ids: torch.Tensor, plan: PhasePlan, call: dict[str, Any]) -> tuple[list[Any], Any]:
    """All events, and what the stream gives in the end."""
    events, stream = [], model.stream_phases(ids, phase_plan=plan, **call)
    while True:
        try:
            events.append(next(stream))
        except StopIteration as stop:
            return events, stop.value


def expected_confidence(signal: str, thinking: list[float], answer: list[float]) -> float:
    if signal == "answer_first":
        return answer[0]
    if signal == "answer_min":
        return min(answer)
    return min(thinking) if signal == "thinking_min" else math.prod(thinking) ** (1 / len(thinking))


@pytest.mark.parametrize(("parent", "handover"), [("nano3", "cache"), ("granite", "reprefill")])
@pytest.mark.parametrize("signal", SIGNALS)
def test_every_sequence_decides_for_itself(family, prompts, parent, handover, signal):
    """A batch whose sequences part: each gets what the plan without a choice gives it alone, by the confidence that plain passes say."""
    model, (ids, mask) = family(parent), prompts
    first: Any = {"expert_ffn": 8} if handover == "reprefill" else NARROW[parent]
    call = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "attention_mask": mask}
    alone = {
        budget is None: [
            model.generate(ids[row, mask[row].bool()][None], phase_plan=plan_of(parent, handover, budget=budget), do_sample=False, eos_token_id=None)[0].tolist()
            for row in range(3)
        ]
        for budget in (first, None)
    }  # fmt: skip
    assert all(small != large for small, large in zip(alone[False], alone[True], strict=True))
    values, drafts = [], []
    for row, text in enumerate(alone[False]):
        prompt = int(mask[row].sum())
        by_thinker = probabilities(model, NARROW[parent], text[:-ANSWER], prompt)
        drafts.append(probabilities(model, first, text, len(text) - ANSWER))
        values.append(expected_confidence(signal, by_thinker, drafts[-1]))
    never = plan_of(parent, handover, budget=first, escalate_to="full", confidence=0.0, signal=signal)
    out = model.generate(ids, phase_plan=never, **call)
    assert out.phases[1].confidence == pytest.approx(values, rel=2e-3)
    assert [row[mask_row.tolist().index(1) :] for row, mask_row in zip(out.sequences.tolist(), mask, strict=True)] == (
        alone[False]
    )
    lowest, middle, _ = sorted(values)
    threshold = (lowest + middle) / 2 if signal != "answer_min" else (lowest * middle) ** 0.5
    plan = plan_of(parent, handover, budget=first, escalate_to="full", confidence=threshold, signal=signal)
    events, out = streamed(model, ids, plan, call)
    _, small, large = out.phases
    assert {small.budget, large.budget} == {e.budget for e in events if e.kind == "start" and e.phase}
    for row, value in enumerate(values):
        unsure = value < threshold
        assert out.sequences[row, int((mask[row] == 0).sum()) :].tolist() == alone[unsure][row]
        told = [e.token_id for e in events if e.kind == "token" and e.row == row]
        assert told == alone[unsure][row][int(mask[row].sum()) :]
        (choice,) = [e for e in events if e.kind == "choice" and e.row == row]
        assert (choice.phase, choice.budget) == ((2, "full") if unsure else (1, small.budget))
        assert (choice.name, choice.signal) == ("answering", signal)
        assert (small.generated[row], large.generated[row]) == ((0, ANSWER) if unsure else (ANSWER, 0))
        assert (small.reasons[row] is None, large.reasons[row] is None) == (unsure, not unsure)
        below = next((i for i, p in enumerate(drafts[row]) if p < threshold), 0)
        drafted = {"answer_min": below + 1, "answer_first": 1}.get(signal, 0)
        assert small.drafted[row] == (drafted if unsure else 0)
        assert choice.confidence == small.confidence[row]
        if signal != "answer_min" or not unsure:
            assert choice.confidence == pytest.approx(value, rel=2e-3)
        else:
            assert choice.confidence == pytest.approx(drafts[row][below], rel=2e-3)
    assert sum(value < threshold for value in values) == 1
    assert model.budget == "full"
    assert [event.seconds for event in events] == sorted(event.seconds for event in events)


@pytest.mark.parametrize("signal", SIGNALS)
def test_everybody_or_nobody(family, prompts, signal):
    """At the ends of the range one submodel answers all, and the other is not heard of."""
    model = family("granite")
    call = {"attention_mask": prompts[1], "do_sample": False, "eos_token_id": None}
    for confidence, budget in ((0, "small"), (1, "full")):
        plan = plan_of("granite", "auto", budget="small", escalate_to="full", confidence=confidence, signal=signal)
        fixed = plan_of("granite", "auto", budget=budget)
        events, out = streamed(model, prompts[0], plan, call)
        assert torch.equal(out.sequences, model.generate(prompts[0], phase_plan=fixed, **call))
        assert [e.budget for e in events if e.kind == "choice"] == [budget] * 3
        asked = ["small"] if signal.startswith("answer") or budget == "small" else []
        started = [e.budget for e in events if e.kind == "start"][1:]
        assert started == [*asked, *(["full"] if budget == "full" else [])]


def test_a_draft_leaves_nothing_behind(family, tokenizer):
    """It opens the thinking again and uses up its cap, then is taken back: scores, counts and what is forced are as if it had not been."""
    model = family("nano3")
    script = {20: [THINK, *range(30, 33), END, 40, THINK, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52]}
    options: dict[str, Any] = {"max_thinking_tokens": 6, "max_answer_tokens": 9, "handover": "reprefill"}

    def run(plan: PhasePlan) -> Any:
        return model.generate(
            torch.tensor([(20, 21)]), phase_plan=plan, tokenizer=tokenizer, logits_processor=[Script(script, 2)],
            return_dict_in_generate=True, output_logits=True, output_scores=True, do_sample=False,
        )  # fmt: skip

    small, large = (run(PhasePlan("large", budget, **options)) for budget in ("large", "full"))
    assert large.phases[1].reopened == [2]
    assert large.phases[1].inserted[0] > 0
    text = small.sequences[0].tolist()
    answer = probabilities(model, "large", text, text.index(END) + 1)
    written = [p for p, logits in zip(answer, small.logits[text.index(END) - 1 :], strict=True) if logits.any()]
    threshold = min(written[:-1]) if written[-1] < min(written[:-1]) else None
    if threshold is None:  # the last token that is the new least one, with as much before it as there is
        least = [i for i in range(1, len(written)) if written[i] < min(written[:i])][-1]
        threshold = math.sqrt(written[least] * min(written[:least]))
    out = run(PhasePlan("large", "large", escalate_to="full", confidence=threshold, **options))
    assert out.phases[1].drafted[0] > 1
    assert out.sequences.tolist() == large.sequences.tolist()
    for name in ("generated", "reopened", "inserted", "spans", "reasons"):
        assert getattr(out.phases[2], name) == getattr(large.phases[1], name), name
    for ours, theirs in zip((*out.logits, *out.scores), (*large.logits, *large.scores), strict=True):
        assert torch.equal(ours, theirs)


def test_without_thinking_nothing_says_how_sure(family, tokenizer):
    """A prompt that asks for no thinking, beside one that thinks: the first escalates."""
    model = family("nano3")
    ids = torch.tensor([[20, THINK, END], [0, 20, 21]])
    plan = PhasePlan("large", "large", escalate_to="full", confidence=0, signal="thinking_min", max_thinking_tokens=4)
    out = model.generate(
        ids,
        attention_mask=(ids != 0).long(),
        phase_plan=plan,
        tokenizer=tokenizer,
        max_new_tokens=9,
        return_dict_in_generate=True,
    )
    _, small, large = out.phases
    assert small.confidence[0] is None
    assert small.confidence[1] > 0
    assert (small.reasons[0], large.reasons[1]) == (None, None)
    assert large.generated[0] > 0


def test_closings_are_not_what_it_was_sure_of(family, tokenizer):
    """Tokens that the plan inserts at a cap do not count."""
    model, prompt = family("granite"), torch.tensor([[20, 21]])
    plan = PhasePlan("small", "small", escalate_to="full", confidence=0, signal="thinking_min", max_thinking_tokens=3)
    out = model.generate(
        prompt, phase_plan=plan, tokenizer=tokenizer, max_new_tokens=8, return_dict_in_generate=True, do_sample=False
    )
    start = 3  # `<think>` was inserted, too
    assert out.phases[0].inserted[0] > 1
    text = out.sequences[0].tolist()
    assert out.phases[1].confidence == pytest.approx([min(probabilities(model, "small", text[:6], start))], rel=2e-3)


def test_confidence_is_not_that_of_the_temperature(family, prompts):
    """Sampled tokens, with the probabilities that the submodel gave them."""
    model, ids = family("nano3"), prompts[0][:1]
    plan = PhasePlan(phases=[Phase("large", max_new_tokens=4, escalate_to="full", confidence=0.0)])
    torch.manual_seed(0)
    out = model.generate(ids, phase_plan=plan, do_sample=True, temperature=3.0, top_k=5, return_dict_in_generate=True)
    expected = min(probabilities(model, "large", out.sequences[0].tolist(), ids.shape[1]))
    assert out.phases[0].confidence == pytest.approx([expected], rel=2e-3)


def test_a_streamer_says_who_answers_and_why(family, tokenizer, prompts):
    shown = io.StringIO()
    plan = plan_of("nano3", "reprefill", budget="large", escalate_to="full", confidence=1.0, signal="answer_first")
    streamer = PhaseTextStreamer(tokenizer, shown)
    out = family("nano3").generate(
        prompts[0][:1], phase_plan=plan, streamer=streamer, do_sample=False, return_dict_in_generate=True
    )
    value = out.phases[1].confidence[0]
    text = tokenizer.decode(out.sequences[0, -ANSWER:])
    assert shown.getvalue().endswith(
        f"\n[answering - large]\n(answer_first {value:.3f}: full)\n\n[answering - full]\n{text}\n"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: PhasePlan("a", "b", escalate_to="c"),
            r"'answering': confidence=None must be a number from 0 \(never",
        ),
        (lambda: PhasePlan("a", "b", escalate_to="c", confidence=1.5), "confidence=1.5 must be a number from 0"),
        (lambda: PhasePlan("a", "b", escalate_to="c", confidence=-0.1), "confidence=-0.1 must be"),
        (lambda: PhasePlan("a", "b", escalate_to="c", confidence=float("nan")), "confidence=nan must be"),
        (lambda: PhasePlan("a", "b", escalate_to="c", confidence=True), "confidence=True must be"),
        (lambda: PhasePlan("a", "b", escalate_to="c", confidence="0.9"), "confidence='0.9' must be"),  # type: ignore[arg-type]
        (lambda: PhasePlan("a", "b", confidence=0.9), "confidence=0.9 decides nothing without escalate_to"),
        (lambda: PhasePlan("a", "b", signal="thinking_min"), "signal='thinking_min' decides nothing"),
        (
            lambda: PhasePlan("a", "b", escalate_to="c", confidence=0.5, signal="entropy"),  # type: ignore[arg-type]
            "signal='entropy' must be one of answer_min, answer_first, thinking_mean, thinking_min",
        ),
        (
            lambda: PhasePlan("a", escalate_to="c", confidence=0.5, signal="thinking_min", max_thinking_tokens=0),
            "signal='thinking_min' is about what the phase before wrote",
        ),
        (
            lambda: PhasePlan(phases=[Phase(escalate_to="c", confidence=0.5, signal="thinking_mean")]),
            "nothing is written before",
        ),
        (
            lambda: PhasePlan(
                phases=[Phase(name="a", max_new_tokens=1, escalate_to="c", confidence=0.5), Phase(name="b")]
            ),
            "phase 'a': escalate_to is for the last phase, 'b'",
        ),
        (lambda: PhasePlan(escalate_to="c", confidence=0.5, phases=[Phase()]), "give either phases= or thinking="),
    ],
)
def test_choices_that_cannot_be(make, message):
    with pytest.raises(PhasePlanError, match=message):
        make()


@pytest.mark.parametrize(
    ("last", "error", "message"),
    [
        ({"budget": "small", "escalate_to": "small"}, PhasePlanError, "escalate_to='small' is small, which writes it"),
        ({"budget": "small", "escalate_to": "ful"}, UnknownBudgetError, "ful.*Did you mean 'full'"),
        ({"budget": "small", "escalate_to": "full", "handover": "cache"}, HandoverError, r"layers \[4\] keep a cache"),
    ],
)
def test_choices_that_this_model_does_not_have(family, last, error, message):
    first = Phase("small", name="thinking", max_new_tokens=3)
    plan = PhasePlan(phases=[first, Phase(name="answering", confidence=0.5, **last)])
    with pytest.raises(error, match=message):
        family("nano3").generate(torch.tensor([[9, 8]]), phase_plan=plan)


def test_choices_are_json():
    plan = PhasePlan("small", "small", escalate_to={"hidden": 32}, confidence=0.75, signal="answer_first")
    text = json.dumps(plan.to_dict())
    assert PhasePlan.from_dict(json.loads(text)) == plan
    assert plan.budgets == ["small", "small", {"hidden": 32}]
    assert PhasePlan("small", "full").budgets == ["small", "full"]
    changed = PhasePlan("small", "small", escalate_to={"hidden": 32}, confidence=0.76, signal="answer_first")
    assert plan != changed
