"""A run that was cut off goes on as if it had not been, and a checkpoint is whole or not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import fresh
import pytest
import torch
from cases import BUDGETS, build_parent
from peft import LoraConfig
from runs import Recorder, config, family, rows, tokenizer, trainer
from transformers import TrainerCallback, TrainerState, modeling_utils

from hf_elastic import CheckpointError, ElasticConfigError, ElasticForCausalLM, HFElasticError, elastify
from hf_elastic.trainers import ElasticDistillationTrainer

STAGES = [
    {"steps": 3, "max_length": 10},
    {"steps": 3, "budget_probabilities": {"full": 0.4, "medium": 0.2, "small": 0.4}, "learning_rate_scale": 0.3},
]
RUN = {
    "stages": STAGES,
    "max_steps": -1,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
}
STATE = "elastic_training.json"


@pytest.fixture(autouse=True)
def _with_gradients():
    with torch.enable_grad():
        yield


class StopAt(TrainerCallback):
    def __init__(self, step: int, error: type[BaseException] = KeyboardInterrupt):
        self.step, self.error = step, error

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error("killed")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The uninterrupted run: trainer, what it was given, folder with checkpoints after 2, 4 and 6 steps."""
    folder = tmp_path_factory.mktemp("straight")
    with torch.enable_grad():
        made = trainer(folder, **RUN)
        recorder = Recorder().watch(made)
        made.train()
    return made, recorder, folder


def assert_same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    state = theirs.state_dict()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("killed_at", [3, 5])
def test_a_killed_run_goes_on_to_the_same_weights(straight, killed_at, tmp_path):
    reference, given, _ = straight
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[StopAt(killed_at)], **RUN).train()
    torch.manual_seed(99)  # as in a new process, which has other states
    resumed = trainer(tmp_path, **RUN)
    recorder = Recorder().watch(resumed)
    resumed.train(resume_from_checkpoint=True)
    first = killed_at - killed_at % 2
    assert [[b for b, _ in step] for step in recorder.steps] == [[b for b, _ in step] for step in given.steps[first:]]
    for step, expected in zip(recorder.steps, given.steps[first:], strict=True):
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for (_, a), (_, b) in zip(step, expected, strict=True))
    assert recorder.rates == given.rates[first:]
    assert_same_weights(resumed.model, reference.model)
    logged = {entry["step"]: entry["loss"] for entry in reference.state.log_history if "loss" in entry}
    assert {entry["step"]: entry["loss"] for entry in resumed.state.log_history if "loss" in entry} == logged
    tokens = [run.state.log_history[-2]["num_tokens"] for run in (resumed, reference)]
    assert tokens[0] == tokens[1] > 0


def go_on(folder: Path) -> None:
    torch.set_num_threads(1)
    trainer(folder, **RUN).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_another_process_goes_on_after_a_kill(straight, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[StopAt(3)], **RUN).train()
    other = fresh.process(go_on, tmp_path)
    other.start()
    other.join(300)
    assert other.exitcode == 0
    assert_same_weights(ElasticForCausalLM.from_pretrained(tmp_path / "checkpoint-6"), straight[0].model)


def test_the_weights_come_from_the_checkpoint_not_from_the_model(straight, tmp_path):
    """Upstream reads the names in the file without mapping them, and would go on with the model's own weights."""
    reference, _, folder = straight
    shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
    other = trainer(tmp_path, family(seed=5), teacher_model=build_parent("nano3"), **RUN)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_weights(other.model, reference.model)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    made = trainer(
        tmp_path,
        **{**RUN, "stages": None, "max_steps": 4, "learning_rate": 0.05, "save_steps": 1},
        eval_dataset=rows(4, 1),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="full/kl",
        greater_is_better=True,
    )
    made.train()
    scores = {entry["step"]: entry["eval_full/kl"] for entry in made.state.log_history if "eval_full/kl" in entry}
    best = max(scores, key=scores.get)
    assert best == made.state.best_global_step
    assert_same_weights(made.model, ElasticForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}"))
    assert made.evaluate()["eval_full/kl"] == pytest.approx(scores[best], rel=1e-6)
    lasts = ElasticForCausalLM.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    if best != 4:
        assert any(not torch.equal(t, lasts[key]) for key, t in made.model.state_dict().items())


