"""Sorting keeps what the parent computes, and puts what matters first."""

from __future__ import annotations

import pytest
import torch
from cases import CONFIGS, VOCAB, build_parent

from hf_elastic import ElasticConfigError, Scores, elastify
from hf_elastic.architectures import get_architecture
from hf_elastic.elastification.sorting import orders_from_scores, sort_state_dict

# Reordered float32 sums; logits are of the order of 1 to 10.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def random_scores(config, seed: int = 0, only: str | None = None) -> Scores:
    """Scores for all axes that have nothing to do with the model, so that every order is far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    architecture = get_architecture(config.model_type)
    full = architecture.full(config)
    scores = Scores(layers=[(i, float(i)) for i in range(full.depth)])

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    for axis in architecture.available_axes(config):
        if axis.name == "experts_per_token" or (only and axis.name != only):
            continue
        for layer in [None] if axis.part is None else architecture.layers_with(config, axis):
            sizes = full.at(layer)
            if axis.name in ("mamba_heads", "mamba_head_dim"):
                scores.values.setdefault("mamba_channels", {})[layer] = draw(
                    sizes["mamba_heads"], sizes["mamba_head_dim"]
                )
            elif axis.name == "expert_ffn":
                scores.values.setdefault(axis.name, {})[layer] = draw(sizes["experts"], sizes["expert_ffn"])
            else:
                scores.values.setdefault(axis.name, {})[-1 if layer is None else layer] = draw(sizes[axis.name])
    return scores


def _axes(name: str) -> list[str]:
    config = CONFIGS[name]()
    return [
        a.name for a in get_architecture(config.model_type).available_axes(config) if a.name != "experts_per_token"
    ]


CASES = [(name, axis) for name in CONFIGS for axis in [*_axes(name), "all"]]


@pytest.mark.parametrize(("name", "axis"), CASES, ids=["-".join(case) for case in CASES])
def test_the_sorted_parent_computes_what_the_parent_computes(name, axis, original, ids):
    model = original(name)
    config = model.config
    architecture = get_architecture(config.model_type)
    axes = _axes(name) if axis == "all" else [axis]
    orders = orders_from_scores(architecture, config, random_scores(config), axes)
    state = sort_state_dict(architecture, config, model.state_dict(), orders)
    assert any(not torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    ours = build_parent(name)
    ours.load_state_dict(state)
    torch.testing.assert_close(ours(ids).logits, model(ids).logits, **TOLERANCE)


def test_nothing_is_shared_with_the_parent(original):
    model = original("nano3")
    architecture = get_architecture("nemotron_h")
    orders = orders_from_scores(architecture, model.config, random_scores(model.config), ["ffn"])
    state = sort_state_dict(architecture, model.config, model.state_dict(), orders)
    ours = {tensor.data_ptr() for tensor in state.values()}
    assert not ours & {tensor.data_ptr() for tensor in model.state_dict().values()}


def test_neurons_are_sorted_inside_each_expert_and_experts_inside_their_router_group(original):
    """Reference: follow every neuron of every expert by hand."""
    model = original("nano3")
    config = model.config
    scores = random_scores(config)
    architecture = get_architecture("nemotron_h")
    orders = orders_from_scores(architecture, config, scores, ["experts", "expert_ffn"])
    state = sort_state_dict(architecture, config, model.state_dict(), orders)
    layer = config.layers_block_type.index("moe")
    prefix = f"model.layers.{layer}.mixer."
    before = model.state_dict()
    per_group = config.n_routed_experts // config.n_group
    for group in range(config.n_group):
        members = range(group * per_group, (group + 1) * per_group)
        by_score = sorted(members, key=lambda e: -scores.values["experts"][layer][e])
        for position, old in zip(members, by_score, strict=True):
            assert torch.equal(state[prefix + "gate.weight"][position], before[prefix + "gate.weight"][old])
            bias = "gate.e_score_correction_bias"
            assert torch.equal(state[prefix + bias][position], before[prefix + bias][old])
            neurons = sorted(
                range(config.moe_intermediate_size), key=lambda i: -scores.values["expert_ffn"][layer][old, i]
            )
            for new_neuron, old_neuron in enumerate(neurons):
                up, down = prefix + "experts.up_proj", prefix + "experts.down_proj"
                assert torch.equal(state[up][position, new_neuron], before[up][old, old_neuron])
                assert torch.equal(state[down][position, :, new_neuron], before[down][old, :, old_neuron])


def test_mamba_heads_stay_in_their_group_and_are_ranked_by_the_channels_that_stay(original):
    model = original("nano2")
    c = model.config
    scores = random_scores(c)
    architecture = get_architecture("nemotron_h")
    layer, keep = 0, 3
    orders = orders_from_scores(
        architecture, c, scores, ["mamba_heads", "mamba_head_dim"], {("mamba_head_dim", layer): keep}
    )
    moments = scores.values["mamba_channels"][layer]
    channels = sorted(range(c.mamba_head_dim), key=lambda d: -moments[:, d].sum())
    assert orders[layer]["mamba_head_dim"].tolist() == [channels]
    per_group = c.mamba_num_heads // c.n_groups
    for group in range(c.n_groups):
        heads = [h for h in range(c.mamba_num_heads) if h // per_group == group]
        by_score = sorted(heads, key=lambda h: -moments[h, channels[:keep]].sum())
        assert orders[layer]["mamba_heads"][group].tolist() == [h - group * per_group for h in by_score]
    by_all = torch.stack([moments[g * per_group : (g + 1) * per_group].sum(1) for g in range(c.n_groups)])
    assert (
        orders[layer]["mamba_heads"].tolist() != by_all.sort(descending=True).indices.tolist()
    )  # the case tells them apart


def test_a_slice_keeps_what_scored_highest(ids):
    """Dead neurons planted at random places are what a sorted parent drops first: the slice computes the same as the parent."""
    parent = build_parent("nano2")
    layer = parent.config.layers_block_type.index("mlp")
    dead = torch.randperm(parent.config.intermediate_size, generator=torch.Generator().manual_seed(5))[:16]
    for block in parent.model.layers:
        if block.block_type == "mlp":
            block.mixer.up_proj.weight[dead] = 0.0
    calibration = [{"input_ids": torch.randint(0, VOCAB, (20,)).tolist()} for _ in range(3)]
    elastic = elastify(
        parent, calibration, budgets={"alive": {"ffn": parent.config.intermediate_size - 16}}, progress=False
    )
    with elastic.at("alive"):
        torch.testing.assert_close(elastic(ids).logits, parent(ids).logits, **TOLERANCE)
    unsorted = elastify(parent, budgets={"alive": {"ffn": parent.config.intermediate_size - 16}}, sort=False)
    with unsorted.at("alive"):
        assert (unsorted(ids).logits - parent(ids).logits).abs().max() > 0.1
    assert layer in elastic.importance_scores.values["ffn"]


def test_ties_stay_where_they_are(original):
    config = original("nano2").config
    scores = Scores({"ffn": {i: torch.ones(40, dtype=torch.float64) for i in (1, 4)}})
    orders = orders_from_scores(get_architecture("nemotron_h"), config, scores, ["ffn"])
    assert orders[1]["ffn"].tolist() == [list(range(40))]


def test_scores_of_another_model_are_refused(original):
    architecture = get_architecture("nemotron_h")
    config = original("nano3").config
    with pytest.raises(ElasticConfigError, match="'ffn' was not scored"):
        orders_from_scores(architecture, config, Scores(), ["ffn"])
    other = random_scores(original("nano2").config)
    with pytest.raises(ElasticConfigError, match="scores of 'ffn' are not of this model: layer 5"):
        orders_from_scores(architecture, config, other, ["ffn"])
    wider = Scores({"hidden": {-1: torch.ones(64, dtype=torch.float64)}})
    with pytest.raises(ElasticConfigError, match=r"layer None has \(1, 64\), its size is 48"):
        orders_from_scores(architecture, config, wider, ["hidden"])
