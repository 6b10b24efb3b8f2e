"""A run that ends when it has learned what it can: the same step on every rank, after every resume, and for every scale of the loss."""

from __future__ import annotations

import json
import math

import pytest
import torch
from runs import Recorder, trainer

from hf_elastic import ElasticConfigError
from hf_elastic.trainers import stopping
from hf_elastic.trainers.progress import Progress
from hf_elastic.trainers.stopping import Plateau


@pytest.fixture(autouse=True)
def _with_gradients():
    with torch.enable_grad():
        yield


def run(curves, limit: int = 5000, warmup: int = 10, until: int | None = None, scale: float = 1.0) -> Plateau:
    """A run whose budgets go by these curves, turn by turn."""
    made = Plateau(Progress(), list(curves))
    made.begin(limit, warmup)
    made.progress.add_entropy(0.0, 1.0)
    names = list(curves)
    for step in range(until or limit):
        if step >= made.ends_at:
            break
        name = names[step % len(names)]
        made.progress.add(step, name, scale * 100 * curves[name](step), 100)
        made.look(step + 1)
    return made


def falling_to(floor: float, over: float):
    return lambda step: floor + 3 * math.exp(-step / over)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_rate_falls_when_no_budget_comes_nearer_whatever_the_scale(scale):
    made = run({"half": falling_to(0.5, 100), "quarter": falling_to(1.0, 200)}, scale=scale)
    quick = run({"half": falling_to(0.5, 20), "quarter": falling_to(1.0, 40)}, scale=scale)
    assert 600 < made.decay_from < 2000
    assert quick.decay_from < made.decay_from / 2
    assert made.ends_at == made.decay_from + round(made.decay_from / 2)


def test_one_budget_that_still_falls_keeps_the_rate_up():
    slow = run({"half": falling_to(0.5, 50), "quarter": lambda step: 3 * (step + 1) ** -0.7})
    assert slow.decay_from is None
    assert (slow.decays_from, slow.ends_at) == (math.ceil(5000 / 1.5), 5000)
    done = run({"half": falling_to(0.5, 50), "quarter": lambda step: 3 * (step + 1) ** -0.2})
    assert done.decay_from is not None


def test_what_is_near_enough_does_not_count_as_falling():
    curve = {"half": lambda step: 3 * (step + 1) ** -1.5}  # below 1/800 of the start after 86 steps
    assert run(curve).decay_from < 150


def test_factors_fall_evenly_to_zero_after_the_last_step():
    made = run({"half": falling_to(0.5, 20)})
    start, end = made.decays_from, made.ends_at
    factors = [made.factor(step) for step in range(end + 2)]
    assert factors[:start] == [1.0] * start
    steps = [a - b for a, b in zip(factors[start - 1 : end], factors[start : end + 1], strict=True)]
    assert steps == pytest.approx([1 / (end - start + 1)] * len(steps))
    assert factors[end:] == [0.0, 0.0]


def test_nothing_is_decided_while_the_rate_still_rises():
    flat = {"half": lambda step: 1.0}
    assert run(flat, warmup=10).decay_from < 150
    assert run(flat, warmup=300).decay_from > 1200


def test_a_run_that_was_cut_off_decides_at_the_same_step():
    curves = {"half": falling_to(0.5, 100), "quarter": falling_to(1.0, 200)}
    straight = run(curves)
    for cut in (straight.decay_from - 40, straight.decay_from, straight.decay_from + 5):
        first = run(curves, until=cut)
        second = Plateau(Progress(), list(curves))
        second.progress.load(json.loads(json.dumps(first.progress.to_dict())))
        second.load(json.loads(json.dumps(first.to_dict())))
        second.begin(5000, 10)
        for step in range(cut, straight.ends_at):
            name = list(curves)[step % 2]
            second.progress.add(step, name, 100 * curves[name](step), 100)
            second.look(step + 1)
        assert (second.decay_from, second.ends_at) == (straight.decay_from, straight.ends_at)


FIELDS = {
    "stop_on_plateau": True,
    "lr_scheduler_type": "linear",  # upstream's default
    "max_steps": 40,
    "warmup_steps": 1,
    "learning_rate": 1e-4,
    "budget_probabilities": {"full": 1.0},  # which has nothing to learn
    "save_strategy": "steps",
    "save_steps": 3,
}


@pytest.fixture
def early(monkeypatch):
    monkeypatch.setattr(stopping, "_FIRST_LOOK", 4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_trainer_ends_by_itself_and_a_resumed_run_too(early, tmp_path):
    made = trainer(tmp_path, **FIELDS)
    recorder = Recorder().watch(made)
    made.train()
    assert made.plateau.decay_from == 6
    assert made.state.global_step == len(recorder.rates) == 9
    assert recorder.rates == pytest.approx([0.0, *[1e-4] * 5, 1e-4 * 3 / 4, 1e-4 / 2, 1e-4 / 4])
    assert (tmp_path / "checkpoint-9").is_dir()
    assert made.verdict[0].state == "done"
    for checkpoint, left in (("checkpoint-3", 6), ("checkpoint-6", 3), ("checkpoint-9", 0)):
        resumed = trainer(tmp_path, **FIELDS)
        again = Recorder().watch(resumed)
        resumed.train(resume_from_checkpoint=str(tmp_path / checkpoint))
        assert resumed.state.global_step == 9
        assert again.rates == pytest.approx(recorder.rates[9 - left :])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"lr_scheduler_type": "cosine"}, "cosine"),
        ({"lr_scheduler_kwargs": {"num_decay_steps": 3}, "lr_scheduler_type": "linear"}, "num_decay_steps"),
        ({"stages": [{"steps": 1}, {"steps": 1}], "max_steps": -1}, "2 stages"),
        ({"quantization": "fp8", "quantization_start": 0.5}, "quantization_start"),
    ],
)
def test_what_contradicts_it_is_refused(fields, said, tmp_path):
    with pytest.raises(ElasticConfigError, match=said):
        trainer(tmp_path, **{"stop_on_plateau": True, "lr_scheduler_type": "linear", **fields})
