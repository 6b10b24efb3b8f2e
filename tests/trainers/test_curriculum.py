"""Stages and the stream of budgets."""

from __future__ import annotations

import math

import pytest

from hf_elastic import ElasticConfigError
from hf_elastic.trainers import Curriculum, Stage
from hf_elastic.trainers.curriculum import make_curriculum

NAMES = ["full", "medium", "small"]
TWO = [
    {"steps": 3, "max_length": 16},
    {"steps": 5, "budget_probabilities": {"full": 0.5, "medium": 0.3, "small": 0.2}, "learning_rate_scale": 0.5},
]


def make(
    probabilities=None, stages=None, max_steps=-1, max_length=64, seed=0, context=128, rows=1, routed=False
) -> Curriculum:
    return make_curriculum(NAMES, probabilities, stages, max_steps, max_length, seed, context, rows, routed)


def test_stages_follow_each_other_and_the_last_one_goes_on():
    curriculum = make(stages=TWO)
    assert curriculum.total_steps == 8
    assert [curriculum.stage(step) for step in range(3)] == [curriculum.stages[0]] * 3
    assert [curriculum.stage(step) for step in (3, 7, 8, 1000)] == [curriculum.stages[1]] * 4
    assert [curriculum.learning_rate_factor(step) for step in (2, 3)] == [1.0, 0.5]
    assert (curriculum.stage(0).max_length, curriculum.stage(5).max_length) == (16, None)


@pytest.mark.parametrize(
    ("tokens", "length", "rows", "steps"),
    [
        (100e9, 8192, 1536, 7948),
        ("100e9", 8192, 1536, 7948),  # as YAML reads it
        (60_000_000_000, 49152, 512, 2385),
        (1536 * 8192, 8192, 1536, 1),
        (1536 * 8192 + 1, 8192, 1536, 2),
        (1, 8192, 1536, 1),
    ],
)
def test_tokens_become_steps_by_the_tokens_of_a_full_step(tokens, length, rows, steps):
    options = {"max_length": 49152, "context": None, "rows": rows}
    own = make(stages=[{"tokens": tokens, "max_length": length}], **options)
    assert own.stages == [Stage(steps, dict.fromkeys(NAMES, 1 / 3), length)]
    assert make(stages=[{"tokens": tokens}], **{**options, "max_length": length}).total_steps == steps


def test_stages_can_mix_steps_and_tokens_and_check_the_whole_run():
    stages = [{"steps": 3, "max_length": 16}, {"tokens": 1000, "max_length": 32}, {"tokens": 1000}]
    assert [stage.steps for stage in make(stages=stages, rows=4).stages] == [
        3,
        8,
        4,
    ]  # 1000 / (4 x 32), 1000 / (4 x 64)
    with pytest.raises(ElasticConfigError, match="max_steps=14, but the stages have 15 steps"):
        make(stages=stages, rows=4, max_steps=14)


def test_a_rate_of_a_stage_takes_the_place_of_the_runs():
    stages = [
        {"steps": 1, "learning_rate": "1e-4", "router_learning_rate": 2e-3},
        {"steps": 1, "learning_rate": 3e-4},
        {"steps": 1, "learning_rate_scale": 0.5},
        {"steps": 1},
    ]
    curriculum = make(stages=stages, routed=True)
    model = [1e-3 * curriculum.learning_rate_factor(step, 1e-3) for step in range(4)]
    router = [1e-2 * curriculum.learning_rate_factor(step, 1e-2, router=True) for step in range(4)]
    assert model == pytest.approx([1e-4, 3e-4, 5e-4, 1e-3])
    assert router == pytest.approx([2e-3, 1e-2, 5e-3, 1e-2])
    assert curriculum.rates == ["learning_rate_scale", "learning_rate", "router_learning_rate"]
    assert make(stages=[{"steps": 1, "learning_rate_scale": 1.0}]).rates == []


