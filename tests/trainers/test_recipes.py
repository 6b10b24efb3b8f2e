"""The recipes parse, and the numbers in them are what their comments work out."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from cases import build_parent, parent_config
from nano_v3 import nano_v3
from published import granite4_tiny, nano2_9b
from quantized import quantizable_parent
from runs import rows, tokenizer
from safetensors.torch import load_file

from hf_elastic import ElasticConfig, ElasticConfigError, elastify, lora_targets, trainers
from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.cost import CostModel
from hf_elastic.cli import main
from hf_elastic.commands.recipes import shipped
from hf_elastic.commands.train import parse
from hf_elastic.lab.family import FAMILY
from hf_elastic.quantization.recipes import quantized_config
from hf_elastic.submodels.adapters import adaptable, factor_rules
from hf_elastic.submodels.training_memory import training_memory
from hf_elastic.trainers import ElasticDistillationConfig
from hf_elastic.trainers.curriculum import make_curriculum

RECIPES = Path(trainers.__file__).parent / "recipes"
# What the recipes ask for and this machine may not have.
HERE = ["--use_cpu", "true", "--bf16", "false"]
PUBLISHED = {"nano3_30b_stage1": (100e9, 8192, 1536), "nano3_30b_stage2": (60e9, 49152, 512)}
GPUS = 64
LORA = {
    "nano3_30b_lora": (nano_v3, 1e9, 3815),
    "granite4_tiny_lora": (granite4_tiny, 200e6, 1526),
    "nano2_9b_lora": (nano2_9b, 500e6, 1908),
}
# Every recipe, and the tiny parent whose family it is run on here.
TINY = {
    "lab": "nano3",
    "minimal": "granite",
    "granite4_tiny_full": "granite",
    "granite4_tiny_lora": "granite",
    "nano2_9b_lora": "nano2",
    "nano3_30b_lora": "nano3",
    "nano2_9b_4b": "nano2",
    "nano3_30b_nvfp4": "blocks",
    **dict.fromkeys(PUBLISHED, "nano3"),
}
# Sizes with the names that any of them draws; multiples of 8, because experts in bfloat16 need rows of 16 bytes.
SIZES = {
    "nano2": {"half": {"ffn": 24}},
    "granite": {"half": {"expert_ffn": 8}},
    "nano3": {
        "23b": {"ffn": 32},
        "12b": {"ffn": 24},
        "half": {"ffn": 24, "expert_ffn": 8},
        "third": {"ffn": 16, "expert_ffn": 8},
        "quarter": {"ffn": 8, "expert_ffn": 8},
    },
    "blocks": {"23b": {"hidden": 48}, "12b": {"hidden": 32, "expert_ffn": 16}},
}


def recipe(name: str, *overrides: str):
    return parse(str(RECIPES / f"{name}.yaml"), [*HERE, *overrides])


def test_every_recipe_is_tested():
    assert {file.stem for file in RECIPES.glob("*.yaml")} == set(shipped()) == set(TINY)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny families with a tokenizer, and rows, on disk."""
    folder = tmp_path_factory.mktemp("tiny")
    for name, sizes in SIZES.items():
        parent = quantizable_parent("nemotron", torch.float32) if name == "blocks" else build_parent(name)
        elastify(parent, budgets=sizes, sort=False).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    rows(4).to_json(folder / "rows.jsonl")
    return folder


@pytest.mark.parametrize("name", TINY)
def test_every_recipe_trains_a_tiny_family(name, folders, tmp_path, capsys):
    """Two steps of each of its stages, as its name runs it, with the fields of this machine."""
    written = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    family, output = folders / TINY[name], tmp_path / "out"
    options = ["--model", family, "--dataset", folders / "rows.jsonl", "--output_dir", output, *HERE]
    options += ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1, "--max_length", 16]
    options += [
        "--warmup_steps",
        0,
        "--logging_steps",
        1,
        "--save_strategy",
        "no",
        "--disable_tqdm",
        "true",
        "--report_to",
        "none",
    ]
    if "stages" in written:
        stages = [{k: v for k, v in stage.items() if k != "tokens"} | {"steps": 2} for stage in written["stages"]]
        options += ["--stages", json.dumps(stages)]
    else:
        options += ["--max_steps", 2]
    options += ["--teacher", family] if "teacher" in written else []
    options += ["--fsdp", ""] if "fsdp" in written else []
    options += ["--eval_dataset", folders / "rows.jsonl"] if name == "minimal" else []
    with torch.enable_grad():
        assert main(["train", name, *map(str, options)]) == 0
    adapted = written.get("use_peft", False)
    assert (output / "adapter_config.json").exists() == adapted
    assert (output / ("merged/config.json" if adapted else "config.json")).exists() == written.get(
        "merge_adapter", not adapted
    )
    if adapted:
        config = json.loads((output / "adapter_config.json").read_text())
        for field, names in lora_targets(parent_config(TINY[name])).items():
            assert sorted(config[field]) == sorted(names)
        changed = load_file(output / "adapter_model.safetensors")
        assert any(tensor.abs().max() > 0 for key, tensor in changed.items() if "lora_B" in key)
    told = capsys.readouterr()
    assert f"recipe: {RECIPES / name}.yaml" in told.err
    assert f"Training {'an adapter' if adapted else 'all weights'} of {family}: " in told.out
    assert "Saved to" in told.out
    if name == "minimal":  # every size is measured before and after, without a word on when
        assert all(
            re.search(rf"^{size} +\d\.\d{{4}} +\d\.\d{{4}}$", told.out, re.MULTILINE) for size in ("full", "half")
        )
        assert told.out.count("'eval_half/kl'") == 2
        assert "an adapter, without the family" in told.out
    if "quantization" in written:
        last = f"hf-elastic quantize {output} {output}-quantized --format nvfp4"
        assert last in told.out
        assert main(last.split()[1:]) == 0
        assert ElasticConfig.from_pretrained(f"{output}-quantized").encodings


