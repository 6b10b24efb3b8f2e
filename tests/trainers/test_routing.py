"""Runs that learn their sizes: a router decides, then the run goes on with what it decided."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
import transformers
from cases import build_parent
from runs import Recorder, config, rows, tokenizer
from safetensors.torch import load_file
from test_resume import StopAt
from transformers import TrainerCallback

from hf_elastic import ElasticConfig, ElasticConfigError, ElasticForCausalLM, elastify
from hf_elastic.architectures.cost import CostModel
from hf_elastic.routing.router import DEAD_ZONE
from hf_elastic.trainers import ElasticDistillationTrainer
from hf_elastic.trainers.routing import REPORT_FILE

CHOICES = {"hidden": [48, 40, 32, 24], "expert_ffn": [16, 12, 8, 4], "ffn": [40, 24, 8], "mamba_heads": [12, 8, 4]}
TARGETS = {"large": 0.75, "small": "34k active"}
RUN = {
    "router_targets": TARGETS,
    "router_steps": 4,
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "router_learning_rate": 0.05,
    "save_strategy": "steps",
    "save_steps": 2,
}


@pytest.fixture(autouse=True)
def _with_gradients():
    with torch.enable_grad():
        yield


def undecided() -> ElasticForCausalLM:
    model = elastify(build_parent("nano3"), budgets={"some": {"hidden": 40}}, sort=False)
    model.elastic_config = ElasticConfig.from_parent(model.config, {}, choices=CHOICES)
    return model


def trainer(folder, **fields) -> ElasticDistillationTrainer:
    return ElasticDistillationTrainer(
        model=undecided(), args=config(folder, **{**RUN, **fields}), train_dataset=rows(), processing_class=tokenizer()
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A whole run, with checkpoints after 2, 4 and 6 steps, and the router that it began with; not to be changed."""
    folder = tmp_path_factory.mktemp("straight")
    with torch.enable_grad():
        made = trainer(folder)
        before = {key: tensor.clone() for key, tensor in made.routing.router.state_dict().items()}
        made.train()
    return SimpleNamespace(folder=folder, trainer=made, model=made.model, router=made.routing.router, before=before)


