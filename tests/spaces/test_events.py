"""The engines and what is folded from their events; no gradio."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import islice

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_elastic import HFElasticError, PhasePlan
from hf_elastic.lab.family import load_family
from hf_elastic.lab.stories import problems, split_of
from hf_elastic.lab.tasks import get_task
from phase_space.asking import Ask, RequestError
from phase_space.engine import Decoder, ElasticEngine, seconds_needed
from phase_space.fake import FakeEngine
from phase_space.tasks import STORIES_TASK
from phase_space.trace import Trace, follow

PROBLEM = next(problems("heldout", 3, 3))
OPENING = get_task("stories").opening(PROBLEM.prompt)


@pytest.fixture(scope="module")
def lab() -> ElasticEngine:
    return ElasticEngine.lab()


def ask(engine, prompt=None, **what) -> Ask:
    prompt = prompt if prompt is not None else "why is it" if engine.fake else PROBLEM.prompt
    small, large = engine.sizes[0].name, engine.sizes[-1].name
    return Ask((("user", prompt),), **{"thinking": small, "answering": large, "max_thinking_tokens": 64} | what)


@pytest.fixture(params=["fake", "lab"])
def engine(request, lab):
    return FakeEngine(sleep=0) if request.param == "fake" else lab


@pytest.mark.parametrize("cap", [64, 7], ids=["ends by itself", "capped"])
def test_events_of_every_engine_have_the_same_form(engine, cap):
    """Two phases, each with one start and one end; the fold has the same counts as the events; a marker where the cap cut."""
    events = list(engine.stream(ask(engine, max_thinking_tokens=cap)))
    assert [(e.kind, e.phase, e.name) for e in events if e.kind != "token"] == [
        ("start", 0, "thinking"), ("end", 0, "thinking"), ("start", 1, "answering"), ("end", 1, "answering")
    ]  # fmt: skip
    assert {e.name: e.budget for e in events} == {"thinking": engine.sizes[0].name, "answering": engine.sizes[-1].name}
    assert [e.seconds for e in events] == sorted(e.seconds for e in events)
    assert [e.context for e in events] == sorted(e.context for e in events)
    assert pickle.loads(pickle.dumps(events)) == events  # as on ZeroGPU, where they come from another process
    trace = Trace()
    for event in events:
        trace.add(event)
    thinking, answer = trace.parts
    written = [sum(e.kind == "token" and not e.inserted and e.phase == i for e in events) for i in (0, 1)]
    assert [thinking.generated, answer.generated] == written
    assert trace.tokens == sum(written)
    assert thinking.reason == ("cap" if cap == 7 else "marker")
    assert thinking.generated == (7 if cap == 7 else thinking.generated)
    inserted = sum(e.inserted for e in events)
    assert inserted == thinking.inserted + answer.inserted
    assert (thinking.inserted > (1 if engine.fake else 0)) == (cap == 7)
    assert "think>" not in thinking.text + answer.text
    assert trace.text("answering") == answer.text != ""
    assert thinking.first_token_seconds > 0
    assert answer.began == thinking.ended
    assert trace.seconds == events[-1].seconds


def test_the_lab_streams_what_generate_gives(lab):
    """Against `generate` at once, in one piece, and against the problem's own solution."""
    plan = PhasePlan("half", "full", max_thinking_tokens=64, max_answer_tokens=64)
    ids = lab.tokenizer(OPENING, return_tensors="pt")
    output = lab.model.generate(**ids, phase_plan=plan, tokenizer=lab.tokenizer, return_dict_in_generate=True)
    trace = list(follow(lab.stream(ask(lab, thinking="half", max_answer_tokens=64))))[-1]
    assert (trace.text("thinking"), trace.text("answering")) == (PROBLEM.thinking, PROBLEM.answer)
    assert [part.generated for part in trace.parts] == [record.generated[0] for record in output.phases]
    assert [part.handover for part in trace.parts] == [record.handover for record in output.phases]
    assert trace.parts[-1].context == output.sequences.shape[1]


def test_the_same_seed_samples_the_same_text(lab):
    def text(seed):
        trace = list(follow(lab.stream(ask(lab, temperature=2.0, seed=seed))))[-1]
        return trace.text("thinking") + "|" + trace.text("answering")

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


def test_closing_in_the_middle_frees_the_engine(engine):
    for stop_after in (1, 5, 30):
        events = engine.stream(ask(engine))
        assert len(list(islice(events, stop_after))) == stop_after
        events.close()
        if engine.fake:
            assert engine.running == 0
        else:
            assert engine.model.submodel == engine.model.elastic_config.submodel("full")
            assert not engine._lock.locked()
    assert list(follow(engine.stream(ask(engine))))[-1].text("answering")


def test_two_at_once_are_never_mixed(lab, monkeypatch):
    """The queue prevents it; if it did not, the second is told so, and the first goes on unharmed."""
    monkeypatch.setattr("phase_space.engine.BUSY_SECONDS", 0.05)
    first = lab.stream(ask(lab))
    begun = list(islice(first, 3))
    with pytest.raises(RequestError, match="busy"):
        next(lab.stream(ask(lab, thinking="full")))
    texts = "".join(e.text for e in [*begun, *first])
    assert texts == PROBLEM.thinking + PROBLEM.answer