def test_without_stages_all_budgets_are_drawn_alike():
    curriculum = make(max_steps=10)
    assert curriculum.stages == [Stage(10, dict.fromkeys(NAMES, 1 / 3))]


def test_stages_inherit_the_probabilities_of_the_run():
    curriculum = make(probabilities={"full": 0.25, "small": 0.75}, stages=TWO)
    assert curriculum.stage(0).budget_probabilities == {"full": 0.25, "small": 0.75}
    assert curriculum.stage(3).budget_probabilities == {"full": 0.5, "medium": 0.3, "small": 0.2}


@pytest.mark.parametrize(
    "probabilities", [None, {"full": 0.5, "medium": 0.3, "small": 0.2}, {"small": 0.9, "full": 0.1}]
)
def test_budgets_are_drawn_as_often_as_asked(probabilities):
    curriculum = make(probabilities=probabilities, max_steps=1)
    draws = [curriculum.budget(step, micro) for step in range(2000) for micro in range(3)]
    wanted = probabilities or dict.fromkeys(NAMES, 1 / 3)
    assert set(draws) == set(wanted)
    for name, p in wanted.items():
        sigma = math.sqrt(len(draws) * p * (1 - p))
        # four standard deviations: one correct implementation in 15000 would fail, and the seed is fixed
        assert abs(draws.count(name) - len(draws) * p) < 4 * sigma


def test_neighbouring_draws_are_independent():
    curriculum = make(max_steps=1)
    pairs = [(curriculum.budget(step, 0), curriculum.budget(step, 1)) for step in range(4500)]
    for pair in [(a, b) for a in NAMES for b in NAMES]:
        sigma = math.sqrt(4500 * (1 / 9) * (8 / 9))
        assert abs(pairs.count(pair) - 500) < 4 * sigma


def test_a_draw_depends_on_seed_step_and_micro_batch_only():
    first, again, other = make(max_steps=100), make(max_steps=100), make(max_steps=100, seed=1)
    forwards = [first.budget(step, micro) for step in range(100) for micro in range(2)]
    backwards = [again.budget(step, micro) for step in reversed(range(100)) for micro in (1, 0)]
    assert forwards == backwards[::-1]
    assert forwards != [other.budget(step, micro) for step in range(100) for micro in range(2)]


def test_the_stream_is_the_same_in_every_process_and_release():
    """Ranks have their own hash seeds, and a checkpoint may be resumed by a newer version: the draws are fixed for good."""
    curriculum = Curriculum([Stage(1, {"a": 0.5, "b": 0.3, "c": 0.2})], seed=3)
    drawn = "".join(curriculum.budget(step, micro) for step in range(20) for micro in range(2))
    assert drawn == "baacaaaaaaacbbbabcacabbabcacaaababacbcbb"


def stage(**fields):
    return {"stages": [{"steps": 2}, {"steps": 3, **fields}]}


