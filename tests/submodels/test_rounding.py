"""Rounded weights in training: what a checkpoint that is quantised now would compute, at every budget, with straight-through gradients."""

import copy

import pytest
import torch
from transformers import NemotronHConfig

from hf_elastic import ElasticConfig, ElasticForCausalLM
from hf_elastic.architectures.encodings import ENCODINGS
from hf_elastic.quantization.codec import global_scale_of, rounded

FORMATS = {"experts": "nvfp4", "shared_experts": "fp8", "mlp": "nvfp4", "mamba": "fp8", "attention": "nvfp4"}
BUDGETS = {
    "mid": {"hidden": 48, "ffn": 64, "experts": 6, "expert_ffn": 32, "mamba_heads": 6},
    "small": {"hidden": 32, "ffn": 32, "experts": 4, "expert_ffn": 16, "mamba_heads": 4, "layers": [0, 1, 2]},
}


@pytest.fixture(scope="module")
def pair():
    """A family, its copy whose weights are rounded, and what rounds them."""
    torch.manual_seed(0)
    parent = NemotronHConfig(
        hidden_size=64,
        layers_block_type=["linear_attention", "full_attention", "moe", "mlp"],
        intermediate_size=96,
        vocab_size=100,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=2,
        ssm_state_size=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        moe_shared_expert_intermediate_size=64,
        n_group=2,
        topk_group=2,
    )
    family = ElasticForCausalLM._from_config(ElasticConfig.from_parent(parent, BUDGETS))
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    rules = family.architecture.rules(parent)
    encodings = {rule.name: ENCODINGS[FORMATS[rule.kind]] for rule in rules if rule.kind}
    reference = copy.deepcopy(family)
    weights = dict(reference.named_parameters())
    fused = [rule.name for rule in rules if rule.fused == "qkv_proj"]
    assert len(fused) == 3
    together = global_scale_of(*(weights[name] for name in fused))
    with torch.no_grad():
        for name, encoding in encodings.items():
            scale = together if name in fused else None
            weights[name].copy_(rounded(weights[name], encoding.format, global_scale=scale))
    return family, reference, encodings


@pytest.mark.parametrize("budget", [None, *BUDGETS])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_every_budget_computes_with_the_rounded_weights_of_the_parent(pair, budget, train):
    family, reference, encodings = pair
    ids = torch.arange(12)[None]
    results = []
    for model, rounds in ((family, encodings), (reference, None)):
        model.train(train)
        model.zero_grad()
        model.round_weights(rounds)
        with torch.enable_grad(), model.computing(budget):
            logits = model(ids).logits
            logits.square().sum().backward()
        results.append((logits, {name: parameter.grad for name, parameter in model.named_parameters()}))
        model.round_weights(None)
    (logits, gradients), (wanted, wanted_gradients) = results
    assert torch.equal(logits, wanted)
    for name, gradient in gradients.items():
        assert (gradient is None) == (wanted_gradients[name] is None), name
        assert gradient is None or torch.equal(gradient, wanted_gradients[name]), name


def test_only_what_is_computed_in_training_is_rounded(pair):
    family, reference, encodings = pair
    ids = torch.arange(12)[None]
    family.eval(), reference.eval()
    plain, smaller = family(ids).logits, family.sized("mid")(ids).logits
    before = {name: tensor.clone() for name, tensor in family.state_dict().items()}
    family.round_weights(encodings)
    with family.computing(None):
        assert torch.equal(family(ids).logits, reference(ids).logits)
    with family.computing("mid"):
        assert not torch.equal(family(ids).logits, smaller)
    assert torch.equal(family(ids).logits, plain)
    with family.at("mid"):
        assert torch.equal(family(ids).logits, smaller)
    assert all(torch.equal(tensor, before[name]) for name, tensor in family.state_dict().items())
    family.round_weights(None)
    with family.computing(None):
        assert torch.equal(family(ids).logits, plain)