# -- another run -------------------------------------------------------------------------------------------------------


def resume(folder: Path, step: int, model: ElasticForCausalLM | None = None, **fields) -> ElasticDistillationTrainer:
    made = trainer(folder, model, **{**RUN, **fields})
    made.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    return made


def test_another_family_is_refused_naming_the_fields(straight):
    _, _, folder = straight
    budgets = {**BUDGETS["nano3"], "small": {**BUDGETS["nano3"]["small"], "hidden": 24}}
    model = elastify(build_parent("nano3"), budgets=budgets, sort=False)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(
        ElasticConfigError, match=r"of another family.*budgets\.small\.sizes\.hidden \(32 there, 24 here\)"
    ):
        resume(folder, 4, model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_another_parent_is_refused_naming_the_fields(straight):
    _, _, folder = straight
    parent = build_parent("nano3")
    parent.config.layer_norm_epsilon = 0.2
    model = elastify(parent, budgets=BUDGETS["nano3"], sort=False)
    with pytest.raises(ElasticConfigError, match=r"parent_config\.layer_norm_epsilon \(0.1 there, 0.2 here\)"):
        resume(folder, 4, model)


OTHER = {
    "seed": ({"seed": 7}, r"of another run: seed \(42 there, 7 here\)"),
    "beta": ({"beta": 0.5}, r"beta \(0.0 there, 0.5 here\)"),
    "temperature": ({"temperature": 2.0}, r"temperature \(1.0 there, 2.0 here\)"),
    "past stage": (
        {"stages": [{**STAGES[0], "max_length": 12}, STAGES[1]]},
        r"stages\[0\]\.max_length \(10 there, 12 here\)",
    ),
    "past rate": (
        {"stages": [{**STAGES[0], "learning_rate": 1e-3}, STAGES[1]]},
        r"stages\[0\]\.learning_rate \(None there, 0.001 here\)",
    ),
    "past tokens": (  # 2 rows x 2 micro-batches x 10 tokens a step
        {"stages": [{"tokens": 80, "max_length": 10}, STAGES[1]]},
        r"stages\[0\]\.steps \(3 there, 2 here\)",
    ),
    "current stage": (
        {"stages": [STAGES[0], {**STAGES[1], "budget_probabilities": {"full": 1.0}}]},
        r"stages\[1\]\.budget_probabilities\.full \(0.4 there, 1.0 here\)",
    ),
    "rate": ({"learning_rate": 1e-4}, r"learning_rate \(0.01 there, 0.0001 here\)"),
    "schedule": ({"lr_scheduler_type": "linear"}, r"lr_scheduler_type \('cosine' there, 'linear' here\)"),
    "decay": ({"weight_decay": 0.3}, r"weight_decay \(0.0 there, 0.3 here\)"),
    "optimizer": ({"optim": "sgd"}, r"optim \('adamw_torch(_fused)?' there, 'sgd' here\)"),
    "batch": (
        {"per_device_train_batch_size": 1},
        r"per_device_train_batch_size \* gradient_accumulation_steps \* processes \(4 there, 2 here\)",
    ),
    "length": ({"max_length": 32}, r"max_length \(64 there, 32 here\)"),
    "shorter past": ({"stages": [{**STAGES[0], "steps": 2}, STAGES[1]]}, r"stages\[0\]\.steps \(3 there, 2 here\)"),
}


@pytest.mark.parametrize("case", OTHER)
def test_another_run_is_refused_naming_the_fields(straight, case):
    fields, message = OTHER[case]
    with pytest.raises(ElasticConfigError, match=message):
        resume(straight[2], 4, **fields)


def test_stages_that_have_not_begun_may_change(straight, tmp_path):
    shutil.copytree(straight[2] / "checkpoint-2", tmp_path / "checkpoint-2")
    made = resume(
        tmp_path, 2, stages=[STAGES[0], {"steps": 1, "budget_probabilities": {"small": 1.0}}], save_strategy="no"
    )
    assert made.state.global_step == 4


def test_tokens_that_come_to_the_same_steps_are_the_same_run(straight, tmp_path):
    shutil.copytree(straight[2] / "checkpoint-4", tmp_path / "checkpoint-4")
    made = resume(tmp_path, 4, stages=[{"tokens": 120, "max_length": 10}, STAGES[1]], save_strategy="no")
    assert_same_weights(made.model, straight[0].model)


def test_as_many_rows_a_step_in_other_parts_may_go_on(straight, tmp_path):
    """On fewer processes, for example; the budgets are drawn anew, as there is one for each part."""
    shutil.copytree(straight[2] / "checkpoint-4", tmp_path / "checkpoint-4")
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "save_strategy": "no"}
    made = trainer(tmp_path, **{**RUN, **parts})
    recorder = Recorder().watch(made)
    made.train(resume_from_checkpoint=True)
    for ((_, batch),), whole in zip(recorder.steps, straight[1].steps[4:], strict=True):
        rows = [row[row != 0].tolist() for _, part in whole for row in part["input_ids"]]
        assert [row[row != 0].tolist() for row in batch["input_ids"]] == rows


