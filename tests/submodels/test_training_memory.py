"""Memory of training runs, counted from a config: against peft, against arithmetic by hand, and as the command says it."""

from __future__ import annotations

import json

import pytest
import torch
from cases import parent_config
from nano_v3 import nano_v3
from peft import LoraConfig, get_peft_model

from hf_elastic import ElasticConfig, ElasticConfigError
from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.cost import CostModel
from hf_elastic.cli import main
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
    found = training_memory(nano_v3(), "full", dtype=torch.float32, gpus=8)
    cost = CostModel(nano_v3()).full
    whole = cost.weight_bytes(torch.float32)
    kept = {part.name: part.size for part in found if part.counted}
    assert kept == {
        "weights": whole // 8,
        "gradients": whole // 8,
        "AdamW": 2 * whole // 8,
        "teacher": cost.weight_bytes(torch.bfloat16) // 8,
    }
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
    ElasticConfig.from_parent(nano_v3(), {"half": {"hidden": 1344}}).save_pretrained(folder)
    return str(folder)


def test_plan_says_what_a_run_takes(folder, capsys):
    arguments = ["plan", folder, "--training", "lora", "--rank", "8", "--length", "2048", "--dtype", "bf16"]
    main(arguments)
    text = capsys.readouterr().out
    assert "219,720,192 parameters of rank 8" in text
    assert "leave a tenth of the GPU free besides" in text
    main([*arguments, "--json"])
    run = json.loads(capsys.readouterr().out)["training"]
    assert run["bytes"] == sum(part["bytes"] for part in run["parts"])
    assert [part["part"] for part in run["parts"] if part["counted"]] == ["weights", "adapter"]
    assert run["flops_per_token"] < training_flops(nano_v3(), "lora", [CostModel(nano_v3()).full.active_params])


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
