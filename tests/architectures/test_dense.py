"""Dense and sparse transformers: what their stock configs tie together, leave out, or call otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from hf_elastic import ElasticConfig
from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.cost import CostModel
from hf_elastic.architectures.obstacles import REFUSES, SILENT
from hf_elastic.errors import ElasticConfigError

FIELDS: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": None,
}
MODEL_TYPES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe"]


def config_of(model_type: str, **fields: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **FIELDS | fields)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_default_configs_are_counted_to_the_last_parameter(model_type):
    config = AutoConfig.for_model(model_type)
    with torch.device("meta"):
        model = get_architecture(model_type).causal_class(config)
    assert CostModel(config).full.total_params == model.num_parameters()


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_width_that_heads_do_not_divide_is_refused_where_the_stock_config_refuses_it(model_type):
    table, config = get_architecture(model_type), config_of(model_type)
    with pytest.raises(ElasticConfigError, match=r"cannot hold \{'hidden': 20\}.*\(20\) is not a multiple.*\(6\)"):
        table.submodel(config, {"hidden": 20})
    assert table.submodel(config, {"hidden": 20, "attention_heads": 4})["hidden"] == 20
    assert get_architecture("qwen3").submodel(config_of("qwen3"), {"hidden": 20})["hidden"] == 20


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "mixtral"])
def test_fields_that_a_stock_model_does_not_read_are_not_read_here(model_type):
    table, given = get_architecture(model_type), {"attention_bias": True, "mlp_bias": True}
    assert table.rules(config_of(model_type, **given)) == table.rules(config_of(model_type))


def test_fields_with_two_names_are_cut_under_both():
    """Qwen3-MoE's config stores `num_experts` as `num_local_experts`; a size of it must not be overruled by the parent's."""
    table, config = get_architecture("qwen3_moe"), config_of("qwen3_moe", num_experts=8, num_experts_per_tok=2)
    cut = table.config_for(config, table.submodel(config, {"experts": 5}))
    assert cut.num_experts == cut.num_local_experts == 5
    varied = table.config_for(config, table.submodel(config, {"experts": {1: 3}}))
    assert [varied.per_layer_config[i].num_experts for i in range(3)] == [8, 3, 8]


def test_dense_layers_stay_dense_when_others_are_dropped():
    """Every second layer has experts, and the first of them is made dense."""
    config = config_of("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[1], num_experts=8)
    table = get_architecture("qwen3_moe")
    kinds = ["mlp", "mlp", "mlp", "moe", "mlp", "moe"]
    assert [kind in table.parts(config, i) for i, kind in enumerate(kinds)] == [True] * 6
    cut = table.config_for(config, table.submodel(config, {"layers": [0, 3, 4, 5]}))
    assert ["moe" in table.parts(cut, i) for i in range(4)] == [False, True, False, True]


def test_a_window_that_the_config_class_converts_is_no_contradiction():
    """Gemma 3 with bidirectional attention halves the window that it is given, and writes the one it was given."""
    config = config_of("gemma3_text", sliding_window=6, use_bidirectional_attention=True, hidden_size=24)
    assert config.sliding_window == 4
    elastic = ElasticConfig.from_parent(config, {"small": {"ffn": 8}})
    again = ElasticConfig.from_dict(elastic.to_dict())
    assert again.parent_config.sliding_window == 4
    assert again.stock_config(again.submodel("small")).sliding_window == 4
    with pytest.raises(ElasticConfigError, match="num_key_value_heads"):
        ElasticConfig.from_dict(
            elastic.to_dict() | {"parent_config": {**config.to_dict(), "num_key_value_heads": 5.5}}
        )


def test_what_vllm_takes_for_the_width_of_a_head():
    table, config = get_architecture("qwen2"), config_of("qwen2", hidden_size=48)
    by_one_share = table.submodel(config, {"hidden": 32, "attention_heads": 4})
    assert not list(table.obstacles(config, by_one_share))
    (obstacle,) = table.obstacles(config, table.submodel(config, {"hidden": 24}))
    assert (obstacle.program, obstacle.does) == ("vLLM", SILENT)
    (obstacle,) = table.obstacles(config, table.submodel(config, {"attention_heads": 4}))
    assert (obstacle.program, obstacle.does) == ("vLLM", REFUSES)
