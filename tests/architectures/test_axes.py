"""The algebra against a reference written from the definition: loops over groups, heads and channels."""

from dataclasses import replace

import pytest
import torch
from cases import CONFIGS
from compare import assert_same_logits, logits

import hf_elastic.submodels.masking
from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.axes import Cut, Dim, TensorRule, dim, take
from hf_elastic.architectures.blocks import HIDDEN, attention, mamba2
from hf_elastic.submodels.masking import masked_model
from hf_elastic.submodels.slicing import slice_state_dict

GROUPS, STATE, KV_HEADS, HEAD_DIM, ROUTER_GROUPS = 2, 3, 2, 4, 2
FULL = {
    "hidden": 6,
    "mamba_heads": 6,
    "mamba_head_dim": 3,
    "attention_heads": 6,
    "experts": 8,
    "expert_ffn": 5,
    "ffn": 7,
}
KEPT = [
    FULL,
    FULL | {"hidden": 4},
    FULL | {"mamba_heads": 4},
    FULL | {"mamba_heads": 2},
    FULL | {"mamba_head_dim": 1},
    FULL | {"mamba_heads": 4, "mamba_head_dim": 2, "hidden": 5},
    FULL | {"attention_heads": 2},
    FULL | {"experts": 4},
    FULL | {"experts": 6, "expert_ffn": 3, "hidden": 1},
    FULL | {"ffn": 2},
    {
        "hidden": 3,
        "mamba_heads": 2,
        "mamba_head_dim": 2,
        "attention_heads": 4,
        "experts": 4,
        "expert_ffn": 2,
        "ffn": 1,
    },
]
kept_sizes = pytest.mark.parametrize(
    "kept", KEPT, ids=lambda kept: "-".join(f"{k}{v}" for k, v in kept.items() if v != FULL[k]) or "full"
)


# The reference. Every function yields the old index of each place along a dimension that the sizes keep.


def hidden(sizes):
    yield from range(sizes["hidden"])


def ffn(sizes):
    yield from range(sizes["ffn"])


