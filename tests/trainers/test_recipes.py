"""The recipes parse, and the numbers in them are what their comments work out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from nano_v3 import nano_v3

from hf_elastic import ElasticConfig, ElasticConfigError, elastify, trainers
from hf_elastic.architectures.cost import CostModel
from hf_elastic.architectures.nemotron_h import NemotronH
from hf_elastic.commands.train import parse
from hf_elastic.lab.family import FAMILY
from hf_elastic.lab.parent import load_parent
from hf_elastic.submodels.adapters import factor_rules
from hf_elastic.trainers import ElasticDistillationConfig, ElasticDistillationTrainer
from hf_elastic.trainers.curriculum import make_curriculum

RECIPES = Path(trainers.__file__).parent / "recipes"
# What the recipes ask for and this machine may not have.
HERE = ["--use_cpu", "true", "--bf16", "false"]
PUBLISHED = {"nano3_30b_stage1": (100e9, 8192, 1536), "nano3_30b_stage2": (60e9, 49152, 512)}
GPUS = 64


def recipe(name: str, *overrides: str):
    return parse(str(RECIPES / f"{name}.yaml"), [*HERE, *overrides])


def test_every_recipe_is_tested():
    assert {file.stem for file in RECIPES.glob("*.yaml")} == {"lab", "nano3_30b_lora", *PUBLISHED}


def test_the_lab_recipe_trains_the_lab_family(tmp_path):
    with torch.enable_grad():
        _, adapter, args = recipe("lab", "--output_dir", str(tmp_path))
        assert args.max_steps == 1000
        assert adapter.peft_config() is None
        parent, tokenizer = load_parent()
        model = elastify(parent, budgets=FAMILY, sort=False)
        args.stages = [{**stage, "steps": 1} for stage in args.stages]
        args.max_steps = 2
        text = Dataset.from_list([{"text": "KAB+3"}] * 32)
        ElasticDistillationTrainer(model, args=args, train_dataset=text, processing_class=tokenizer).train()


def test_the_lab_recipe_takes_hand_overs():
    assert "--handover_probability 0.5 --handover_token" in (RECIPES / "lab.yaml").read_text(encoding="utf-8")
    args = recipe("lab", "--handover_probability", "0.5", "--handover_token", "</think>")[2]
    assert (args.handover_probability, args.handover_token, args.trains_handover) == (0.5, "</think>", True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_run_has_the_published_tokens_lengths_and_batches(name, monkeypatch):
    monkeypatch.setattr(ElasticDistillationConfig, "world_size", property(lambda self: GPUS))
    tokens, length, batch = PUBLISHED[name]
    arguments, _, args = recipe(name, "--fsdp", "")
    assert args.max_length == length
    assert args.rows_per_step == args.per_device_train_batch_size * args.gradient_accumulation_steps * GPUS == batch
    assert args.max_steps == math.ceil(tokens / (length * batch)) == {8192: 7948, 49152: 2385}[length]
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"{args.max_steps:,} steps on {GPUS} GPUs" in text
    assert (args.learning_rate, args.warmup_steps, str(args.optim.value)) == (1e-4, 60, "adamw_torch")
    assert args.teacher_model_init_kwargs == {"dtype": "bfloat16"}
    assert arguments.dtype == "float32"
    curriculum = make_curriculum(
        ["full", "23b", "12b"],
        args.budget_probabilities,
        args.stages,
        args.max_steps,
        args.max_length,
        args.seed,
        context=262144,
        rows=args.rows_per_step,
    )
    assert curriculum.total_steps == args.max_steps
    probabilities = list(curriculum.stage(0).budget_probabilities.values())
    assert probabilities == ([1 / 3] * 3 if name.endswith("1") else [0.5, 0.3, 0.2])


def test_the_sizes_in_the_published_recipes_are_those_of_the_published_family():
    config = ElasticConfig.from_parent(
        nano_v3(), {"23b": {"hidden": 2016}, "12b": {"hidden": 1920, "expert_ffn": 960}}
    )
    count = CostModel(config.parent_config)
    billions = {name: round(count(member).total_params / 1e9, 2) for name, member in config.family().items()}
    assert billions == {"full": 31.58, "23b": 23.68, "12b": 12.43}
    gigabytes = 16 * count(config.submodel("full")).total_params / 1e9
    assert f"{gigabytes:.1f} GB" in (RECIPES / "nano3_30b_stage1.yaml").read_text(encoding="utf-8")


def test_the_lora_recipe_says_its_steps_and_its_memory():
    arguments, adapter, args = recipe("nano3_30b_lora")
    text = (RECIPES / "nano3_30b_lora.yaml").read_text(encoding="utf-8")
    tokens = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.max_length
    assert args.max_steps == math.ceil(1e9 / tokens) == 3815
    assert f"= {tokens:,} tokens a step) = {1e9 / tokens:,.1f} -> {args.max_steps:,} steps on 1 GPU" in text
    assert (arguments.dtype, arguments.teacher, args.bf16) == ("bfloat16", None, False)  # bf16 of the recipe: see HERE
    config = adapter.peft_config()
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (8, 16, True, 0.0)
    parent = nano_v3()
    rules, full = NemotronH().rules(parent), NemotronH().full(parent)
    targets = [f".{name}.weight" for name in config.target_modules] + [f".{name}" for name in config.target_parameters]
    counts = {
        rule.name: sum(factor.count(full.at(rule.layer)) for factor in factor_rules(rule, config.r))
        for rule in rules
        if rule.name.endswith(tuple(targets))
    }
    adapted, experts = sum(counts.values()), sum(n for name, n in counts.items() if ".experts." in name)
    assert f"{adapted / 1e6:.1f}e6 of the adapter (rank 8; {experts / 1e6:.1f}e6 of them for the experts)" in text
    total = CostModel(parent).full.total_params
    layer = 2 * parent.n_routed_experts * parent.moe_intermediate_size * parent.hidden_size * 2
    depth = len(parent.layers_block_type)
    rows = depth * args.max_length * parent.hidden_size * 2
    logits = args.loss_chunk_size * parent.vocab_size * 4
    parts = [2 * total / 1e9, 16 * adapted / 1e9, 2 * layer / 1e9, rows / 1e9 + 1.0, 4 * logits / 1e9]
    for part in parts:
        assert f"-> {part:4.1f} GB" in text
    assert f"{layer / 1e9:.2f} GB" in text
    assert f"{rows / 1e9:.2f} GB" in text
    assert f"{logits / 1e9:.2f} GB" in text
    assert f"together {sum(parts):.1f} GB. Rank 16 would need {16 * adapted / 1e9:.1f} GB more" in text


def test_fields_of_lora_without_use_peft_are_refused():
    with pytest.raises(ElasticConfigError, match="lora_r would be ignored without use_peft: true"):
        recipe("lab", "--lora_r", "4")