@pytest.fixture
def cut_off(straight, tmp_path):
    """A folder with the checkpoints of a run that was killed after so many steps."""

    def copied(steps):
        for step in range(2, steps + 1, 2):
            shutil.copytree(straight.folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
        return tmp_path

    return copied


def test_choices_become_nested_budgets_within_their_targets(straight, tmp_path):
    made, model, before = straight.trainer, straight.model, straight.before
    assert list(model.budgets) == ["large", "small"]
    count = CostModel(model.config)
    total = count.full.total_params
    large, small = (model.elastic_config.submodel(name) for name in ("large", "small"))
    assert small.nests_in(large)
    assert abs(count(large).total_params / (0.75 * total) - 1) <= DEAD_ZONE
    assert abs(count(small).active_params / 34e3 - 1) <= DEAD_ZONE
    assert {row["budget"]: row["cost"] for row in made.routing.report} == {
        "large": count(large).total_params,
        "small": count(small).active_params,
    }
    after = made.routing.router.state_dict()
    assert all(not torch.equal(before[key], tensor) for key, tensor in after.items())
    made.save_model(str(tmp_path / "end"))
    loaded = ElasticForCausalLM.from_pretrained(tmp_path / "end", budget="small")
    assert loaded.num_parameters() == model.budgets["small"]["total_params"]
    logged = {key for entry in made.state.log_history for key in entry}
    assert {"large/kl", "small/kl", "full/kl"} <= logged
    assert logged & {"large/resource", "small/resource"}


def test_a_step_is_the_divergence_of_the_mixture_and_the_weighted_resource_loss(tmp_path):
    """By hand: the same draw of the router, full logits, and autograd over everything."""
    fields = {
        "max_steps": 1,
        "router_steps": 9,
        "gradient_accumulation_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
    }
    made = trainer(tmp_path, **fields, max_grad_norm=0.0, budget_probabilities={"large": 1.0}, save_strategy="no")
    model, router = undecided().train(), trainer(tmp_path / "other", **fields).routing
    seen = Recorder().watch(made)
    made.train()
    batch = seen.steps[0][0][1]
    router.model = model
    teacher = undecided().eval()
    tokens = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with router.at("large", 0, 1):
        student = model(**tokens, use_cache=False).logits
        resource = router.loss("large")
    with torch.no_grad():
        wanted = teacher(**tokens, use_cache=False).logits
    target = batch["labels"][:, 1:] != -100
    p, q = wanted[:, :-1][target].log_softmax(-1), student[:, :-1][target].log_softmax(-1)
    loss = (p.exp() * (p - q)).sum() / target.sum() + resource
    loss.backward()
    assert resource > 0
    entry = made.state.log_history[0]
    assert entry["large/resource"] == pytest.approx(float(resource.detach()), rel=1e-5)
    assert entry["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)


def test_the_resource_losses_of_micro_batches_are_averaged(tmp_path):
    made = trainer(tmp_path, max_steps=1, budget_probabilities={"large": 1.0}, save_strategy="no")
    made.train()
    entry = made.state.log_history[0]
    assert entry["large/resource"] > 0
    assert entry["loss"] == pytest.approx(entry["large/kl"] + entry["large/resource"], rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_mixtures_follow_the_schedules(share, tmp_path):
    made, seen = trainer(tmp_path, router_hard_share=share, save_strategy="no"), []
    sample = made.routing.router.sample

    def record(budget, temperature, scale, *, hard, generator):
        seen.append((temperature, scale, hard))
        return sample(budget, temperature, scale, hard=hard, generator=generator)

    made.routing.router.sample = record
    made.train()
    # 4 steps of 2 micro-batches: the temperature falls from 1 to 0.05, the scale rises from 1 to 10
    wanted = [(1 - 0.95 * p, 1 + 9 * p) for p in (0, 1 / 3, 2 / 3, 1) for _ in range(2)]
    assert [(temperature, scale) for temperature, scale, _ in seen] == [pytest.approx(pair) for pair in wanted]
    assert {hard for *_, hard in seen} == {share == 1.0}


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "plain"])
def test_the_router_can_be_trained_alone(checkpointing, tmp_path):
    fields = {"freeze_model": True, "max_steps": 4, "gradient_checkpointing": checkpointing, "weight_decay": 0.1}
    made = trainer(tmp_path, **fields)
    weights = {key: tensor.clone() for key, tensor in made.model.state_dict().items()}
    router = {key: tensor.clone() for key, tensor in made.routing.router.state_dict().items()}
    made.train()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in made.model.state_dict().items())
    assert all(not torch.equal(tensor, router[key]) for key, tensor in made.routing.router.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in made.model.parameters())
    assert list(made.model.budgets) == ["large", "small"]
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert len(losses) == 4
    free = trainer(tmp_path / "free", **{**fields, "freeze_model": False, "max_steps": 1})
    free.train()
    # the first step of both starts from the same weights and draws the same mixtures
    assert losses[0] == free.state.log_history[0]["loss"]
    resumed = trainer(tmp_path, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    wanted = made.routing.router.state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in resumed.routing.router.state_dict().items())
    with pytest.raises(ElasticConfigError, match=r"freeze_model \(True there, None here\)"):
        trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_stages_have_a_rate_for_the_router(tmp_path):
    stages = [{"steps": 1, "router_learning_rate": 0.02}, {"steps": 2, "learning_rate": 1e-3}]
    made = trainer(tmp_path, stages=stages, max_steps=-1, save_strategy="no")
    rates = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append([group["lr"] for group in optimizer.param_groups])

    made.add_callback(Rates())
    made.train()
    assert rates == [pytest.approx([1e-2, 1e-2, 0.02])] + [pytest.approx([1e-3, 1e-3, 0.05])] * 2


