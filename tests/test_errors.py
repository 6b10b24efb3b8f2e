"""What errors print: names and shapes, never whole tensors or models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hf_elastic import (
    ElasticConfig,
    ElasticForCausalLM,
    HFElasticError,
    Phase,
    PhasePlan,
    elastify,
    masked_model,
)
from hf_elastic.errors import shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("12b", "'12b'"),
        (0.5, "0.5"),
        (None, "None"),
        ({"hidden": 8}, "{'hidden': 8}"),
        (Path("a"), repr(Path("a"))),
        (torch.bfloat16, "torch.bfloat16"),
        (torch.zeros(2, 3), "<Tensor of shape (2, 3), float32>"),
        ({"hidden": [torch.zeros(1000)]}, "{'hidden': [<Tensor of shape (1000,), float32>]}"),
        (nn.Linear(2, 2), "<Linear>"),
        (nn.Linear, "<Linear>"),
        (list(range(100)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ...]"),
    ],
)
def test_values_are_shown_in_a_line(value, text):
    assert shown(value) == text
    assert len(shown([value] * 1000)) < 2000


def test_texts_are_cut():
    assert len(shown("a" * 10_000)) <= 162
    assert shown("a" * 100) == repr("a" * 100)


BIG = torch.randn(64, 64)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.set_budget(BIG),
        lambda model: model.set_budget({"hidden": BIG}),
        lambda model: model.set_budget(model),
        lambda model: model.generate(BIG, phase_plan=model),
        lambda model: model.generate(torch.ones(1, 2).long(), phase_plan=PhasePlan(), assistant_model=model),
        lambda model: model.generate(torch.ones(1, 2).long(), phase_plan=PhasePlan(), inputs_embeds=BIG),
        lambda model: model.generate(torch.ones(1, 2).long(), phase_plan=PhasePlan(), past_key_values=[BIG]),
        lambda model: model.generate(torch.ones(1, 2).long(), draft_budget=BIG),
        lambda model: model.generate(torch.ones(1, 2).long(), draft_budget="small", num_draft_tokens=BIG),
        lambda model: PhasePlan(phases=[model]),
        lambda model: PhasePlan(phases=BIG),
        lambda model: PhasePlan(max_thinking_tokens=BIG),
        lambda model: PhasePlan(thinking_options=BIG),
        lambda model: PhasePlan.from_dict(BIG),
        lambda model: Phase(name=model),
        lambda model: Phase(end=BIG),
        lambda model: Phase(handover=BIG),
        lambda model: model.set_budget({"layers": BIG}),
        lambda model: model.set_budget({"experts": [BIG]}),
        lambda model: masked_model(model, model),
        lambda model: elastify(model, None, None, BIG),
        lambda model: elastify(model, None, BIG),
        lambda model: elastify(model, None, None, {"a": {"hidden": 40}}, scores=model),
        lambda model: ElasticConfig.from_parent(model, {}),
        lambda model: ElasticConfig.from_parent(model.config, BIG),
        lambda model: ElasticConfig(parent_config=model),
        lambda model: ElasticForCausalLM.from_pretrained(None, config=model, state_dict={}),
        lambda model: ElasticForCausalLM.from_pretrained(model.name_or_path, dtype=BIG),
        lambda model: ElasticForCausalLM.from_pretrained(model.name_or_path, budget=BIG),
        lambda model: ElasticForCausalLM.from_pretrained(model.name_or_path, elastic_config=model),
    ],
)
def test_wrong_arguments_are_named_and_not_printed(call, whole):
    with pytest.raises((HFElasticError, TypeError)) as caught:
        call(whole)
    message = str(caught.value)
    assert len(message) < 1500
    assert "tensor(" not in message
    assert "Linear(" not in message
    assert message.count("\n") < 4


@pytest.fixture(scope="module")
def whole(family_folder) -> ElasticForCausalLM:
    return ElasticForCausalLM.from_pretrained(family_folder("nano3"))
