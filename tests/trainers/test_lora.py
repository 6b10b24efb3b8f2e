"""Training adapters only: the step by hand, the frozen parent as teacher, checkpoints, and the merged family."""

from __future__ import annotations

import copy
import json
import math
import shutil

import pytest
import torch
from adapted import adapted, targets
from by_hand import ByHand
from cases import build_parent
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from runs import Recorder, family, rows, trainer
from test_resume import RUN, StopAt
from test_routing import RUN as ROUTED
from test_routing import undecided
from transformers import AutoModelForCausalLM

from hf_elastic import CheckpointError, ElasticConfigError, ElasticForCausalLM, slice_adapter
from hf_elastic.submodels.adapters import attached
from hf_elastic.testing.adapting import adapter_parameters, effective_weights, perturb, plain_parameters
from hf_elastic.trainers.lora import check_adapters

BUDGETS = ["full", "large", "medium", "small"]
# float32; the reference adds B A to the weights, the run to the activations, and both through two steps
CLOSE = {"rtol": 1e-3, "atol": 2e-5}


@pytest.fixture(autouse=True)
def _with_gradients():
    with torch.enable_grad():
        yield


def lora_run(folder, **fields):
    """A run whose adapters do not start at zero, so that the first step has a loss."""
    return trainer(folder, fields.pop("model", None) or adapted("nano3"), **fields)


def assert_same_adapters(ours, theirs) -> None:
    expected = adapter_parameters(theirs)
    for key, parameter in adapter_parameters(ours).items():
        assert torch.equal(parameter, expected[key]), key


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_two_steps_are_those_written_by_hand(checkpointing, tmp_path):
    """SGD on A and B of the divergence between the parent without adapters and the masked parent with the merged weights."""
    rate = 0.5
    made = lora_run(
        tmp_path,
        optim="sgd",
        learning_rate=rate,
        max_grad_norm=0.0,
        gradient_accumulation_steps=3,
        gradient_checkpointing=checkpointing,
        seed=3,
    )
    recorder = Recorder().watch(made)
    before = {key: p.detach().clone() for key, p in plain_parameters(made._elastic).items()}
    made.train()
    assert len({budget for step in recorder.steps for budget, _ in step}) > 2
    wrapped = adapted("nano3")
    hand = ByHand("nano3", made._elastic.elastic_config)
    mine = adapter_parameters(wrapped)
    start = {key: p.detach().clone() for key, p in mine.items()}
    for step in recorder.steps:
        parts = [hand.divergence(budget, batch, effective_weights(wrapped)) for budget, batch in step]
        loss = torch.stack([total for total, _ in parts]).sum() / sum(count for _, count in parts)
        found = torch.autograd.grad(loss, list(mine.values()), allow_unused=True)
        with torch.no_grad():
            for p, gradient in zip(mine.values(), found, strict=True):
                p.sub_(rate * (torch.zeros_like(p) if gradient is None else gradient))
    for key, p in adapter_parameters(made.model).items():
        torch.testing.assert_close(p, mine[key], **CLOSE, msg=lambda text, key=key: f"{key}: {text}")
    assert max(float((p - start[key]).abs().max()) for key, p in mine.items()) > 0.02
    after = plain_parameters(made._elastic)
    assert all(torch.equal(p, after[key]) and not after[key].requires_grad for key, p in before.items())


