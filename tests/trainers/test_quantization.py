"""Quantisation-aware distillation: the run computes with what the quantised checkpoint will hold, and trains the weights behind it."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext

import pytest
import torch
from adapted import targets
from quantized import BUDGETS, quantizable_parent
from runs import rows, trainer
from transformers import TrainerCallback

from hf_elastic import ElasticConfig, ElasticConfigError, ElasticForCausalLM, elastify, quantize_checkpoint
from hf_elastic.hub.trainer_cards import run_facts
from hf_elastic.quantization.codec import global_scale_of, rounded
from hf_elastic.quantization.recipes import resolve_recipe
from hf_elastic.trainers import ElasticDistillationConfig
from hf_elastic.trainers.curriculum import first_step
from hf_elastic.trainers.resuming import check_training, training_state

MIXED = {"experts": "nvfp4", "shared_experts": "fp8", "mlp": "nvfp4", "mamba": "fp8", "attention": "nvfp4"}
CHOICES = {"hidden": [64, 48, 32], "expert_ffn": [32, 16], "mamba_heads": [8, 4, 2]}


@pytest.fixture(autouse=True)
def _with_gradients():
    with torch.enable_grad():
        yield


def family(name: str = "nemotron") -> ElasticForCausalLM:
    torch.manual_seed(0)
    return elastify(quantizable_parent(name, torch.float32), budgets=BUDGETS[name], sort=False)


def undecided() -> ElasticForCausalLM:
    model = family()
    model.elastic_config = ElasticConfig.from_parent(model.config, {}, choices=CHOICES)
    return model


def round_in_place(model: ElasticForCausalLM, recipe) -> ElasticForCausalLM:
    """Written by hand: every weight that the recipe names is rounded, q, k and v with one global scale."""
    weights = dict(model.named_parameters())
    config = model.elastic_config
    with torch.no_grad():
        scales = {}
        for name in weights:
            owner, _, leaf = name.removesuffix(".weight").rpartition(".")
            if leaf in ("q_proj", "k_proj", "v_proj"):
                scales[name] = global_scale_of(*(weights[f"{owner}.{part}_proj.weight"] for part in "qkv"))
        for name, encoding in resolve_recipe(recipe, config.architecture, config.parent_config).items():
            scale = scales.get(name) if encoding.format == "nvfp4" else None
            weights[name].copy_(rounded(weights[name].clone(), encoding.format, global_scale=scale))
    return model


class Gradients(TrainerCallback):
    """Remembers the gradients of every step, and what the router got."""

    def __init__(self, made):
        self.steps, self.made = [], made
        made.add_callback(self)

    def on_pre_optimizer_step(self, *args, **kwargs):
        found = {name: p.grad.clone() for name, p in self.made.model.named_parameters()}
        if self.made.routing is not None:
            found |= {f"router.{name}": p.grad.clone() for name, p in self.made.routing.router.named_parameters()}
        self.steps.append(found)


RUNS = {
    "checkpointed": ("nemotron", "nvfp4", {}),
    "plain": ("nemotron", MIXED, {"gradient_checkpointing": False}),
    "fused_experts": ("granite", "nvfp4", {}),
    "channels": ("granite", "fp8", {"gradient_checkpointing": False}),
    "hidden_states": ("nemotron", "nvfp4", {"hidden_loss_weight": 0.5}),
    "handover": ("nemotron", "nvfp4", {"activation_checkpointing": False, "handover_probability": 1.0}),
    "router": (
        "undecided",
        "nvfp4",
        {"router_targets": {"large": 0.75, "small": 0.5}, "router_steps": 1, "router_learning_rate": 0.05},
    ),
}


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(run, marks=pytest.mark.slow) if run in ("channels", "hidden_states", "handover") else run
        for run in RUNS
    ],
)
def test_a_step_is_that_of_the_rounded_weights_and_changes_those_behind_them(run, tmp_path):
    """Losses and gradients are those of a plain run on a family whose weights were rounded beforehand, taught by the parent as it was."""
    name, recipe, fields = RUNS[run]
    make = undecided if name == "undecided" else lambda: family(name)
    fields = {"gradient_accumulation_steps": 4, "max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, **fields}
    made = trainer(tmp_path / "made", make(), quantization=recipe, **fields)
    plain = trainer(tmp_path / "plain", round_in_place(make(), recipe), teacher_model=make(), **fields)
    before = {key: p.clone() for key, p in made.model.state_dict().items()}
    seen = [Gradients(made), Gradients(plain)]
    for each in (made, plain):
        each.train()
    losses = [each.state.log_history[0] for each in (made, plain)]
    assert {key: x for key, x in losses[0].items() if "/kl" in key or key == "loss"} == {
        key: x for key, x in losses[1].items() if "/kl" in key or key == "loss"
    }
    assert losses[0]["loss"] > 1e-3
    assert len([key for key in losses[0] if key.endswith("/kl")]) > 1
    ours, theirs = seen[0].steps[0], seen[1].steps[0]
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        assert torch.equal(gradient, theirs[key]), key
    encodings = made.quantizing.encodings
    assert all(ours[key].abs().max() > 0 for key in encodings)
    after = made.model.state_dict()
    for key in encodings:  # what was stepped from is not rounded
        torch.testing.assert_close(after[key], before[key] - 1e-2 * ours[key])


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("nemotron", MIXED),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("nemotron", "nvfp4"), ("granite", "nvfp4")]),
    ],
)
def test_what_is_evaluated_is_the_checkpoint_that_is_written(name, recipe, tmp_path):
    """Train, evaluate, save, quantise, load: all sizes compute the same, bit for bit."""
    made = trainer(
        tmp_path / "run",
        family(name),
        quantization=recipe,
        gradient_accumulation_steps=2,
        eval_dataset=rows(2, 1),
        eval_strategy="steps",
        eval_steps=5,
        max_steps=1,
        teacher_model=family(name),
    )
    made.train()
    metrics = {key: x for key, x in made.evaluate().items() if key.endswith("/kl")}
    made.save_model(str(tmp_path / "saved"))
    quantize_checkpoint(tmp_path / "saved", tmp_path / "quantized", recipe, progress=False)
    loaded = ElasticForCausalLM.from_pretrained(tmp_path / "quantized", dtype="float32")
    ids, model = torch.arange(2, 26).view(2, 12), made.model.eval()
    plain, differ = model(ids).logits.detach(), []
    for budget in (None, *BUDGETS[name]):
        with torch.no_grad(), made.quantizing.rounding(), model.computing(budget):
            ours = model(ids).logits
        with torch.no_grad(), loaded.at(budget):
            assert torch.equal(ours, loaded(ids).logits), budget
        differ.append(float((ours - plain).abs().max()))
    assert min(differ) > 1e-3
    assert torch.equal(model(ids).logits, plain)  # nothing is rounded outside the run
    again = trainer(tmp_path / "again", loaded, eval_dataset=rows(2, 1), teacher_model=family(name))
    assert metrics == {key: x for key, x in again.evaluate().items() if key.endswith("/kl")}
    assert len(metrics) == 1 + len(BUDGETS[name])
    assert min(metrics.values()) > 1e-4


def test_rounding_begins_when_it_shall_and_evaluation_is_always_of_rounded_weights(tmp_path):
    fields = {"max_steps": 2, "eval_dataset": rows(2, 1), "eval_strategy": "steps", "eval_steps": 5}
    late = trainer(tmp_path, family(), quantization="nvfp4", quantization_start=1, **fields)
    plain = trainer(tmp_path, family(), **fields)
    assert late.evaluate()["eval_full/kl"] > 1e-4 > plain.evaluate()["eval_full/kl"]
    seen = [Gradients(late), Gradients(plain)]
    late.train(), plain.train()
    same = [
        all(torch.equal(ours[key], theirs[key]) for key in ours)
        for ours, theirs in zip(seen[0].steps, seen[1].steps, strict=True)
    ]
    assert same == [True, False]


def test_a_start_is_a_share_of_the_steps_or_a_number_of_them():
    assert [first_step(*given) for given in [(0.0, 9), (0.5, 9), (0.999, 9), (1.0, 9), (4, 9)]] == [0, 5, 9, 1, 4]


# -- resuming ----------------------------------------------------------------------------------------------------------

RESUMED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "quantization": "nvfp4"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Folder of a run of four steps, only the last of them rounded, and its weights."""
    folder = tmp_path_factory.mktemp("straight")
    with torch.enable_grad():
        made = trainer(folder, family(), **RESUMED, quantization_start=3)
        made.train()
    return folder, {key: p.detach().clone() for key, p in made.model.named_parameters()}


