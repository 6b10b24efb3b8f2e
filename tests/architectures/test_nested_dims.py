"""Dimensions inside dimensions against a list of what every index is: which entry of every axis, in which group."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from hf_elastic.architectures.axes import Cut, Dim, TensorRule, dim

KEYS, KEY_DIM = 3, 2
HEADS, CHANNELS = Cut("heads", groups=KEYS), Cut("channels")
V = (Cut("heads", groups=KEYS, gated=True), Cut("channels", gated=True))
FULL = {"heads": 6, "channels": 4, "hidden": 5}
KEPT = [FULL, FULL | {"heads": 3}, FULL | {"channels": 3}, {"heads": 3, "channels": 1, "hidden": 2}]
DIMS = {
    "qkvz": dim(KEYS, dim(q=(KEY_DIM,), k=(KEY_DIM,), v=V, z=(HEADS, CHANNELS))),
    "ba": dim(KEYS, dim(b=(HEADS,), a=(HEADS,))),
    "flat": dim(q=(KEYS, KEY_DIM), v=(KEYS, *V), z=(KEYS, HEADS, CHANNELS)),
    "twice nested": dim(2, dim(a=(KEYS, dim(b=(HEADS,), c=(2, CHANNELS))), d=(CHANNELS,))),
    "segments of both": dim(x=(KEYS, dim(v=V, one=(1,))), y=(CHANNELS, 2)),
    "behind a cut": dim(CHANNELS, dim(a=(2,), b=(Cut("hidden"),))),
}
"""`qkvz` is what Qwen3-Next stores: key head by key head, query, key, values, gates."""


def entries(found: Dim, sizes: dict[str, int], group: int = 0) -> list[tuple]:
    """Every index of a dimension, in order: the path to it, with `(axis, group, index, gated)` where a cut runs."""
    listed = []
    for name, segment in found.segments:
        paths = [((name,), group)]
        for factor in segment:
            longer = []
            for path, inside in paths:
                if isinstance(factor, int):
                    longer += [((*path, i), i) for i in range(factor)]
                elif isinstance(factor, Cut):
                    each = range(sizes[factor.axis] // factor.groups)
                    at = inside if factor.groups > 1 else 0
                    longer += [((*path, (factor.axis, at, i, factor.gated)), inside) for i in each]
                else:
                    longer += [((*path, *inner), inside) for inner in entries(factor, sizes, inside)]
            paths = longer
        listed += [path for path, _ in paths]
    return listed


def moved(path: tuple, orders: dict[str, torch.Tensor]) -> tuple:
    """The path of what comes to stand at this one."""
    return tuple(
        (step[0], step[1], int(orders[step[0]][step[1], step[2]]), step[3])
        if isinstance(step, tuple) and step[0] in orders
        else step
        for step in path
    )


@pytest.fixture(params=DIMS)
def nested(request) -> Dim:
    return DIMS[request.param]


def orders(*axes: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    groups = {"heads": KEYS, "channels": 1, "hidden": 1}
    return {
        axis: torch.stack([torch.randperm(FULL[axis] // groups[axis]) for _ in range(groups[axis])]) for axis in axes
    }


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_runs_are_the_entries_that_are_left(nested, kept):
    everything, left = entries(nested, FULL), entries(nested, kept)
    runs = nested.runs(FULL, kept)
    assert [everything[i] for start, stop in runs for i in range(start, stop)] == left
    assert nested.size(FULL) == len(everything)
    assert nested.size(kept) == len(left)
    assert all(stop < start for (_, stop), (start, _) in zip(runs, runs[1:], strict=False))  # merged


@pytest.mark.parametrize("axes", [("heads",), ("channels",), ("heads", "channels", "hidden")], ids="-".join)
def test_the_order_moves_every_entry_inside_its_group(nested, axes):
    everything, by = entries(nested, FULL), orders(*axes)
    place = {path: i for i, path in enumerate(everything)}
    expected = [place[moved(path, by)] for path in everything]
    found = nested.order(FULL, by)
    if not {cut.axis for cut in nested.cuts} & set(axes):
        assert found is None
        assert expected == list(range(len(everything)))
    else:
        assert found.tolist() == expected
        assert expected != list(range(len(everything)))


def test_gates_weight_what_is_gated_and_nothing_else(nested):
    torch.manual_seed(1)
    weights = {"heads": torch.rand(FULL["heads"] // KEYS) + 0.5, "channels": torch.rand(FULL["channels"]) + 0.5}
    expected = []
    for path in entries(nested, FULL):
        steps = [step for step in path if isinstance(step, tuple) and step[3]]
        expected.append(float(torch.tensor([weights[axis][i] for axis, _, i, _ in steps]).prod()))
    found = nested.gates(FULL, weights)
    if set(expected) == {1.0}:
        assert found is None
    else:
        torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("name", DIMS)
@pytest.mark.parametrize("kept", KEPT[1:], ids=str)
def test_a_tensor_is_sorted_cut_and_masked_entry_by_entry(name, kept):
    rule = TensorRule("w", (DIMS[name], dim(Cut("hidden"))))
    rows, columns = entries(rule.dims[0], FULL), entries(rule.dims[1], FULL)
    value = {pair: i for i, pair in enumerate(product(rows, columns))}
    tensor = torch.arange(len(value), dtype=torch.float32).view(len(rows), len(columns))
    by = orders("heads", "channels", "hidden")
    ordered = rule.permute(tensor, FULL, by)
    expected = [[value[moved(row, by), moved(column, by)] for column in columns] for row in rows]
    assert ordered.tolist() == expected
    left = [
        [value[moved(r, by), moved(c, by)] for c in entries(rule.dims[1], kept)] for r in entries(DIMS[name], kept)
    ]
    assert rule.narrow(ordered, FULL, kept).tolist() == left
    mask = rule.mask(FULL, kept)
    there = set(product(entries(DIMS[name], kept), entries(rule.dims[1], kept)))
    assert mask.tolist() == [[float((row, column) in there) for column in columns] for row in rows]
