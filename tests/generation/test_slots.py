"""Layers with several states of one kind, with a convolution alone or a recurrent state alone, in a stock cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Qwen3Config

from hf_elastic.architectures import StateRule, get_architecture
from hf_elastic.architectures.axes import Cut, dim
from hf_elastic.architectures.blocks import HIDDEN
from hf_elastic.architectures.cost import CostModel
from hf_elastic.errors import HandoverError
from hf_elastic.generation.caches import claim, hand_over, join_rows, read_cache, take_row, write_cache

KINDS = ["hybrid", "linear_attention", "conv"]
STATES = [
    {"keys": (2, 5, 4), "values": (2, 5, 4), "conv": (8, 3), "conv.1": (12, 4), "ssm.1": (6, 2)},
    {"ssm": (6, 3), "ssm.1": (6, 2)},
    {"conv": (8, 3)},
]
"""Per layer the shapes of what the test's architecture keeps of 5 tokens."""


class Several(type(get_architecture("qwen3"))):
    """Keeps what no stock model of these tests does."""

    def states(self, config, layer):
        heads, ffn = dim(Cut("attention_heads")), dim(Cut("ffn"))
        keyed = (StateRule("keys", (dim(2), dim(4)), 0.5), StateRule("values", (dim(2), dim(4)), 0.5))
        conv, second = StateRule("conv", (HIDDEN, dim(3)), 0.5), StateRule("conv", (ffn, dim(4)), 1.0, slot=1)
        ssm, last = StateRule("ssm", (heads, dim(3)), 1.0), StateRule("ssm", (heads, dim(2)), 0.5, slot=1)
        return [(*keyed, conv, second, last), (ssm, last), (conv,)][layer]


CONFIG = Qwen3Config(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=4,
    layer_types=KINDS,
    number_of_conv_states=2,
)
ARCHITECTURE = Several()
FULL = ARCHITECTURE.full(CONFIG)
SMALL = ARCHITECTURE.submodel(CONFIG, {"hidden": 2, "ffn": 9, "attention_heads": 4})


def written(batch: int, seed: int = 0) -> DynamicCache:
    """A cache as a stock model would have written it: with the stock methods alone."""
    torch.manual_seed(seed)
    cache = DynamicCache(config=CONFIG)
    for i, shapes in enumerate(STATES):
        for key, shape in shapes.items():
            kind, _, slot = key.partition(".")
            at = {"layer_idx": i, "state_idx": int(slot or 0)}
            if kind == "keys":
                cache.update(torch.randn(batch, *shape), torch.randn(batch, *shape), i)
            elif kind == "conv":
                cache.update_conv_state(torch.randn(batch, *shape), **at, conv_kernel_size=shape[-1])
            elif kind == "ssm":
                cache.update_recurrent_state(torch.randn(batch, *shape), **at)
    return cache


def test_every_state_is_read_from_its_slot_and_written_back_to_it():
    cache = written(2)
    states = read_cache(cache)
    assert [{key: tuple(t.shape[1:]) for key, t in layer.items()} for layer in states] == STATES
    assert states[0]["conv.1"] is cache.layers[0].conv_states[1]
    again = write_cache(states, CONFIG)
    for layer, found in zip(again.layers, read_cache(again), strict=True):
        assert found.keys() == states[again.layers.index(layer)].keys()
    for before, after in zip(states, read_cache(again), strict=True):
        assert all(torch.equal(before[key], after[key]) and before[key] is not after[key] for key in before)
    # a stock model gets from it what it wrote
    assert torch.equal(again.get_conv_state(0, state_idx=1), states[0]["conv.1"])
    assert torch.equal(again.get_recurrent_state(0, state_idx=1), states[0]["ssm.1"])
    assert torch.equal(again.get_recurrent_state(1), states[1]["ssm"])
    assert again.get_conv_state(1) is None
    assert again.get_recurrent_state(2) is None


def test_an_empty_and_an_emptied_cache_hold_nothing_of_convolutions():
    assert not any(read_cache(DynamicCache(config=CONFIG)))
    cache = written(1)
    cache.reset()
    states = read_cache(cache)
    assert not any(key.startswith("conv") for layer in states for key in layer)
    assert all(not t.any() for layer in states for t in layer.values())


def test_sequences_come_apart_and_together_again():
    states = read_cache(written(3))
    rows = [take_row(states, row, 5 - row) for row in range(3)]
    joined = join_rows(rows[::-1])
    for before, after in zip(states, joined, strict=True):
        for key, tensor in before.items():
            expected = tensor.flip(0).clone()
            if key in ("keys", "values"):
                for place, row in enumerate((2, 1, 0)):  # padding in front of the shorter ones
                    expected[place, :, :row] = 0
            assert torch.equal(after[key], expected), key


def test_every_state_is_handed_over_by_its_own_rule():
    states = read_cache(written(2))
    given = hand_over(states, ARCHITECTURE, CONFIG, FULL, SMALL)
    narrower = 2 / 8
    for layer, (old, new) in enumerate(zip(states, given, strict=True)):
        assert old.keys() == new.keys()
        for key, tensor in new.items():
            degree = {"conv": 0.5, "conv.1": 1.0, "ssm": 1.0, "ssm.1": 0.5}.get(key, 0.5)
            kept = {"conv": 2, "conv.1": 9, "ssm": 4, "ssm.1": 4}.get(key, 2)
            torch.testing.assert_close(tensor, old[key][:, :kept] * narrower**degree, msg=f"{layer} {key}")
    back = hand_over(given, ARCHITECTURE, CONFIG, SMALL, FULL)
    assert [{key: tuple(t.shape[1:]) for key, t in layer.items()} for layer in back] == STATES
    torch.testing.assert_close(back[0]["conv.1"][:, :9], states[0]["conv.1"][:, :9])
    assert not back[0]["conv.1"][:, 9:].any()


def test_a_cache_is_known_by_all_of_its_states():
    claim(written(1), ARCHITECTURE, CONFIG, FULL, FULL)
    small = hand_over(read_cache(written(1)), ARCHITECTURE, CONFIG, FULL, SMALL)
    claim(write_cache(small, CONFIG), ARCHITECTURE, CONFIG, SMALL, SMALL)
    lacking = [{key: t for key, t in layer.items() if key != "ssm.1"} for layer in small]
    longer = [{**layer, "ssm.1": torch.zeros(1, 6, 2)} if "ssm.1" in layer else layer for layer in small]
    for wrong in (lacking, longer):
        with pytest.raises(HandoverError, match="written by another"):
            claim(write_cache(wrong, CONFIG), ARCHITECTURE, CONFIG, SMALL, SMALL)


def test_the_cost_counts_every_slot():
    cost = CostModel(CONFIG, ARCHITECTURE)(SMALL)
    assert cost.kv_elements == 2 * 2 * 4
    assert cost.conv_elements == (2 * 3 + 9 * 4) + 2 * 3
    assert cost.ssm_elements == 4 * 2 + (4 * 3 + 4 * 2)
