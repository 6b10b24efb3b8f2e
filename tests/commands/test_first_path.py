"""The path of somebody with a model and a file of chats, by the commands of the docs alone: elastify, train, evaluate, push, export."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from chats import save_parent, write_chats
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteMoeHybridForCausalLM

from hf_elastic.cli import main

pytestmark = pytest.mark.slow

FULL = """\
model: family
dataset: chats.jsonl
eval_dataset: heldout.jsonl
output_dir: trained
eval_strategy: epoch
eval_on_start: true
num_train_epochs: 3
learning_rate: 3.0e-3
per_device_train_batch_size: 16
bf16: false
use_cpu: true
report_to: none
"""

LORA = (
    FULL.replace("output_dir: trained", "output_dir: adapter").replace("3.0e-3", "1.0e-2")
    + """\
use_peft: true
lora_targets: auto
merge_adapter: true
"""
)


def hf_elastic(line: str) -> None:
    """What a user types after `hf-elastic`."""
    assert main(line.split()) == 0


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A folder in which everything up to the trained checkpoints was typed. Later commands are run in it, too."""
    folder = tmp_path_factory.mktemp("path")
    before = Path.cwd()
    os.chdir(folder)
    try:
        save_parent(Path("parent"))
        write_chats(Path("chats.jsonl"), 96, seed=0)
        write_chats(Path("heldout.jsonl"), 16, seed=1)
        hf_elastic(
            "elastify parent family --calibration chats.jsonl --axis hidden --axis mamba_heads --axis expert_ffn --budget half=50%"
        )
        for name, recipe in (("full", FULL), ("lora", LORA)):
            Path(f"{name}.yaml").write_text(recipe)
            with Path(f"{name}.log").open("w") as log, redirect_stdout(log):
                hf_elastic(f"train {name}.yaml --disable_tqdm true")
        yield folder
    finally:
        os.chdir(before)


def test_the_family_has_the_size_that_was_asked_for(path, capsys):
    hf_elastic("plan family --json")
    full, half = json.loads(capsys.readouterr().out)["budgets"]
    assert (full["name"], half["name"]) == ("full", "half")
    assert 0.45 < half["total_params"] / full["total_params"] <= 0.5
    parent = AutoModelForCausalLM.from_pretrained("parent")
    family = AutoModelForCausalLM.from_pretrained("family")
    ids = AutoTokenizer.from_pretrained("family")("<user> what is one plus two ?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(family(ids).logits, parent(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_training_brings_every_size_near(name, path):
    """By what it prints: the divergence of every size from the parent, on rows that were not trained on, before the first step and after."""
    logs = [ast.literal_eval(line) for line in Path(f"{name}.log").read_text().splitlines() if line.startswith("{")]
    before, *_, after = [
        {size: float(log[f"eval_{size}/kl"]) for size in ("full", "half")} for log in logs if "eval_loss" in log
    ]
    assert before["full"] < 1e-6 < before["half"]
    assert after["half"] < 0.8 * before["half"]
    assert after["full"] < 0.5 * before["half"]


@pytest.mark.parametrize("name", ["trained", "adapter/merged"])
def test_evaluate_gives_numbers_for_every_size(name, path, capsys):
    found = {}
    for folder in ("family", name):
        hf_elastic(f"evaluate {folder} --data heldout.jsonl --json")
        found[folder] = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["sizes"]}
        assert list(found[folder]) == ["full", "half"]
        full, half = found[folder].values()
        assert (full["kl"], full["agreement"]) == (0.0, 1.0)
        assert full["tokens"] == half["tokens"] > 100
    assert found[name]["half"]["kl"] < found["family"]["half"]["kl"]
    hf_elastic(f"evaluate {name} --data heldout.jsonl")
    table = capsys.readouterr().out
    assert f"{found[name]['half']['kl']:.4f}" in table
    assert "compare with the whole model (full)" in table


def test_the_merged_adapter_is_a_family(path):
    """Merged, it has no adapter any more, and is not what it was before."""
    ids = AutoTokenizer.from_pretrained("adapter/merged")("<user> what is one plus two ?", return_tensors="pt")
    family = AutoModelForCausalLM.from_pretrained("family", budget="half")
    merged = AutoModelForCausalLM.from_pretrained("adapter/merged", budget="half")
    assert set(merged.state_dict()) == set(family.state_dict())
    with torch.no_grad():
        assert not torch.allclose(merged(**ids).logits, family(**ids).logits, atol=1e-2)


@pytest.mark.parametrize("name", ["trained", "adapter/merged"])
def test_a_dry_run_lists_files_and_card(name, path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hf_elastic(f"push {name} me/granite-elastic --base-model me/granite --license apache-2.0 --overwrite-readme")
    said = capsys.readouterr().out
    for file in (
        "README.md",
        "config.json",
        "budgets/half/model.safetensors",
        "budgets/full/added.safetensors",
        "tokenizer.json",
    ):
        assert file in said
    assert "base_model:\n- me/granite" in said or "base_model: me/granite" in said
    assert "license: apache-2.0" in said
    assert said.strip().endswith("nothing was uploaded; --upload does it")
    assert "training_args.bin" not in said.split("left out:")[0]


def test_the_export_is_a_plain_checkpoint(path):
    """Exported as users do, in a process of its own; loaded by the stock class, it computes what the size computed."""
    line = [sys.executable, "-m", "hf_elastic.cli", *["export", "trained", "plain", "--budget", "half"]]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "exported" in done.stdout
    plain = GraniteMoeHybridForCausalLM.from_pretrained("plain")
    trained = AutoModelForCausalLM.from_pretrained("trained")
    ids = AutoTokenizer.from_pretrained("plain")("<user> what is one plus two ?", return_tensors="pt")
    with torch.no_grad(), trained.at("half"):
        torch.testing.assert_close(plain(**ids).logits, trained(**ids).logits, atol=1e-5, rtol=1e-5)


def test_generate_takes_the_trained_family(path, capsys):
    hf_elastic("generate trained what --budget half --max-new-tokens 4 --json")
    result = json.loads(capsys.readouterr().out)
    assert result["budget"] == "half"
    assert 1 <= result["tokens"] <= 4


def test_evaluate_asks_for_a_task(path, capsys):
    """The default task is that of the lab's model; what another one writes there would only look like a result."""
    assert main(["evaluate", "trained"]) == 2
    assert "Give --data FILE with rows of your own, or --task NAME" in capsys.readouterr().err