def test_a_resumed_run_is_the_one_that_was_not_cut_off(straight, tmp_path):
    shutil.copytree(straight[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    made = trainer(tmp_path, family(), **RESUMED, quantization_start=0.75)
    made.train(resume_from_checkpoint=True)
    for key, p in made.model.named_parameters():
        assert torch.equal(p, straight[1][key]), key


@pytest.mark.parametrize(
    ("checkpoint", "fields", "message"),
    [
        (2, {"quantization": None}, r"quantization \('nvfp4' there, None here\)"),
        (2, {"quantization": "fp8", "quantization_start": 3}, r"quantization \('nvfp4' there, 'fp8' here\)"),
        (2, {"quantization": {"experts": "nvfp4"}}, r"quantization \('nvfp4' there, \{'experts': 'nvfp4'\} here\)"),
        (2, {"quantization_start": 1}, r"quantization_start \(2 there, 1 here\)"),
        (4, {"quantization_start": 0.9, "max_steps": 8}, r"quantization_start \(3 there, 4 here\)"),
        (2, {"quantization_start": 2}, None),  # it was still to come
        (2, {"quantization_start": 0.9, "max_steps": 8}, None),
        (4, {"quantization_start": 3, "max_steps": 8}, None),
    ],
)
def test_a_checkpoint_of_another_rounding_is_refused(checkpoint, fields, message, straight, tmp_path):
    made = trainer(tmp_path, family(), **{**RESUMED, **fields})
    refused = nullcontext() if message is None else pytest.raises(ElasticConfigError, match=message)
    with refused:
        check_training(str(straight[0] / f"checkpoint-{checkpoint}"), training_state(made.curriculum, made.args))


# -- what is said ------------------------------------------------------------------------------------------------------


def test_the_card_says_to_what_weights_were_rounded(tmp_path):
    from huggingface_hub import ModelCard

    for recipe, said in [
        ("nvfp4", "nvfp4"),
        ({"experts": "nvfp4", "attention": None}, "experts: nvfp4, attention: as it is"),
    ]:
        made = trainer(tmp_path, family(), quantization=recipe)
        made.create_model_card()
        facts = run_facts(ModelCard.load(tmp_path / "README.md"))
        assert f"Elastic distillation, quantisation-aware ({said}) ([Nemotron Elastic" in facts


def test_a_file_is_a_recipe_and_what_is_kept_is_what_it_says(tmp_path):
    file = tmp_path / "mixed.json"
    file.write_text(json.dumps(MIXED))
    args = ElasticDistillationConfig(str(tmp_path), quantization=str(file), use_cpu=True)
    assert args.quantization == MIXED


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization": "nvfp5"}, "'nvfp5' is no format; .* Did you mean 'nvfp4'"),
        ({"quantization": {"expert": "nvfp4"}}, "names 'expert', which is no kind .*Did you mean 'experts'"),
        ({"quantization": "nvfp4", "torch_compile": True}, "does not work with torch_compile=True"),
        ({"quantization": "nvfp4", "peft_config": True}, "does not work with adapters: .* Quantise the family first"),
        ({"quantization": "nvfp4", "quantization_start": 1.5}, "quantization_start=1.5 must be a share"),
        ({"quantization": "nvfp4", "quantization_start": -1}, "quantization_start=-1 must be a share"),
        ({"quantization": "nvfp4", "quantization_start": float("nan")}, "quantization_start=nan must be a share"),
        ({"quantization": "nvfp4", "quantization_start": 2}, "the run has 2 steps, none of which would be rounded"),
        ({"quantization_start": 0.5}, "would be ignored: there is no quantization"),
    ],
)
def test_what_cannot_be_is_refused(fields, message, tmp_path):
    model = family()
    if fields.get("peft_config"):
        fields = {**fields, "peft_config": targets("nano3")}
    before = {key: p.clone() for key, p in model.named_parameters()}
    with pytest.raises(ElasticConfigError, match=message):
        trainer(tmp_path, model, **fields)
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    assert not list(tmp_path.iterdir())