def test_rates_of_stages_go_on_after_a_kill(tmp_path):
    stages = [{"steps": 3, "learning_rate": 5e-3}, {"tokens": 3 * 4 * 64, "learning_rate": 2e-3}]
    runs = {}
    for name in ("straight", "killed"):
        made = trainer(tmp_path / name, **{**RUN, "stages": stages})
        runs[name] = made, Recorder().watch(made)
    runs["straight"][0].train()
    runs["killed"][0].add_callback(StopAt(3))
    with pytest.raises(KeyboardInterrupt):
        runs["killed"][0].train()
    # the run's own rate only counts where a stage has none
    resumed = trainer(tmp_path / "killed", **{**RUN, "stages": stages, "learning_rate": 0.5})
    recorder = Recorder().watch(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert recorder.rates == runs["straight"][1].rates[2:]
    assert_same_weights(resumed.model, runs["straight"][0].model)


# -- whole or not there ------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("at", ["weights", "optimizer", "state"])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_part_of_a_new_one(at, tmp_path, monkeypatch):
    made = trainer(tmp_path, **RUN)
    target = {"weights": "_save", "optimizer": "_save_optimizer_and_scheduler", "state": "_save_rng_state"}[at]
    original = getattr(made, target)
    old: dict[str, bytes] = {}

    def full_disk(output_dir: str, *args, **kwargs) -> None:
        if output_dir.endswith("checkpoint-4"):
            old.update(files(tmp_path / "checkpoint-2"))
            Path(output_dir).mkdir(exist_ok=True)
            (Path(output_dir) / "half").write_bytes(b"x")
            raise OSError(28, "No space left on device")
        original(output_dir, *args, **kwargs)

    monkeypatch.setattr(made, target, full_disk)
    with pytest.raises(OSError, match="No space left"):
        made.train()
    assert old
    assert files(tmp_path / "checkpoint-2") == old
    assert not (tmp_path / "checkpoint-4").exists()
    resumed = trainer(tmp_path, **RUN)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


WRITERS = {
    "weights": (modeling_utils, "safe_save_file", 1),
    "optimizer": (torch, "save", 1),
    "elastic state": (Path, "write_text", 0),
    "trainer state": (TrainerState, "save_to_json", 1),
}
"""Functions that write the files of a checkpoint, and which argument says where."""


@pytest.mark.parametrize("file", WRITERS)
def test_a_disk_that_fills_up_in_the_middle_of_a_file_leaves_the_old_checkpoint(file, straight, tmp_path, monkeypatch):
    owner, function, position = WRITERS[file]
    write = getattr(owner, function)
    halves: list[str] = []

    def write_half(*args, **kwargs):
        write(*args, **kwargs)
        path = str(args[position])
        if "checkpoint-4" in path:
            halves.append(path)
            os.truncate(path, os.path.getsize(path) // 2)
            raise OSError(errno.ENOSPC, "No space left on device", path)

    made = trainer(tmp_path, **RUN)
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, write_half)
        with pytest.raises(OSError, match="No space left on device"):
            made.train()
    assert halves
    assert not (tmp_path / "checkpoint-4").exists()
    ours, theirs = ((folder / "checkpoint-2") for folder in (tmp_path, straight[2]))
    assert files(ours).keys() == files(theirs).keys()
    assert files(ours)["model.safetensors"] == files(theirs)["model.safetensors"]
    resumed = trainer(tmp_path, **RUN)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed.model, straight[0].model)


