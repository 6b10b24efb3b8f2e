"""The trainer: its step is the one written by hand, and everything around it keeps to the budgets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from by_hand import ByHand
from cases import BUDGETS, VOCAB, build_parent
from datasets import Dataset
from runs import EOS, Recorder, config, family, rows, tokenizer, trainer
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import TrlParser

from hf_elastic import ElasticConfigError, ElasticForCausalLM
from hf_elastic.trainers import ElasticDistillationConfig, ElasticDistillationTrainer

NAMES = ["full", *BUDGETS["nano3"]]
# Large, because m / (sqrt(v) + eps) turns float noise in a gradient near zero into a whole step if eps is small.
ADAM = {"adam_epsilon": 1e-3, "weight_decay": 0.1}
# float32; weights of order 1 after two steps of at most 0.01 each, from gradients that agree to about 1e-5.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _with_gradients():
    with torch.enable_grad():
        yield


def assert_run_is_the_one_by_hand(
    made: ElasticDistillationTrainer, recorder: Recorder, name: str, clip: float
) -> None:
    by_hand = ByHand(name, made.model.elastic_config)
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    # weight decay does not act on biases and norms, as in every HF trainer
    decayed = set(made.get_decay_parameter_names(made.model))
    assert len(losses) == len(recorder.steps)
    for loss, micro_batches, rate in zip(losses, recorder.steps, recorder.rates, strict=True):
        before = {key: p.clone() for key, p in by_hand.parameters.items()}
        expected = by_hand.step(micro_batches, rate, clip, eps=ADAM["adam_epsilon"], decay=ADAM["weight_decay"])
        for key, p in by_hand.parameters.items():
            if key not in decayed:
                p.add_(rate * ADAM["weight_decay"] * before[key])
        assert loss == pytest.approx(expected, rel=1e-4)
    moved = 0.0
    start = dict(by_hand.parent.named_parameters())
    for key, p in made.model.named_parameters():
        torch.testing.assert_close(
            p.detach(), by_hand.parameters[key], **CLOSE, msg=lambda text, key=key: f"{key}: {text}"
        )
        moved = max(moved, float((p - start[key]).abs().max()))
    assert moved > 100 * CLOSE["atol"]


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "plain"])
@pytest.mark.parametrize("name", BUDGETS)
def test_steps_over_different_budgets_and_lengths_are_those_written_by_hand(name, checkpointing, tmp_path):
    made = trainer(
        tmp_path,
        family(name),
        gradient_accumulation_steps=3,
        gradient_checkpointing=checkpointing,
        loss_chunk_size=5,
        max_grad_norm=0.5,
        seed=5,
        **ADAM,
    )
    recorder = Recorder().watch(made)
    made.train()
    assert len({budget for step in recorder.steps for budget, _ in step}) >= 3
    assert len({int(batch["attention_mask"].sum()) for step in recorder.steps for _, batch in step}) >= 4
    assert made.model.is_activation_checkpointing == checkpointing
    assert_run_is_the_one_by_hand(made, recorder, name, clip=0.5)


def test_a_dropped_layer_goes_on_by_momentum_and_decay_as_a_dropped_channel_does(tmp_path):
    made = trainer(
        tmp_path,
        stages=[
            {"steps": 1, "budget_probabilities": {"full": 1.0}},
            {"steps": 1, "budget_probabilities": {"small": 1.0}},
        ],
        teacher_model=build_parent("nano3", 5),
        max_steps=-1,
        optim="sgd",
        optim_args="momentum=0.5",
        weight_decay=0.1,
        learning_rate=0.1,
    )
    before: list[torch.Tensor] = []
    weight = made.model.model.layers[3].mixer.gate.weight  # a layer that `small` drops

    class Watch(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            before.append(weight.detach().clone())

    made.add_callback(Watch())
    made.train()
    first = before[0] - before[1]  # rate * (gradient + decay * weight)
    second = 0.5 * first + 0.1 * 0.1 * before[1]
    assert first.abs().max() > 0
    torch.testing.assert_close(before[1] - weight.detach(), second, rtol=1e-3, atol=1e-6)


def test_checkpointing_is_on_by_default(tmp_path):
    assert trainer(tmp_path).args.gradient_checkpointing


# -- datasets ----------------------------------------------------------------------------------------------------------

TEXTS = {
    "text": [{"text": text} for text in ("HELLO WORLD", "ABC", "12 + 30 = 42", "XYZ")],
    "completion": [
        {"prompt": p, "completion": c} for p, c in [("1+1=", "2"), ("HELLO ", "WORLD"), ("A", "BCD"), ("", "Z")]
    ],
    "conversation": [
        {"messages": [{"role": "user", "content": u}, {"role": "assistant", "content": a}]}
        for u, a in [("HI", "HELLO"), ("1+1?", "2"), ("A", "B"), ("LONGER THAN", "X")]
    ],
    "conversation_completion": [
        {"prompt": [{"role": "user", "content": u}], "completion": [{"role": "assistant", "content": a}]}
        for u, a in [("HI", "HELLO"), ("1+1?", "2"), ("A", "B"), ("LONGER THAN", "X")]
    ],
    "tokens": [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10]}],
    "labels": [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
        {"input_ids": [9, 10, 11], "labels": [9, -100, 11]},
    ],
}


def expected_labels(kind: str, row: dict) -> list[int]:
    """What counts, spelled out with the tokenizer."""
    ids = lambda text: tokenizer()(text)["input_ids"]  # noqa: E731
    if kind == "text":
        return [*ids(row["text"]), EOS]
    if kind == "completion":
        return [-100] * len(row["prompt"]) + [*ids(row["completion"]), EOS]
    if kind == "conversation":
        return ids(f"<u>{row['messages'][0]['content']}<a>{row['messages'][1]['content']}<eos>")
    if kind == "conversation_completion":
        prompt = ids(f"<u>{row['prompt'][0]['content']}<a>")
        return [-100] * len(prompt) + ids(f"{row['completion'][0]['content']}<eos>")
    return row.get("labels", row["input_ids"])


@pytest.mark.parametrize("kind", TEXTS)
def test_every_kind_of_dataset_trains_on_its_target_tokens(kind, tmp_path):
    made = trainer(
        tmp_path, dataset=Dataset.from_list(TEXTS[kind]), gradient_accumulation_steps=2, max_steps=1, **ADAM
    )
    recorder = Recorder().watch(made)
    made.train()
    seen = [
        row[mask.bool()].tolist()
        for step in recorder.steps
        for _, batch in step
        for row, mask in zip(batch["labels"], batch["attention_mask"], strict=True)
    ]
    wanted = [expected_labels(kind, row) for row in TEXTS[kind]]
    assert sorted(seen) == sorted(wanted)  # one step sees all rows
    assert_run_is_the_one_by_hand(made, recorder, "nano3", clip=1.0)


def test_a_dataset_without_the_columns_is_refused(tmp_path):
    bad = Dataset.from_list([{"sentence": "A"}])
    with pytest.raises(ElasticConfigError, match="train_dataset has the columns sentence; it needs input_ids, text"):
        trainer(tmp_path, dataset=bad)
    with pytest.raises(ElasticConfigError, match="eval_dataset has the columns sentence"):
        trainer(tmp_path, eval_dataset={"a": rows(), "b": bad})
    for empty in ([], Dataset.from_dict({"input_ids": []})):
        with pytest.raises(ElasticConfigError, match="train_dataset is empty"):
            trainer(tmp_path, dataset=empty)


def test_a_batch_without_target_tokens_changes_nothing_and_is_no_error(tmp_path):
    dataset = Dataset.from_list(
        [{"input_ids": [5, 6, 7], "labels": [5, -100, -100]}] * 2
    )  # the first token is no target
    made = trainer(tmp_path, dataset=dataset, max_steps=1, weight_decay=0.0)
    before = {key: p.detach().clone() for key, p in made.model.named_parameters()}
    made.train()
    assert made.state.log_history[0]["loss"] == 0.0
    assert all(torch.equal(p, before[key]) for key, p in made.model.named_parameters())


# -- stages ------------------------------------------------------------------------------------------------------------


def test_stages_cut_rows_before_their_tokens_are_counted_and_scale_the_learning_rate(tmp_path):
    stages = [
        {"steps": 1, "max_length": 4, "learning_rate_scale": 0.5},
        {"steps": 2, "budget_probabilities": {"full": 0.5, "small": 0.5}},
    ]
    made = trainer(
        tmp_path,
        dataset=rows(12, shortest=6),
        stages=stages,
        max_steps=-1,
        gradient_accumulation_steps=2,
        lr_scheduler_type="linear",
        learning_rate=1e-2,
        **ADAM,
    )
    recorder = Recorder().watch(made)
    made.train()
    assert [entry["step"] for entry in made.state.log_history if "loss" in entry] == [1, 2, 3]
    assert [max(batch["input_ids"].shape[1] for _, batch in step) > 4 for step in recorder.steps] == [
        False,
        True,
        True,
    ]
    assert all(set(batch) == {"input_ids", "labels", "attention_mask"} for step in recorder.steps for _, batch in step)
    assert {budget for step in recorder.steps[1:] for budget, _ in step} <= {"full", "small"}
    # linear from 1e-2 to 0 over three steps, times the stage's scale
    assert recorder.rates == pytest.approx([0.5 * 1e-2, 1e-2 * 2 / 3, 1e-2 / 3])
    logged = [entry["learning_rate"] for entry in made.state.log_history if "loss" in entry]
    assert logged == pytest.approx(recorder.rates)
    assert_run_is_the_one_by_hand(made, recorder, "nano3", clip=1.0)


def test_stages_by_tokens_and_with_rates_of_their_own(tmp_path):
    # a step is 2 rows x 2 micro-batches, so 4 x 8 = 32 tokens, then 4 x 64 = 256
    stages = [
        {"tokens": 33, "max_length": 8, "learning_rate": 4e-3},
        {"tokens": 256},
        {"steps": 1, "learning_rate": 1e-3},
    ]
    made = trainer(
        tmp_path, stages=stages, max_steps=-1, gradient_accumulation_steps=2, lr_scheduler_type="linear", **ADAM
    )
    assert made.args.max_steps == 4
    recorder = Recorder().watch(made)
    made.train()
    assert [max(batch["input_ids"].shape[1] for _, batch in step) > 8 for step in recorder.steps[:2]] == [False, False]
    # linear from 1 to 0 over four steps, times the stage's rate, or the run's 1e-2
    assert recorder.rates == pytest.approx([4e-3, 0.75 * 4e-3, 0.5 * 1e-2, 0.25 * 1e-3])
    assert [entry["learning_rate"] for entry in made.state.log_history if "loss" in entry] == pytest.approx(
        recorder.rates
    )
    assert_run_is_the_one_by_hand(made, recorder, "nano3", clip=1.0)


def test_a_rate_of_a_stage_cannot_replace_none(tmp_path):
    made = trainer(tmp_path, stages=[{"steps": 2, "learning_rate": 1e-3}], max_steps=-1, learning_rate=0.0)
    with pytest.raises(ElasticConfigError, match="learning_rate of a stage needs a learning_rate of the run above 0"):
        made.train()


def test_learning_rate_scale_refuses_schedules_it_cannot_scale(tmp_path):
    stages = [{"steps": 2, "learning_rate_scale": 0.5}]
    made = trainer(
        tmp_path,
        stages=stages,
        max_steps=-1,
        lr_scheduler_type="reduce_lr_on_plateau",
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=rows(),
    )
    with pytest.raises(
        ElasticConfigError, match="learning_rate_scale does not work with lr_scheduler_type=.*use linear"
    ):
        made.train()


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_evaluation_reports_every_budget_as_computed_by_hand(tmp_path):
    made = trainer(tmp_path, eval_dataset=rows(5, seed=1), per_device_eval_batch_size=2)
    by_hand = ByHand("nano3", made.model.elastic_config)
    with torch.no_grad():  # so that the full budget differs from the teacher too
        for key, p in made.model.named_parameters():
            p.mul_(1.2)
            by_hand.parameters[key].mul_(1.2)
    metrics = made.evaluate()
    batches = list(made.get_eval_dataloader())
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    with torch.no_grad():
        for budget in NAMES:
            parts = [by_hand.divergence(budget, batch) for batch in batches]
            expected = float(sum(total for total, _ in parts)) / sum(count for _, count in parts)
            assert expected > 0.01
            assert metrics[f"eval_{budget}/kl"] == pytest.approx(expected, rel=1e-4)
    assert metrics["eval_loss"] == pytest.approx(sum(metrics[f"eval_{budget}/kl"] for budget in NAMES) / len(NAMES))
    assert made.model.budget == "full"


def test_only_the_budgets_asked_for_are_evaluated_under_the_name_of_each_dataset(tmp_path):
    made = trainer(tmp_path, eval_dataset={"a": rows(4, 1), "b": rows(4, 2)}, eval_budgets=["small"])
    metrics = made.evaluate()
    assert {key for key in metrics if key.endswith("/kl")} == {"eval_a_small/kl", "eval_b_small/kl"}
    assert metrics["eval_a_small/kl"] != metrics["eval_b_small/kl"]
    with pytest.raises(ElasticConfigError, match="eval_budgets: unknown budget 'tiny'; the model has full, large"):
        trainer(tmp_path, eval_budgets=["tiny"])


def test_evaluating_in_between_changes_nothing(tmp_path):
    """Evaluation switches the model's mode and budgets; the next step has to start where the last one ended."""
    weights = []
    for strategy in ("no", "steps"):
        options = {"eval_strategy": strategy, "eval_steps": 1, "eval_on_start": strategy == "steps"}
        made = trainer(tmp_path, max_steps=4, gradient_accumulation_steps=2, eval_dataset=rows(4, 1), **options)
        made.train()
        weights.append(made.model.state_dict())
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


