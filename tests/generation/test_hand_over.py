"""The conversion of caches against its definition, written out for each kind of state."""

from __future__ import annotations

import pytest
import torch
from phased import NARROW
from transformers import DynamicCache

from hf_elastic import elastify
from hf_elastic.errors import HandoverError
from hf_elastic.generation.caches import hand_over, join_rows, read_cache, take_row, write_cache
from hf_elastic.testing.models import random_model, tiny_config

SHAPES = {"nano3": {"groups": 2, "state": 6}, "granite": {"groups": 2, "state": 6}}
"""Of the Mamba mixers of the parents in cases.py; a head belongs to one of the groups."""


def reference(state: torch.Tensor, kind: str, parent: str, old: dict[str, int], new: dict[str, int]) -> torch.Tensor:
    """What is kept of one state, from the definition: per group the first heads, per head the first channels, the rest zero; keys, values
    and convolution inputs grow with the root of the width, SSM states with the width."""
    groups, n = SHAPES[parent]["groups"], SHAPES[parent]["state"]
    wider = new["hidden"] / old["hidden"]
    if kind in ("keys", "values"):
        return state * wider**0.5
    heads, dims = (
        (min(old[a], new[a]) // g, (old[a] // g, new[a] // g))
        for a, g in (("mamba_heads", groups), ("mamba_head_dim", 1))
    )
    (h, (old_h, new_h)), (d, (old_d, new_d)) = heads, dims
    batch = len(state)
    if kind == "ssm":
        given = torch.zeros(batch, groups, new_h, new_d, n)
        given[:, :, :h, :d] = state.view(batch, groups, old_h, old_d, n)[:, :, :h, :d]
        return given.view(batch, groups * new_h, new_d, n) * wider
    inner = groups * old_h * old_d
    given = torch.zeros(batch, groups, new_h, new_d, state.shape[-1])
    given[:, :, :h, :d] = state[:, :inner].reshape(batch, groups, old_h, old_d, -1)[:, :, :h, :d]
    return torch.cat([given.flatten(1, 3), state[:, inner:]], dim=1) * wider**0.5


@pytest.mark.parametrize("parent", ["nano3", "granite"])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_states_are_converted_as_defined(family, prompts, parent, direction):
    model = family(parent)
    config = model.elastic_config
    budgets = [config.resolve(NARROW[parent]), config.resolve(None)]
    source, target = budgets if direction == "up" else budgets[::-1]
    with model.at(source):
        states = read_cache(model(prompts[0], use_cache=True).past_key_values)
    given = hand_over(states, model.architecture, config.parent_config, source, target)
    kinds = []
    for layer, (old, new) in enumerate(zip(states, given, strict=True)):
        assert old.keys() == new.keys()
        for kind, tensor in new.items():
            expected = reference(old[kind], kind, parent, source.at(layer), target.at(layer))
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=0)
            assert tensor.count_nonzero() > tensor.numel() // 5
            kinds.append(kind)
    assert set(kinds) == {"keys", "values", "conv", "ssm"}
    unscaled = hand_over(states, model.architecture, config.parent_config, source, target, scale=False)
    wider = target.at(None)["hidden"] / source.at(None)["hidden"]
    for plain, scaled in zip(unscaled, given, strict=True):
        for kind in plain:
            torch.testing.assert_close(plain[kind] * (wider if kind == "ssm" else wider**0.5), scaled[kind])


def test_dropped_layers_keep_the_others_in_their_places(family, prompts):
    model = family("nano3")
    config = model.elastic_config
    full = config.resolve(None)
    shallow = config.resolve({"layers": [0, 2, 3, 4, 6]})
    states = read_cache(model(prompts[0], use_cache=True).past_key_values)
    given = hand_over(states, model.architecture, config.parent_config, full, shallow)
    assert [found.keys() for found in given] == [states[i].keys() for i in shallow.layers]
    for i, layer in enumerate(shallow.layers):
        assert all(torch.equal(given[i][kind], states[layer][kind]) for kind in given[i])
    with pytest.raises(HandoverError, match=r"layers \[6\] keep a cache.*reprefill"):
        hand_over(given, model.architecture, config.parent_config, config.resolve({"layers": [0, 2, 3, 4]}), shallow)


