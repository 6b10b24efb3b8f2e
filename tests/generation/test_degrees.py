"""`StateRule.degree`: how states scale with the share of hidden channels, measured in random models of a few layers."""

import math

import pytest
import torch
from transformers import (
    KimiLinearConfig,
    KimiLinearForCausalLM,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from hf_elastic.architectures import get_architecture
from hf_elastic.generation.caches import read_cache
from hf_elastic.submodels.slicing import slice_state_dict

WIDTH = 192
SIZES = {
    "vocab_size": 128,
    "hidden_size": WIDTH,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def olmo() -> OlmoHybridForCausalLM:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 24}
    delta = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
    width = {"linear_key_head_dim": 24, "linear_value_head_dim": 24}
    return OlmoHybridForCausalLM(OlmoHybridConfig(**SIZES, **heads, **delta, **width))


def kimi() -> KimiLinearForCausalLM:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "linear_num_heads": 4, "linear_head_dim": 24}
    latent = {"kv_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 24}
    return KimiLinearForCausalLM(KimiLinearConfig(**SIZES, **heads, **latent, mlp_layer_types=["dense"] * 4))


def qwen() -> Qwen3_5ForCausalLM:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 24}
    delta = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
    width = {"linear_key_head_dim": 24, "linear_value_head_dim": 24}
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**SIZES, **heads, **delta, **width))


def drawn(make, seed: int):
    """As trained models begin: what matrices put out is as large as what they are given."""
    torch.manual_seed(seed)
    model = make().eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            weight.data.normal_(0, weight.shape[1] ** -0.5)
        elif weight.ndim == 2 or "conv1d" in name:
            weight.data.normal_(0, 1 if weight.ndim == 2 else 0.5)
        elif "norm" in name:
            weight.data.uniform_(0.5, 1.5)
    return model


def sizes_of_states(model, ids: torch.Tensor) -> list[dict[str, float]]:
    with torch.no_grad():
        states = read_cache(model(ids, use_cache=True).past_key_values)
    return [{key: tensor.float().square().mean().sqrt().item() for key, tensor in layer.items()} for layer in states]


@pytest.mark.parametrize("make", [olmo, kimi, qwen])
def test_degrees_are_those_of_random_models(make):
    found: dict[tuple[int, str], list[float]] = {}
    for seed in range(2):
        parent = drawn(make, seed)
        architecture, ids = get_architecture(parent.config.model_type), torch.randint(2, 128, (4, 48))
        whole = sizes_of_states(parent, ids)
        for share in (1 / 2, 1 / 3):
            submodel = architecture.submodel(parent.config, {"hidden": int(WIDTH * share)})
            small = type(parent)(architecture.config_for(parent.config, submodel)).eval()
            small.load_state_dict(slice_state_dict(architecture, parent.config, parent.state_dict(), submodel))
            for layer, (mine, theirs) in enumerate(zip(sizes_of_states(small, ids), whole, strict=True)):
                for key in mine:
                    degree = math.log(mine[key] / theirs[key]) / math.log(share)
                    found.setdefault((layer, key), []).append(degree)
    for (layer, key), degrees in found.items():
        rules = architecture.states(parent.config.per_layer_config[layer], layer)
        said = next(rule.degree for rule in rules if rule.key == key)
        mean = sum(degrees) / len(degrees)
        assert mean == pytest.approx(said, abs=0.2), (layer, key, degrees)