# -- what training leaves behind ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run long enough to learn, with its folder."""
    folder = tmp_path_factory.mktemp("trained")
    with torch.enable_grad():
        made = trainer(
            folder,
            dataset=rows(24),
            eval_dataset=rows(24),
            max_steps=60,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            lr_scheduler_type="linear",
            logging_steps=20,
        )
        start = made.evaluate()
        made.train()
        end = made.evaluate()
    made.save_model(folder / "saved")
    return made, start, end, folder / "saved"


def test_training_improves_every_budget(trained):
    _, start, end, _ = trained
    assert start["eval_full/kl"] == 0.0
    for budget in BUDGETS["nano3"]:
        assert end[f"eval_{budget}/kl"] < 0.6 * start[f"eval_{budget}/kl"]
    assert end["eval_full/kl"] < 0.3 * min(start[f"eval_{budget}/kl"] for budget in BUDGETS["nano3"])


def test_logs_hold_the_divergence_of_the_budgets_drawn(trained):
    made = trained[0]
    train = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(train) == 3
    for entry in train:
        assert {f"{name}/kl" for name in NAMES} >= {key for key in entry if key.endswith("/kl")} != set()
    tokens = 60 * 8 * sum(len(row) for row in rows(24)["input_ids"]) / 24  # every row is seen 20 times
    assert train[-1]["num_tokens"] == tokens