@pytest.fixture
def short_convolutions():
    """An elastic LFM2 of random weights, and three texts."""
    parent = random_model(tiny_config("lfm2"))
    ids = torch.randint(6, parent.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(2))
    return elastify(parent, budgets={"narrow": {"hidden": parent.config.hidden_size // 2}}, sort=False), ids


def test_a_convolution_that_was_dropped_begins_with_an_empty_window(short_convolutions):
    """Compared with the stock model on a cache that is put together by hand, which upstream fills with zeros at the start of a text."""
    model, ids = short_convolutions
    config, full = model.elastic_config, model.elastic_config.resolve(None)
    kinds = config.parent_config.layer_types
    dropped = kinds.index("conv", 1)
    source = config.resolve({"layers": [i for i in range(len(kinds)) if i != dropped]})
    with model.at(source):
        states = read_cache(model(ids[:, :-1], use_cache=True).past_key_values)
    given = hand_over(states, model.architecture, config.parent_config, source, full)
    cache = DynamicCache(config=config.parent_config)
    for i in range(len(kinds)):
        if i == dropped:
            width = config.parent_config.hidden_size, config.parent_config.conv_L_cache
            cache.update_conv_state(torch.zeros(len(ids), *width), i)
        elif kinds[i] == "conv":
            cache.update_conv_state(states[source.layers.index(i)]["conv"], i)
        else:
            found = states[source.layers.index(i)]
            cache.update(found["keys"], found["values"], i)
    expected = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits
    found = model(ids[:, -1:], past_key_values=write_cache(given, model.config), use_cache=True).logits
    torch.testing.assert_close(found, expected)
    whole = model(ids).logits[:, -1:]
    assert float((found - whole).abs().max()) > 1e-3  # of another text, for the layer
    attention = kinds.index("full_attention")
    shallow = config.resolve({"layers": [i for i in range(len(kinds)) if i != attention]})
    with pytest.raises(HandoverError, match=rf"layers \[{attention}\] keep a cache"):
        hand_over(states, model.architecture, config.parent_config, shallow, full)


@pytest.mark.parametrize("parent", ["nano3", "granite"])
def test_sequences_of_a_batch_come_apart_and_together_again(family, prompts, parent):
    """Each of three sequences goes on alone, and all three in another order, as its whole text says."""
    model = family(parent)
    ids, mask = prompts
    lengths = mask.sum(-1).tolist()
    caches = [model(ids[row : row + 1, -n:], use_cache=True).past_key_values for row, n in enumerate(lengths)]
    batch = join_rows([take_row(read_cache(cache), 0, n) for cache, n in zip(caches, lengths, strict=True)])
    rows = [take_row(batch, row, n) for row, n in enumerate(lengths)]
    new = torch.tensor([[9], [10], [11]])

    def go_on(order: list[int]) -> torch.Tensor:
        count = mask.sum(-1)[order]
        seen = (torch.arange(int(count.max())) >= (count.max() - count)[:, None]).long()
        seen = torch.cat([seen, torch.ones(len(order), 1, dtype=torch.long)], dim=1)
        cache = write_cache(join_rows([rows[row] for row in order]), model.config)
        return model(new[order], past_key_values=cache, attention_mask=seen, position_ids=count[:, None]).logits[:, 0]

    together = go_on([2, 0, 1])
    for place, row in enumerate([2, 0, 1]):
        text = torch.cat([ids[row : row + 1, mask[row].bool()], new[row : row + 1]], dim=1)
        # the cached and the whole pass sum the scan in another order
        torch.testing.assert_close(together[place], model(text).logits[0, -1], atol=5e-5, rtol=0)
        torch.testing.assert_close(go_on([row])[0], together[place], atol=2e-5, rtol=0)
