"""A block that several layers share: one tensor under several names, stored once, cut alike, with an entry of its own for every use."""

import contextlib
import itertools
import random

import pytest
import torch
from cases import randomize
from compare import assert_same_logits, assert_same_weights, logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Zamba2Config, Zamba2ForCausalLM

from hf_elastic import ElasticConfig, ElasticForCausalLM, elastify
from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.cost import CostModel
from hf_elastic.architectures.pieces import pieces
from hf_elastic.architectures.sharing import in_turn, ranking_in_turn
from hf_elastic.errors import ElasticConfigError, HFElasticError
from hf_elastic.routing.router import BudgetRouter
from hf_elastic.submodels.masking import masked_model
from hf_elastic.submodels.slicing import check_table, slice_state_dict

TABLE = get_architecture("zamba2")
HYBRID = (1, 3, 4, 6)  # with two blocks: 1 and 4 share one, 3 and 6 the other
SHARED = "model.layers.{}.shared_transformer.feed_forward.{}"
SMALL = {"hidden": 32, "ffn": 10, "kv_heads": 2, "mamba_heads": 8, "layers": [0, 3, 4, 5, 6]}
"""Without layer 1, which has the stored copies of a block in the parent."""


def config(blocks: int = 2, **fields) -> Zamba2Config:
    kinds = ["hybrid" if i in HYBRID else "linear_attention" for i in range(7)]
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 20, "num_attention_heads": 4, "adapter_rank": 3}
    mamba = {"n_mamba_heads": 12, "mamba_ngroups": 2, "mamba_d_state": 4, "chunk_size": 8}
    rest = {"layers_block_type": kinds, "num_hidden_layers": 7, "num_mem_blocks": blocks, "use_mem_rope": True}
    return Zamba2Config(**sizes | mamba | rest | fields)


@pytest.fixture(scope="module")
def parent() -> Zamba2ForCausalLM:
    model = Zamba2ForCausalLM(config()).eval()
    randomize(model)
    return model


@pytest.fixture(scope="module")
def folder(parent, tmp_path_factory):
    place = tmp_path_factory.mktemp("family")
    parent.save_pretrained(place / "plain")
    elastic = ElasticConfig.from_parent(parent.config, {"small": SMALL})
    family = ElasticForCausalLM.from_pretrained(place / "plain", elastic_config=elastic)
    family.save_pretrained(place / "stock")
    family.save_pretrained(place / "nested", layout="nested")
    return place


@pytest.fixture(scope="module")
def family(folder) -> ElasticForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder / "stock")


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(1, 64, (2, 17), generator=torch.Generator().manual_seed(0))


def partition(blocks: dict[int, int]) -> set[frozenset[int]]:
    """Layers by the block that they have."""
    return {frozenset(i for i in blocks if blocks[i] == block) for block in blocks.values()}


def stock_partition(kept: tuple[int, ...], blocks: int) -> set[frozenset[int]]:
    """The kept layers by the block that a stock model of them gives each, read off its parameters."""
    with torch.device("meta"):
        model = Zamba2ForCausalLM(
            config(blocks, layers_block_type=["hybrid"] * len(kept), num_hidden_layers=len(kept))
        )
    weights = [layer.shared_transformer.self_attn.q_proj.weight for layer in model.model.layers]
    return partition({layer: id(weight) for layer, weight in zip(kept, weights, strict=True)})


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_layers_are_dropped_where_a_stock_model_gives_the_others_their_own_block(blocks):
    of = {layer: TABLE.sharers(config(blocks), layer)[0] for layer in HYBRID}
    assert partition(of) == stock_partition(HYBRID, blocks)
    right, possible = {}, []
    for kept in (k for n in range(1, 5) for k in itertools.combinations(HYBRID, n)):
        own = partition({layer: of[layer] for layer in kept})
        if any(stock_partition(kept, n) == own for n in range(1, len(kept) + 1)):
            possible.append(kept)
        with contextlib.suppress(ElasticConfigError):
            submodel = TABLE.submodel(config(blocks), {"layers": kept})
            right[kept] = stock_partition(kept, TABLE.config_for(config(blocks), submodel).num_mem_blocks) == own
    assert list(right) == possible
    assert all(right.values())
    assert len(right) == (13 if blocks == 2 else 15)