def test_slices_of_the_saved_checkpoint_score_what_the_live_model_scored(trained, ids):
    made, _, _, saved = trained
    live = made.model.eval()
    assert made.model.budget == "full"
    assert not any("forward" in module.__dict__ for module in live.modules() if module is not live)
    whole = ElasticForCausalLM.from_pretrained(saved)
    assert whole.state_dict().keys() == live.state_dict().keys()
    assert all(torch.equal(whole.state_dict()[key], tensor) for key, tensor in live.state_dict().items())
    with torch.no_grad():
        for budget in NAMES:
            cut = AutoModelForCausalLM.from_pretrained(saved, budget=budget)
            with live.exposed(budget):
                state = {key: tensor.clone() for key, tensor in live.state_dict().items()}
            assert all(torch.equal(cut.state_dict()[key], tensor) for key, tensor in state.items())
            with live.computing(budget):
                hidden = live.model(ids, use_cache=False).last_hidden_state
                training = live.get_output_embeddings()(hidden)
            # the same numbers, contiguous in one and strided in the other
            torch.testing.assert_close(cut(ids).logits, training, rtol=1e-4, atol=1e-5)


def test_the_teacher_stays_the_parent(trained):
    made = trained[0]
    parent = build_parent("nano3")
    teacher = made.accelerator.unwrap_model(made.teacher_model)
    assert all(torch.equal(tensor, parent.state_dict()[key]) for key, tensor in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    assert any(not torch.equal(p, parent.state_dict()[key]) for key, p in made.model.named_parameters())


def test_the_model_card_says_what_was_done(trained):
    made, _, _, _ = trained
    made.create_model_card(model_name="toy")
    card = (Path(made.args.output_dir) / "README.md").read_text()
    assert "Elastic distillation" in card
    assert "2511.16664" in card
    assert all(f"- {tag}" in card for tag in ("elastic", "distillation", "trl"))


# -- precision and memory ----------------------------------------------------------------------------------------------


def test_bf16_autocast_trains_float32_weights(tmp_path):
    runs = {}
    for bf16 in (False, True):
        made = trainer(tmp_path, bf16=bf16, gradient_accumulation_steps=2, max_steps=3, learning_rate=1e-3)
        assert (made.args.use_cpu, made.accelerator.mixed_precision) == (True, "bf16" if bf16 else "no")
        before = {key: p.detach().clone() for key, p in made.model.named_parameters()}
        made.train()
        for key, p in made.model.named_parameters():
            assert not torch.equal(p, before[key]), key
            # steps of 1e-3 are lost in a weight of order 1 with 8 bits; in float32 they are kept
            assert not torch.equal(p, p.bfloat16().float()), key
        runs[bf16] = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
        assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    assert runs[True] != runs[False]
    # bfloat16 has 8 bits: logits of order 1 are off by about 1e-2, and so is their divergence
    assert runs[True] == pytest.approx(runs[False], rel=0.2, abs=0.02)


@pytest.mark.parametrize("name", BUDGETS)
def test_bf16_weights_train(name, tmp_path):
    made = trainer(tmp_path, family(name).to(torch.bfloat16), gradient_accumulation_steps=3, eval_dataset=rows(3))
    made.train()
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}
    assert all(entry["loss"] > 0 for entry in made.state.log_history if "loss" in entry)
    assert made.evaluate()["eval_small/kl"] > 0