@pytest.mark.parametrize("at", ["weights", "optimizer", "state"])
def test_a_full_disk_leaves_the_old_checkpoint_of_the_same_number(at, straight, tmp_path, monkeypatch):
    shutil.copytree(straight[2] / "checkpoint-4", tmp_path / "checkpoint-4")
    old = files(tmp_path / "checkpoint-4")
    made = trainer(tmp_path, **{**RUN, "save_steps": 4})
    target = {"weights": "_save", "optimizer": "_save_optimizer_and_scheduler", "state": "_save_rng_state"}[at]

    def full_disk(output_dir: str, *args, **kwargs) -> None:
        Path(output_dir).mkdir(exist_ok=True)
        (Path(output_dir) / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(made, target, full_disk)
    with pytest.raises(OSError, match="No space left"):
        made.train()
    assert files(tmp_path) == {f"checkpoint-4/{name}": content for name, content in old.items()} | {
        "README.md": (tmp_path / "README.md").read_bytes()
    }
    resumed = trainer(tmp_path, **RUN)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed.model, straight[0].model)


def test_a_checkpoint_of_the_same_number_is_replaced(straight, tmp_path):
    shutil.copytree(straight[2] / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "old").touch()
    trainer(tmp_path, **{**RUN, "stages": None, "max_steps": 4, "save_steps": 4}).train()
    assert not (tmp_path / "checkpoint-4" / "old").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "checkpoint-4", "training_verdict.json"}
    ours, theirs = (ElasticForCausalLM.from_pretrained(f / "checkpoint-4") for f in (tmp_path, straight[2]))
    assert any(not torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("written", ["half", "whole"])
def test_a_kill_while_a_checkpoint_is_replaced_loses_none(written, straight, tmp_path):
    aside = tmp_path / "_replaced-checkpoint-4"
    shutil.copytree(straight[2] / "checkpoint-4", aside)
    shutil.copytree(straight[2] / "checkpoint-4", tmp_path / "checkpoint-4")
    if written == "half":
        (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
        (tmp_path / "checkpoint-4" / "model.safetensors").write_bytes(b"half")
    resumed = trainer(tmp_path, **RUN)
    resumed.train(resume_from_checkpoint=True)
    assert not aside.exists()
    assert_same_weights(resumed.model, straight[0].model)


def test_a_run_that_was_done_makes_no_step_more(tmp_path):
    """Killed after its last checkpoint, in the middle of an epoch."""
    fields = {**RUN, "stages": None, "max_steps": 4}
    made = trainer(tmp_path, **fields)
    made.train()
    resumed = trainer(tmp_path, family(seed=5), teacher_model=build_parent("nano3"), **fields)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert_same_weights(resumed.model, made.model)


@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_resuming_passes_over_a_checkpoint_that_was_not_finished(straight, damage, tmp_path):
    """A process that is killed has no time to clean up."""
    reference, _, folder = straight
    for step in (2, 4):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    if damage == "missing":
        state.unlink()
    else:
        state.write_text(state.read_text()[:100])
    with pytest.raises(CheckpointError, match="checkpoint-4 is not a complete checkpoint"):
        resume(tmp_path, 4)
    made = trainer(tmp_path, **RUN)
    recorder = Recorder().watch(made)
    made.train(resume_from_checkpoint=True)
    assert len(recorder.steps) == 4
    assert_same_weights(made.model, reference.model)


def test_resuming_from_nothing_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="there is no complete checkpoint in"):
        trainer(tmp_path, **RUN).train(resume_from_checkpoint=True)


def test_a_run_without_the_trainers_own_file_can_be_resumed(straight, tmp_path):
    """Checkpoints of another trainer have weights, optimizer and steps."""
    shutil.copytree(straight[2] / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / STATE).unlink()
    assert_same_weights(resume(tmp_path, 4).model, straight[0].model)


# -- a loss that is not finite -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_loss_stops_naming_the_batch_and_keeps_the_last_checkpoint(bad, tmp_path):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                self.before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
                for parameter in made.teacher_model.get_output_embeddings().parameters():
                    parameter.fill_(bad)

    breaks = Break()
    made = trainer(tmp_path, callbacks=[breaks], **RUN)
    recorder = Recorder().watch(made)
    with pytest.raises(HFElasticError) as caught:
        made.train()
    budget, batch = recorder.steps[3][0]
    message = str(caught.value)
    assert "at step 3, micro-batch 0" in message
    assert f"budget {budget!r}" in message
    assert str(batch["input_ids"][0, :8].tolist()) in message
    for key, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, breaks.before[key])
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2
    assert made.model.budget == "full"  # the computation was switched back


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_bad_gradient_stops_before_the_weights_change(clip, tmp_path):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                self.before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
                model.model.norm_f.weight.register_hook(lambda gradient: gradient * float("inf"))

    breaks = Break()
    made = trainer(tmp_path, callbacks=[breaks], max_grad_norm=clip, **RUN)
    with pytest.raises(HFElasticError, match="the gradient norm is (inf|nan) at step 3, though the loss is finite"):
        made.train()
    assert all(torch.equal(tensor, breaks.before[key]) for key, tensor in made.model.state_dict().items())
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_stage_lengths_fit_the_model(tmp_path):
    with pytest.raises(ElasticConfigError, match="longer than the context of the model, 128 tokens"):
        ElasticDistillationTrainer(
            family(),
            args=config(tmp_path, stages=[{"steps": 1, "max_length": 129}], max_steps=-1, max_length=None),
            train_dataset=rows(),
            processing_class=tokenizer(),
        )