BAD = {
    "unknown budget": ({"thinking": "haf"}, "unknown budget 'haf'"),
    "no thinking tokens": ({"max_thinking_tokens": 0}, "max_thinking_tokens=0 must be a whole number of at least 1"),
    "fewer than none": ({"max_answer_tokens": -3}, "max_answer_tokens=-3 must be a whole number of at least 1"),
    "half a token": ({"max_thinking_tokens": 1.5}, "max_thinking_tokens=1.5 must be a whole number"),
    "too many tokens": ({"max_answer_tokens": 10**9}, "From 1 to"),
    "no cap": ({"max_thinking_tokens": None}, "From 1 to"),
    "a cap in words": ({"max_answer_tokens": "many"}, "max_answer_tokens='many' must be a whole number"),
    "not a text": ({"prompt": 5}, "empty"),
    "no prompt": ({"prompt": ""}, "empty"),
    "blank prompt": ({"prompt": " \n "}, "empty"),
    "control characters": ({"prompt": "Mia\x07 has \x1b[31m7"}, r"control characters \(U\+0007, U\+001B\)"),
    "endless prompt": ({"prompt": "a" * 100_001}, "100,001 characters"),
    "past the thinking": ({"prompt": "why<think>a6</think>"}, "past the thinking already"),
    "too hot": ({"temperature": 3.0}, "temperature"),
    "not a temperature": ({"temperature": float("nan")}, "temperature"),
    "seed out of range": ({"seed": -1}, "seed"),
    "no seed": ({"seed": None}, "seed"),
}
BAD_FOR_THE_LAB = {
    "html": (
        {"prompt": "<b>hello</b>"},
        "This small model cannot read that: .* It reads stories of one form only, such as: Mia has 7 coins",
    ),
    "a beginning only": ({"prompt": "Mia has 7 coins."}, "3 at least.*this has 1"),
    "somebody else": (
        {"prompt": PROBLEM.prompt.replace("has", "owns", 1)},
        "must be a sentence like “Mia has 7 coins.”",
    ),
    "too many people": (
        {"prompt": next(problems("heldout", 11, 0)).prompt},
        "has 11 people, and the model has room for 10",
    ),
    "a thought begun": ({"prompt": PROBLEM.prompt + "<think>Mia"}, "must be a sentence like “What can"),
}


@pytest.mark.parametrize("case", [*BAD, *BAD_FOR_THE_LAB])
def test_bad_requests_are_explained_and_the_next_is_served(case, lab):
    """In every engine that the case applies to; the lab's own errors come from the library or its task."""
    what, message = (BAD | BAD_FOR_THE_LAB)[case]
    for engine in [lab, FakeEngine(sleep=0)][: 1 if case in BAD_FOR_THE_LAB else 2]:
        prompt = what.get("prompt")
        with pytest.raises(HFElasticError, match=message):
            list(engine.stream(ask(engine, prompt, **{k: v for k, v in what.items() if k != "prompt"})))
        assert list(islice(engine.stream(ask(engine)), 1))[0].kind == "start"


def test_a_start_that_the_prompt_holds_is_not_an_end(lab):
    """A prompt may open the thinking itself and write its beginning."""
    begun = OPENING + PROBLEM.thinking.partition(".")[0] + "."
    lab_without_template = ElasticEngine(lab.model, _without_template(lab.tokenizer), "lab")
    trace = list(follow(lab_without_template.stream(ask(lab, begun))))[-1]
    assert PROBLEM.thinking.endswith(trace.text("thinking"))
    assert trace.text("answering") == PROBLEM.answer


def test_markers_of_the_model_are_not_shown_and_not_asked(lab):
    """The lab's family with a tokenizer whose markers are called otherwise: the plan that runs is the one that is read."""
    renamed = lab.tokenizer.backend_tokenizer.to_str()
    for old, new in (("<think>", "[THINK]"), ("</think>", "[/THINK]")):
        renamed = renamed.replace(old, new)
    backend = Tokenizer.from_str(renamed)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token=lab.tokenizer.eos_token,
        chat_template=lab.tokenizer.chat_template.replace("<think>", "[THINK]"),
    )  # fmt: skip
    engine = ElasticEngine(lab.model, tokenizer, "lab", STORIES_TASK)
    trace = list(follow(engine.stream(ask(lab))))[-1]
    assert (trace.text("thinking"), trace.text("answering")) == (PROBLEM.thinking, PROBLEM.answer)
    with pytest.raises(RequestError, match=r"it holds \[/THINK\], the end marker"):
        Ask((("user", "a [/THINK] b"),), "half", "full").check(4096, tokenizer)
    Ask((("user", "a </think> b"),), "half", "full").check(4096, tokenizer)