def test_no_head_is_ever_called_with_more_than_a_chunk_of_tokens(tmp_path):
    made = trainer(tmp_path, loss_chunk_size=3, max_steps=3, eval_dataset=rows(3))
    seen: list[int] = []
    for model in (made.model, made.teacher_model):
        model.get_output_embeddings().register_forward_pre_hook(
            lambda module, args: seen.append(args[0].numel() // args[0].shape[-1])
        )
    made.train()
    made.evaluate()
    assert max(seen) == 3


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_another_teacher_is_used_and_one_that_is_the_model_is_copied(tmp_path):
    other = build_parent("nano3", seed=7)
    made = trainer(tmp_path, teacher_model=other, eval_dataset=rows(3), eval_budgets=["full"])
    assert made.evaluate()["eval_full/kl"] > 0.1
    model = family()
    made = trainer(tmp_path, model, teacher_model=model, eval_dataset=rows(3), eval_budgets=["full"])
    assert all(p.requires_grad for p in model.parameters())
    assert made.evaluate()["eval_full/kl"] == 0.0


def test_a_teacher_by_name_has_arguments_of_its_own(family_folder, tmp_path):
    folder = str(family_folder("nano3"))
    made = trainer(
        tmp_path,
        teacher_model=folder,
        teacher_model_init_kwargs={"dtype": "bfloat16"},
        bf16=True,
        budget_probabilities={"full": 1.0},
    )
    assert made.teacher_model.dtype == torch.bfloat16
    made.train()
    assert 0 < made.state.log_history[0]["full/kl"] < 0.05  # the same weights, rounded to 8 bits
    with pytest.raises(ElasticConfigError, match="teacher_model_init_kwargs need a teacher_model to load"):
        trainer(tmp_path, teacher_model_init_kwargs={"dtype": "bfloat16"})


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path):
    teacher = build_parent("nano3")
    teacher.resize_token_embeddings(VOCAB + 8)
    with pytest.raises(
        ElasticConfigError, match="teacher's vocabulary has 72 tokens, the model's 64.*resize_token_embeddings"
    ):
        trainer(tmp_path, teacher_model=teacher)


