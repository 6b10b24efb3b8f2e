"""The distance of hidden states is the one written by hand, and is off unless asked for."""

from __future__ import annotations

import pytest
import torch
from by_hand import ByHand
from cases import BUDGETS, build_parent
from runs import Recorder, family, rows, trainer
from transformers import TrainerCallback

from hf_elastic import ElasticConfigError, ElasticForCausalLM, elastify
from hf_elastic.trainers import hidden_distance

# float32 against float64; gradients of up to about 1, summed in another order
CLOSE = {"rtol": 1e-3, "atol": 2e-6}
WEIGHT = 0.7


@pytest.fixture(autouse=True)
def _with_gradients():
    with torch.enable_grad():
        yield


class Gradients(TrainerCallback):
    """Remembers the gradients of the last step, as the optimizer gets them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {key: p.grad.clone() for key, p in model.named_parameters()}


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """So that the whole parent differs from the teacher too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("kind", "layers"), [("cosine", None), ("mse", None), ("cosine", [0, 2, 3])], ids=["cosine", "mse", "some_layers"]
)
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "plain"])
@pytest.mark.parametrize("name", BUDGETS)
def test_loss_and_every_gradient_are_those_written_by_hand(name, checkpointing, kind, layers, tmp_path):
    made = trainer(
        tmp_path,
        moved(family(name)),
        teacher_model=build_parent(name),
        hidden_loss_weight=WEIGHT,
        hidden_loss=kind,
        hidden_loss_layers=layers,
        gradient_checkpointing=checkpointing,
        gradient_accumulation_steps=4,
        max_grad_norm=0.0,
        max_steps=1,
        loss_chunk_size=5,
        seed=5,
    )
    recorder, gradients = Recorder().watch(made), Gradients()
    made.add_callback(gradients)
    by_hand = ByHand(name, made.model.elastic_config)
    weights = {key: p.detach().clone().requires_grad_() for key, p in made.model.named_parameters()}
    made.train()
    (step,) = recorder.steps
    budgets = {budget for budget, _ in step}
    assert len(budgets) >= 3
    submodels = [made.model.elastic_config.submodel(budget) for budget in budgets]
    assert any(len(submodel.layers) < submodel.depth for submodel in submodels)
    parts = [
        (budget, *by_hand.divergence(budget, batch, weights), by_hand.distance(budget, batch, kind, layers, weights))
        for budget, batch in step
    ]
    count = sum(part[2] for part in parts)
    loss = sum(divergence + WEIGHT * distance for _, divergence, _, distance in parts) / count
    entry = made.state.log_history[0]
    assert entry["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    for budget in budgets:
        own = [part for part in parts if part[0] == budget]
        expected = sum(float(part[3].detach()) for part in own) / sum(part[2] for part in own)
        assert expected > 1e-3
        assert entry[f"{budget}/hidden"] == pytest.approx(expected, rel=1e-4)
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    for (key, weight), expected in zip(weights.items(), found, strict=True):
        expected = torch.zeros_like(weight) if expected is None else expected
        torch.testing.assert_close(gradients.found[key], expected, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


def test_it_is_off_by_default_and_adds_up_when_on(tmp_path):
    runs = {}
    for weight in (0.0, 1e-12, 0.5):
        made = trainer(tmp_path, moved(family()), teacher_model=build_parent("nano3"), hidden_loss_weight=weight)
        made.train()
        runs[weight] = made.state.log_history[0]
    assert not any("hidden" in key for key in runs[0.0])
    (distance,) = [value for key, value in runs[0.5].items() if key.endswith("/hidden")]
    assert runs[1e-12]["loss"] == pytest.approx(runs[0.0]["loss"])
    assert runs[0.5]["loss"] == pytest.approx(runs[0.0]["loss"] + 0.5 * distance)


def test_evaluation_reports_it_beside_the_divergence_which_stays_the_loss(tmp_path):
    made = trainer(
        tmp_path,
        moved(family()),
        teacher_model=build_parent("nano3"),
        hidden_loss_weight=WEIGHT,
        eval_dataset=rows(5, 1),
        per_device_eval_batch_size=2,
    )
    by_hand = ByHand("nano3", made.model.elastic_config)
    weights = {key: p.detach() for key, p in made.model.named_parameters()}
    metrics = made.evaluate()
    with torch.no_grad():
        for budget in ["full", *BUDGETS["nano3"]]:
            parts = [
                (
                    by_hand.distance(budget, batch, "cosine", None, weights),
                    by_hand.divergence(budget, batch, weights)[1],
                )
                for batch in made.get_eval_dataloader()
            ]
            expected = float(sum(total for total, _ in parts)) / sum(count for _, count in parts)
            assert metrics[f"eval_{budget}/hidden"] == pytest.approx(expected, rel=1e-4)
    divergences = [value for key, value in metrics.items() if key.endswith("/kl")]
    assert metrics["eval_loss"] == pytest.approx(sum(divergences) / len(divergences))


def test_the_default_teacher_starts_at_no_distance_and_nothing_stays_on_the_models(tmp_path):
    made = trainer(tmp_path, hidden_loss_weight=1.0, budget_probabilities={"full": 1.0}, max_steps=1)
    made.train()
    assert made.state.log_history[0]["full/hidden"] == pytest.approx(0.0, abs=1e-6)
    for model in (made.model, made.teacher_model):
        assert not any(layer._forward_hooks for layer in model.model.layers)


def test_a_budget_that_keeps_none_of_the_layers_has_the_divergence_alone(tmp_path):
    model = family()
    submodel = model.elastic_config.submodel("small")
    dropped = sorted(set(range(submodel.depth)) - set(submodel.layers))
    made = trainer(
        tmp_path,
        model,
        hidden_loss_weight=1.0,
        hidden_loss_layers=dropped,
        budget_probabilities={"small": 1.0, "full": 0},
    )
    made.train()
    entry = made.state.log_history[0]
    assert entry["small/hidden"] == 0.0
    assert entry["loss"] == pytest.approx(entry["small/kl"], rel=1e-5)


def test_bf16_runs_are_close(tmp_path):
    losses = {}
    for bf16 in (False, True):
        made = trainer(tmp_path, hidden_loss_weight=1.0, hidden_loss="mse", bf16=bf16)
        made.train()
        losses[bf16] = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.1, abs=0.02)  # 8 bits


# -- the function ------------------------------------------------------------------------------------------------------


def test_distances_of_vectors_that_can_be_worked_out():
    student = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    teacher = torch.tensor(
        [[6.0, 8.0, 9.0], [0.0, 2.0, 9.0], [1.0, 0.0, 9.0]]
    )  # the third channel is not the student's
    assert hidden_distance(student, teacher).tolist() == pytest.approx([0.0, 1.0, 1.0], abs=1e-6)
    assert hidden_distance(student, teacher, kind="mse").tolist() == pytest.approx([25 / 100, 5 / 4, 1.0])
    assert hidden_distance(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_a_distance_has_no_unit_and_no_gradient_that_is_not_finite(kind):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(7, 5, generator=generator) for _ in range(2))
    whole = hidden_distance(student, teacher, kind=kind)
    torch.testing.assert_close(hidden_distance(1e3 * student, 1e3 * teacher, kind=kind), whole)
    nothing = torch.zeros(1, 5, requires_grad=True)
    hidden_distance(nothing, torch.zeros(1, 5), kind=kind).sum().backward()
    assert torch.isfinite(nothing.grad).all()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_loss_weight": -1.0}, "hidden_loss_weight=-1.0 must be a finite number of at least 0"),
        ({"hidden_loss_weight": float("nan")}, "hidden_loss_weight=nan must be"),
        ({"hidden_loss": "l1"}, "hidden_loss='l1' must be one of cosine, mse"),
        ({"hidden_loss_weight": 0.0, "hidden_loss_layers": [1]}, "would be ignored: hidden_loss_weight is 0"),
        ({"hidden_loss_layers": []}, "must be a list of different layers"),
        ({"hidden_loss_layers": [1, 1]}, "must be a list of different layers"),
        ({"hidden_loss_layers": [0, 8]}, "8 is no layer of the parent, which has 8, counted from 0"),
        ({"hidden_loss_layers": [-1]}, "-1 is no layer of the parent"),
        ({"router_targets": {"half": 0.5}, "router_steps": 1}, "does not work with router_targets.*second run"),
    ],
)
def test_bad_options_are_named(fields, message, tmp_path):
    with pytest.raises(ElasticConfigError, match=message):
        trainer(tmp_path, **{"hidden_loss_weight": 1.0, **fields})