# -- where a run saves -------------------------------------------------------------------------------------------------


def test_a_slice_is_not_trained_into_the_folder_of_its_family(tmp_path):
    """Said before the first step, not after the last one; the whole family may be saved back."""
    family().save_pretrained(tmp_path)
    with pytest.raises(ElasticConfigError, match="would be replaced by a smaller one"):
        trainer(tmp_path, ElasticForCausalLM.from_pretrained(tmp_path, budget="small"))
    made = trainer(tmp_path, ElasticForCausalLM.from_pretrained(tmp_path))
    made.save_model()
    assert ElasticForCausalLM.from_pretrained(tmp_path).budgets == made.model.budgets


@pytest.mark.parametrize("adapted", [False, True], ids=["model", "adapter"])
def test_a_model_is_saved_with_its_tokenizer_or_not_at_all(adapted, tmp_path, monkeypatch):
    made = trainer(tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if adapted else None)
    made.save_model()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    before = files(tmp_path)
    for parameter in made.model.parameters():
        parameter.data.add_(1.0)

    def full_disk(folder: str, *args, **kwargs) -> None:
        (Path(folder) / "tokenizer.json").write_text("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(made.processing_class, "save_pretrained", full_disk)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be written"):
            made.save_model()
    assert files(tmp_path) == before
    made.save_model()
    weights = "adapter_model.safetensors" if adapted else "model.safetensors"
    assert files(tmp_path)[weights] != before[weights]
    assert "mine" in (tmp_path / "README.md").read_text()
