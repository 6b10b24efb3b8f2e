"""Memory of training runs, counted from a config: against peft, against arithmetic by hand, and as the command says it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from cases import parent_config
from nano_v3 import nano_v3
from peft import LoraConfig, get_peft_model
from published import granite4_tiny, nano2_9b

from hf_elastic import ElasticConfig, ElasticConfigError
from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.cost import CostModel
from hf_elastic.cli import main
from hf_elastic.commands.elastify import parse_budget
from hf_elastic.submodels.training_memory import adapter_parameters, training_flops, training_memory

LORA = {
    "nano3": (
        ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "up_proj", "down_proj"],
        ["mixer.experts.up_proj", "mixer.experts.down_proj"],
    ),
    "granite": (
        ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "input_linear", "output_linear"],
        ["experts.gate_up_proj", "experts.down_proj"],
    ),
}


def sizes(parts):
    return {part.name: part.size for part in parts}


@pytest.mark.parametrize("name", LORA)
def test_adapters_are_counted_as_peft_makes_them(name, parent):
    model = parent(name)
    counted = adapter_parameters(get_architecture(model.config.model_type), model.config, rank=2)
    modules, parameters = LORA[name]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=modules, target_parameters=parameters))
    made = sum(p.numel() for key, p in adapted.named_parameters() if "lora_" in key)
    assert counted == made


def test_a_full_run_keeps_weights_gradients_two_moments_and_a_teacher():
    found = training_memory(nano_v3(), "full", dtype=torch.float32, gpus=8, teacher=torch.bfloat16)
    cost = CostModel(nano_v3()).full
    whole = cost.weight_bytes(torch.float32)
    kept = {part.name: part.size for part in found if part.counted}
    assert kept == {
        "weights": whole // 8,
        "gradients": whole // 8,
        "AdamW": 2 * whole // 8,
        "teacher": cost.weight_bytes(torch.bfloat16) // 8,
    }
    copied = sizes(training_memory(nano_v3(), "full", dtype=torch.float32, gpus=8))
    assert copied == sizes(found) | {"teacher": whole // 8}  # of the model as the run has it
    assert sizes(found)["hidden states"] == 52 * 4096 * 2688 * 2  # FSDP gathers in bfloat16


def test_estimates_follow_the_rows_and_stop_at_the_context():
    config = parent_config("nano3")
    one, two = (sizes(training_memory(config, "lora", length=64, rows=rows)) for rows in (1, 2))
    for name in ("hidden states", "one layer"):
        assert two[name] == 2 * one[name] > 0
    assert sizes(training_memory(config, "lora", length=10**6)) == sizes(training_memory(config, "lora", length=128))
    assert "folded experts" in one
    assert "gathered" not in one
    assert "gathered" in sizes(training_memory(config, "lora", gpus=2))


def test_operations_count_every_pass_of_student_and_teacher():
    config = parent_config("nano3")
    active = CostModel(config).full.active_params
    assert training_flops(config, "full", [active]) == 2 * (4 + 1) * active
    assert training_flops(config, "lora", [active, active // 2], [0.0, 1.0]) == 2 * (3 * (active // 2) + active)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "qlora"}, "training 'qlora' must be one of full, lora"),
        ({"kind": "lora", "rank": 0}, "rank=0 must be a whole number of at least 1"),
        ({"kind": "full", "gpus": 1.5}, r"gpus=1\.5 must be a whole number"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ElasticConfigError, match=message):
        training_memory(parent_config("nano3"), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    parent = nano_v3()
    parent.dtype = torch.bfloat16
    ElasticConfig.from_parent(parent, {"half": {"hidden": 1344}}).save_pretrained(folder)
    return str(folder)


def test_plan_says_what_a_run_takes(folder, capsys):
    arguments = ["plan", folder, "--training", "lora", "--rank", "8", "--length", "2048", "--dtype", "bf16"]
    main(arguments)
    text = capsys.readouterr().out
    assert "219,720,192 parameters of rank 8" in text
    assert "leave a sixth of the GPU free besides" in text
    main([*arguments, "--json"])
    run = json.loads(capsys.readouterr().out)["training"]
    assert run["bytes"] == sum(part["bytes"] for part in run["parts"])
    assert [part["part"] for part in run["parts"] if part["counted"]] == ["weights", "adapter"]
    assert run["flops_per_token"] < training_flops(nano_v3(), "lora", [CostModel(nano_v3()).full.active_params])


@pytest.mark.parametrize(
    ("options", "weights", "teacher"),
    [
        (["--training", "full"], "float32", "float32"),
        (["--training", "full", "--dtype", "bf16"], "bfloat16", "bfloat16"),
        (["--training", "lora"], "bfloat16", None),
    ],
)
def test_plan_counts_the_types_that_train_uses(options, weights, teacher, folder, capsys):
    main(["plan", folder, *options, "--json"])
    run = json.loads(capsys.readouterr().out)["training"]
    how = {part["part"]: part["how"] for part in run["parts"]}
    assert run["dtype"] == weights
    assert how["weights"].endswith(f" parameters in {weights}")
    assert how.get("teacher") == (teacher and f"the frozen parent in {teacher}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "8"], "--gpus describe a training run; give --training full or lora too"),
        (["--training", "full", "--rank", "8"], "--rank is of adapters"),
        (["--training", "lora", "--context", "4096"], "Rows of a training run have a --length"),
        (["--training", "lora", "--length", "0"], "length=0 must be a whole number"),
    ],
)
def test_plan_refuses_options_that_nothing_would_look_at(folder, options, message, capsys):
    assert main(["plan", folder, *options]) != 0
    assert message in capsys.readouterr().err


NANO_9B, GRANITE_TINY = nano2_9b(), granite4_tiny()
ROWS = {
    "weights": "weights, bfloat16",
    "gradients": "gradients",
    "AdamW": "AdamW",
    "adapter": "adapter, with gradients and AdamW",
    "teacher": "teacher, bfloat16",
    "hidden states": "*hidden states, checkpointed*",
    "one layer": "*one layer, computed again*",
    "logits": "*logits*",
    "gathered": "*gathered by FSDP*",
    "folded experts": "*experts with the adapter folded in*",
}


def test_the_guide_says_what_is_counted():
    page = (Path(__file__).parents[2] / "docs" / "make.md").read_text(encoding="utf-8")
    table = page.partition("<!-- training:begin -->")[2].partition("<!-- training:end -->")[0]
    said = {
        cells[0]: cells[1:] for cells in (row.strip()[1:-1].split("|") for row in table.splitlines() if "|" in row)
    }
    said = {name.strip(): [cell.strip() for cell in cells] for name, cells in said.items()}
    runs = [
        training_memory(GRANITE_TINY, "lora", rank=8),
        training_memory(NANO_9B, "lora", rank=64),
        training_memory(nano_v3(), "lora", rank=16, gpus=8),
        training_memory(nano_v3(), "full", gpus=8),
    ]
    for name, row in ROWS.items():
        cells = [f"{sizes(run)[name] / 1e9:.1f}" if name in sizes(run) else "" for run in runs]
        assert said[row] == cells, row
    assert said["**together**"] == [f"**{sum(part.size for part in run) / 1e9:.1f}**" for run in runs]

    def together(config, kind, **options):
        return f"{sum(part.size for part in training_memory(config, kind, **options)) / 1e9:.1f} GB"

    page = " ".join(page.split())
    assert "`--training full --gpus 8 --dtype bfloat16`" in table
    f32, half = {"dtype": torch.float32}, {"dtype": torch.float32, "teacher": torch.bfloat16}
    for config in (GRANITE_TINY, NANO_9B):
        both = f"{together(config, 'full', **f32)}, and {together(config, 'full')} with `dtype: bfloat16`"
        assert f"All weights do not: {both}" in page
    four = [together(NANO_9B, "full", gpus=4, **types) for types in (f32, half)]
    assert f"they take {four[0]} each in float32, or {four[1]} with the teacher in bfloat16" in page
    eight = [together(nano_v3(), "full", gpus=8, **types) for types in (f32, half)]
    assert f"in float32 ({eight[0]}, or {eight[1]} with the teacher in bfloat16)" in page


SUGGESTED = {
    "Granite 4.0 H Tiny": (GRANITE_TINY, "6.94B (1.47B), 5.43B (1.46B), 3.16B (1.18B)", "1.1e10"),
    "Nemotron Nano 9B v2": (NANO_9B, "8.89B, 7.90B, 6.57B", "6.4e10"),
    "Nemotron 3 Nano 30B-A3B": (nano_v3(), "31.58B (3.58B), 23.68B (2.69B), 12.43B (2.08B)", "2.4e10"),
}


@pytest.mark.parametrize("name", SUGGESTED)
def test_the_sizes_that_the_guide_suggests_are_counted(name):
    page = (Path(__file__).parents[2] / "docs" / "make.md").read_text(encoding="utf-8")
    config, counted, flops = SUGGESTED[name]
    (budgets, told) = re.search(rf"^\| {name} \| `(.*?)` \| (.*?) \|$", page, re.MULTILINE).groups()
    family = ElasticConfig.from_parent(config, dict(map(parse_budget, budgets.replace("--budget ", "").split())))
    costs = [CostModel(config)(member) for member in family.family().values()]
    with_active = "(" in told
    words = [
        f"{c.total_params / 1e9:.2f}B" + (f" ({c.active_params / 1e9:.2f}B)" if with_active else "") for c in costs
    ]
    assert ", ".join(words) == told == counted
    per_token = training_flops(config, "lora", [cost.active_params for cost in costs])
    assert f"{per_token:.1e}".replace("e+", "e") == flops
    assert re.search(rf"^\| {name} with .*?, LoRA \| {flops} \| {flops[:3]}e18 \|$", page, re.MULTILINE)
