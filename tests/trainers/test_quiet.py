"""`hf-elastic train` as a new user sees it: nothing is warned of that the user did not set, and what was given is used."""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings

import pytest
import torch
import transformers
from runs import rows, tokenizer
from transformers import TrainingArguments

from hf_elastic.cli import main
from hf_elastic.trainers import ElasticDistillationConfig, ElasticDistillationTrainer


@pytest.fixture
def recipe(family_folder, tmp_path):
    """The path of a minimal recipe; what is given is added to it."""
    shutil.copytree(family_folder("nano3"), tmp_path / "family")
    tokenizer().save_pretrained(tmp_path / "family")
    lines = [json.dumps({"input_ids": [3 + i, 7, 9, 11, 5, 1]}) for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    fields = {"model": tmp_path / "family", "dataset": tmp_path / "rows.jsonl", "output_dir": tmp_path / "out"}
    fields |= {"bf16": "false", "use_cpu": "true", "max_steps": 1, "per_device_train_batch_size": 2}

    def write(**more: object) -> str:
        text = "".join(f"{key}: {value}\n" for key, value in {**fields, **more}.items())
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "recipe.yaml")

    return write


@pytest.mark.skipif(
    torch.accelerator.is_available(), reason="torch warns of pinned memory where there is no accelerator"
)
def test_nothing_is_warned_of(recipe, caplog, capsys):
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.WARNING), torch.enable_grad():
        warnings.simplefilter("always")
        assert main(["train", recipe()]) == 0
    # kernels that are not installed, once each; and that the tiny parents have no tokens of a tokenizer, which is so
    shown = [str(entry.message) for entry in warned if entry.category not in (DeprecationWarning, ResourceWarning)]
    assert shown == []
    said = [record.getMessage() for record in caplog.records]
    assert [text for text in said if not re.search("is falling back to its reference|has new PAD/BOS/EOS", text)] == []
    for package in ("mamba_ssm", "causal_conv1d"):
        assert sum(f"because `{package}` is not installed" in text for text in said) <= 1
    assert "FutureWarning" not in capsys.readouterr().err


def test_checkpointing_is_on_by_its_new_name(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for fields, on in (({}, True), ({"activation_checkpointing": False}, False)):
            made = ElasticDistillationConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **fields)
            assert made.activation_checkpointing is made.gradient_checkpointing is on
    with pytest.warns(FutureWarning, match="gradient_checkpointing"):  # what a user did set
        made = ElasticDistillationConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False
        )
    assert made.activation_checkpointing is False
    pinned = TrainingArguments(output_dir=str(tmp_path)).dataloader_pin_memory and torch.accelerator.is_available()
    assert made.dataloader_pin_memory == pinned


def test_data_for_evaluation_is_used_at_the_end(family_folder, tmp_path, capsys):
    """Upstream takes an `eval_dataset` without `eval_strategy`, and never looks at it."""
    fields = {"use_cpu": True, "bf16": False, "save_strategy": "no", "report_to": []}
    trainer = ElasticDistillationTrainer(
        model=str(family_folder("nano3")),
        args=ElasticDistillationConfig(str(tmp_path / "out"), max_steps=2, **fields),
        train_dataset=rows(4),
        eval_dataset=rows(2),
        processing_class=tokenizer(),
    )
    with torch.enable_grad():
        trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_small/kl" in entry]
    assert [entry["step"] for entry in evaluations] == [2]
    assert {"eval_full/kl", "eval_large/kl", "eval_medium/kl", "eval_small/kl"} <= evaluations[0].keys()
    assert "eval_small/kl" in capsys.readouterr().out


def test_who_says_no_evaluation_gets_none(recipe, tmp_path, capsys):
    with torch.enable_grad():
        assert main(["train", recipe(eval_dataset=tmp_path / "rows.jsonl", eval_strategy='"no"')]) == 0
    assert "eval_" not in capsys.readouterr().out


def test_bars_are_shown_once(recipe, tmp_path, capsys):
    """The model and a teacher are loaded, a checkpoint and the result are saved."""
    transformers.utils.logging.enable_progress_bar()
    try:
        with torch.enable_grad():
            assert main(["train", recipe(teacher=tmp_path / "family")]) in (0, 2)
    finally:
        transformers.utils.logging.disable_progress_bar()
    said = capsys.readouterr().err
    for bar in ("Loading weights", "Writing model shards"):
        assert said.count(f"{bar}:   0%") == 1, bar


def test_an_adapter_is_no_model_and_how_it_gets_into_one_is_said(recipe, tmp_path, capsys):
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # peft asks for a deprecated name, which is not the user's doing
        assert main(["train", recipe(use_peft="true", save_strategy='"no"')]) == 0
    out = str(tmp_path / "out")
    commands = [["generate", out, "x"], ["push", out, "me/x"], ["plan", out], ["export", out, f"{out}2"]]
    commands += [["slice", out, f"{out}2", "--budget", "small"], ["evaluate", out], ["train", recipe(model=out)]]
    for command in commands:
        capsys.readouterr()
        assert main(command) == 2
        said = capsys.readouterr().err
        assert f"{out} holds an adapter, not a model. Merge it into the family" in said, command
        assert "`merge_adapter: true`" in said
        assert str(tmp_path / "family") in said
    shutil.copytree(tmp_path / "family", tmp_path / "out/merged")
    assert main(["generate", out, "x"]) == 2
    assert f"with the adapter merged is in {tmp_path / 'out/merged'}; give that" in capsys.readouterr().err