def test_a_recipe_that_does_not_say_it_gets_defaults(tmp_path):
    """Those that are other than trl's; what is written or given as an option is kept."""
    file = tmp_path / "recipe.yaml"

    def read(text: str, *options: str):
        file.write_text(f"model: x\ndataset: y\noutput_dir: {tmp_path / 'out'}\n{text}")
        arguments, adapter, args = parse(str(file), [*options])
        return arguments.dtype, args.learning_rate, args.eval_strategy, args.eval_on_start, args.bf16

    assert read("") == ("float32", 1e-4, "no", False, False)  # no bf16 without a device for it
    for peft in ("use_peft: true\nlora_targets: auto\n", "use_peft: true\n"):
        assert read(peft)[:2] == ("auto", 2e-4)
    for options in (["--use_peft", "true"], ["--use_peft=true"], ["--use_peft"], ["--use-peft", "y"]):
        assert read("", *options)[:2] == ("auto", 2e-4)
    assert read("", "--use_peft", "false")[:2] == ("float32", 1e-4)
    assert read("eval_dataset: z\n")[2:4] == ("epoch", True)
    assert read("", "--eval_dataset", "z")[2:4] == ("epoch", True)
    for yes in ("y", "'yes'", "T", "1"):
        assert read(f"use_peft: {yes}\n")[:2] == ("auto", 2e-4)
    assert read("", "--eval-dataset", "z")[2:4] == ("epoch", True)
    for options in ([], ["--eval-steps", "50"]):
        assert read('eval_dataset: z\neval_strategy: "no"\n', *options)[2:4] == ("no", False)
    assert read("eval_dataset: z\neval_steps: 50\n")[2:4] == ("steps", True)
    assert read("eval_dataset: z\n", "--eval-steps", "50", "--eval-on-start", "false")[2:4] == ("steps", False)
    empty = "dtype:\nlearning_rate:\neval_strategy:\neval_on_start:\neval_dataset: z\n"
    assert read(empty)[:4] == ("float32", 1e-4, "epoch", True)
    assert read(empty, "--learning_rate", "0.5")[1] == 0.5
    assert read("learning_rate: 0.5\ndtype: bf16\n", "--eval_strategy", "no")[:3] == ("bf16", 0.5, "no")
    assert read("learning_rate: 0.5\n", "--learning_rate", "0.25")[1] == 0.25
    assert ElasticDistillationConfig(str(tmp_path / "out")).bf16 is False
    assert ElasticDistillationConfig(str(tmp_path / "out"), use_cpu=True, bf16=True).bf16 is True


