"""A `config.json` that lists one dict per block is read as the stock model that computes the same, or refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from cases import VOCAB, nemotron
from compare import assert_same_logits, logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, NemotronHForCausalLM

from hf_elastic import ElasticConfig, ElasticConfigError, ElasticForCausalLM, elastify
from hf_elastic.architectures import as_stock
from hf_elastic.cli import main
from hf_elastic.configuration.parent import parent_from_dict
from hf_elastic.submodels.masking import masked_model

KINDS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
PATTERN = "ME*EM-*E"
SIZES = {1: (12, 3, 16, 24), 3: (8, 2, 8, 16), 7: (6, 1, 12, 24)}
"""Per MoE block: experts, experts per token, their width, and that of the shared one."""


def block_config(**fields):
    """The form as other programs write it: what blocks say is not said for the whole model."""
    stock = nemotron(PATTERN).to_dict()
    for name in (
        "layers_block_type",
        "num_hidden_layers",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
    ):
        stock.pop(name, None)
    for name in (
        "moe_shared_expert_intermediate_size",
        "intermediate_size",
        "moe_latent_size",
        "routed_scaling_factor",
    ):
        stock.pop(name)
    blocks = []
    for i, kind in enumerate(PATTERN):
        block = {"block_type": KINDS[kind]}
        if kind == "E":
            experts, per_token, width, shared = SIZES[i]
            block |= {"n_routed_experts": experts, "num_experts_per_tok": per_token, "moe_intermediate_size": width}
            block |= {
                "moe_shared_expert_intermediate_size": shared,
                "routed_scaling_factor": 1.5,
                "moe_latent_size": None,
            }
        if kind == "-":
            block["intermediate_size"] = 40
        if kind == "M":
            block["ssm_state_size"] = 6
        blocks.append(block)
    more = {
        "model_type": "nemotron_h_puzzle",
        "architectures": ["NemotronHPuzzleForCausalLM"],
        "blockwise_members": ["block_type"],
    }
    auto_map = {"AutoConfig": "configuration_nemotron_h_puzzle.NemotronHPuzzleConfig"}
    return {**stock, **more, "auto_map": auto_map, "block_configs": blocks, "mtp_block_configs": [], **fields}


@pytest.fixture(scope="module")
def whole(original):
    """The uniform model that the blocks were cut from, and the size that they are."""
    sizes = zip(
        ("experts", "experts_per_token", "expert_ffn", "shared_expert_ffn"),
        zip(*SIZES.values(), strict=True),
        strict=True,
    )
    budget = {axis: dict(zip(SIZES, values, strict=True)) for axis, values in sizes}
    return original("nano3"), budget


@pytest.fixture(scope="module")
def folder(whole, tmp_path_factory):
    """Files as NVIDIA publishes them: the base model is called `model`, experts are stored one by one."""
    parent, budget = whole
    made, folder = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("blocks")
    parent.save_pretrained(made / "stock")
    cut = ElasticForCausalLM.from_pretrained(made / "stock", budget="cut", elastic_config={"cut": budget})
    cut.save_pretrained(made / "cut")
    tensors = load_file(made / "cut" / "model.safetensors")
    named = {name.replace("backbone.", "model."): tensor for name, tensor in tensors.items()}
    assert named["model.layers.3.mixer.experts.7.up_proj.weight"].shape == (8, 48)
    assert "model.layers.3.mixer.experts.8.up_proj.weight" not in named
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(block_config()))
    return folder


@pytest.fixture(scope="module")
def expected(whole, ids):
    """Logits of the size, from a mask on the stock model: nothing here has read a list of blocks."""
    parent, budget = whole
    config = ElasticConfig.from_parent(parent.config, {"cut": budget})
    return logits(masked_model(parent, config.submodel("cut")), ids)


def test_it_is_the_model_of_the_blocks(folder, expected, ids):
    model = ElasticForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "nemotron_h"
    assert model.config.architectures == ["NemotronHForCausalLM"]
    assert_same_logits(logits(model, ids), expected)


def test_a_family_is_made_of_it(folder, expected, ids, tmp_path):
    calibration = [
        {"input_ids": row}
        for row in torch.randint(VOCAB, (4, 16), generator=torch.Generator().manual_seed(0)).tolist()
    ]
    family = elastify(
        folder,
        calibration,
        budgets={"half": {"expert_ffn": 0.5, "hidden": 32, "experts": {3: 6}}},
        multiple_of=4,
        progress=False,
    )
    assert_same_logits(logits(family, ids), expected)  # sorted, and the same function
    assert dict(family.elastic_config.submodel("half").items)["expert_ffn"] == (None, 8, None, 4, None, None, None, 8)
    family.save_pretrained(tmp_path / "family")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "family", budget="half")
    assert half.num_parameters() < 0.7 * family.num_parameters()
    with family.at("half"):
        assert_same_logits(logits(family, ids), logits(half, ids))
    half.export(tmp_path / "export", heterogeneous=True)
    assert_same_logits(logits(ElasticForCausalLM.from_pretrained(tmp_path / "export"), ids), logits(half, ids))


def test_a_size_may_be_one_that_another_layer_has(folder):
    parent = ElasticConfig.from_parent(parent_from_dict(block_config()), {"half": {"expert_ffn": {1: 12}}})
    assert parent.axes["expert_ffn"]["choices"] == [16, 12, 8]
    assert parent.submodel("half").at(1)["expert_ffn"] == 12


def test_it_is_planned(folder, capsys):
    assert main(["plan", str(folder), "--size", "expert_ffn=4"]) == 0
    assert "experts=[-,12,-,8,-,-,-,6]" in capsys.readouterr().out


def test_blocks_alike_are_a_plain_stock_model(folder, original, tmp_path, ids):
    """Without a size that differs the stock class builds it; what blocks do not say is said for the whole model."""
    config = block_config(
        moe_intermediate_size=16, n_routed_experts=12, num_experts_per_tok=3, moe_shared_expert_intermediate_size=24
    )
    config["block_configs"] = [{"block_type": block["block_type"]} for block in config["block_configs"]]
    config |= {
        "intermediate_size": 40,
        "routed_scaling_factor": 1.5,
        "hybrid_override_pattern": PATTERN,
        "layers_block_type": [KINDS[k] for k in PATTERN],
    }
    fields = as_stock(config)
    assert "per_layer_config" not in fields
    original("nano3").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    family = ElasticForCausalLM.from_pretrained(tmp_path, elastic_config={"half": {"hidden": 24}})
    assert isinstance(family, NemotronHForCausalLM)
    assert_same_logits(logits(family, ids), logits(original("nano3"), ids))


def changed(block, **fields):
    config = block_config()
    config["block_configs"][block] |= fields
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (block_config(block_configs=[]), "block_configs is missing or empty"),
        (block_config(block_configs=[3]), r"block_configs=\[3\] must be a list with one dict per block"),
        (changed(0, block_type="rwkv"), "block_type='rwkv' must be one of mamba, attention, mlp, moe"),
        (changed(2, q_indexer_top_k=4), "says q_indexer_top_k=4, which is not known of attention blocks"),
        (changed(2, num_attention_heads=4), "says num_attention_heads=4, which is not known"),
        (changed(2, sliding_window=128), "sliding_window is .* in attention blocks; a stock nemotron_h has it once"),
        (block_config(sliding_window=128), "sliding_window=128: attention of a stock nemotron_h sees everything"),
        (changed(4, ssm_state_size=4), r"ssm_state_size is \['4', '6'\] in mamba blocks"),
        (changed(3, routed_scaling_factor=2.5), "routed_scaling_factor is .* in moe blocks"),
        (changed(3, num_experts_per_tok=None), r"block_configs\[3\]: num_experts_per_tok=None must be a whole number"),
        (changed(3, moe_intermediate_size=8.0), r"moe_intermediate_size=8\.0 must be a whole number"),
        (block_config(hybrid_override_pattern="M" * 8), "do not list the kinds of block_configs"),
        (block_config(mtp_block_configs=[{"block_type": "moe", "x": 1}]), r"mtp_block_configs\[0\] says x=1"),
    ],
)  # fmt: skip
def test_what_a_stock_model_does_not_compute_is_refused(config, message, folder, tmp_path):
    shutil.copy(folder / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ElasticConfigError, match=message):
        ElasticForCausalLM.from_pretrained(tmp_path)
