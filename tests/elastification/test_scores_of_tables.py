"""Scores follow from the table: every axis of every table has them, and a DeltaNet's are of what reaches its output projection."""

from __future__ import annotations

import pytest
import torch

from hf_elastic.architectures import get_architecture
from hf_elastic.elastification.importance import score
from hf_elastic.elastification.sorting import orders_from_scores
from hf_elastic.testing.models import random_model, tiny_config
from hf_elastic.testing.tiny import TINY


def _rows(count: int = 3):
    ids = torch.randint(0, 64, (count, 11), generator=torch.Generator().manual_seed(4))
    return ids, [{"input_ids": row.tolist()} for row in ids]


@pytest.mark.parametrize("model_type", TINY)
def test_every_axis_has_scores_that_tell_entries_apart(model_type):
    model, architecture = random_model(tiny_config(model_type)), get_architecture(model_type)
    scores = score(model, _rows()[1], progress=False)
    axes = [axis.name for axis in architecture.available_axes(model.config)]
    orders = orders_from_scores(architecture, model.config, scores, axes)  # which refuses what was not scored
    sorted_by = {name for here in orders.values() for name in here}
    followed = {axis for cut in architecture.orders(model.config).values() for axis in cut.axes}
    assert set(axes) - sorted_by <= {*architecture.per_token.values(), *followed}
    assert {name for name, _ in architecture.orders(model.config)} <= sorted_by
    for layers in scores.values.values():
        for values in layers.values():
            assert values.unique().numel() > min(2, values.numel() - 1)


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_text"])
def test_value_heads_and_their_channels_are_scored_at_the_output_projection(model_type):
    model, architecture = random_model(tiny_config(model_type)), get_architecture(model_type)
    c, (ids, rows) = model.config, _rows()
    layer = c.layer_types.index("linear_attention")
    caught = []
    out = model.model.layers[layer].linear_attn.out_proj
    hook = out.register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    heads, width = c.linear_num_value_heads, c.linear_value_head_dim
    moments = torch.zeros(heads, width)
    for head in range(heads):
        for channel in range(width):
            moments[head, channel] = caught[0][..., head * width + channel].square().sum()
    scores = score(model, rows, axes=["value_heads", "value_head_dim"], progress=False)
    torch.testing.assert_close(scores.values["delta_channels"][layer].float(), moments, rtol=2e-4, atol=1e-6)

    keep = 3
    smallest = {("value_head_dim", layer): keep}
    orders = orders_from_scores(architecture, c, scores, ["value_heads", "value_head_dim"], smallest)[layer]
    channels = sorted(range(width), key=lambda d: -moments[:, d].sum())
    assert orders["value_head_dim"].tolist() == [channels]
    per_key = heads // c.linear_num_key_heads
    for key in range(c.linear_num_key_heads):
        mine = sorted(range(per_key), key=lambda h: -moments[key * per_key + h, channels[:keep]].sum())
        assert orders["value_heads"][key].tolist() == mine
