"""What a mask has to correct. Norms of which it has set entries to zero: corrected, they compute what the smaller norm computes on the entries that are kept."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from hf_elastic import elastify
from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.axes import Cut, Norm, TensorRule, dim
from hf_elastic.architectures.pieces import Piece
from hf_elastic.errors import HFElasticError
from hf_elastic.submodels.masking import correct_epsilon, epsilon_of, masked_weight
from hf_elastic.submodels.slicing import check_table
from hf_elastic.submodels.soft import Mixture, SoftUnits

EPS = 0.3  # as large as the mean square, so that an epsilon that is not corrected shows


def grouped(size: int, group: int) -> nn.Module:
    return Zamba2RMSNormGated(size, group, eps=EPS)


HEADS, PER_GROUP = Cut("heads", groups=2), {"heads": 8}
NORMS = {
    "all heads": ((2, HEADS, 3), True, PER_GROUP, {"heads": 4}, lambda size, _: LlamaRMSNorm(size, eps=EPS)),
    "1 + w": ((Cut("hidden"),), Norm(centre=1.0), {"hidden": 20}, {"hidden": 12}, lambda n, _: Gemma3RMSNorm(n, EPS)),
    "smaller groups": ((2, HEADS, 3), True, PER_GROUP, {"heads": 6}, lambda size, _: grouped(size, size // 2)),
    "fewer groups": ((Cut("blocks"), 6), Norm(beside=("blocks",)), {"blocks": 4}, {"blocks": 2}, lambda n, _: grouped(n, 6)),
    "fewer and smaller": (
        (Cut("blocks"), Cut("head_dim")),
        Norm(beside=("blocks",)),
        {"blocks": 4, "head_dim": 6},
        {"blocks": 3, "head_dim": 2},
        lambda size, sizes: grouped(size, sizes["head_dim"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NORMS)
def test_a_masked_norm_is_the_smaller_norm(case):
    factors, norm, full, kept, make = NORMS[case]
    rule = TensorRule("norm.weight", (dim(*factors),), norm=norm)
    piece, generator = Piece(rule, rule, full, kept), torch.Generator().manual_seed(3)
    whole, small = (make(rule.count(sizes), sizes) for sizes in (full, kept))
    with torch.no_grad():
        whole.weight.copy_(torch.randn(whole.weight.shape, generator=generator))
        small.weight.copy_(piece.narrow(whole.weight))
        x = torch.randn(5, rule.count(full), generator=generator)
        expected = small(torch.stack([piece.narrow(row) for row in x]))
        whole.weight.copy_(masked_weight(piece, whole.weight))
        correct_epsilon(whole, piece)
        found = whole(x * rule.mask(full, kept))
    torch.testing.assert_close(torch.stack([piece.narrow(row) for row in found]), expected)
    assert (found.abs().sum(0) > 0).sum() == rule.count(kept)


def test_mixtures_of_norms_over_two_parts_of_one_axis_count_it_once():
    """A norm over hidden state and embeddings beside each other, each as long as `hidden`."""
    rule = TensorRule("norm.weight", (dim(h=(Cut("hidden"),), e=(Cut("hidden"),)),), norm=True)
    pi = torch.tensor([0.25, 0.75])
    mixture = Mixture({"hidden": (48, 12)}, {("hidden", None): pi})
    share = mixture.mean(rule.axes, {"hidden": 48}, None, lambda sizes: rule.alive({"hidden": 48}, sizes))
    assert share.item() == pytest.approx(0.25 + 0.75 * 0.25)


def test_mixtures_weight_every_combination_of_choices():
    probabilities = {("a", None): torch.tensor([0.2, 0.8]), ("b", 1): torch.tensor([0.5, 0.5])}
    mixture = Mixture({"a": (9, 4), "b": (4, 1)}, probabilities)
    mean = mixture.mean(("a", "b", "c"), {"a": 9, "b": 4, "c": 7}, 1, lambda s: math.sqrt(s["a"] + s["b"]) + s["c"])
    expected = [0.1 * 13**0.5, 0.1 * 10**0.5, 0.4 * 8**0.5, 0.4 * 5**0.5]
    assert mean.item() == pytest.approx(7 + sum(expected))


@pytest.mark.parametrize(
    ("module", "norm", "found"),
    [
        (SimpleNamespace(variance_epsilon=1.0), Norm(), "variance_epsilon"),
        (SimpleNamespace(eps=1.0), Norm(), "eps"),
        (SimpleNamespace(eps=1.0, tiny=1.0), Norm(epsilon="tiny"), "tiny"),
        (SimpleNamespace(eps=None), Norm(), "no number called variance_epsilon or eps"),
        (SimpleNamespace(eps=1.0), Norm(epsilon="tiny"), "no number called tiny"),
        (nn.LayerNorm(3), Norm(), "subtracts a mean"),
    ],
    ids=str,
)
def test_the_epsilon_is_found_or_refused(module, norm, found):
    if " " not in found:
        assert epsilon_of(module, norm) == found
        return
    with pytest.raises(HFElasticError, match=found):
        epsilon_of(module, norm)


def test_a_table_that_forgets_a_norm_or_cuts_a_layer_norm_is_refused():
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    model, table = LlamaForCausalLM(config), get_architecture("llama")
    check_table(table, model)

    class Forgets(type(table)):
        def rules(self, config):
            rules = super().rules(config)
            return [TensorRule(rule.template, rule.dims, rule.layer, tied=rule.tied) for rule in rules]

    with pytest.raises(HFElasticError, match="model.norm.weight of a LlamaRMSNorm is cut, and its rule does not say"):
        check_table(Forgets(), model)
    model.model.norm = nn.LayerNorm(8, bias=False)
    with pytest.raises(HFElasticError, match="a LayerNorm subtracts a mean"):
        check_table(table, model)


def test_embeddings_of_an_undecided_width_have_the_mean_scale():
    """`sum_i pi_i sqrt(k_i)`, with the weights of the channels, and with a gradient to the probabilities."""
    config = Gemma2Config(
        vocab_size=8,
        hidden_size=12,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    model = elastify(Gemma2ForCausalLM(config), budgets={"small": {"hidden": 4}}, sort=False)
    units, ids = SoftUnits(model, model.architecture), torch.tensor([[3, 5]])
    with torch.enable_grad():
        pi = torch.tensor([0.25, 0.75], requires_grad=True)
        units.install(Mixture({"hidden": (12, 4)}, {("hidden", None): pi}))
        found = model.model.embed_tokens(ids)
        (gradient,) = torch.autograd.grad(found.sum(), pi)
    units.uninstall()
    kept = torch.tensor([[1.0] * 12, [1.0] * 4 + [0.0] * 8])
    scale = 0.25 * 12**0.5 + 0.75 * 4**0.5
    weight = model.model.embed_tokens.weight[ids]
    torch.testing.assert_close(found, weight * scale * (torch.tensor([0.25, 0.75]) @ kept))
    assert gradient.abs().min() > 0