def test_the_defaults_in_the_shortest_recipe_are_the_defaults():
    text = " ".join((RECIPES / "minimal.yaml").read_text(encoding="utf-8").replace("#", "").split())
    arguments, _, args = recipe("minimal")
    assert f"{args.num_train_epochs:g} epochs (num_train_epochs)" in text
    assert f"{args.per_device_train_batch_size} rows a device and step" in text
    assert f"cut to {args.max_length:,} tokens" in text
    assert f"every {args.save_steps:g} steps (save_steps)" in text
    assert (arguments.dtype, args.learning_rate, args.lr_scheduler_type.value) == ("auto", 2e-4, "linear")
    assert "learning rate 2e-4, for all weights 1e-4 (learning_rate), falling to 0" in text
    assert len(yaml.safe_load((RECIPES / "minimal.yaml").read_text())) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["granite4_tiny_lroa"],
            "no recipe of this name in the package, which has granite4_tiny_full, .*Did you mean 'granite4_tiny_lora'",
        ),
        (["granite4_tiny_lora"], "model: MODEL stands for yours; write it there, or give --model"),
        (["minimal", "--model", "x"], "dataset: DATA stands for yours"),
        (["granite4_tiny_full", "--model", "x", "--dataset", "y", "--fsdp", ""], "teacher: MODEL stands for yours"),
    ],
)
def test_what_only_the_user_knows_is_asked_for(arguments, message, capsys):
    assert main(["train", *arguments, *HERE]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_the_lab_recipe_is_for_the_lab_family():
    _, adapter, args = recipe("lab")
    assert args.max_steps == 1000
    assert adapter.peft_config() is None
    assert {name for stage in args.stages for name in stage.get("budget_probabilities", {})} == {"full", *FAMILY}


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


def test_the_recipe_for_nvfp4_goes_on_from_the_published_run(monkeypatch):
    monkeypatch.setattr(ElasticDistillationConfig, "world_size", property(lambda self: GPUS))
    arguments, _, args = recipe("nano3_30b_nvfp4", "--fsdp", "")
    before = yaml.safe_load((RECIPES / "nano3_30b_stage2.yaml").read_text(encoding="utf-8"))
    assert (args.quantization, arguments.model, arguments.teacher) == (
        "nvfp4",
        before["output_dir"],
        before["teacher"],
    )
    assert args.stages[0]["budget_probabilities"] == before["stages"][0]["budget_probabilities"]
    a_step = args.rows_per_step * args.max_length
    assert args.max_steps == math.ceil(5e9 / a_step)
    text = (RECIPES / "nano3_30b_nvfp4.yaml").read_text(encoding="utf-8")
    assert f"= {a_step:,} tokens a step) = {5e9 / a_step:,.1f} -> {args.max_steps:,} steps on {GPUS} GPUs" in text
    parent = nano_v3()
    experts = parent.n_routed_experts * 2 * parent.moe_intermediate_size * parent.hidden_size
    assert f"{parent.n_routed_experts} experts" in text
    assert f"{parent.moe_intermediate_size:,} x {parent.hidden_size:,} x 4 bytes = {4 * experts / 1e9:.1f} GB" in text
    budgets = {"23b": {"hidden": 2016}, "12b": {"hidden": 1920, "expert_ffn": 960}}
    quantized_config(ElasticConfig.from_parent(parent, budgets), args.quantization)  # all sizes are on the blocks


def test_the_sizes_in_the_published_recipes_are_those_of_the_published_family():
    config = ElasticConfig.from_parent(
        nano_v3(), {"23b": {"hidden": 2016}, "12b": {"hidden": 1920, "expert_ffn": 960}}
    )
    count = CostModel(config.parent_config)
    billions = {name: round(count(member).total_params / 1e9, 2) for name, member in config.family().items()}
    assert billions == {"full": 31.58, "23b": 23.68, "12b": 12.43}
    gigabytes = 16 * count(config.submodel("full")).total_params / 1e9
    assert f"{gigabytes:.1f} GB" in (RECIPES / "nano3_30b_stage1.yaml").read_text(encoding="utf-8")


def test_the_recipe_for_the_published_4b_says_its_steps_and_its_memory(monkeypatch):
    monkeypatch.setattr(ElasticDistillationConfig, "world_size", property(lambda self: GPUS))
    args = recipe("nano2_9b_4b", "--fsdp", "")[2]
    text = " ".join((RECIPES / "nano2_9b_4b.yaml").read_text(encoding="utf-8").split())
    a_step = args.rows_per_step * args.max_length
    assert (args.rows_per_step, args.max_length, args.max_steps) == (1536, 8192, math.ceil(63e9 / a_step))
    assert f"= {a_step:,} tokens a step) = {63e9 / a_step:,.1f} -> {args.max_steps:,} steps on 64 GPUs" in text
    params = CostModel(nano2_9b()).full.total_params / 1e9
    assert f"for {params:.2f}e9 parameters: student 16 bytes a parameter, {16 * params:.1f} GB" in text
    assert (
        f"teacher 2 bytes, {2 * params:.1f} GB; sharded by FSDP2 over 64 GPUs {18 * params / 64:.1f} GB each" in text
    )
    assert f"8 GPUs need {18 * params / 8:.1f} GB each" in text.replace("# ", "")


@pytest.mark.parametrize("name", LORA)
def test_the_lora_recipes_say_their_steps_and_their_memory(name):
    make, tokens, steps = LORA[name]
    parent = make()
    arguments, adapter, args = recipe(name)
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.max_length
    assert args.max_steps == math.ceil(tokens / a_step) == steps
    assert f"= {a_step:,} tokens a step) = {tokens / a_step:,.1f} -> {args.max_steps:,} steps on 1 GPU" in text
    assert (arguments.dtype, arguments.teacher, args.bf16) == ("bfloat16", None, False)  # bf16 of the recipe: see HERE
    config = adapter.peft_config()
    assert (config.target_modules, config.use_rslora, config.lora_dropout) == ("auto", True, 0.0)
    architecture = get_architecture(parent.model_type)
    full = architecture.full(parent)
    counts = {
        rule.name: sum(factor.count(full.at(rule.layer)) for factor in factor_rules(rule, config.r))
        for rule in architecture.rules(parent)
        if adaptable(rule)
    }
    adapted, experts = sum(counts.values()), sum(n for name, n in counts.items() if ".experts." in name)
    assert f"{adapted / 1e6:.1f}e6" in text
    assert not experts or f"{experts / 1e6:.1f}e6 of them for the experts" in text
    total = CostModel(parent).full.total_params
    if name != "nano3_30b_lora":
        sizes = {"length": args.max_length, "rank": config.r, "chunk": args.loss_chunk_size}
        memory = training_memory(parent, "lora", dtype=torch.bfloat16, **sizes)
        for part in memory:
            assert re.search(rf"^#   {part.name}.* {part.size / 1e9:.1f} GB$", text, re.MULTILINE)
        assert f"together {sum(part.size for part in memory) / 1e9:.1f} GB" in text
        assert f"({2 * total / 1e9:.1f} GB of files)" in text
        return
    layer = 2 * parent.n_routed_experts * parent.moe_intermediate_size * parent.hidden_size * 2
    states = architecture.depth(parent) * args.max_length * parent.hidden_size * 2
    logits = args.loss_chunk_size * parent.vocab_size * 4
    parts = [2 * total / 1e9, 16 * adapted / 1e9, 2 * layer / 1e9, states / 1e9 + 1.0, 4 * logits / 1e9]
    for part in parts:
        assert f"-> {part:4.1f} GB" in text
    for amount in (layer, states, logits):
        assert f"{amount / 1e9:.2f} GB" in text
    assert f"together {sum(parts):.1f} GB. Rank 16 would need {16 * adapted / 1e9:.1f} GB more" in text


def test_the_full_recipe_of_granite_says_its_steps_and_its_memory(monkeypatch):
    monkeypatch.setattr(ElasticDistillationConfig, "world_size", property(lambda self: 4))
    arguments, adapter, args = recipe("granite4_tiny_full", "--fsdp", "")
    text = (RECIPES / "granite4_tiny_full.yaml").read_text(encoding="utf-8")
    assert (arguments.dtype, args.teacher_model_init_kwargs, adapter.peft_config()) == (
        "float32",
        {"dtype": "bfloat16"},
        None,
    )
    a_step = args.rows_per_step * args.max_length
    assert args.max_steps == math.ceil(2e9 / a_step) == 3815
    assert f"= {a_step:,} tokens a step) = {2e9 / a_step:,.1f} -> {args.max_steps:,} steps on 4 GPUs" in text
    total = CostModel(granite4_tiny()).full.total_params
    assert total == 6_939_037_248  # what the published files hold
    for amount in (16 * total, 2 * total):
        assert re.search(rf"-> +{amount / 1e9:.1f} GB", text)
    assert f"together {18 * total / 1e9:.1f} GB, sharded by FSDP2 over 4 GPUs: {18 * total / 4e9:.1f} GB each" in text


@pytest.mark.parametrize(("options", "streaming"), [([], False), (["--max_steps", "5"], True)])
def test_a_hub_data_set_is_streamed_only_if_the_steps_are_known(options, streaming, folders, monkeypatch, tmp_path):
    """Upstream refuses epochs of what has no length, after the model was loaded."""
    asked = []

    def load_dataset(name, **kwargs):
        asked.append((name, kwargs["streaming"]))
        raise RuntimeError("seen")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("hf_elastic.storage.sources.pinned", lambda *args, **kwargs: None)
    given = ["--model", str(folders / "granite"), "--dataset", "me/rows", "--output_dir", str(tmp_path / "out")]
    assert main(["train", "minimal", *given, *HERE, *options]) == 2
    assert asked == [("me/rows", streaming)]


def test_options_are_not_shortened(capsys):
    """The defaults depend on some of them, and would not know them by half a name."""
    with pytest.raises(ElasticConfigError, match="unknown option --use_pef; .* Did you mean 'use_peft'"):
        recipe("lab", "--use_pef", "true")


def test_fields_of_lora_without_use_peft_are_refused():
    with pytest.raises(ElasticConfigError, match="lora_r would be ignored without use_peft: true"):
        recipe("lab", "--lora_r", "4")
