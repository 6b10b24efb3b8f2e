"""What a run says of itself when it ends: how far every budget is from its teacher, and whether it is worth going on."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from cases import build_parent
from runs import family, rows, trainer

from hf_elastic.trainers import Verdict
from hf_elastic.trainers.progress import SPANS, Progress
from hf_elastic.trainers.verdict import judge


@pytest.fixture(autouse=True)
def _with_gradients():
    with torch.enable_grad():
        yield


def followed(curve, steps: int = 1000, budget: str = "half", entropy: float = 0.5, rate=lambda s: 1.0) -> Progress:
    """A run whose divergence per token at a step is `curve(step)`, in micro-batches of different lengths."""
    made, rng = Progress(), random.Random(0)
    made.add_entropy(entropy * 10, 10)
    for step in range(steps):
        tokens = rng.randint(50, 150)
        made.add(step, budget, curve(step) * tokens, tokens)
        made.add_rate(step, rate(step))
    return made


def verdict(progress: Progress, steps: int = 1000, budget: str = "half", **more) -> Verdict:
    (made,) = judge(progress, [budget], steps, **more)
    return made


@pytest.mark.parametrize("steps", [100, 1000, 5000])
def test_means_over_spans_are_those_of_all_micro_batches_in_them(steps):
    rng, made, kept = random.Random(1), Progress(), []
    for step in range(steps):
        kept.append((rng.random() * 100, rng.randint(1, 100)))
        made.add(step, "half", *kept[-1])
    spans = made.spans["half"]
    assert len(spans) <= SPANS
    assert made.width == max(1, 2 ** math.ceil(math.log2(steps / SPANS)))
    edges = (steps // 2 // made.width * made.width, steps // 4 * 3 // made.width * made.width)
    expected = sum(d for d, _ in kept[slice(*edges)]) / sum(t for _, t in kept[slice(*edges)])
    assert made.mean("half", *edges) == pytest.approx(expected)
    assert made.first == {"half": kept[0][0] / kept[0][1]}


@pytest.mark.parametrize("power", [0.1, 0.5, 1.0])
def test_the_gain_is_what_twice_the_steps_take_off_a_power_law(power):
    made = followed(lambda step: 3 * (step + 1) ** -power, 2000)
    assert made.gain("half", 1000) == pytest.approx(1 - 2**-power, abs=0.01)
    assert made.gain("half", 2000) == pytest.approx(1 - 2**-power, abs=0.01)
    assert made.gain("other", 1000) is None


def test_a_distance_that_falls_while_the_rate_is_high_asks_for_a_longer_run():
    found = verdict(followed(lambda step: 3 * (step + 1) ** -0.5))
    assert found.state == "falling"
    assert "train longer (twice the steps would take off about 30%)" in found.sentence
    assert found.distance == pytest.approx(3 / 1000**0.5, rel=0.05)
    assert found.start == 3.0


def test_what_falls_only_because_the_rate_does_is_not_still_falling():
    """Flat at 0.3 up to the middle; then it falls with the rate, as every divergence does."""

    def rate(step: int) -> float:
        return 1.0 if step < 500 else (1000 - step) / 500

    def curve(step: int) -> float:
        return max(3 * math.exp(-step / 30), 0.3) * (0.3 + 0.7 * rate(step))

    assert verdict(followed(curve, rate=rate)).state == "settled"
    assert verdict(followed(curve)).state == "falling"  # at a constant rate the same curve would go on


def test_a_rate_that_falls_from_the_start_is_high_until_it_has_halved():
    assert followed(lambda step: 1.0, rate=lambda step: 1 - step / 1000).high_until(1000) == 501
    assert followed(lambda step: 1.0, rate=lambda step: min(1, step / 50, (1000 - step) / 400)).high_until(1000) == 641
    assert followed(lambda step: 1.0).high_until(1000) == 1000


def test_near_enough_is_done_by_either_scale():
    for entropy, floor in ((1.0, 0.008), (0.0, 0.003)):
        assert (
            verdict(followed(lambda step, f=floor: max(3 * math.exp(-step / 30), f), entropy=entropy)).state == "done"
        )
        assert (
            verdict(followed(lambda step, f=floor: max(3 * math.exp(-step / 30), 4 * f), entropy=entropy)).state
            == "settled"
        )


def test_the_largest_that_leaves_its_teacher_is_told():
    made = followed(lambda step: max(3 * math.exp(-step / 30), 0.001))
    for step in range(1000):
        made.add(step, "full", 0.0 if step == 0 else 9.0, 100)
        made.add(step, "good", 0.0 if step == 0 else 0.2, 100)
    assert verdict(made, budget="full", own="full").state == "away"
    assert "moved 0.09 nats a token away" in verdict(made, budget="full", own="full").sentence
    assert verdict(made, budget="full").state == "settled"  # by another teacher
    assert verdict(made, budget="good", own="good").state == "done"


def test_what_never_came_nearer_is_not_called_settled_only():
    assert "no nearer than at the start" in verdict(followed(lambda step: 3.0 + 0.001 * (step > 0))).sentence


def test_evaluation_goes_before_training():
    made = followed(lambda step: 3 * (step + 1) ** -0.5)
    found = verdict(made, evaluated={"half": 0.001})
    assert (found.state, found.distance, found.measured_on) == ("done", 0.001, "evaluation")
    assert verdict(made).measured_on == "training"


def test_what_was_saved_goes_on_as_if_nothing_was(tmp_path):
    rng = random.Random(2)
    batches = [(step, rng.choice(["full", "half"]), rng.random() * 9, rng.randint(1, 9)) for step in range(700)]
    straight, first, second = Progress(), Progress(), Progress()
    for step, *batch in batches:
        straight.add(step, *batch)
        straight.add_rate(step, 1 / (step + 1))
    for step, *batch in batches[:300]:
        first.add(step, *batch)
        first.add_rate(step, 1 / (step + 1))
    second.load(json.loads(json.dumps(first.to_dict())))
    for step, *batch in batches[300:]:
        second.add(step, *batch)
        second.add_rate(step, 1 / (step + 1))
    assert second.to_dict() == straight.to_dict()


def test_a_run_ends_with_its_verdict(tmp_path, capsys):
    made = trainer(tmp_path, max_steps=12, seed=3, learning_rate=1e-3)
    made.train()
    assert capsys.readouterr().out.endswith("".join(f"\n- {entry.sentence}" for entry in made.verdict) + "\n")
    budgets = list(made.model.elastic_config.family())
    assert [entry.budget for entry in made.verdict] == budgets
    saved = json.loads((tmp_path / "training_verdict.json").read_text())
    assert saved == {"steps": 12, "budgets": [vars(entry) for entry in made.verdict]}
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    for entry in made.verdict:
        kls = [log[f"{entry.budget}/kl"] for log in logged if f"{entry.budget}/kl" in log]
        assert entry.start == pytest.approx(kls[0])
        assert entry.measured_on == "training"
    assert (made.progress.peak, made.progress.high) == (1e-3, [12, 12])


def test_the_teachers_entropy_is_that_of_its_distributions(tmp_path):
    teacher, data = build_parent("nano3", 4), rows(4, shortest=9, longest=9)
    made = trainer(tmp_path, family(), teacher_model=teacher, dataset=data, max_steps=1, per_device_train_batch_size=4)
    made.train()
    with torch.no_grad():
        log_p = teacher(torch.tensor(data["input_ids"])).logits[:, :-1].double().log_softmax(-1)
    expected = float(-(log_p.exp() * log_p).sum(-1).mean())
    assert made.verdict[0].teacher_entropy == pytest.approx(expected, rel=1e-4)


def test_evaluation_after_the_last_step_is_what_counts(tmp_path: Path):
    made = trainer(tmp_path, max_steps=3, eval_dataset=rows(4, seed=9))
    made.train()
    last = [entry for entry in made.state.log_history if "eval_loss" in entry][-1]
    for entry in made.verdict:
        assert (entry.measured_on, entry.distance) == ("evaluation", pytest.approx(last[f"eval_{entry.budget}/kl"]))


def test_a_resumed_run_gives_the_verdict_of_the_uninterrupted_one(tmp_path):
    fields = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    straight = trainer(tmp_path, **fields)
    straight.train()
    resumed = trainer(tmp_path, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.verdict == straight.verdict
