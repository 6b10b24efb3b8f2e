"""Phases against loops written by hand with the stock model, token for token."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from phased import END, EOS, NARROW, NEWLINE, POINT, THINK, Script
from transformers import DynamicCache, StoppingCriteria, TextStreamer, set_seed

from hf_elastic import ElasticForCausalLM, Phase, PhasePlan, PhaseStreamer, PhaseTextStreamer
from hf_elastic.generation.caches import hand_over, read_cache, write_cache

PARENTS = ["nano3", "granite"]


def three_phases(parent: str, handover: str, end: str | None) -> PhasePlan:
    """The whole, then a narrow submodel, then a middle one."""
    return PhasePlan(
        phases=[
            Phase(name="first", max_new_tokens=5, end=end, grace_tokens=0),
            Phase(budget=NARROW[parent], name="second", max_new_tokens=6, handover=handover),  # type: ignore[arg-type]
            Phase(budget={"expert_ffn": 8}, name="third", max_new_tokens=7, handover=handover),  # type: ignore[arg-type]
        ]
    )


def by_hand(model: ElasticForCausalLM, prompt: torch.Tensor, plan: PhasePlan, tokenizer: Any) -> list[int]:
    """One sequence, one token at a time, on stock modules and caches."""
    text, cache, read, before = prompt.tolist(), None, 0, None
    config = model.elastic_config
    for phase in plan.phases:
        now = config.resolve(phase.budget)
        with model.at(now):
            if cache is None or phase.handover == "reprefill":
                cache, read = DynamicCache(config=model.config), 0
            else:
                states = hand_over(read_cache(cache), model.architecture, config.parent_config, before, now)
                cache = write_cache(states, model.config)
            for _ in range(phase.max_new_tokens):  # type: ignore[arg-type]
                logits = model(torch.tensor([text[read:]]), past_key_values=cache, use_cache=True).logits
                read = len(text)
                text.append(int(logits[0, -1].argmax()))
                if phase.end and tokenizer.decode([text[-1]]) == phase.end:
                    break
            else:
                if phase.end:
                    text += tokenizer.encode(f".\n{phase.end}\n\n")
        before = now
    return text[len(prompt) :]


def ends_at_different_times(model: ElasticForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> str:
    """A token that the whole model writes early in one sequence, later in another, and not in the first five of the third."""
    new = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)[
        :, ids.shape[1] :
    ]
    for token in new.flatten().tolist():
        where = [row.index(token) if token in row else 5 for row in new.tolist()]
        if len(set(where)) > 1 and min(where) < 5:
            return f"t{token}"
    raise AssertionError("no such token; take other prompts")


@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize("handover", ["cache", "reprefill"])
def test_three_phases_are_those_made_by_hand(family, tokenizer, prompts, parent, handover):
    """Also: a batch is its sequences one by one, and what is streamed is what is returned."""
    model = family(parent)
    ids, mask = prompts
    plan = three_phases(parent, handover, ends_at_different_times(model, ids, mask))
    out = model.generate(
        ids, attention_mask=mask, phase_plan=plan, tokenizer=tokenizer, return_dict_in_generate=True, do_sample=False
    )
    assert model.budget == "full"
    first = out.phases[0]
    assert len(set(first.generated)) > 1
    assert {"marker", "cap"} == set(first.reasons)
    stream = model.stream_phases(ids, attention_mask=mask, phase_plan=plan, tokenizer=tokenizer, do_sample=False)
    events = list(stream)
    for row in range(3):
        own = ids[row, mask[row].bool()]
        expected = by_hand(model, own, plan, tokenizer)
        new = out.sequences[row, ids.shape[1] :].tolist()
        assert new[: len(expected)] == expected
        assert not any(new[len(expected) :])  # padding
        alone = model.generate(own[None], phase_plan=plan, tokenizer=tokenizer, do_sample=False)
        assert alone[0, len(own) :].tolist() == expected
        assert [event.token_id for event in events if event.kind == "token" and event.row == row] == expected
        for record in out.phases:
            start, stop = record.spans[row]
            assert stop - start == record.generated[row] + record.inserted[row]
    narrow = model.generate(
        ids,
        attention_mask=mask,
        phase_plan=PhasePlan(phases=[Phase(NARROW[parent], max_new_tokens=18)]),
        do_sample=False,
    )
    assert narrow.tolist() != out.sequences.tolist()
    assert [e.handover for e in events if e.kind == "start"] == [None, handover, handover]
    assert [e.budget for e in events if e.kind == "start"][0] == "full"


@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize("handover", ["cache", "auto", "reprefill"])
def test_one_submodel_in_all_phases_is_plain_generate(family, prompts, parent, handover):
    model = family(parent)
    ids, mask = prompts
    plan = PhasePlan(phases=[Phase(name="a", max_new_tokens=4), Phase(name="b", handover=handover)])
    kwargs: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(ids, attention_mask=mask, **kwargs)
    assert torch.equal(model.generate(ids, attention_mask=mask, phase_plan=plan, **kwargs), plain)
    kwargs |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain, phased = model.generate(ids[:1], **kwargs), model.generate(ids[:1], phase_plan=plan, **kwargs)
    assert phased.phases[1].handover == ("reprefill" if handover == "reprefill" else "cache")
    for ours, theirs in zip((*phased.scores, *phased.logits), (*plain.scores, *plain.logits), strict=True):
        if handover == "reprefill":  # one pass over the text sums the scan in another order than token by token
            torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)
        else:
            assert torch.equal(ours, theirs)


def test_sampling_is_plain_sampling(family, prompts):
    """The same draws as `generate` for one sequence; several return sequences differ; settings of a phase apply to it alone."""
    model = family("nano3")
    ids = prompts[0][:1]
    plan = PhasePlan(phases=[Phase(name="a", max_new_tokens=4), Phase(name="b")])
    kwargs: dict[str, Any] = {"max_new_tokens": 10, "do_sample": True, "temperature": 1.3, "top_k": 20}
    set_seed(0)
    plain = model.generate(ids, **kwargs)
    set_seed(0)
    assert torch.equal(model.generate(ids, phase_plan=plan, **kwargs), plain)
    several = model.generate(ids, phase_plan=plan, num_return_sequences=4, **kwargs)
    assert len({tuple(row) for row in several.tolist()}) == 4
    greedy = model.generate(ids, max_new_tokens=4, do_sample=False)
    cold = Phase(name="a", max_new_tokens=4, generation={"do_sample": False})
    mixed = model.generate(ids, phase_plan=PhasePlan(phases=[cold, Phase(name="b")]), num_return_sequences=4, **kwargs)
    assert (mixed[:, :15] == greedy[0]).all()
    assert len({tuple(row) for row in mixed[:, 15:].tolist()}) > 1


def scripted(model, tokenizer, script: list[int], plan: PhasePlan, prompt: tuple[int, ...] = (20, 21), **kwargs: Any):
    """What comes out if the model writes `script`; the place in it is counted in all tokens after the prompt."""
    return model.generate(
        torch.tensor([prompt]),
        phase_plan=plan,
        tokenizer=tokenizer,
        logits_processor=[Script({prompt[0]: script}, len(prompt))],
        return_dict_in_generate=True,
        do_sample=False,
        **kwargs,
    )


T = list(range(30, 60))
CASES = {
    "marker": (T[:3] + [END] + T[:9], 6, None, [THINK, *T[1:3], END, T[0], T[1]], "marker"),
    "cap": (T, 4, None, [THINK, *T[1:5], POINT, NEWLINE, END, NEWLINE, NEWLINE, T[10], T[11]], "cap"),
    "closing": (T, 2, "t9</think>", [THINK, *T[1:3], 9, END, T[5], T[6]], "cap"),
    "line": (
        [*T[:4], NEWLINE, *T[5:]],
        6,
        None,
        [THINK, *T[1:4], NEWLINE, END, NEWLINE, NEWLINE, T[8], T[9]],
        "soft cap",
    ),
    "early line": (
        [*T[:2], NEWLINE, *T[3:]],
        5,
        None,
        [THINK, T[1], NEWLINE, *T[3:6], POINT, NEWLINE, END, NEWLINE, NEWLINE, T[11], T[12]],
        "cap",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_thinking_ends_as_planned(family, tokenizer, case):
    """`<think>` is inserted in front; the cap is never exceeded; the closing is what the tokenizer can express."""
    script, cap, closing, expected, reason = CASES[case]
    options = {"grace_tokens": 0 if closing else 2, "closing": closing}
    if case == "marker":
        script = [THINK, *script[1:4], T[0], T[1]]
    plan = PhasePlan(
        max_thinking_tokens=cap, max_answer_tokens=2, thinking_options={k: v for k, v in options.items() if v}
    )
    if closing:
        plan = PhasePlan(
            max_thinking_tokens=cap, max_answer_tokens=2, thinking_options={"grace_tokens": 0, "closing": closing}
        )
    out = scripted(family("nano3"), tokenizer, script, plan)
    assert out.sequences[0, 2:].tolist() == expected
    thinking, answering = out.phases
    assert thinking.reasons == [reason]
    assert thinking.generated[0] <= cap
    assert thinking.generated[0] + thinking.inserted[0] + answering.generated[0] == len(expected)
    assert answering.generated == [2]


def test_a_point_inside_a_number_ends_no_sentence(family, tokenizer):
    script = [THINK, T[0], T[1], POINT, *T[:8]]  # t31 then a point: a digit before it
    plan = PhasePlan(max_thinking_tokens=4, max_answer_tokens=1, thinking_options={"grace_tokens": 3})
    assert scripted(family("nano3"), tokenizer, script, plan).phases[0].reasons == ["cap"]


def test_an_open_thinking_is_not_opened_again(family, tokenizer):
    plan = PhasePlan(max_thinking_tokens=2, max_answer_tokens=1)
    out = scripted(family("nano3"), tokenizer, T, plan, prompt=(20, THINK))
    assert out.sequences[0, 2:4].tolist() == T[:2]
    assert out.phases[0].inserted == [5]
    closed_and_open = scripted(family("nano3"), tokenizer, T, plan, prompt=(20, THINK, END, THINK))
    assert closed_and_open.phases[0].inserted == [5]


class StopsAt(StoppingCriteria):
    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize(
    ("kwargs", "script", "reason", "written"),
    [
        ({"eos_token_id": EOS}, [THINK, T[0], EOS, *T], "eos", 2),
        ({"max_new_tokens": 3}, [THINK, *T], "length", 3),
        ({"stopping_criteria": [StopsAt(T[2])]}, [THINK, *T], "stopping criteria", 3),
    ],
)
def test_the_text_can_end_while_thinking(family, tokenizer, kwargs, script, reason, written):
    out = scripted(family("nano3"), tokenizer, script, PhasePlan(max_thinking_tokens=20), **kwargs)
    assert out.phases[0].reasons == [reason]
    assert out.phases[0].generated == [written]
    assert out.phases[1].reasons == [None]
    assert out.phases[1].generated == [0]
    assert out.sequences.shape == (1, 2 + 1 + written)


def test_the_context_ends_the_text(family, tokenizer):
    model = family("nano3")  # 128 tokens
    out = model.generate(
        torch.tensor([[20] * 120]), phase_plan=PhasePlan(thinking="large", answering="small"), tokenizer=tokenizer,
        return_dict_in_generate=True, do_sample=False, eos_token_id=None,
    )  # fmt: skip
    assert out.sequences.shape == (1, 128)
    assert "length" in (out.phases[0].reasons[0], out.phases[1].reasons[0])


def test_a_prompt_can_be_read_in_chunks(family, prompts):
    model = family("granite")
    ids, mask = prompts
    plan = PhasePlan(phases=[Phase(NARROW["granite"], name="a", max_new_tokens=5), Phase(name="b", max_new_tokens=5)])
    whole = model.generate(ids, attention_mask=mask, phase_plan=plan, do_sample=False)
    chunks = model.generate(ids, attention_mask=mask, phase_plan=plan, do_sample=False, prefill_chunk_size=3)
    assert torch.equal(whole, chunks)


def test_auto_takes_the_cache_where_it_is_exact_or_was_trained(family, monkeypatch, prompts):
    model = family("nano3")
    plan = PhasePlan(phases=[Phase(NARROW["nano3"], name="a", max_new_tokens=1), Phase(name="b", max_new_tokens=1)])

    def handover(plan: PhasePlan) -> str | None:
        return model.generate(prompts[0], phase_plan=plan, return_dict_in_generate=True).phases[1].handover

    assert handover(plan) == "reprefill"
    monkeypatch.setattr(type(model.elastic_config), "handover_trained", True, raising=False)
    assert handover(plan) == "cache"
    shallow = Phase("small", name="a", max_new_tokens=1)  # has no cache for the layers it drops
    assert handover(PhasePlan(phases=[shallow, Phase(name="b", max_new_tokens=1)])) == "reprefill"


def test_the_model_is_free_while_a_stream_runs(family, prompts):
    """What a stream writes does not depend on what is done with the model between two events, nor the other way round."""
    model = family("nano3")
    plan = PhasePlan(phases=[Phase("small", name="a", max_new_tokens=9), Phase(name="b", max_new_tokens=9)])
    expected = [event.token_id for event in model.stream_phases(prompts[0], phase_plan=plan) if event.kind == "token"]
    texts = {
        size: model.sized(size).generate(prompts[0], do_sample=False, max_new_tokens=4) for size in ("large", "small")
    }
    written = []
    with model.at("large"):
        for event in model.stream_phases(prompts[0], phase_plan=plan):
            assert model.budget == "large"
            assert not torch.is_inference_mode_enabled()
            written += [event.token_id] if event.kind == "token" else []
            for size in ("small", "large"):
                with model.at(size):
                    out = model.generate(prompts[0], do_sample=False, max_new_tokens=4)
                assert torch.equal(out, texts[size])
        assert written == expected


def test_closing_the_stream_puts_a_model_in_training_mode_back(family, prompts):
    model = copy.deepcopy(family("nano3")).train()
    plan = PhasePlan(phases=[Phase("small", name="a", max_new_tokens=9), Phase(name="b", max_new_tokens=9)])
    with model.at("large"):
        stream = model.stream_phases(prompts[0], phase_plan=plan)
        assert [next(stream).kind for _ in range(3)] == ["start", "token", "token"]
        assert model.budget == "small"
        stream.close()
        assert model.budget == "large"


def test_gradients_are_off_inside_and_as_before_outside(family, prompts):
    plan = PhasePlan(phases=[Phase(max_new_tokens=3)])
    with torch.enable_grad():
        for event in family("nano3").stream_phases(prompts[0], phase_plan=plan):
            assert torch.is_grad_enabled(), event


def test_streamers(family, tokenizer, prompts):
    model = family("nano3")
    plan = PhasePlan(phases=[Phase("small", name="a", max_new_tokens=3), Phase(name="b", max_new_tokens=3)])
    ids = prompts[0][:1]
    out = model.generate(ids, phase_plan=plan, do_sample=False)
    tagged = io.StringIO()
    model.generate(ids, phase_plan=plan, do_sample=False, streamer=PhaseTextStreamer(tokenizer, tagged))
    texts = [tokenizer.decode(out[0, start : start + 3]) for start in (11, 14)]
    assert tagged.getvalue() == f"[a - small]\n{texts[0]}\n[b - full]\n{texts[1]}\n"

    class Collects(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)

    pieces: list[str] = []
    model.generate(ids, phase_plan=plan, do_sample=False, streamer=Collects(tokenizer, skip_prompt=True))
    assert "".join(pieces) == "".join(texts)

    class Events(PhaseStreamer):
        def put_event(self, event: Any) -> None:
            seen.append(event.to_dict())

    seen: list[dict[str, Any]] = []
    several = model.generate(*prompts[:1], phase_plan=plan, do_sample=False, streamer=Events())
    for row in range(3):
        tokens = [event["token_id"] for event in seen if event["kind"] == "token" and event["row"] == row]
        assert tokens == several[row, 11:].tolist()
    with pytest.raises(ValueError, match=r"Collects cannot follow 3 sequences"):
        model.generate(prompts[0], phase_plan=plan, streamer=Collects(tokenizer))