def test_sizes_off_the_blocks_are_refused(tmp_path):
    model = elastify(quantizable_parent("nemotron", torch.float32), budgets={"odd": {"hidden": 40}}, sort=False)
    with pytest.raises(ElasticConfigError, match=r"budget 'odd'.*hidden"):
        trainer(tmp_path, model, quantization="nvfp4")
    model = undecided()
    model.elastic_config = ElasticConfig.from_parent(model.config, {}, choices={**CHOICES, "expert_ffn": [32, 24]})
    fields = {"router_targets": {"small": 0.8}, "router_steps": 1}
    with pytest.raises(ElasticConfigError, match="axis expert_ffn, choice 24, .*expert_ffn"):
        trainer(tmp_path, model, quantization="nvfp4", **fields)
    assert trainer(tmp_path, model, quantization="fp8", **fields).quantizing is not None


def test_what_was_quantised_trains_decoded_and_not_packed(tmp_path):
    family().save_pretrained(tmp_path / "family")
    quantize_checkpoint(tmp_path / "family", tmp_path / "quantized", "nvfp4", progress=False)
    packed = ElasticForCausalLM.from_pretrained(tmp_path / "quantized", packed=True)
    with pytest.raises(ElasticConfigError, match="training needs weights, and this model keeps codes"):
        trainer(tmp_path / "run", packed)
    decoded = ElasticForCausalLM.from_pretrained(tmp_path / "quantized", dtype="float32")
    before = {key: p.clone() for key, p in decoded.named_parameters()}
    made = trainer(tmp_path / "run", decoded, peft_config=targets("nano3"))
    made.train()
    base = made.model.get_base_model()
    assert all(
        torch.equal(p, before[re.sub(r"\.base_layer", "", key)])
        for key, p in base.named_parameters()
        if "lora_" not in key
    )