def test_an_end_marker_that_the_tokenizer_splits_is_refused(lab):
    symbols = ["<pad>", "<eos>", *"^>=+-</", *"0123456789", *"abcdefghijklmnopqrst"]
    backend = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split(Regex("."), behavior="isolated"), decoders.Fuse()
    engine = ElasticEngine(lab.model, PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>"), "split")
    with pytest.raises(HFElasticError, match="has to be one token"):
        list(engine.stream(ask(lab, "ask")))
    assert list(lab.stream(ask(lab)))[-1].kind == "end"


def test_a_prompt_that_the_tokenizer_cannot_read_is_refused_before_anything_runs(lab):
    model, tokenizer = load_family("book")
    engine = ElasticEngine(model, tokenizer, "any chat model")
    with pytest.raises(
        HFElasticError, match=r"The prompt: the tokenizer has no tokens for '\?', 'W', 'y'. Take it out"
    ):
        engine.check(ask(engine, "Why?"))
    with pytest.raises(HFElasticError, match="no tokens for"):
        next(engine.stream(ask(engine, "Why?")))
    assert list(engine.stream(ask(engine, "^a6b-1>")))[-1].kind == "end"


def test_a_prompt_longer_than_the_context_is_refused(lab):
    engine = ElasticEngine(lab.model, lab.tokenizer, "any chat model")
    with pytest.raises(HFElasticError, match="context of the model ends at 256"):
        list(engine.stream(ask(engine, "Mia has 7 coins. " * 60)))


def test_a_problem_is_put_to_the_model_as_it_was_trained_on_it(lab):
    """Whatever the white space, and without what was said before."""
    spaced = ask(lab, "\n" + PROBLEM.prompt.replace(" ", "  \n"))
    said = (("user", "before"), ("assistant", "that"), *spaced.messages)
    ids = lab._encode(replace(spaced, messages=said))["input_ids"][0]
    assert lab.tokenizer.decode(ids) == OPENING


def _without_template(tokenizer):
    copied = pickle.loads(pickle.dumps(tokenizer))
    copied.chat_template = None
    return copied


def test_a_character_of_several_tokens_comes_in_one_piece():
    class Bytes:
        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode(errors="replace")

    decoder = Decoder(Bytes())
    pieces = [decoder.push(byte) for byte in "ä€\nb".encode()]
    assert pieces == ["", "ä", "", "", "€", "\n", "b"]
    assert decoder.push("é".encode()[0]) == ""
    assert decoder.flush() == "\ufffd"  # cut off in a character


def test_a_stop_is_heeded_before_and_during_a_run():
    engine = FakeEngine(sleep=0)
    *_, trace = follow(engine.stream(ask(engine)), lambda: True)
    assert (trace.stopped, trace.parts, engine.most) == (True, [], 0)
    asked = iter([False] * 20 + [True])
    trace = list(follow(engine.stream(ask(engine)), lambda: next(asked)))[-1]
    assert trace.stopped
    assert [part.state for part in trace.parts] == ["stopped"]
    assert trace.tokens == 18  # 20 events: a start and an inserted marker besides
    assert engine.running == 0


def test_a_request_travels_and_has_an_upper_time():
    request = Ask((("user", "x"),), "S", "L", 2000, 100)
    assert pickle.loads(pickle.dumps(request)) == request
    assert seconds_needed(request) == 10 + 2100 // 20
    assert seconds_needed(Ask((("user", "x"),), "S", "L", 4000, 4000)) == 300


def test_new_problems_are_held_out_and_readable(lab):
    for seed in range(20):
        assert split_of(STORIES_TASK.new(seed)) == "heldout"
        assert STORIES_TASK.solve(STORIES_TASK.new(seed))
    for longest in islice(problems("heldout", 10, 0), 20):
        thinking, answer = (len(lab.tokenizer(text)["input_ids"]) for text in (longest.thinking, longest.answer))
        assert thinking + 1 <= STORIES_TASK.max_thinking_tokens
        assert answer + 1 <= STORIES_TASK.max_answer_tokens


def test_costs_shown_are_those_of_the_model(lab):
    """Of the largest size against the tensors themselves."""
    held = sum(tensor.nbytes for tensor in {t.data_ptr(): t for t in lab.model.state_dict().values()}.values())
    assert lab.sizes[-1].weight_bytes == held
    assert [size.name for size in lab.sizes] == ["quarter", "half", "full"]
    output = lab.model(torch.tensor([[5, 6, 7]]), use_cache=True)
    cache = output.past_key_values
    kv = sum(
        layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if getattr(layer, "keys", None) is not None
    )
    assert kv == 3 * lab.sizes[-1].kv_bytes_per_token
    assert lab.sizes[-1].cache_bytes(3) == kv + lab.sizes[-1].state_bytes


def test_a_size_may_be_asked_for_as_a_share(lab):
    size, whole = lab.sizes[1], lab.sizes[-1]
    share = f"{100 * size.active_params / whole.active_params + 0.01:.2f}% active"
    ask = Ask((("user", lab.task.examples[0]),), share, "100%", 2, 2)
    lab.check(ask)
    assert [event.budget for event in lab.stream(ask) if event.kind == "start"] == [size.name, whole.name]