def test_dropping_layers_that_would_give_others_the_wrong_block_is_an_error():
    with pytest.raises(ElasticConfigError, match=r"layers=\[1, 3, 6\] are kept, which have the blocks \[1, 3, 3\]"):
        TABLE.submodel(config(), {"layers": [0, 1, 2, 3, 5, 6]})


@pytest.mark.parametrize("seed", range(4))
def test_every_prefix_of_a_ranking_can_be_built(seed):
    ranking = list(range(7))
    random.Random(seed).shuffle(ranking)
    for blocks in (1, 2, 3):
        found = TABLE.keepable_ranking(config(blocks), ranking)
        assert sorted(found) == sorted(ranking)
        for count in range(1, 8):
            TABLE.submodel(config(blocks), {"layers": found[:count]})
    assert ranking_in_turn(ranking, dict.fromkeys(HYBRID, 0)) == ranking  # of one block any layer may go
    assert [in_turn(blocks) for blocks in ([0, 1, 1, 0], [1, 0, 1], [])] == [False, True, True]


@pytest.mark.parametrize("layers", [[0, 1, 3, 4, 6], [0, 3, 4, 5, 6], [1, 2, 4]], ids=str)
def test_what_is_stored_in_a_submodel_is_what_its_own_table_says(layers):
    stock = config(use_shared_attention_adapter=True)
    submodel = TABLE.submodel(stock, {"layers": layers, "ffn": 7})
    own = TABLE.config_for(stock, submodel)
    targets = {piece.target.name: (piece.copy_of, piece.shape) for piece in pieces(TABLE, stock, submodel)}
    full = TABLE.full(own)
    assert targets == {rule.name: (rule.copy_of, rule.shape(full.at(rule.layer))) for rule in TABLE.rules(own)}
    assert any(copy is not None and ".shared_transformer." in copy for copy, _ in targets.values())
    with torch.device("meta"):
        model = Zamba2ForCausalLM(own)
    check_table(TABLE, model)
    assert CostModel(stock)(submodel).total_params == model.num_parameters()


def test_one_size_in_all_layers_that_share_a_block():
    for sizes in ([None, 10, None, 20, 20, None, 20], {1: 10}):
        with pytest.raises(ElasticConfigError, match=r"ffn=\[10, 20\] in layers \[1, 4\], which share one block"):
            TABLE.submodel(config(), {"ffn": sizes})
    alike = TABLE.submodel(config(), {"ffn": [None, 10, None, 20, 10, None, 20]})  # two blocks, two sizes
    assert TABLE.submodel(config(), {"ffn": {1: 10}, "layers": [0, 1, 3]}).at(1)["ffn"] == 10  # nobody else has it
    assert CostModel(config())(alike).total_params < CostModel(config()).full.total_params


def test_a_slice_without_the_owner_is_the_mask_the_view_and_both_layouts(parent, folder, family, ids):
    submodel = family.elastic_config.submodel("small")
    sliced = AutoModelForCausalLM.from_pretrained(folder / "stock", budget="small")
    assert_same_weights(sliced, slice_state_dict(TABLE, parent.config, parent.state_dict(), submodel))
    assert_same_weights(sliced, AutoModelForCausalLM.from_pretrained(folder / "nested", budget="small"))
    expected = logits(sliced, ids)
    assert_same_logits(logits(masked_model(parent, submodel), ids), expected, atol=2e-4)
    with family.at("small"):
        assert_same_weights(family, sliced)
        assert_same_logits(logits(family, ids), expected)
    assert (expected - logits(parent, ids)).abs().max() > 0.1


def test_a_family_is_stored_once(parent, folder):
    stored = load_file(folder / "stock" / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == parent.num_parameters()
    nested = [load_file(file) for file in sorted((folder / "nested").rglob("*.safetensors"))]
    assert sum(tensor.numel() for file in nested for tensor in file.values()) == parent.num_parameters()


def test_the_name_of_any_of_the_layers_is_read(parent, folder, tmp_path):
    """Files of other programs have a shared tensor under another layer's name, or under the name of each."""
    stored = load_file(folder / "stock" / "model.safetensors")
    moved = {name.replace(".layers.1.shared_", ".layers.4.shared_"): tensor for name, tensor in stored.items()}
    each = {name: tensor.clone() for name, tensor in (stored | moved).items()}
    assert len(each) > len(moved) == len(stored)
    for tensors in (moved, each):
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        for name in ("config.json", "generation_config.json"):
            (tmp_path / name).write_bytes((folder / "stock" / name).read_bytes())
        assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), parent)