BAD = {
    "unknown budget": (
        {"probabilities": {"smal": 1.0}},
        "unknown budget 'smal'; the model has full, medium, small.*'small'",
    ),
    "sum": ({"probabilities": {"full": 0.5, "small": 0.4}}, "budget_probabilities sums to 0.9, it must sum to 1"),
    "nothing": ({"probabilities": {}}, "sums to 0, it must sum to 1"),
    "negative": ({"probabilities": {"full": 1.5, "small": -0.5}}, r"\['full'\]=1.5 must be a number in \[0, 1\]"),
    "nan": ({"probabilities": {"full": math.nan}}, r"\['full'\]=nan must be a number in \[0, 1\]"),
    "text": ({"probabilities": {"full": "1"}}, r"\['full'\]='1' must be a number"),
    "flag": ({"probabilities": {"full": True}}, r"\['full'\]=True must be a number"),
    "list": ({"probabilities": [0.5, 0.5]}, "must be a dict from budget to probability"),
    "no stages": ({"stages": []}, "must be a list of at least one dict"),
    "dict of stages": ({"stages": {"steps": 3}}, "must be a list of at least one dict"),
    "not a stage": ({"stages": [3]}, r"stages\[0\]=3 must be a dict with .*steps"),
    "unknown key": (stage(max_lenght=8), r"unknown key 'max_lenght' in stages\[1\].*'max_length'"),
    "no steps": ({"stages": [{}]}, r"stages\[0\].steps=None must be a whole number of at least 1"),
    "zero steps": (stage(steps=0), r"stages\[1\].steps=0 must be"),
    "half a step": (stage(steps=1.5), r"stages\[1\].steps=1.5 must be"),
    "true steps": (stage(steps=True), r"stages\[1\].steps=True must be"),
    "length 1": (stage(max_length=1), r"stages\[1\].max_length=1 must be a whole number of at least 2"),
    "length text": (stage(max_length="16"), r"stages\[1\].max_length='16' must be a whole number"),
    "rows": (stage(max_length=65), r"stages\[1\].max_length=65, but rows are cut to max_length=64"),
    "context": (
        {**stage(max_length=129), "max_length": None},
        r"max_length=129 is longer than the context .* 128 tokens",
    ),
    "scale": (stage(learning_rate_scale=0), r"stages\[1\].learning_rate_scale=0 must be a positive number"),
    "scale inf": (stage(learning_rate_scale=math.inf), "learning_rate_scale=inf must be a positive number"),
    "scale text": (stage(learning_rate_scale="x"), "learning_rate_scale='x' must be a positive number"),
    "steps and tokens": (stage(tokens=100), r"stages\[1\] has steps=3 and tokens=100; give one of them"),
    "tokens text": ({"stages": [{"tokens": "12x"}]}, r"stages\[0\].tokens='12x' must be a positive number"),
    "no tokens": ({"stages": [{"tokens": 0}]}, r"stages\[0\].tokens=0 must be a positive number"),
    "tokens nan": ({"stages": [{"tokens": math.nan}]}, r"stages\[0\].tokens=nan must be a positive number"),
    "tokens true": ({"stages": [{"tokens": True}]}, r"stages\[0\].tokens=True must be a positive number"),
    "tokens without a length": (
        {"stages": [{"tokens": 100}], "max_length": None},
        "no length is known. Give the stage or the run a max_length, or give steps",
    ),
    "rate": (stage(learning_rate=-1e-4), r"stages\[1\].learning_rate=-0.0001 must be a positive number"),
    "router rate": (
        {**stage(router_learning_rate=0), "routed": True},
        r"stages\[1\].router_learning_rate=0 must be a positive number",
    ),
    "rate and scale": (
        stage(learning_rate=1e-4, learning_rate_scale=0.5),
        r"stages\[1\] has learning_rate=0.0001 and learning_rate_scale=0.5; give one of them",
    ),
    "router rate and scale": (
        {**stage(router_learning_rate=1e-4, learning_rate_scale=0.5), "routed": True},
        r"stages\[1\] has router_learning_rate=0.0001 and learning_rate_scale=0.5; give one of them",
    ),
    "router rate without a router": (stage(router_learning_rate=1e-3), "has no router to act on; give router_targets"),
    "stage sum": (stage(budget_probabilities={"full": 0.2}), r"stages\[1\].budget_probabilities sums to 0.2"),
    "stage budget": (stage(budget_probabilities={"x": 1}), r"stages\[1\].budget_probabilities: unknown budget 'x'"),
    "steps disagree": ({"stages": TWO, "max_steps": 9}, "max_steps=9, but the stages have 8 steps"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_with_what_is_allowed(case):
    arguments, message = BAD[case]
    with pytest.raises(ElasticConfigError, match=message):
        make(**arguments)


def test_a_curriculum_needs_a_stage():
    with pytest.raises(ElasticConfigError, match="at least one stage"):
        Curriculum([])
