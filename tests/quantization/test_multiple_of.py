"""Sizes that keep to the blocks of a format: which they are, and that elastify offers no others."""

import itertools
import json

import pytest
import torch
from cases import nemotron
from quantized import CONFIGS, quantizable_parent

from hf_elastic import elastify
from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.alignment import block_steps
from hf_elastic.cli import main
from hf_elastic.configuration.quantized import refuse_off_blocks
from hf_elastic.errors import ElasticConfigError
from hf_elastic.quantization.recipes import resolve_recipe

ALL = dict.fromkeys(("attention", "mamba", "mlp", "experts", "shared_experts"), "nvfp4")
TARGET = {"budgets": {"half": "60%"}, "sort": False}


def table(name):
    config = CONFIGS[name]()
    return get_architecture(config.model_type), config


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("recipe", ["nvfp4", ALL], ids=["nvfp4", "all"])
def test_the_sizes_that_can_be_cut_are_the_multiples(name, recipe):
    """Against sizes of every axis, tried one by one."""
    architecture, config = table(name)
    encodings = resolve_recipe(recipe, architecture, config)
    steps, full = block_steps(architecture, config, encodings, 16), architecture.full(config)
    free = 0
    for axis in architecture.available_axes(config):
        groups = int(getattr(config, axis.groups)) if axis.groups else 1
        whole = max(full.values(axis.name))
        for size in range(groups, whole, max(groups, whole // 16)):
            try:
                submodel = architecture.submodel(config, {axis.name: size})
            except ElasticConfigError:  # no stock model of this size
                continue
            try:
                refuse_off_blocks(architecture, config, encodings, {"it": submodel})
                fits = True
            except ElasticConfigError:
                fits = False
            assert fits == (size % steps.get(axis.name, 1) == 0), (axis.name, size)
            free += fits
    assert steps["hidden"] == steps["expert_ffn"] == 16
    assert free > 5


def test_heads_of_a_block_are_free_and_narrow_ones_come_together():
    config = nemotron(
        "ME*E",
        hidden_size=64,
        head_dim=16,
        num_attention_heads=8,
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
    )
    architecture = get_architecture(config.model_type)
    names = {rule.name for rule in architecture.rules(config) if rule.kind in ("attention", "mamba")}
    steps = block_steps(architecture, config, names, 16)
    assert "attention_heads" not in steps
    assert "mamba_heads" not in steps
    assert steps["mamba_head_dim"] == 16
    wide = block_steps(architecture, config, names, 64)  # four heads of 16 are a block: in each group of them
    assert wide["attention_heads"] == 4 * config.num_key_value_heads
    assert wide["mamba_heads"] == 4 * config.n_groups
    assert wide["mamba_head_dim"] == config.mamba_head_dim  # none but the whole


def test_several_axes_together_stay_on_blocks():
    architecture, config = table("nemotron")
    encodings = resolve_recipe(ALL, architecture, config)
    steps, full = block_steps(architecture, config, encodings, 16), architecture.full(config)
    least = {
        axis.name: max(int(getattr(config, axis.groups)) if axis.groups else 1, steps.get(axis.name, 1))
        for axis in architecture.available_axes(config)
        if axis.name not in ("experts", "experts_per_token")
    }
    for axes in itertools.combinations(least, 2):
        submodel = architecture.submodel(config, {axis: min(least[axis], max(full.values(axis))) for axis in axes})
        refuse_off_blocks(architecture, config, encodings, {"it": submodel})


def on_blocks(model, recipe="nvfp4"):
    elastic = model.elastic_config
    encodings = resolve_recipe(recipe, elastic.architecture, elastic.parent_config)
    refuse_off_blocks(elastic.architecture, elastic.parent_config, encodings, elastic.family())
    return elastic


def test_shares_and_searched_sizes_are_on_blocks():
    model = quantizable_parent("nemotron", torch.float32)
    axes = ["hidden", "ffn", "expert_ffn", "shared_expert_ffn", "mamba_heads"]
    elastic = on_blocks(elastify(model, axes=axes, formats="nvfp4", **TARGET))
    assert elastic.axes["hidden"]["choices"] == [64, 48, 32, 16]
    assert elastic.axes["shared_expert_ffn"]["choices"] == [48, 32, 16]
    shares = {"half": {"hidden": 0.6, "ffn": 0.4}}
    assert (
        on_blocks(elastify(model, budgets=shares, formats="nvfp4", sort=False)).budgets["half"]["sizes"]["hidden"]
        == 32
    )
    free = elastify(model, budgets=shares, sort=False).elastic_config
    assert free.budgets["half"]["sizes"]["hidden"] == 40  # without formats it is cut off the blocks


def test_a_number_per_axis():
    model = quantizable_parent("nemotron", torch.float32)
    made = elastify(model, axes=["hidden", "ffn"], multiple_of={"hidden": 32}, **TARGET).elastic_config
    assert made.axes["hidden"]["choices"] == [64, 32]
    assert 88 not in made.axes["ffn"]["choices"]
    assert all(size % 8 == 0 for size in made.axes["ffn"]["choices"])
    heads = elastify(
        model, axes=["mamba_heads"], multiple_of={"mamba_heads": 4}, budgets={"a": {"mamba_heads": 0.5}}, sort=False
    )
    assert heads.elastic_config.axes["mamba_heads"]["choices"] == [8, 4]


def test_granite_by_one_share():
    """Portable sizes that are on the blocks as well."""
    model = quantizable_parent("granite", torch.float32)
    axes = ["hidden", "attention_heads", "mamba_heads"]
    elastic = on_blocks(elastify(model, axes=axes, formats="nvfp4", portable=True, **TARGET))
    assert set(elastic.axes["hidden"]["choices"]) <= {64, 48, 32, 16}
    assert len(elastic.axes["hidden"]["choices"]) == len(elastic.axes["mamba_heads"]["choices"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"budgets": {"a": {"hidden": 40}}, "formats": "nvfp4"},
            r"budget 'a': hidden=40 cannot be held in nvfp4.*multiples of 16; give 32 or 48",
        ),
        (
            {"budgets": {"a": "50%"}, "axes": {"ffn": [56]}, "formats": ["nvfp4"]},
            r"axes\['ffn'\]: ffn=56 .*multiples of 16",
        ),
        (
            {"budgets": {"a": {"hidden": [40] * 2}}, "formats": "nvfp5"},
            "there are nvfp4, nvfp4-gguf, fp8.*Did you mean",
        ),
        ({"budgets": {"a": {"hidden": 32}}, "formats": "nvfp4-gguf"}, "no whole blocks of 64"),
        ({"budgets": {"a": {"hidden": 0.5}}, "multiple_of": {"hiden": 16}}, "unknown axis 'hiden'"),
        ({"budgets": {"a": {"hidden": 0.5}}, "multiple_of": {"hidden": 0}}, r"multiple_of\['hidden'\]=0 must be"),
        ({"budgets": {"a": {"hidden": 0.5}}, "multiple_of": {"layers": 2}}, "layers are counted one by one"),
    ],
)
def test_refused_before_anything_is_scored(options, message):
    with pytest.raises(ElasticConfigError, match=message):
        elastify(quantizable_parent("nemotron", torch.float32), sort=False, **options)


def test_fp8_cuts_anywhere():
    model = quantizable_parent("nemotron", torch.float32)
    assert elastify(model, budgets={"a": {"hidden": 40}}, formats="fp8", sort=False).elastic_config.budgets["a"]


def test_the_command(tmp_path, capsys):
    quantizable_parent("granite").save_pretrained(tmp_path / "parent")
    arguments = ["elastify", str(tmp_path / "parent"), str(tmp_path / "family"), "--no-sort", "--axis", "expert_ffn"]
    main(
        [
            *arguments,
            "--axis",
            "shared_expert_ffn",
            "--budget",
            "half=80%",
            "--for",
            "nvfp4",
            "--multiple-of",
            "shared_expert_ffn=32",
        ]
    )
    section = json.loads((tmp_path / "family" / "config.json").read_text())["elastic"]
    assert section["axes"]["expert_ffn"]["choices"] == [32, 16]
    assert section["axes"]["shared_expert_ffn"]["choices"] == [48, 32]