def test_teachers_without_the_parents_channels_are_refused(tmp_path):
    from cases import _CLASSES, nemotron

    options = {"hidden_loss_weight": 1.0}
    with pytest.raises(
        ElasticConfigError, match=r"model_type \('granitemoehybrid' in the teacher, 'nemotron_h' in the model\)\."
    ):
        trainer(tmp_path, teacher_model=build_parent("granite"), **options)
    wide = _CLASSES["nemotron_h"](nemotron("ME*EM-*E", hidden_size=64))
    with pytest.raises(
        ElasticConfigError, match=r"hidden \(64 in the teacher, 48 in the model\).*hidden_loss_weight=0"
    ):
        trainer(tmp_path, teacher_model=wide, **options)
    with pytest.raises(ElasticConfigError, match=r"num_hidden_layers \(4 in the teacher, 8 in the model\)"):
        trainer(tmp_path, teacher_model=_CLASSES["nemotron_h"](nemotron("ME*E")), **options)
    with pytest.raises(ElasticConfigError, match=r"attention_heads\[2\]"):
        trainer(tmp_path, teacher_model=_CLASSES["nemotron_h"](nemotron("MEE*M-*E")), **options)


def test_the_parent_as_it_was_before_sorting_is_refused(tmp_path):
    """It computes the same logits, with its channels in another order."""
    parent = build_parent("nano3")
    calibration = [{"input_ids": row["input_ids"]} for row in rows(4)]
    model = elastify(build_parent("nano3"), calibration=calibration, budgets=BUDGETS["nano3"])
    with pytest.raises(ElasticConfigError, match="the teacher's channels are not the model's.*elastify.. sorts them"):
        trainer(tmp_path, model, teacher_model=parent, hidden_loss_weight=1.0)
    made = trainer(tmp_path, model, teacher_model=parent)  # the divergence alone does not mind
    made.train()


def test_an_elastic_teacher_by_name_and_resuming(family_folder, tmp_path):
    options = {
        "teacher_model": str(family_folder("nano3")),
        "hidden_loss_weight": 1.0,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    trainer(tmp_path, ElasticForCausalLM.from_pretrained(family_folder("nano3")), **options).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    for fields, message in (
        ({"hidden_loss_weight": 0.5}, r"hidden_loss_weight \(1.0 there, 0.5 here\)"),
        ({"hidden_loss_weight": 0.0}, r"hidden_loss_weight \(1.0 there, None here\)"),
        ({"hidden_loss": "mse"}, r"hidden_loss \('cosine' there, 'mse' here\)"),
        ({"hidden_loss_layers": [1]}, r"hidden_loss_layers \(None there, \[1\] here\)"),
    ):
        made = trainer(tmp_path, **{**options, **fields})
        with pytest.raises(ElasticConfigError, match=message):
            made.train(resume_from_checkpoint=checkpoint)