def test_a_folder_is_loaded_in_float32_as_sft_does(family_folder, tmp_path):
    folder = family_folder("nano3")
    made = ElasticDistillationTrainer(
        str(folder),
        teacher_model=str(folder),
        args=config(tmp_path),
        train_dataset=rows(),
        processing_class=tokenizer(),
    )
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    made = ElasticDistillationTrainer(
        str(folder),
        args=config(tmp_path, model_init_kwargs={"dtype": "bfloat16"}),
        train_dataset=rows(),
        processing_class=tokenizer(),
    )
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}
    made.train()


def test_a_granites_balancing_loss_is_left_to_others(tmp_path):
    model = family("granite")
    before = model.config.router_aux_loss_coef
    made = trainer(tmp_path, model, max_steps=1)
    made.train()
    assert before > 0
    assert made.model.config.router_aux_loss_coef == before
    assert not made.model.config.output_router_logits


@pytest.mark.parametrize(
    ("field", "value"), [("loss_type", "dft"), ("label_smoothing_factor", 0.1), ("router_aux_loss_coef", 0.01)]
)
def test_options_that_the_loss_would_ignore_are_refused(field, value, tmp_path):
    with pytest.raises(ElasticConfigError, match=f"{field}={value!r} would be ignored"):
        trainer(tmp_path, **{field: value})


