"""Sizes that follow an axis and are sorted by themselves, and depths that a stock config can say."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import JambaConfig

from hf_elastic import ElasticConfigError, elastify
from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.axes import Cut, TensorRule, dim
from hf_elastic.architectures.portability import portability
from hf_elastic.elastification.importance import score
from hf_elastic.elastification.search import default_choices, sizes_from_spec
from hf_elastic.elastification.sorting import orders_from_scores, sort_state_dict
from hf_elastic.testing.models import random_model, tiny_config

FULL = {"hidden": 6, "expand": 3}
INNER = Cut("hidden", by="expand", times=2, order="channels", gated=True)


@pytest.mark.parametrize("kept", [{"hidden": 4, "expand": 3}, {"hidden": 6, "expand": 1}, {"hidden": 5, "expand": 2}])
def test_it_is_cut_to_a_prefix_of_the_product(kept):
    count = kept["hidden"] * kept["expand"] * 2
    assert dim(INNER).size(kept) == count
    assert dim(INNER).runs(FULL, kept) == [(0, count)]
    assert TensorRule("w", (dim(INNER),)).mask(FULL, kept).tolist() == [1.0] * count + [0.0] * (36 - count)


def test_undecided_entries_count_as_often_as_they_are_kept():
    """Reference: every pair of choices by itself, weighted by its probability."""
    choices = {"hidden": {6: 0.2, 4: 0.5, 3: 0.3}, "expand": {3: 0.1, 2: 0.6, 1: 0.3}}
    weights = {
        axis: sum(p * (torch.arange(FULL[axis]) < size) for size, p in sizes.items()).requires_grad_()
        for axis, sizes in choices.items()
    }
    for undecided in (("hidden",), ("expand",), ("hidden", "expand")):
        pairs = [
            (h, e, p * q)
            for h, p in (choices["hidden"] if "hidden" in undecided else {6: 1.0}).items()
            for e, q in (choices["expand"] if "expand" in undecided else {3: 1.0}).items()
        ]
        expected = sum(p * (torch.arange(36) < 2 * h * e) for h, e, p in pairs)
        with torch.enable_grad():
            found = dim(INNER).gates(FULL, {axis: weights[axis] for axis in undecided})
            gradients = torch.autograd.grad(found.sum(), [weights[axis] for axis in undecided])
        torch.testing.assert_close(found.detach(), expected)
        assert all(gradient.count_nonzero() == len(gradient) for gradient in gradients)
    assert dim(INNER).gates(FULL, {"ffn": torch.ones(3)}) is None


def test_it_moves_by_its_own_order_and_not_by_that_of_the_axis():
    rule, tensor = (
        TensorRule("w", (dim(Cut("hidden", order="channels")), dim(Cut("hidden")))),
        torch.arange(36).view(6, 6),
    )
    own, axis = torch.tensor([[3, 0, 5, 1, 2, 4]]), torch.tensor([[5, 4, 3, 2, 1, 0]])
    assert torch.equal(rule.permute(tensor, FULL, {"hidden": axis}), tensor.flip(1))
    assert torch.equal(rule.permute(tensor, FULL, {"hidden": axis, "channels": own}), tensor.flip(1)[own[0]])


@pytest.mark.parametrize(
    ("model_type", "order", "path", "width"),
    [("lfm2", "conv_channels", "conv.out_proj", 48), ("jamba", "mamba_channels", "mamba.out_proj", 144)],
)
def test_channels_are_sorted_by_what_reaches_their_output_projection(model_type, order, path, width):
    model = random_model(tiny_config(model_type))
    architecture, config = get_architecture(model_type), model.config
    ids = torch.randint(0, 64, (3, 11), generator=torch.Generator().manual_seed(4))
    caught = []
    layer = next(i for i, module in enumerate(model.model.layers) if hasattr(module, path.partition(".")[0]))
    module = model.get_submodule(f"model.layers.{layer}.{path}")
    hook = module.register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    with torch.no_grad():
        before = model(ids).logits
    hook.remove()
    expected = caught[0].abs().sum((0, 1))
    scores = score(model, [{"input_ids": row.tolist()} for row in ids], axes=["hidden"], progress=False)
    torch.testing.assert_close(scores.values[order][layer].float(), expected, rtol=1e-4, atol=1e-5)
    orders = orders_from_scores(architecture, config, scores, ["hidden"])
    assert orders[layer][order].tolist() == [expected.argsort(descending=True, stable=True).tolist()]
    state = sort_state_dict(architecture, config, model.state_dict(), orders)
    moved = copy.deepcopy(model)
    moved.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(moved(ids).logits, before, rtol=1e-4, atol=1e-4)
    assert module.weight.shape[1] == width
    across = scores.values["hidden"][-1].argsort(
        descending=True, stable=True
    )  # rows lead to the residual stream, in its order
    assert torch.equal(state[f"model.layers.{layer}.{path}.weight"], module.weight[across][:, orders[layer][order][0]])


# Jamba, whose config says where kinds of layers are by a period


def jamba(**fields) -> JambaConfig:
    config = tiny_config("jamba")
    sizes = {"num_hidden_layers": 10, "attn_layer_period": 4, "mamba_expand": 2}
    return type(config)(**{**config.to_dict(), **sizes, **fields})


def test_layers_are_ranked_and_offered_in_whole_periods():
    architecture, config = get_architecture("jamba"), jamba()
    ranking = architecture.keepable_ranking(config, [8, 9, 3, 1, 2, 0, 4, 5, 6, 7])
    assert ranking == [8, 9, 0, 1, 2, 3, 4, 5, 6, 7]
    assert architecture.depths(config, ranking) == [2, 6, 10]
    for depth in architecture.depths(config, ranking):
        kept = architecture.submodel(config, {"layers": ranking[:depth]})
        built = architecture.config_for(config, kept)
        kinds = [config.layers_block_type[i] for i in kept.layers]
        experts = [config.layers_num_experts[i] for i in kept.layers]
        assert (built.layers_block_type, built.layers_num_experts) == (kinds, experts)
    assert default_choices(architecture, config, "layers", 8) == [10, 8, 4]
    assert len(sizes_from_spec(architecture, config, {"layers": 0.5}, ranking, 8)["layers"]) == 6
    other = get_architecture("nemotron_h")
    free = tiny_config("nemotron_h")
    assert other.depths(free, other.keepable_ranking(free, range(6))) == [1, 2, 3, 4, 5, 6]


def test_the_parents_own_period_stays():
    architecture, config = get_architecture("jamba"), jamba(num_hidden_layers=4)
    built = architecture.config_for(config, architecture.full(config))
    assert (built.attn_layer_period, built.attn_layer_offset) == (4, 1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"layers": [0, 1, 2, 5, 6, 7, 8, 9]},
            r"budget 'x': layers=.*have attention by a period.*whole periods.*0\.\.3, 4\.\.7, 8\.\.9",
        ),
        ({"layers": [0, 2, 3]}, "drops every attention layer"),
        ({"experts": 1, "experts_per_token": 1}, "experts=1 is an MLP without a router"),
    ],
)
def test_what_a_jamba_config_cannot_say_is_refused(sizes, message):
    with pytest.raises(ElasticConfigError, match=message):
        get_architecture("jamba").submodel(jamba(), sizes, "budget 'x'")


def test_depths_that_no_config_can_say_are_refused_before_anything_is_scored():
    model = random_model(jamba())
    with pytest.raises(ElasticConfigError, match=r"choices of layers=\[7\].*\[4, 8, 10\] can be kept"):
        elastify(model, budgets={"x": {"ffn": 8}}, axes={"layers": [7]}, sort=False)


def test_axes_that_share_a_field_make_it_differ_from_layer_to_layer():
    architecture, config = get_architecture("jamba"), tiny_config("jamba")
    both = architecture.submodel(config, {"ffn": 8, "expert_ffn": 8})
    one = architecture.submodel(config, {"ffn": 8})
    assert portability(architecture, config, both, torch.float32) == []
    assert "ffn and expert_ffn differ from layer to layer" in portability(architecture, config, one)[0].why
    assert not architecture.config_for(config, both).is_heterogeneous
    assert architecture.config_for(config, one).is_heterogeneous