def heads(sizes, offset=0):
    per_group = FULL["mamba_heads"] // GROUPS
    for group in range(GROUPS):
        for head in range(sizes["mamba_heads"] // GROUPS):
            yield offset + group * per_group + head


def inner(sizes, offset=0):
    for head in heads(sizes):
        for channel in range(sizes["mamba_head_dim"]):
            yield offset + head * FULL["mamba_head_dim"] + channel


def states(sizes, offset=0):
    for group in range(GROUPS):
        for state in range(STATE):
            yield offset + group * STATE + state


WIDTH, SHARED = FULL["mamba_heads"] * FULL["mamba_head_dim"], GROUPS * STATE


def in_proj(sizes):
    yield from inner(sizes)  # z
    yield from inner(sizes, WIDTH)  # x
    yield from states(sizes, 2 * WIDTH)  # B
    yield from states(sizes, 2 * WIDTH + SHARED)  # C
    yield from heads(sizes, 2 * WIDTH + 2 * SHARED)  # dt


def convolution(sizes):
    yield from inner(sizes)
    yield from states(sizes, WIDTH)
    yield from states(sizes, WIDTH + SHARED)


def query(sizes):
    per_kv = FULL["attention_heads"] // KV_HEADS
    for kv in range(KV_HEADS):
        for head in range(sizes["attention_heads"] // KV_HEADS):
            for channel in range(HEAD_DIM):
                yield (kv * per_kv + head) * HEAD_DIM + channel


def experts(sizes):
    per_group = FULL["experts"] // ROUTER_GROUPS
    for group in range(ROUTER_GROUPS):
        for expert in range(sizes["experts"] // ROUTER_GROUPS):
            yield group * per_group + expert


def expert_ffn(sizes):
    yield from range(sizes["expert_ffn"])


def gate_up(sizes):
    for part in range(2):
        for neuron in range(sizes["expert_ffn"]):
            yield part * FULL["expert_ffn"] + neuron


def _rules():
    blocks = [
        *mamba2("mamba", 0, groups=GROUPS, state=STATE, kernel=4, conv_bias=True, proj_bias=True),
        *attention("attention", 0, kv_heads=KV_HEADS, head_dim=HEAD_DIM, bias=True),
    ]
    rules = {rule.name: rule for rule in blocks}
    expert = dim(ROUTER_GROUPS, Cut("experts", groups=ROUTER_GROUPS))
    neuron = (Cut("expert_ffn", within="experts"),)
    rules["up"] = TensorRule("up", (expert, dim(*neuron), HIDDEN))
    rules["gate_up"] = TensorRule("gate_up", (expert, dim(gate=neuron, up=neuron), HIDDEN))
    rules["down"] = TensorRule("down", (expert, HIDDEN, dim(*neuron)))
    rules["mlp"] = TensorRule("mlp", (dim(Cut("ffn")), HIDDEN))
    return rules


RULES = _rules()
REFERENCE = {
    "mamba.in_proj.weight": (in_proj, hidden),
    "mamba.in_proj.bias": (in_proj,),
    "mamba.conv1d.weight": (convolution, lambda sizes: [0], lambda sizes: range(4)),
    "mamba.conv1d.bias": (convolution,),
    "mamba.dt_bias": (heads,),
    "mamba.A_log": (heads,),
    "mamba.D": (heads,),
    "mamba.norm.weight": (inner,),
    "mamba.out_proj.weight": (hidden, inner),
    "mamba.out_proj.bias": (hidden,),
    "attention.q_proj.weight": (query, hidden),
    "attention.q_proj.bias": (query,),
    "attention.k_proj.weight": (lambda sizes: range(KV_HEADS * HEAD_DIM), hidden),
    "attention.k_proj.bias": (lambda sizes: range(KV_HEADS * HEAD_DIM),),
    "attention.v_proj.weight": (lambda sizes: range(KV_HEADS * HEAD_DIM), hidden),
    "attention.v_proj.bias": (lambda sizes: range(KV_HEADS * HEAD_DIM),),
    "attention.o_proj.weight": (hidden, query),
    "attention.o_proj.bias": (hidden,),
    "up": (experts, expert_ffn, hidden),
    "gate_up": (experts, gate_up, hidden),
    "down": (experts, hidden, expert_ffn),
    "mlp": (ffn, hidden),
}
each_rule = pytest.mark.parametrize("name", RULES)


def numbered(rule: TensorRule) -> torch.Tensor:
    """A tensor whose every element is its own position, so that no wrong place goes unseen."""
    return torch.arange(rule.count(FULL), dtype=torch.float32).reshape(rule.shape(FULL))


def picked(tensor: torch.Tensor, indices: list[list[int]]) -> torch.Tensor:
    for i, index in enumerate(indices):
        tensor = torch.stack([tensor.select(i, j) for j in index], dim=i)
    return tensor


def test_the_reference_covers_every_rule():
    assert REFERENCE.keys() == RULES.keys()
    for name, rule in RULES.items():
        assert rule.shape(FULL) == tuple(len(list(indices(FULL))) for indices in REFERENCE[name])


@each_rule
@kept_sizes
def test_narrow_and_mask_and_count_agree_with_the_reference(name, kept):
    rule, tensor = RULES[name], numbered(RULES[name])
    indices = [list(along(kept)) for along in REFERENCE[name]]
    expected = picked(tensor, indices)
    narrowed = rule.narrow(tensor, FULL, kept)
    assert torch.equal(narrowed, expected)
    assert rule.shape(kept) == expected.shape
    assert rule.count(kept) == expected.numel()
    mask = rule.mask(FULL, kept)
    assert torch.equal(mask, torch.isin(tensor, expected).float())
    assert [i for runs in rule.runs(FULL, kept)[0] for i in range(*runs)] == indices[0]


@each_rule
@kept_sizes
def test_narrow_is_a_view_exactly_where_it_says(name, kept):
    rule, tensor = RULES[name], numbered(RULES[name])
    narrowed = rule.narrow(tensor, FULL, kept)
    shares = narrowed.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert shares == rule.is_view(FULL, kept)
    if kept == FULL:
        assert shares


@each_rule
@kept_sizes
def test_runs_are_ordered_and_not_adjacent(name, kept):
    for dimension, runs in zip(RULES[name].dims, RULES[name].runs(FULL, kept), strict=True):
        assert all(start < stop for start, stop in runs)
        assert all(left[1] < right[0] for left, right in zip(runs, runs[1:], strict=False))
        assert runs[-1][1] <= dimension.size(FULL)


def test_mamba_heads_keep_a_prefix_of_every_group():
    kept = FULL | {"mamba_heads": 2}
    assert RULES["mamba.dt_bias"].runs(FULL, kept) == [[(0, 1), (3, 4)]]
    assert RULES["mamba.norm.weight"].runs(FULL, kept) == [[(0, 3), (9, 12)]]


def test_spans_are_where_the_stock_mixer_splits(original):
    mixer = original("nano3").model.layers[0].mixer
    width, shared = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size
    rules = {r.name: r for r in get_architecture("nemotron_h").rules(original("nano3").config)}
    sizes = {"hidden": 48, "mamba_heads": mixer.num_heads, "mamba_head_dim": mixer.head_dim}
    projection = rules["model.layers.0.mixer.in_proj.weight"].dims[0]
    gate, states, dt = (0, width), (width, width + mixer.conv_dim), (width + mixer.conv_dim, projection.size(sizes))
    assert projection.span("z", sizes) == gate
    assert (projection.span("x", sizes)[0], projection.span("C", sizes)[1]) == states
    assert projection.span("dt", sizes) == dt
    convolution = rules["model.layers.0.mixer.conv1d.weight"].dims[0]
    assert [convolution.span(s, sizes) for s in "xBC"] == [
        (0, width),
        (width, width + shared),
        (width + shared, width + 2 * shared),
    ]
    with pytest.raises(KeyError, match="no segment 'y' among"):
        projection.span("y", sizes)


def test_constant_segments_stay_in_their_place():
    """z, x, B, C and dt filled with 1 to 5: after a cut, each still fills its own segment and no other."""
    rule, kept = RULES["mamba.in_proj.weight"], FULL | {"mamba_heads": 2, "mamba_head_dim": 2, "hidden": 4}
    tensor = torch.zeros(rule.shape(FULL))
    for value, name in enumerate(("z", "x", "B", "C", "dt"), start=1):
        start, stop = rule.dims[0].span(name, FULL)
        tensor[start:stop] = value
    narrowed = rule.narrow(tensor, FULL, kept)
    for value, name in enumerate(("z", "x", "B", "C", "dt"), start=1):
        start, stop = rule.dims[0].span(name, kept)
        assert (narrowed[start:stop] == value).all()
        assert (narrowed == value).sum() == (stop - start) * kept["hidden"]


def test_dim_takes_one_segment_or_named_ones():
    assert dim(2, Cut("ffn")) == Dim((("", (2, Cut("ffn"))),))
    assert [name for name, _ in dim(a=(1,), b=(2,)).segments] == ["a", "b"]
    for wrong in (lambda: dim(), lambda: dim(2, a=(3,))):
        with pytest.raises(TypeError, match="one segment or named segments"):
            wrong()


def test_take_cuts_every_dimension():
    tensor = torch.arange(24.0).reshape(4, 6)
    assert torch.equal(take(tensor, [[(0, 1), (3, 4)], [(1, 3)]]), tensor[[0, 3]][:, 1:3])


# Sorting


def shuffled(sizes: dict[str, int], groups: dict[str, int], seed: int) -> dict[str, torch.Tensor]:
    """A random order of every axis: one row per group, per expert for the neurons of experts."""
    generator = torch.Generator().manual_seed(seed)
    orders = {}
    for axis, size in sizes.items():
        if axis != "experts_per_token":
            rows = sizes["experts"] if axis == "expert_ffn" else groups.get(axis, 1)
            per_row = size if axis == "expert_ffn" else size // rows
            orders[axis] = torch.stack([torch.randperm(per_row, generator=generator) for _ in range(rows)])
    return orders


def reference_order(name: str, orders: dict[str, torch.Tensor]) -> list[list[int]]:
    """The old index of every new place, per dimension; neurons of experts are left to the test."""
    head = {
        (g, h): g * (FULL["mamba_heads"] // GROUPS) + int(orders["mamba_heads"][g, h])
        for g in range(GROUPS)
        for h in range(FULL["mamba_heads"] // GROUPS)
    }
    channel = [int(c) for c in orders["mamba_head_dim"][0]]
    per_kv, per_group = FULL["attention_heads"] // KV_HEADS, FULL["experts"] // ROUTER_GROUPS

    def inner_order(offset=0):
        return [offset + h * FULL["mamba_head_dim"] + c for h in head.values() for c in channel]

    def same(start, size):
        return list(range(start, start + size))

    along = {
        hidden: [int(i) for i in orders["hidden"][0]],
        ffn: [int(i) for i in orders["ffn"][0]],
        heads: list(head.values()),
        inner: inner_order(),
        in_proj: inner_order()
        + inner_order(WIDTH)
        + same(2 * WIDTH, 2 * SHARED)
        + [2 * WIDTH + 2 * SHARED + h for h in head.values()],
        convolution: inner_order() + same(WIDTH, 2 * SHARED),
        query: [
            (g * per_kv + int(orders["attention_heads"][g, h])) * HEAD_DIM + c
            for g in range(KV_HEADS)
            for h in range(per_kv)
            for c in range(HEAD_DIM)
        ],
        experts: [
            g * per_group + int(orders["experts"][g, e]) for g in range(ROUTER_GROUPS) for e in range(per_group)
        ],
    }
    return [along.get(indices, list(indices(FULL))) for indices in REFERENCE[name]]


@each_rule
@pytest.mark.parametrize("seed", [0, 1])
def test_permute_agrees_with_the_reference(name, seed):
    orders = shuffled(FULL, {"mamba_heads": GROUPS, "attention_heads": KV_HEADS, "experts": ROUTER_GROUPS}, seed)
    rule, tensor = RULES[name], numbered(RULES[name])
    expected = tensor.clone()
    if name in ("up", "gate_up", "down"):  # every expert's own neurons first, named by its old index
        for e in range(FULL["experts"]):
            order = [int(i) for i in orders["expert_ffn"][e]]
            if name == "gate_up":
                order = order + [FULL["expert_ffn"] + i for i in order]
            expected[e] = tensor[e][:, order] if name == "down" else tensor[e][order]
    expected = picked(expected, reference_order(name, orders))
    sorted_tensor = rule.permute(tensor, FULL, orders)
    assert torch.equal(sorted_tensor, expected)
    assert torch.equal(tensor, numbered(rule)), "the original was changed"


@each_rule
def test_permute_without_orders_changes_nothing(name):
    assert torch.equal(RULES[name].permute(numbered(RULES[name]), FULL, {}), numbered(RULES[name]))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_parent_sorted_by_any_order_computes_the_same(name, parent, original, ids):
    model = parent(name)
    architecture = get_architecture(model.config.model_type)
    full, rules = architecture.full(model.config), architecture.rules(model.config)
    groups = {a.name: getattr(model.config, a.groups) for a in architecture.axes if a.groups}
    whole = shuffled(full.at(None), {}, seed=99)
    state, moved = model.state_dict(), 0
    for rule in rules:
        if rule.tied:
            continue
        sizes = full.at(rule.layer)
        orders = shuffled(sizes, groups, seed=rule.layer or 0) | whole
        new = rule.permute(state[rule.name], sizes, orders)
        moved += not torch.equal(new, state[rule.name])
        state[rule.name].copy_(new)
    assert moved > len(rules) // 2
    assert_same_logits(logits(model, ids), logits(original(name), ids))


# The three mistakes that are easy to make


def sliced_by(table, stock, sizes):
    """A stock model with the weights that a table takes out of the parent."""
    architecture = get_architecture(stock.config.model_type)
    submodel = architecture.submodel(stock.config, sizes)
    model = type(stock)(architecture.config_for(stock.config, submodel)).eval()
    model.load_state_dict(slice_state_dict(table, stock.config, stock.state_dict(), submodel))
    return model, masked_model(stock, submodel)


def changed_table(model_type, change):
    base = get_architecture(model_type)

    class Table(type(base)):
        def rules(self, config):
            return [change(rule) for rule in super().rules(config)]

    return Table()


def flat(rule: TensorRule) -> TensorRule:
    """The same rule with the heads of all Mamba groups in one row, cut to a flat prefix."""

    def flatten(factors):
        at = next((i for i, f in enumerate(factors) if isinstance(f, Cut) and f.axis == "mamba_heads"), None)
        return factors if at is None else (*factors[: at - 1], Cut("mamba_heads"), *factors[at + 1 :])

    return replace(rule, dims=tuple(Dim(tuple((n, flatten(s)) for n, s in d.segments)) for d in rule.dims))


def reordered(*names):
    """The table with the segments of `in_proj` in another order."""

    def change(rule: TensorRule) -> TensorRule:
        if not rule.name.endswith("in_proj.weight"):
            return rule
        segments = dict(rule.dims[0].segments)
        return replace(rule, dims=(Dim(tuple((name, segments[name]) for name in names)), *rule.dims[1:]))

    return change


WRONG = 0.05
"""Logits here are of magnitude 1 to 10, rounding is below 2e-5; the mildest of the mistakes below gives 0.47."""

MAMBA_CUT = {"nano3": {"mamba_heads": 6}, "granite": {"mamba_heads": 12}}


@pytest.mark.parametrize("name", MAMBA_CUT)
def test_a_flat_mamba_prefix_is_another_function(name, original, ids):
    stock = original(name)
    right, masked = sliced_by(get_architecture(stock.config.model_type), stock, MAMBA_CUT[name])
    assert_same_logits(logits(right, ids), logits(masked, ids))
    wrong, _ = sliced_by(changed_table(stock.config.model_type, flat), stock, MAMBA_CUT[name])
    assert (logits(wrong, ids) - logits(masked, ids)).abs().max() > WRONG


@pytest.mark.parametrize("name", MAMBA_CUT)
@pytest.mark.parametrize(
    "segments",
    [("x", "B", "z", "C", "dt"), ("dt", "z", "x", "B", "C"), ("B", "C", "z", "x", "dt"), ("z", "x", "B", "dt", "C")],
    ids="".join,
)
def test_swapped_segments_are_another_function(name, segments, original, ids):
    stock = original(name)
    wrong, masked = sliced_by(changed_table(stock.config.model_type, reordered(*segments)), stock, MAMBA_CUT[name])
    assert (logits(wrong, ids) - logits(masked, ids)).abs().max() > WRONG


def _no_factor(piece, weight):
    return weight * piece.rule.mask(piece.full, piece.kept)


WITHOUT = {"factor": {"masked_weight": _no_factor}, "epsilon": {"correct_epsilon": lambda *_: None}}
WITHOUT["both"] = WITHOUT["factor"] | WITHOUT["epsilon"]


@pytest.mark.parametrize("sizes", [{"hidden": 24}, {"mamba_heads": 12}], ids=["hidden", "mamba_heads"])
@pytest.mark.parametrize("changed", WITHOUT.values(), ids=WITHOUT)
def test_masks_need_both_norm_corrections(sizes, changed, original, ids, monkeypatch):
    stock = original("granite")
    sliced, right = sliced_by(get_architecture("granitemoehybrid"), stock, sizes)
    assert_same_logits(logits(right, ids), logits(sliced, ids))
    for name, function in changed.items():
        monkeypatch.setattr(hf_elastic.submodels.masking, name, function)
    wrong = masked_model(stock, get_architecture("granitemoehybrid").submodel(stock.config, sizes))
    assert (logits(wrong, ids) - logits(sliced, ids)).abs().max() > WRONG