def test_gradients_of_all_uses_are_added_up_in_the_one_tensor(parent, folder, ids):
    family = AutoModelForCausalLM.from_pretrained(folder / "stock").train()
    family.set_budget("small")
    sliced = AutoModelForCausalLM.from_pretrained(folder / "stock", budget="small").train()
    with torch.enable_grad():
        losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for model in (family, sliced)]
        sum(losses).backward()
    torch.testing.assert_close(*losses)
    mine, theirs = (dict(model.named_parameters(remove_duplicate=False)) for model in (family, sliced))
    for piece in pieces(TABLE, parent.config, family.submodel):
        whole, part = mine[piece.rule.name].grad, theirs[piece.target.name].grad
        torch.testing.assert_close(piece.narrow(whole), part, atol=1e-4, rtol=1e-3, msg=piece.rule.name)
        torch.testing.assert_close(whole.abs().sum(), part.abs().sum(), rtol=1e-3, atol=1e-4)
    weight = SHARED.format(4, "down_proj.weight")
    assert mine[weight] is mine[SHARED.format(1, "down_proj.weight")]
    entry = SHARED.format(3, "gate_up_proj_adapter_list.{}.0.weight")
    assert mine[entry.format(1)].grad.abs().sum() > 0  # of layer 3, the first of the kept uses
    assert theirs[SHARED.format(1, "gate_up_proj_adapter_list.0.0.weight")].grad.abs().sum() > 0


def test_sorting_gives_layers_that_share_a_block_one_order(parent, ids):
    rows = [{"input_ids": row.tolist()} for row in torch.randint(1, 64, (4, 12))]
    axes = {"ffn": [20, 10], "hidden": [48, 32], "layers": [7, 5]}
    made = elastify(parent, axes=axes, budgets={"small": SMALL}, calibration=rows, progress=False)
    assert_same_logits(logits(made, ids), logits(parent, ids), atol=5e-4)
    assert made.num_parameters() == parent.num_parameters()
    old, new = (model.state_dict()[SHARED.format(1, "down_proj.weight")] for model in (parent, made))
    assert not torch.equal(old, new)
    count, router = CostModel(parent.config), BudgetRouter(made.elastic_config, {"less": "70%"})
    for choice in (0, 1):
        hard = {
            key: torch.eye(len(router.choices[key[0]]))[min(choice, len(router.choices[key[0]]) - 1)]
            for key in router.keys
        }
        sizes = {key[0]: router.choices[key[0]][min(choice, len(router.choices[key[0]]) - 1)] for key in router.keys}
        sizes["layers"] = made.elastic_config.axes["layers"]["ranking"][: sizes["layers"]]
        exact = count(TABLE.submodel(parent.config, sizes)).total_params
        assert float(router.expected(router.mixture(hard), router.limits["less"])) == exact
    with pytest.raises(ElasticConfigError, match="share the block"):
        BudgetRouter(made.elastic_config, {"less": "70%"}, per_layer=["ffn"])


def test_adapters_are_refused_on_what_layers_share(family, ids):
    from peft import LoraConfig, get_peft_model

    from hf_elastic import lora_targets

    assert lora_targets(family) == {"target_modules": ["in_proj", "linear"]}
    model = elastify(Zamba2ForCausalLM(config()), budgets={"small": SMALL}, sort=False)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).train()
    with pytest.raises(ElasticConfigError, match=r"layers \[1, 4\] share this tensor"):
        model.set_budget("small")


def test_a_family_with_shared_blocks_is_not_sharded(family):
    from hf_elastic.trainers.checks import refuse_sharded_blocks

    refuse_sharded_blocks(family, False)
    with pytest.raises(ElasticConfigError, match=r"layers \[1, 4\] share tensors, and FSDP"):
        refuse_sharded_blocks(family, True)


def test_a_model_whose_layers_do_not_share_what_the_table_says_is_refused(parent):
    torn = Zamba2ForCausalLM(config())
    torn.model.layers[4].shared_transformer.feed_forward.down_proj.weight = torch.nn.Parameter(torch.zeros(48, 20))
    with pytest.raises(HFElasticError, match=r"layers\.4\..*down_proj.weight and .*layers\.1\..* are two tensors"):
        check_table(TABLE, torn)
    with pytest.raises(ElasticConfigError, match="then shares no blocks"):
        TABLE.rules(config(tie_word_embeddings=False))
