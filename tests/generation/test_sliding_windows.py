"""Layers with sliding windows, in prompts longer than the window: what their caches cost, phases, hand-over, drafts that are taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import randomize
from phased import PAD
from transformers import DynamicCache, Gemma3TextConfig, MistralConfig, PreTrainedModel

from hf_elastic import ElasticForCausalLM, HandoverError, Phase, PhasePlan, elastify
from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.cost import CostModel
from hf_elastic.generation.caches import hand_over, read_cache, write_cache
from hf_elastic.submodels.slicing import slice_state_dict
from trainers.handover import handed_over

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "rms_norm_eps": 0.1,
}
CONFIGS = {
    "some layers": lambda: Gemma3TextConfig(**COMMON, sliding_window_pattern=2),
    "all layers": lambda: MistralConfig(**COMMON),
}
NARROW = {"hidden": 16, "attention_heads": 4}
SMALL = {**NARROW, "layers": [0, 2, 3]}
GREEDY = {"do_sample": False}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request) -> ElasticForCausalLM:
    config = CONFIGS[request.param]()
    stock: PreTrainedModel = get_architecture(config.model_type).causal_class(config).eval()
    randomize(stock)
    family = elastify(stock, budgets={"narrow": NARROW, "small": SMALL}, sort=False)
    family.generation_config.pad_token_id = PAD
    return family


def stock_slice(model: ElasticForCausalLM) -> PreTrainedModel:
    """The small size as a stock model."""
    table, config, small = (
        model.architecture,
        model.elastic_config.parent_config,
        model.elastic_config.submodel("small"),
    )
    stock = table.causal_class(table.config_for(config, small)).eval()
    stock.load_state_dict(slice_state_dict(table, config, model.state_dict(), small))
    stock.generation_config.pad_token_id = PAD
    return stock


def test_caches_cost_what_they_hold(model):
    small = model.elastic_config.submodel("small")
    cost, stock = CostModel(model.elastic_config.parent_config)(small), stock_slice(model)
    for tokens in (1, 3, 4, 5, 6, 13):
        cache = DynamicCache(config=stock.config)
        stock(torch.full((2, tokens), 7), past_key_values=cache, use_cache=True)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert held == cost.cache_bytes(tokens, 2, torch.float32)
    assert held == 2 * (13 * cost.kv_bytes_per_token(torch.float32) + cost.window_bytes(torch.float32))
    assert cost.window_bytes() > 0


@pytest.mark.parametrize("length", [3, 11])
def test_phases_of_one_size_are_stock_generation(model, prompts, length):
    """Short of the window and beyond it; sequences of a batch that have seen different numbers of tokens, handed over twice."""
    ids, mask = (tensor[:, -length:] for tensor in prompts)
    phases = [Phase("small", name=name, max_new_tokens=4, handover="cache") for name in "abc"]
    out = model.generate(ids, attention_mask=mask, phase_plan=PhasePlan(phases=phases), **GREEDY)
    stock = stock_slice(model)
    for row in range(3):
        own = ids[row : row + 1, mask[row].bool()]
        expected = stock.generate(own, max_new_tokens=12, **GREEDY)
        assert out[row, length:].tolist() == expected[0, own.shape[1] :].tolist()
    assert not torch.equal(out, model.generate(ids, attention_mask=mask, max_new_tokens=12, **GREEDY))


def test_handed_over_in_a_batch_as_one_by_one(model, prompts):
    """The whole writes, the small one goes on, and the other way round; by hand with stock caches and the newest tokens' positions."""
    ids, mask = prompts
    config, table = model.elastic_config, model.architecture
    for first, second in ((None, "narrow"), ("narrow", None)):
        plan = PhasePlan(
            phases=[
                Phase(first, name="a", max_new_tokens=3),
                Phase(second, name="b", max_new_tokens=9, handover="cache"),
            ]
        )
        out = model.generate(ids, attention_mask=mask, phase_plan=plan, **GREEDY)
        for row in range(3):
            text, read = ids[row, mask[row].bool()].tolist(), 0
            cache = DynamicCache(config=config.stock_config(config.resolve(first)))
            for step in range(12):
                now = first if step < 3 else second
                if step == 3:
                    states = hand_over(
                        read_cache(cache), table, config.parent_config, *map(config.resolve, (first, second))
                    )
                    cache = write_cache(states, config.stock_config(config.resolve(second)), read)
                with model.at(now):
                    logits = model(torch.tensor([text[read:]]), past_key_values=cache, use_cache=True).logits
                read = len(text)
                text.append(int(logits[0, -1].argmax()))
            assert out[row, ids.shape[1] :].tolist() == text[-12:]


def test_drafts_are_taken_back(model, prompts):
    ids = prompts[0][:1]
    settings = GREEDY | {"max_new_tokens": 14, "return_dict_in_generate": True}
    out = model.generate(ids, draft_budget="small", num_draft_tokens=3, **settings)
    assert torch.equal(out.sequences, model.generate(ids, **settings).sequences)
    assert out.drafted > out.accepted


def test_training_of_hand_over_goes_on_at_the_right_position(model, prompts):
    """A cache for a size that reads on, whose windows are full, says how many tokens were read."""
    tokens = {"input_ids": prompts[0][:1], "attention_mask": prompts[1][:1]}
    cache = handed_over(model, "narrow", tokens)
    assert cache.get_seq_length() == 11
    text = torch.cat([tokens["input_ids"], torch.tensor([[9]])], dim=1)
    with model.at("narrow"):
        given, expected = handed_over(model, "narrow", tokens), model(text).logits[0, -1]
        torch.testing.assert_close(model(text[:, -1:], past_key_values=given).logits[0, -1], expected)


def test_full_windows_need_the_number_of_tokens(model):
    with model.at("small"):
        cache = model(torch.full((1, 9), 7), use_cache=True).past_key_values
    states, config = read_cache(cache), model.elastic_config.stock_config(model.elastic_config.submodel("small"))
    if all(cache.is_sliding):
        with pytest.raises(HandoverError, match="give tokens="):
            write_cache(states, config)
    assert write_cache(states, config, 9).get_seq_length() == 9
    short = [{key: tensor[:, :, :2] for key, tensor in found.items()} for found in states]
    assert write_cache(short, config).get_seq_length() == 2
