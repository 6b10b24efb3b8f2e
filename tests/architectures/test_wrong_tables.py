"""Tables that are wrong in one thing each: the conformance kit finds every one of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest

from hf_elastic.architectures import ARCHITECTURES, Architecture, get_architecture
from hf_elastic.architectures.axes import Cut, Dim, Norm, TensorRule
from hf_elastic.architectures.encodings import ENCODINGS, Encoding
from hf_elastic.checkpoints import encoding
from hf_elastic.errors import HFElasticError
from hf_elastic.quantization import codec
from hf_elastic.testing.checks import CHECKS
from hf_elastic.testing.conformance import a_subject, run_checks
from hf_elastic.testing.models import tiny_config

Change = Callable[[TensorRule], TensorRule]

_FIRST = [
    "every tensor has a rule",
    "masked = sliced",
    "decided mixture = submodel",
    "names in files",
    "sorted = parent",
]
ORDER = [*_FIRST, *(name for name in CHECKS if name not in _FIRST)]
"""What finds most, and is quick, comes first."""

MOST = 99 if os.environ.get("HF_ELASTIC_LONG") else 1
"""Tensors per table and kind of mistake."""

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


def concatenated(dim: Dim) -> bool:
    """Whether something else is cut when its segments lie in another order."""
    inner = [factor for _, segment in dim.segments for factor in segment if isinstance(factor, Dim)]
    return any(map(concatenated, inner)) or (bool(dim.cuts) and len({segment for _, segment in dim.segments}) > 1)


WRONG: dict[str, tuple[Callable[[TensorRule], object], Change]] = {
    "segments in another order": (
        lambda rule: any(map(concatenated, rule.dims)),
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
            return next((result.name for result in run_checks(subject, ORDER) if result.failures), None)
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
            if where(rule) and form not in seen and len([k for k, _ in seen if k == kind]) < MOST:
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
        if any(map(concatenated, s.dims))
    ]
    if not changed:
        pytest.skip("no state is a concatenation")
    assert found_by(model_type, variant, Wrong(), monkeypatch) == "caches are handed over"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text"])
def test_a_window_that_is_not_said_is_found(model_type, monkeypatch):
    class Wrong(type(get_architecture(model_type))):
        def states(self, config, layer):
            return tuple(replace(state, window=None) for state in super().states(config, layer))

    assert found_by(model_type, 0, Wrong(), monkeypatch) == "caches are counted"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["nemotron_h", "qwen3_5_moe_text", "mixtral", "jamba", "kimi_linear"])
def test_a_router_that_is_not_biased_is_found(model_type, monkeypatch):
    original = get_architecture(model_type)

    class Wrong(type(original)):
        def bias_router(self, router, source, bias, top_k):
            pass

    assert found_by(model_type, 0, Wrong(), monkeypatch) == "masked = sliced"


# -- what is quantised -------------------------------------------------------------------------------------------------


def with_kind(kind) -> Change:
    return lambda rule: replace(rule, kind=kind)


KINDS_WRONG: dict[str, tuple[Callable[[TensorRule], object], Change]] = {
    "a norm has a kind": (lambda rule: rule.norm, with_kind("mlp")),
    "a convolution has a kind": (lambda rule: "conv" in rule.template and len(rule.dims) == 3, with_kind("mamba")),
    "a parameter of a scan has a kind": (lambda rule: rule.template.endswith("A_log"), with_kind("mamba")),
    "embeddings have a kind": (lambda rule: "embed" in rule.template, with_kind("mlp")),
    "the head has a kind": (lambda rule: rule.template == "lm_head.weight", with_kind("mlp")),
    "a router has a kind": (lambda rule: rule.routes, with_kind("experts")),
    "a bias has a kind": (lambda rule: rule.template.endswith("proj.bias"), with_kind("attention")),
    "a weight is not said to be of one matrix with others": (
        lambda rule: rule.fused,
        lambda rule: replace(rule, fused=None),
    ),
    "a weight is of another matrix than its neighbours": (
        lambda rule: rule.fused,
        lambda rule: replace(rule, fused="another_proj"),
    ),
    "a weight has no kind and its neighbours in one matrix have": (
        lambda rule: rule.fused and ".k_proj" in rule.template,
        with_kind(None),
    ),
}


@pytest.mark.parametrize(
    ("model_type", "variant"), [("nemotron_h", 0), ("qwen3_5_moe_text", 0), ("kimi_linear", 1), ("lfm2", 0)]
)
def test_a_wrong_kind_is_found(model_type, variant, monkeypatch):
    config, table = tiny_config(model_type, variant), get_architecture(model_type)
    rules, made = table.rules(config), 0
    with a_subject(config, 0, False) as subject:
        for kind, (where, change) in KINDS_WRONG.items():
            for template in list(dict.fromkeys(rule.template for rule in rules if where(rule)))[:MOST]:
                subject.architecture = one_rule_wrong(table, template, change)
                (result,) = run_checks(subject, ["kinds of weights"])
                assert result.failures, (kind, template)
                made += 1
        subject.architecture = table
        (result,) = run_checks(subject, ["kinds of weights"])
        assert not result.failures
    assert made >= 5


def companions(name: str, **fields) -> Encoding:
    """NVFP4 with another companion of that suffix."""
    right = ENCODINGS["nvfp4"]
    changed = (replace(part, **fields) if part.suffix == name else part for part in right.companions)
    return replace(right, companions=tuple(changed))


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        companions("weight_packed", columns=1),
        companions("weight_packed", columns=4),
        companions("weight_packed", rows=0),
        companions("weight_scale", columns=8),
        companions("weight_scale", columns=0),
        companions("weight_scale", dtypes=("F32",)),
        companions("weight_global_scale", rows=1),
    ],
    ids=lambda encoding: ", ".join(
        f"{c.suffix} {c.rows} {c.columns}" for c in encoding.companions if c not in ENCODINGS["nvfp4"].companions
    ),
)
def test_companions_of_a_wrong_shape_are_found(wrong, monkeypatch):
    monkeypatch.setitem(ENCODINGS, "nvfp4", wrong)
    with a_subject(tiny_config("mixtral"), 0, False) as subject:
        results = run_checks(subject, ["sizes off the blocks are refused", "quantised = sliced"])
        assert any(result.failures for result in results)


def test_a_cut_off_the_blocks_that_is_not_refused_is_found(monkeypatch):
    with a_subject(tiny_config("nemotron_h"), 0, False) as subject:
        assert subject.in_blocks
        monkeypatch.setattr(Dim, "_blocks", lambda dim, runs: [(a // dim.per, b // dim.per) for a, b in runs])
        (result,) = run_checks(subject, ["sizes off the blocks are refused"])
    assert any("hidden" in failure for failure in result.failures)


@pytest.mark.slow
@pytest.mark.parametrize("choose", [True, False])
def test_codes_of_another_program_are_found(choose, monkeypatch):
    """A codec that decodes what it encodes, so that only an independent one can tell."""
    most, encode = codec._LARGEST_SCALE, codec.encode
    monkeypatch.setattr(codec, "_LARGEST_SCALE", most if not choose else 448.0)
    monkeypatch.setattr(encoding, "encode", lambda *args, **kwargs: encode(*args, **{**kwargs, "choose": choose}))
    with a_subject(tiny_config("mistral"), 0, False) as subject:
        (result,) = run_checks(subject, ["quantised = sliced"])
    assert result.failures