@pytest.mark.parametrize("kill_at", [3, 5], ids=["undecided", "decided"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(kill_at, straight, tmp_path):
    killed = trainer(tmp_path / "killed")
    killed.add_callback(StopAt(kill_at))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = trainer(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.model.elastic_config.elastic == straight.model.elastic_config.elastic
    for ours, theirs in ((resumed.model, straight.model), (resumed.routing.router, straight.router)):
        wanted = theirs.state_dict()
        assert all(torch.equal(wanted[key], tensor) for key, tensor in ours.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_steps": 5}, r"router_steps \(4 there, 5 here\)"),
        ({"router_loss_weight": 1.0}, r"router_loss_weight \(5.0 there, 1.0 here\)"),
        ({"router_learning_rate": 0.2}, r"router_learning_rate \(0.05 there, 0.2 here\)"),
        ({"router_hard_share": 0.5}, r"router_hard_share \(0.004 there, 0.5 here\)"),
        ({"router_targets": {**TARGETS, "large": 0.8}}, r"router\.targets\.large \(0.75 there, 0.8 here\)"),
    ],
)
def test_a_router_is_not_resumed_by_another_run(fields, message, straight, tmp_path):
    with pytest.raises(ElasticConfigError, match=message):
        trainer(tmp_path, **fields).train(resume_from_checkpoint=str(straight.folder / "checkpoint-2"))


def test_a_run_that_ends_when_the_router_is_done_has_decided(tmp_path):
    made = trainer(tmp_path, max_steps=4)
    made.train()
    assert list(made.model.budgets) == ["large", "small"]


def test_a_run_that_is_ended_earlier_has_decided(straight, tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    made = trainer(tmp_path)
    made.add_callback(Stop())
    made.train()
    assert made.state.global_step == 3
    assert list(made.model.budgets) == ["large", "small"]
    assert "ended after 3 steps, before the 4 of router_steps" in caplog.text
    resumed = trainer(tmp_path)  # the checkpoint is that of a router that goes on
    resumed.train(resume_from_checkpoint=True)
    assert resumed.model.elastic_config.elastic == straight.model.elastic_config.elastic


def test_axes_can_have_a_choice_per_layer(tmp_path):
    made = trainer(tmp_path, max_steps=4, router_per_layer=["expert_ffn"], save_strategy="no")
    networks = [key for key in made.routing.router.keys if key[0] == "expert_ffn"]
    assert [layer for _, layer in networks] == [1, 3, 7]
    made.train()
    assert list(made.model.budgets) == ["large", "small"]


@pytest.mark.parametrize(
    "small",
    [
        0.5,
        "32k active",
        {"memory": "155kB", "context_length": 64, "batch_size": 4, "dtype": "bfloat16"},
    ],
    ids=["total", "active", "memory"],
)
def test_choices_per_layer_meet_every_kind_of_target(small, tmp_path):
    fields = {"router_targets": {"large": 0.75, "small": small}, "max_steps": 4, "save_strategy": "no"}
    made = trainer(tmp_path, **fields, router_per_layer=["expert_ffn", "mamba_heads"])
    made.train()
    config, limits = made.model.elastic_config, made.routing.router.limits
    for budget, limit in limits.items():
        cost = config.costs()[budget]
        if limit.quantity == "bytes":  # added up by hand: weights, then the caches of 4 sequences of 64 tokens
            caches = 4 * (64 * 2 * cost.kv_elements + 2 * cost.conv_elements + 4 * cost.ssm_elements)
            needed = 2 * cost.other_elements + 4 * cost.fp32_elements + caches
        else:
            needed = cost.active_params if limit.quantity == "active" else cost.total_params
        assert abs(needed / limit.value - 1) <= DEAD_ZONE
    assert any(not config.submodel(budget).is_homogeneous for budget in config.budgets)


# Saved


def test_the_saved_model_has_the_router_and_what_it_interpolates(straight, tmp_path):
    made = straight.trainer
    made.save_model(str(tmp_path / "end"))
    loaded = ElasticForCausalLM.from_pretrained(tmp_path / "end")
    wanted = made.routing.router.state_dict()
    assert all(torch.equal(wanted[key], tensor) for key, tensor in loaded.router.state_dict().items())
    assert loaded.elastic_config.elastic == made.model.elastic_config.elastic
    assert loaded.elastic_config.interpolated
    between = loaded.elastic_config.interpolated[0]["total_params"]
    assert ElasticForCausalLM.from_pretrained(tmp_path / "end", budget=between).num_parameters() == between


class FakeHub:
    """Keeps a copy of every folder that is uploaded, without what is not to be uploaded."""

    def __init__(self, folder):
        self.folder, self.pushes = folder, []

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, folder_path, ignore_patterns=(), path_in_repo="", **kwargs):
        self.pushes.append(self.folder / str(len(self.pushes)))
        shutil.copytree(folder_path, self.pushes[-1], ignore=shutil.ignore_patterns(*ignore_patterns))
        done: Future[None] = Future()
        done.set_result(None)
        return done


def test_what_is_pushed_in_between_can_be_loaded(tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    trainer(tmp_path / "run", max_steps=2, seed=7).train()  # leaves a checkpoint to be replaced
    made = trainer(tmp_path / "run", push_to_hub=True, hub_model_id="me/family", hub_always_push=True)
    made.train()
    assert len(hub.pushes) == 3
    for push, step in zip(hub.pushes, (2, 4, 6), strict=True):
        loaded = ElasticForCausalLM.from_pretrained(push)
        wanted = ElasticForCausalLM.from_pretrained(tmp_path / "run" / f"checkpoint-{step}")
        for ours, theirs in ((loaded, wanted), (loaded.router, wanted.router)):
            state = theirs.state_dict()
            assert all(torch.equal(state[key], tensor) for key, tensor in ours.state_dict().items())
        assert list(loaded.budgets) == (["large", "small"] if step == 6 else [])
        assert not [path for path in push.rglob("*") if path.is_dir()]


def test_the_report_is_written_and_kept_in_checkpoints(tmp_path, caplog):
    with caplog.at_level("INFO", "hf_elastic.trainers.routing"):
        made = trainer(tmp_path, max_steps=6)
        made.train()
    report = json.loads((tmp_path / REPORT_FILE).read_text())
    assert report == made.routing.report
    assert [row["budget"] for row in report] == ["large", "small"]
    assert not (tmp_path / "checkpoint-4" / REPORT_FILE).exists()  # decided after it
    assert json.loads((tmp_path / "checkpoint-6" / REPORT_FILE).read_text()) == report
    assert "budget small: target 34.00k active parameters" in caplog.text
    (tmp_path / REPORT_FILE).unlink()
    resumed = trainer(tmp_path, max_steps=7)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.routing.report == report
    assert json.loads((tmp_path / REPORT_FILE).read_text()) == report


def test_a_missed_target_is_a_warning(tmp_path, caplog):
    model = undecided()
    model.elastic_config = ElasticConfig.from_parent(model.config, {}, choices={"hidden": [48, 24]})
    args = config(tmp_path, **{**RUN, "router_targets": {"less": 0.8}, "router_steps": 1, "max_steps": 1})
    made = ElasticDistillationTrainer(model=model, args=args, train_dataset=rows(), processing_class=tokenizer())
    made.train()
    assert "budget less misses its target by" in caplog.text


@pytest.mark.parametrize("file", ["router.safetensors", REPORT_FILE])
def test_a_disk_that_fills_up_leaves_no_part_of_a_checkpoint(file, cut_off, tmp_path, monkeypatch):
    cut_off(4)
    made = trainer(tmp_path)
    write = {"router.safetensors": "save", REPORT_FILE: "_write_report"}[file]
    owner = made.routing.router if write == "save" else made.routing
    original = getattr(owner, write)

    def write_half(folder):
        original(folder)
        if "checkpoint-6" in str(folder):
            (folder / file).write_bytes(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, write, write_half)
    with pytest.raises(OSError, match="No space left"):
        made.train(resume_from_checkpoint=True)
    assert not (tmp_path / "checkpoint-6").exists()
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-6" / file).exists()


# Frozen

FROZEN = {**RUN, "router_targets": None, "router_steps": 0, "freeze_router": True, "max_steps": 2}


def frozen(folder, model, **fields) -> ElasticDistillationTrainer:
    args = config(folder, **{**FROZEN, **fields})
    return ElasticDistillationTrainer(model=model, args=args, train_dataset=rows(), processing_class=tokenizer())


@pytest.mark.parametrize("decided", [True, False])
def test_a_frozen_router_decides_at_once_and_does_not_change(decided, straight, tmp_path):
    saved = straight.folder / f"checkpoint-{6 if decided else 2}"
    model = ElasticForCausalLM.from_pretrained(saved, dtype=torch.float32)
    assert list(model.budgets) == (["large", "small"] if decided else [])
    before = {key: tensor.clone() for key, tensor in model.router.state_dict().items()}
    made = frozen(tmp_path / "second", model)
    assert list(made.model.budgets) == ["large", "small"]  # before the first step
    assert json.loads((tmp_path / "second" / REPORT_FILE).read_text()) == made.routing.report
    seen = Recorder().watch(made)
    made.train()
    assert {budget for step in seen.steps for budget, _ in step} <= {"full", "large", "small"}
    assert all(torch.equal(before[key], tensor) for key, tensor in made.model.router.state_dict().items())
    assert not any("resource" in key for entry in made.state.log_history for key in entry)
    if decided:
        assert made.model.elastic_config.elastic == straight.model.elastic_config.elastic
    resumed = frozen(tmp_path / "second", ElasticForCausalLM.from_pretrained(saved), max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.model.elastic_config.elastic == made.model.elastic_config.elastic


def test_a_run_can_go_on_with_its_router_frozen(cut_off, tmp_path):
    cut_off(2)
    resumed = frozen(tmp_path, undecided(), router_targets=TARGETS, max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    saved = load_file(tmp_path / "checkpoint-2" / "router.safetensors")
    assert all(torch.equal(saved[key], tensor) for key, tensor in resumed.model.router.state_dict().items())
    assert list(resumed.model.budgets) == ["large", "small"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_steps": 3}, "router_steps=3 does not work with freeze_router=True"),
        ({"freeze_model": True}, "freeze_model=True does not work with freeze_router=True"),
        ({}, "the model has no router: load one that was saved with its router"),
    ],
)
def test_what_a_frozen_router_does_not_go_with(fields, message, tmp_path):
    with pytest.raises(ElasticConfigError, match=message):
        frozen(tmp_path, undecided(), **fields)


def test_a_frozen_router_has_been_trained(tmp_path):
    with pytest.raises(ElasticConfigError, match="the router was never trained"):
        frozen(tmp_path, undecided(), router_targets=TARGETS).train()


def test_a_frozen_router_does_not_replace_other_budgets(straight, tmp_path):
    model = ElasticForCausalLM.from_pretrained(straight.folder / "checkpoint-6")
    section = {"axes": model.elastic_config.axes, "budgets": {"mine": {"sizes": {"hidden": 40}}}}
    section["router"] = model.router.describe()
    model.elastic_config.elastic = ElasticConfig(parent_config=model.config, elastic=section).elastic
    with pytest.raises(ElasticConfigError, match=r"budgets that its router does not choose \(mine\)"):
        frozen(tmp_path, model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_steps": 0}, "give both, or neither"),
        ({"router_targets": None}, "give both, or neither"),
        ({"router_targets": None, "router_steps": -1}, "give both, or neither"),
        ({"router_targets": {"large": 2e9}}, "is not below the parent's"),
        ({"router_targets": ["large"]}, "must be a dict"),
        ({"router_learning_rate": 0.0}, "must be above 0"),
        ({"freeze_model": True}, r"set max_steps \(here 6\) to router_steps \(4\)"),
        (
            {"freeze_model": True, "router_targets": None, "router_steps": 0},
            "leaves nothing to train without a router",
        ),
        ({"budget_probabilities": {"big": 1.0}}, "unknown budget 'big'; the model has full, large, small"),
    ],
)
def test_bad_input(fields, message, tmp_path):
    with pytest.raises(ElasticConfigError, match=message):
        trainer(tmp_path, **fields)


def test_a_model_with_budgets_of_its_own_is_refused(tmp_path):
    model = elastify(build_parent("nano3"), budgets={"some": {"hidden": 40}}, sort=False)
    with pytest.raises(ElasticConfigError, match=r"has budgets already \(some\)"):
        ElasticDistillationTrainer(
            model=model, args=config(tmp_path, **RUN), train_dataset=rows(), processing_class=tokenizer()
        )
