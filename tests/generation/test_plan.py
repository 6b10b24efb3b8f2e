"""What a plan, a prompt and a call may say: everything else is refused before anything runs."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from phased import END, THINK
from transformers import GenerationConfig

from hf_elastic import HandoverError, HFElasticError, Phase, PhasePlan, PhasePlanError, UnknownBudgetError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PhasePlan(max_thinking_tokens=-1), "max_thinking_tokens=-1 must be a whole number of at least 0"),
        (lambda: PhasePlan(max_answer_tokens=0), "max_answer_tokens=0 must be a whole number of at least 1"),
        (lambda: Phase(start="<think>", max_new_tokens=0), "max_new_tokens=0 needs an end marker"),
        (lambda: PhasePlan(phases=[Phase(max_new_tokens=0)]), "is the last one and has max_new_tokens=0"),
        (lambda: PhasePlan(max_answer_tokens=-3), "max_answer_tokens=-3 must be a whole number"),
        (lambda: PhasePlan(max_thinking_tokens=True), "max_thinking_tokens=True must be a whole number"),
        (
            lambda: PhasePlan(handover="cash"),
            "phase 'answering': handover='cash' must be one of auto, cache, reprefill",
        ),  # type: ignore[arg-type]
        (lambda: PhasePlan(end=""), "phase 'thinking': end='' must be a text"),
        (
            lambda: PhasePlan(thinking_options={"closing": "so"}),
            "closing='so' must hold the end marker, end='</think>'",
        ),
        (lambda: PhasePlan(thinking_options={"grace_tokens": 4}), "grace_tokens needs max_new_tokens and end"),
        (
            lambda: PhasePlan(max_thinking_tokens=4, thinking_options={"grace_tokens": 4}),
            "grace_tokens=4 must be less than max_new_tokens=4",
        ),
        (lambda: PhasePlan(thinking_options={"grace": 4}), "thinking_options: unknown field 'grace' of a phase"),
        (lambda: Phase(generation={"temprature": 1.0}), "'temprature' is no setting.*Did you mean 'temperature'"),
        (lambda: Phase(generation={"num_beams": 2}), "'num_beams' is not set per phase"),
        (lambda: Phase(name=""), "a phase's name must be a text"),
        (lambda: PhasePlan(phases=[]), r"phases=\[\] must be a list of one or more Phase"),
        (lambda: PhasePlan("small", phases=[Phase()]), "give either phases= or thinking="),
        (lambda: PhasePlan(phases=[Phase(max_new_tokens=1), Phase()]), "the names of phases must differ"),
        (lambda: PhasePlan(phases=[Phase(name="a"), Phase(name="b")]), "phase 'a' would never end"),
        (lambda: PhasePlan.from_dict({"phase": []}), "is no phase plan"),
        (lambda: PhasePlan.from_dict({"phases": [{"nmae": "a"}]}), "unknown field 'nmae'.*Did you mean 'name'"),
    ],
)
def test_plans_that_cannot_be(make, message):
    with pytest.raises(PhasePlanError, match=message):
        make()


PLAN = PhasePlan(thinking="small", max_thinking_tokens=4)


@pytest.mark.parametrize(
    ("plan", "kwargs", "error", "message"),
    [
        (PhasePlan(thinking="smal"), {}, UnknownBudgetError, "smal.*Did you mean 'small'"),
        (PhasePlan(end="</answer>"), {}, PhasePlanError, "marker '</answer>', which the tokenizer cannot express"),
        (
            PhasePlan(start="t7t8"),
            {},
            PhasePlanError,
            r"marker 't7t8', which the tokenizer splits into \['t7', 't8'\]",
        ),
        (
            PhasePlan(thinking_options={"closing": "enough</think>"}),
            {},
            PhasePlanError,
            "cannot express closing='enough</think>'",
        ),
        (
            PhasePlan(thinking_options={"closing": "</think></think>"}),
            {},
            PhasePlanError,
            "with its end marker once in it",
        ),
        (PhasePlan(thinking="small", handover="cache"), {}, HandoverError, r"layers \[4\] keep a cache"),
        (PLAN, {"input_ids": torch.full((1, 128), 9)}, PhasePlanError, "prompt 0 has 128 tokens.*ends at 128"),
        (PLAN, {"input_ids": torch.tensor([[9, THINK, 8, END]])}, PhasePlanError, "prompt 0 is past phase 'thinking'"),
        (PLAN, {"input_ids": torch.tensor([[9, END]])}, PhasePlanError, "'</think>' was written"),
        (
            PLAN,
            {"input_ids": torch.tensor([[9, 8], [0, 0]]), "attention_mask": torch.tensor([[1, 1], [0, 0]])},
            PhasePlanError,
            "prompt 1 is empty",
        ),
        *(
            (
                PLAN,
                {"input_ids": torch.full((1, 3), 9), "attention_mask": torch.ones(shape, dtype=torch.long)},
                PhasePlanError,
                rf"attention_mask=<Tensor of shape {re.escape(str(shape))}, int64> must have the shape .* \(1, 3\)",
            )
            for shape in ((1, 7), (1, 2), (2, 3), (3,))
        ),
        (PLAN, {"input_ids": torch.empty(1, 0, dtype=torch.long)}, PhasePlanError, "at least one token"),
        (PLAN, {"num_beams": 2}, PhasePlanError, "greedily or by sampling, not by beam_search"),
        (PLAN, {"assistant_model": object()}, PhasePlanError, "assistant_model=.* cannot be used with phase_plan"),
        (PLAN, {"output_attentions": True}, PhasePlanError, "output_attentions=True cannot be used"),
        (PLAN, {"min_new_tokens": 3}, PhasePlanError, "min_new_tokens=3 cannot be used.*`generation` of a phase"),
        (PLAN, {"cache_implementation": "static"}, PhasePlanError, "run with the default cache"),
        (PLAN, {"use_cache": False}, PhasePlanError, "use_cache=False"),
        (PLAN, {"max_new_token": 3}, ValueError, "max_new_token"),
        ("small", {}, PhasePlanError, "phase_plan='small' must be a PhasePlan"),
    ],
)
def test_calls_that_cannot_be(family, tokenizer, plan, kwargs, error, message):
    """Refused at the call, by `stream_phases` too, and the model is as it was."""
    model = family("nano3")
    kwargs = {"input_ids": torch.tensor([[9, 8]]), "tokenizer": tokenizer, "phase_plan": plan, **kwargs}
    for call in (model.generate, model.stream_phases):
        with pytest.raises(error, match=message):
            call(**kwargs)
        assert model.budget == "full"
    if error is not ValueError:
        assert issubclass(error, HFElasticError)
    assert model.generate(torch.tensor([[9, 8]]), max_new_tokens=2).shape == (1, 4)


def test_prefix_functions_need_one_sequence(family, tokenizer):
    model = family("nano3")
    plan = PhasePlan(phases=[Phase(name="a", max_new_tokens=2), Phase(name="b", max_new_tokens=2)])
    only: dict[str, Any] = {"prefix_allowed_tokens_fn": lambda row, ids: [11 + len(ids)], "phase_plan": plan}
    assert model.generate(torch.tensor([[9, 8]]), **only)[0, 2:].tolist() == [13, 14, 15, 16]
    with pytest.raises(PhasePlanError, match="generate one at a time"):
        model.generate(torch.tensor([[9, 8], [8, 9]]), **only)


def test_the_tokenizer_beside_the_checkpoint_is_found(own_folder, tokenizer):
    from hf_elastic import ElasticForCausalLM

    folder = own_folder("nano3")
    model = ElasticForCausalLM.from_pretrained(folder)
    with pytest.raises(PhasePlanError, match=r"(?s)none was found beside the model.*tokenizer="):
        model.generate(torch.tensor([[9, 8]]), phase_plan=PLAN)
    tokenizer.save_pretrained(folder)
    out = model.generate(torch.tensor([[9, 8]]), phase_plan=PLAN, max_new_tokens=5, pad_token_id=0)
    assert out[0, 2] == THINK


def test_lengths_of_the_call_and_of_configs(family):
    """A cap on everything, wherever it is given; without one the stock default of 20 tokens does not apply."""
    model = family("nano3")
    ids, plan = torch.tensor([[9, 8]]), PhasePlan(phases=[Phase("small", max_new_tokens=30)])
    kwargs: dict[str, Any] = {"phase_plan": plan, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(ids, **kwargs).shape == (1, 32)
    assert model.generate(ids, max_new_tokens=7, **kwargs).shape == (1, 9)
    assert model.generate(ids, max_length=7, **kwargs).shape == (1, 7)
    given = GenerationConfig(eos_token_id=None, pad_token_id=0)
    assert model.generate(ids, phase_plan=plan, generation_config=given).shape == (1, 32)
    assert given.max_new_tokens is None
    given.max_new_tokens = 6
    assert model.generate(ids, phase_plan=plan, generation_config=given).shape == (1, 8)


def test_plans_are_json():
    plan = PhasePlan("small", {"hidden": 32}, max_thinking_tokens=9, handover="cache")
    text = json.dumps(plan.to_dict())
    assert PhasePlan.from_dict(json.loads(text)) == plan
    assert plan != PhasePlan("small", {"hidden": 32}, max_thinking_tokens=8, handover="cache")
    assert json.loads(text)["phases"][1] == {"name": "answering", "budget": {"hidden": 32}, "handover": "cache"}