@pytest.mark.parametrize("name", ["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"])
def test_functions_of_full_logits_are_refused(name, tmp_path):
    with pytest.raises(ElasticConfigError, match=f"{name} needs full logits"):
        ElasticDistillationTrainer(
            family(),
            args=config(tmp_path),
            train_dataset=rows(),
            processing_class=tokenizer(),
            **{name: lambda *_: None},
        )


def test_other_models_and_configs_are_refused(tmp_path):
    with pytest.raises(ElasticConfigError, match="must be an ElasticForCausalLM, got NemotronHForCausalLM.*elastify"):
        trainer(tmp_path, build_parent("nano3"))
    from trl import SFTConfig

    with pytest.raises(ElasticConfigError, match="args must be an ElasticDistillationConfig, got SFTConfig"):
        ElasticDistillationTrainer(family(), args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))


def test_a_run_that_never_draws_the_parent_warns(tmp_path):
    with pytest.warns(UserWarning, match=r"the whole parent \('full'\) is never drawn"):
        trainer(tmp_path, budget_probabilities={"small": 1.0})


def test_the_command_line_gives_dicts_and_lists_as_json(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    stages = '[{"steps": 3, "max_length": 8}, {"steps": 4, "budget_probabilities": {"full": 0.5, "small": 0.5}}]'
    (args,) = TrlParser(ElasticDistillationConfig).parse_args_and_config(
        [
            *arguments,
            "--budget_probabilities",
            '{"full": 0.25, "small": 0.75}',
            "--stages",
            stages,
            "--eval_budgets",
            "small",
        ]
    )
    assert args.budget_probabilities == {"full": 0.25, "small": 0.75}
    assert args.stages == [
        {"steps": 3, "max_length": 8},
        {"steps": 4, "budget_probabilities": {"full": 0.5, "small": 0.5}},
    ]
    assert args.max_steps == 7
    assert args.eval_budgets == ["small"]
    with pytest.raises(ElasticConfigError, match=re.escape("stages='[{' is not JSON")):
        TrlParser(ElasticDistillationConfig).parse_args_and_config([*arguments, "--stages", "[{"])
