"""Tables that are wrong in one thing each: the conformance kit finds every one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from hf_elastic.architectures import ARCHITECTURES, Architecture, get_architecture
from hf_elastic.architectures.axes import Cut, Dim, Norm, TensorRule
from hf_elastic.errors import HFElasticError
from hf_elastic.testing.conformance import a_subject, run_checks
from hf_elastic.testing.models import tiny_config

Change = Callable[[TensorRule], TensorRule]

TABLES = [
    ("nemotron_h", 0),
    ("granitemoehybrid", 1),
    ("falcon_h1", 0),
    ("qwen3_next", 1),
    ("qwen3_5_moe_text", 0),
    ("zamba2", 0),
    ("gemma3_text", 0),
    ("mixtral", 0),
    ("kimi_linear", 0),
    ("jamba", 0),
]


def factors(dim: Dim, change: Callable[[Cut], Cut]) -> Dim:
    """A dimension with other cuts."""

    def of(factor):
        return (
            factors(factor, change)
            if isinstance(factor, Dim)
            else change(factor)
            if isinstance(factor, Cut)
            else factor
        )

    return Dim(tuple((name, tuple(map(of, segment))) for name, segment in dim.segments))


def with_cuts(**fields) -> Change:
    return lambda rule: replace(
        rule, dims=tuple(factors(dim, lambda cut: replace(cut, **fields)) for dim in rule.dims)
    )


def in_another_order(dim: Dim) -> Dim:
    inner = tuple(
        (name, tuple(in_another_order(f) if isinstance(f, Dim) else f for f in segment))
        for name, segment in dim.segments
    )
    return Dim(inner[::-1])


def flat(dim: Dim) -> Dim:
    """Heads as one prefix of all groups together."""
    segments = []
    for name, segment in dim.segments:
        factors = [flat(f) if isinstance(f, Dim) else f for f in segment]
        for i, factor in enumerate(factors):
            if isinstance(factor, Cut) and factor.groups > 1 and i and factors[i - 1] == factor.groups:
                factors[i - 1 : i + 1] = [1, replace(factor, groups=1)]
        segments.append((name, tuple(factors)))
    return Dim(tuple(segments))


def concatenated(rule: TensorRule) -> bool:
    """Whether something else is cut when segments lie in another order."""
    return any(
        in_another_order(dim) != dim and {s for _, s in dim.segments} != {s for _, s in dim.segments[:1]}
        for dim in rule.dims
    )


WRONG: dict[str, tuple[Callable[[TensorRule], object], Change]] = {
    "segments in another order": (
        concatenated,
        lambda rule: replace(rule, dims=tuple(map(in_another_order, rule.dims))),
    ),
    "names of gate and up exchanged": (
        lambda rule: rule.parted,
        lambda rule: replace(rule, dims=tuple(Dim(tuple(zip(reversed([n for n, _ in d.segments]), [s for _, s in d.segments], strict=True))) for d in rule.dims)),
    ),
    "no correction of a norm": (lambda rule: rule.norm, lambda rule: replace(rule, norm=False)),
    "weights of norms around 0": (
        lambda rule: isinstance(rule.norm, Norm) and rule.norm.centre,
        lambda rule: replace(rule, norm=Norm()),
    ),
    "no scale": (lambda rule: rule.scale, lambda rule: replace(rule, scale=None)),
    "a tie is missing": (lambda rule: rule.tied, lambda rule: replace(rule, tied=None)),
    "a tie that is not there": (
        lambda rule: rule.template == "lm_head.weight" and not rule.tied,
        lambda rule: replace(rule, tied="model.norm.weight"),
    ),
    "router in another order than experts": (
        lambda rule: rule.routes,
        lambda rule: replace(rule, dims=(factors(rule.dims[0], lambda cut: replace(cut, order="other")), *rule.dims[1:])),
    ),
    "nothing routes": (lambda rule: rule.routes, lambda rule: replace(rule, routes=False)),
    "experts are not said": (lambda rule: rule.routed, lambda rule: replace(rule, routed=False)),
    "undecided sizes are not weighted": (
        lambda rule: rule.layer is not None and len(rule.dims) == 2 and any(cut.gated for cut in rule.dims[1].cuts),
        with_cuts(gated=False),
    ),
    "a name on disk": (
        lambda rule: rule.disk and not rule.tied and rule.disk.endswith("weight"),
        lambda rule: replace(rule, disk=rule.disk.replace("weight", "wait")),
    ),
}  # fmt: skip


def found_by(model_type: str, variant: int, table: Architecture, monkeypatch) -> str | None:
    """The check that fails first."""
    monkeypatch.setitem(ARCHITECTURES._loaded, model_type, table)
    try:
        with a_subject(tiny_config(model_type, variant), 0, False) as subject:
            return next((result.name for result in run_checks(subject) if result.failures), None)
    except HFElasticError as error:
        return str(error)


def one_rule_wrong(table: Architecture, template: str, change: Change) -> Architecture:
    class Wrong(type(table)):
        def rules(self, config):
            return [change(rule) if rule.template == template else rule for rule in super().rules(config)]

    return Wrong()


def mutations(model_type: str, variant: int):
    """For each kind of mistake the first tensor of every form where it can be made."""
    rules, seen = get_architecture(model_type).rules(tiny_config(model_type, variant)), set()
    for kind, (where, change) in WRONG.items():
        for rule in rules:
            form = (kind, rule.dims)
            if where(rule) and form not in seen and len([k for k, _ in seen if k == kind]) < 2:
                seen.add(form)
                yield pytest.param(
                    model_type, variant, rule.template, change, id=f"{model_type}-{kind}-{rule.template}"
                )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "variant", "template", "change"), [m for table in TABLES for m in mutations(*table)]
)
def test_a_rule_that_is_wrong_is_found(model_type, variant, template, change, monkeypatch):
    table = one_rule_wrong(get_architecture(model_type), template, change)
    assert found_by(model_type, variant, table, monkeypatch)


GROUPED = [
    (model_type, variant, axis.name)
    for model_type, variant in TABLES
    for axis in get_architecture(model_type).available_axes(tiny_config(model_type, variant))
    if axis.groups
]


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "variant", "axis"), GROUPED)
def test_heads_that_leave_their_group_are_found(model_type, variant, axis, monkeypatch):
    config = tiny_config(model_type, variant)
    original = get_architecture(model_type)
    groups = {
        cut.groups for rule in original.rules(config) for dim in rule.dims for cut in dim.cuts if cut.axis == axis
    }
    if groups == {1}:
        pytest.skip("one group")

    class Wrong(type(original)):
        def rules(self, config):
            return [
                replace(r, dims=tuple(flat(d) if any(c.axis == axis for c in d.cuts) else d for d in r.dims))
                for r in super().rules(config)
            ]

    assert found_by(model_type, variant, Wrong(), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "variant"), [t for t in TABLES if t[0] not in ("gemma3_text", "mixtral")])
def test_states_in_another_order_are_found(model_type, variant, monkeypatch):
    original = get_architecture(model_type)

    class Wrong(type(original)):
        def states(self, config, layer):
            return tuple(replace(s, dims=tuple(map(in_another_order, s.dims))) for s in super().states(config, layer))

    changed = [
        s
        for i in range(3)
        for s in original.states(tiny_config(model_type, variant), i)
        if any(map(concatenated_dim, s.dims))
    ]
    if not changed:
        pytest.skip("no state is a concatenation")
    assert found_by(model_type, variant, Wrong(), monkeypatch) == "caches are handed over"


def concatenated_dim(dim: Dim) -> bool:
    return len({segment for _, segment in dim.segments}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["nemotron_h", "qwen3_5_moe_text", "mixtral", "jamba", "kimi_linear"])
def test_a_router_that_is_not_biased_is_found(model_type, monkeypatch):
    original = get_architecture(model_type)

    class Wrong(type(original)):
        def bias_router(self, router, source, bias, top_k):
            pass

    assert found_by(model_type, 0, Wrong(), monkeypatch) == "masked = sliced"