@pytest.mark.parametrize("weight", [0.0, 0.5], ids=["divergence", "hidden_states"])
def test_the_model_is_its_own_teacher_and_another_one_can_be_given(weight, tmp_path):
    """Nothing is copied; the same parent beside it teaches the same."""
    fields = {"gradient_accumulation_steps": 2, "hidden_loss_weight": weight}
    own = lora_run(tmp_path / "own", **fields)
    given = lora_run(tmp_path / "given", teacher_model=build_parent("nano3"), **fields)
    assert own.teacher_model is None
    assert given.teacher_model is not None
    for made in (own, given):
        made.train()
    for key, p in adapter_parameters(own.model).items():
        torch.testing.assert_close(p, adapter_parameters(given.model)[key], rtol=1e-4, atol=1e-6)
    losses = [[entry["loss"] for entry in made.state.log_history if "loss" in entry] for made in (own, given)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert min(losses[0]) > 0.01


@pytest.mark.parametrize("name", ["nano3", "granite"])
def test_the_default_targets_are_the_projections_of_attention(name, tmp_path):
    config = LoraConfig(r=2, task_type="CAUSAL_LM")
    made = trainer(tmp_path, family(name), peft_config=config)
    assert config.target_modules is None  # what was given is not changed
    leaves = {key.split(".lora_")[0].rpartition(".")[2] for key in adapter_parameters(made.model)}
    assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj"}
    made.train()
    assert all(p.abs().max() > 0 for key, p in adapter_parameters(made.model).items() if "lora_B" in key)


@pytest.mark.parametrize("name", ["nano3", "granite"])
def test_every_budget_scores_after_merging_what_it_scored_live(name, tmp_path):
    made = trainer(
        tmp_path,
        family(name),
        peft_config=targets(name),
        eval_dataset=rows(4, 1),
        max_steps=4,
        gradient_accumulation_steps=2,
        learning_rate=0.05,
    )
    untrained = made.evaluate()
    made.train()
    trained = made.evaluate()
    assert trained["eval_small/kl"] < untrained["eval_small/kl"]
    assert untrained["eval_full/kl"] == pytest.approx(0.0, abs=1e-6)  # B starts at zero: the parent itself
    assert trained["eval_full/kl"] > 1e-4
    merged = made.model.merge_and_unload()
    assert isinstance(merged, ElasticForCausalLM)
    assert not attached(merged)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = ElasticForCausalLM.from_pretrained(tmp_path / "merged")
    scored = trainer(
        tmp_path / "again", reloaded, teacher_model=build_parent(name), eval_dataset=rows(4, 1)
    ).evaluate()
    for budget in BUDGETS:
        key = f"eval_{budget}/kl"
        assert scored[key] == pytest.approx(trained[key], rel=1e-3, abs=1e-6)
        loaded = ElasticForCausalLM.from_pretrained(tmp_path / "merged", budget=budget)
        with torch.no_grad(), merged.eval().at(budget):
            ids = torch.tensor([rows(1)[0]["input_ids"]])
            torch.testing.assert_close(loaded(ids).logits, merged(ids).logits, rtol=1e-4, atol=2e-5)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight-lora")
    with torch.enable_grad():
        made = trainer(folder, peft_config=dropped(), **RUN)
        made.train()
    return made, folder


def dropped() -> LoraConfig:
    """With dropout, whose random states have to come from the checkpoint."""
    return LoraConfig(r=3, lora_dropout=0.2, target_modules=["q_proj", "in_proj", "down_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize("killed_at", [3, 5])
def test_a_killed_run_goes_on_to_the_same_adapter(straight, killed_at, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, peft_config=dropped(), callbacks=[StopAt(killed_at)], **RUN).train()
    torch.manual_seed(99)
    resumed = trainer(tmp_path, peft_config=dropped(), **RUN)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == straight[0].state.global_step
    assert_same_adapters(resumed.model, straight[0].model)


def test_a_checkpoint_is_the_adapter_and_what_family_it_is_of(straight, tmp_path):
    made, folder = straight
    files = {file.name for file in (folder / "checkpoint-6").iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "elastic_config.json",
        "elastic_training.json",
    } <= files
    assert not any(name.startswith(("model", "config")) for name in files)
    loaded = PeftModel.from_pretrained(family(), folder / "checkpoint-6")
    assert_same_adapters(loaded, made.model)
    merged, expected = loaded.merge_and_unload(), copy.deepcopy(made.model).merge_and_unload()
    assert all(torch.equal(p, expected.state_dict()[key]) for key, p in merged.state_dict().items())
    _, small = slice_adapter(folder / "checkpoint-6", "small")  # the family is beside it
    _, live = slice_adapter(made.model, "small")
    assert small.keys() == live.keys()
    assert all(torch.equal(tensor, live[key].cpu()) for key, tensor in small.items())
    shutil.copytree(folder / "checkpoint-6", tmp_path / "checkpoint-6")
    with pytest.raises(ElasticConfigError, match="is of another family"):
        trainer(
            tmp_path, family("granite"), peft_config=LoraConfig(), **{**RUN, "stages": None, "max_steps": 8}
        ).train(resume_from_checkpoint=True)


def test_only_the_same_adapter_is_resumed(straight, tmp_path):
    """Upstream would load what fits, or nothing, and go on."""
    shutil.copytree(straight[1] / "checkpoint-4", tmp_path / "checkpoint-4")
    other = dropped()
    other.r, other.target_modules = 4, ["q_proj", "in_proj"]
    with pytest.raises(ElasticConfigError, match=r"is of another adapter: r \(3 there, 4 here\), target_modules"):
        trainer(tmp_path, peft_config=other, **RUN).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="holds an adapter, it is of a run with adapters; give peft_config"):
        trainer(tmp_path, **RUN).train(resume_from_checkpoint=True)
    fields = {**RUN, "stages": None, "max_steps": 1, "save_steps": 1}
    trainer(tmp_path / "all", **fields).train()
    with pytest.raises(CheckpointError, match="holds no adapter.*leave out peft_config"):
        trainer(tmp_path / "all", peft_config=dropped(), **fields).train(resume_from_checkpoint=True)


def test_an_adapter_is_not_left_out_when_its_folder_is_loaded(family_folder, tmp_path):
    """The AutoClasses follow it to its base."""
    base = family_folder("nano3")
    made = trainer(tmp_path, ElasticForCausalLM.from_pretrained(base), peft_config=LoraConfig(task_type="CAUSAL_LM"))
    made.save_model(str(tmp_path / "end"))
    for budget in (None, "small"):
        with pytest.raises(ElasticConfigError, match="end holds an adapter.*PeftModel.from_pretrained"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "end", budget=budget)
    merged = PeftModel.from_pretrained(ElasticForCausalLM.from_pretrained(base), tmp_path / "end").merge_and_unload()
    assert list(merged.budgets) == BUDGETS[1:]


def test_experts_and_routers_are_resumed(tmp_path):
    fields = {**RUN, "stages": None, "max_steps": 2, "save_steps": 1}
    straight = trainer(tmp_path / "straight", peft_config=targets("nano3"), **fields)
    straight.train()
    shutil.copytree(tmp_path / "straight" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
    resumed = trainer(tmp_path / "again", peft_config=targets("nano3"), **fields)
    resumed.train(resume_from_checkpoint=True)
    assert_same_adapters(resumed.model, straight.model)


def test_the_best_adapter_is_loaded_at_the_end(tmp_path):
    made = trainer(
        tmp_path,
        peft_config=targets("nano3"),
        **{**RUN, "stages": None, "max_steps": 3, "learning_rate": 0.05, "save_steps": 1},
        eval_dataset=rows(4, 1),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="full/kl",
        greater_is_better=False,
    )
    made.train()
    scores = {entry["step"]: entry["eval_full/kl"] for entry in made.state.log_history if "eval_full/kl" in entry}
    best = min(scores, key=scores.get)
    assert best != 3
    assert made.evaluate()["eval_full/kl"] == pytest.approx(scores[best], rel=1e-5)


@pytest.mark.slow
def test_sizes_are_learned_on_adapters(tmp_path):
    def run(folder):
        return trainer(folder, perturb(get_peft_model(undecided(), targets("nano3"))), **ROUTED)

    straight = run(tmp_path / "straight")
    before = {key: p.detach().clone() for key, p in straight.routing.router.named_parameters()}
    straight.train()
    assert list(straight._elastic.budgets) == ["large", "small"]
    assert any(not torch.equal(p, before[key]) for key, p in straight.routing.router.named_parameters())
    frozen = plain_parameters(undecided())
    for key, p in plain_parameters(straight._elastic).items():
        assert torch.equal(p, frozen[key.replace(".base_layer", "")]), key
    killed = run(tmp_path / "killed")
    killed.add_callback(StopAt(3))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = run(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert_same_adapters(resumed.model, straight.model)
    straight.save_model(str(tmp_path / "end"))
    saved = json.loads((tmp_path / "end" / "elastic_config.json").read_text())
    assert list(saved["elastic"]["budgets"]) == ["large", "small"]


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "ia3": (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "must be a peft.LoraConfig, got IA3Config"),
    "dora": (LoraConfig(use_dora=True), "DoraLinearVariant cannot follow a budget"),
    "lora_bias": (LoraConfig(lora_bias=True), "lora_bias=True cannot follow a budget"),
    "bias": (LoraConfig(bias="all"), "bias='all' trains biases beside the adapter"),
    "saved": (LoraConfig(modules_to_save=["norm_f"]), "adapter of model.norm_f is not supported: .*ModulesToSave"),
    "tokens": (LoraConfig(trainable_token_indices=[1]), "adapter of .*embeddings is not supported"),
    "pissa": (LoraConfig(init_lora_weights="pissa"), "init_lora_weights='pissa' changes the weights"),
    "replicated": (
        LoraConfig(layer_replication=[(0, 4), (2, 8)]),
        "layer_replication=.* makes a parent of another depth",
    ),
    "head": (LoraConfig(target_modules=["lm_head"]), "adapter of lm_head is not supported: .*no head"),
    "embeddings": (LoraConfig(target_modules=["embeddings"]), "adapter of model.embeddings is not supported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_cannot_follow_are_refused_before_anything_is_attached(case, tmp_path):
    config, message = REFUSED[case]
    model = family()
    with pytest.raises(ElasticConfigError, match=message):
        trainer(tmp_path, model, peft_config=config)
    assert not attached(model)
    assert not getattr(model, "peft_config", None)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "targets", "error"),
    [
        ("nano3", ["out_proj"], "is incompatible with Mamba-based models"),
        ("nano3", "all-linear", "is incompatible with Mamba-based models"),
        ("granite", ["out_proj"], "hands this weight to kernels"),
        ("granite", "all-linear", "hands this weight to kernels"),
        ("nano3", ["q_prj"], "'q_prj' matches no module.*Did you mean 'q_proj'"),
    ],
)
def test_targets_are_checked(name, targets, error, tmp_path):
    model = family(name)
    with pytest.raises(ValueError, match=error):
        trainer(tmp_path, model, peft_config=LoraConfig(target_modules=targets))
    assert not attached(model)


def test_a_frozen_model_has_no_adapters(tmp_path):
    fields = {**ROUTED, "freeze_model": True, "max_steps": 4}
    with pytest.raises(ElasticConfigError, match="freeze_model=True trains the router alone: leave out the adapters"):
        trainer(tmp_path, undecided(), peft_config=targets("nano3"), **fields)


def test_given_models_with_adapters(tmp_path):
    base = family()
    wrapped = get_peft_model(base, targets("nano3"))
    with pytest.raises(ElasticConfigError, match="attached to the model already.*pass the PeftModel without"):
        trainer(tmp_path, wrapped, peft_config=targets("nano3"))
    with pytest.raises(ElasticConfigError, match="pass the PeftModel around it"):
        trainer(tmp_path, base)
    injected = inject_adapter_in_model(targets("nano3"), family())
    with pytest.raises(ElasticConfigError, match="pass the PeftModel around it"):
        trainer(tmp_path, injected)
    with pytest.raises(ElasticConfigError, match="cannot follow a budget"):
        trainer(tmp_path, get_peft_model(family(), LoraConfig(target_modules=["q_proj"], use_dora=True)))
    with pytest.raises(ElasticConfigError, match="has IA3Config adapters"):
        trainer(tmp_path, get_peft_model(family(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])))
    with pytest.raises(ElasticConfigError, match="must be an ElasticForCausalLM, got NemotronHForCausalLM"):
        trainer(tmp_path, get_peft_model(build_parent("nano3"), targets("nano3")))


def test_checking_draws_no_random_numbers_and_copies_no_weight():
    model, before = family(), torch.get_rng_state()
    config = targets("nano3")
    checked = check_adapters(model, config)
    assert torch.equal(torch.get_rng_state(), before)
    assert checked == config
    assert checked is not config


def test_training_one_size_with_an_adapter_is_stock(family_folder, ids):
    """Where a budget has adapters of its own."""
    one = ElasticForCausalLM.from_pretrained(family_folder("nano3"), budget="large").train()
    wrapped = get_peft_model(one, targets("nano3"))
    wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients = [p.grad for key, p in adapter_parameters(wrapped).items() if "lora_B" in key]
    assert gradients
    assert all(g is not None and math.isfinite(g.abs().max()) and g.abs().max() > 0 for g in gradients)
