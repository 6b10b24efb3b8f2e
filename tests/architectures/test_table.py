"""The table of an architecture: complete, in the layout of the Hub, and exact in every number read off it."""

from dataclasses import replace

import pytest
import torch
from cases import CASES, CONFIGS, IDS, granite, nemotron
from nano_v3 import nano_v3
from safetensors import safe_open
from transformers import AutoModelForCausalLM, DynamicCache

from hf_elastic import HFElasticError
from hf_elastic.architectures import ARCHITECTURES, get_architecture
from hf_elastic.architectures.axes import Cut, dim
from hf_elastic.architectures.cost import CostModel
from hf_elastic.architectures.nemotron_h import NemotronH
from hf_elastic.architectures.pieces import pieces
from hf_elastic.submodels.slicing import build_meta, check_table

each_case = pytest.mark.parametrize("case", CASES, ids=IDS)

MORE_CONFIGS = {
    "nemotron_h without a shared group": lambda: nemotron("ME*", n_groups=1, n_group=1, conv_kernel=2),
    "nemotron_h with one KV head": lambda: nemotron("M*-", num_key_value_heads=1),
    "nemotron_h with every switch": lambda: nemotron(
        "ME*-", moe_latent_size=12, use_bias=True, mlp_bias=True, use_conv_bias=False, attention_bias=True
    ),
    "granite with its own head_dim": lambda: granite(head_dim=4, attention_bias=False, mamba_proj_bias=False),
    "granite without Mamba": lambda: granite(layer_types=["full_attention"], num_hidden_layers=1),
}


def on_meta(config):
    architecture = get_architecture(config.model_type)
    return build_meta(architecture, config, architecture.causal_class)


# Completeness


@pytest.mark.parametrize("name", [*CONFIGS, *MORE_CONFIGS])
def test_every_tensor_has_one_rule_and_every_rule_a_tensor(name):
    config = (CONFIGS | MORE_CONFIGS)[name]()
    model = on_meta(config)
    check_table(get_architecture(config.model_type), model)
    rules = get_architecture(config.model_type).rules(config)
    assert len({rule.name for rule in rules}) == len(rules) == len(model.state_dict())


# Defaults that the stock class does not build itself, and what they lack.
UNBUILT = {"lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16}}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_defaults_of_the_stock_classes_are_covered(model_type):
    architecture = get_architecture(model_type)
    config = architecture.causal_class.config_class(**UNBUILT.get(model_type, {}))
    check_table(architecture, on_meta(config))


def test_the_published_parent_is_covered():
    check_table(get_architecture("nemotron_h"), on_meta(nano_v3()))


class Changed(NemotronH):
    """The table with one rule exchanged for others."""

    def __init__(self, change):
        self.change = change

    def rules(self, config):
        return [new for rule in super().rules(config) for new in self.change(rule)]


def _only(name, change):
    return lambda rule: change(rule) if rule.name == name else [rule]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_only("model.layers.0.mixer.D", lambda rule: []), r"model\.layers\.0\.mixer\.D \(12,\) has no rule"),
        (
            _only("model.norm_f.weight", lambda rule: [rule, rule]),
            r"two rules of nemotron_h claim model\.norm_f\.weight",
        ),
        (
            _only("lm_head.weight", lambda rule: [rule, replace(rule, template="lm_head.bias")]),
            r"lm_head\.bias \(64, 48\) is not in the model",
        ),
        (
            _only("model.layers.0.mixer.D", lambda rule: [replace(rule, dims=(dim(3),))]),
            r"model\.layers\.0\.mixer\.D is \(12,\) in the model and \(3,\) in the table",
        ),
        (
            _only("lm_head.weight", lambda rule: [replace(rule, dims=rule.dims[::-1])]),
            r"lm_head\.weight is \(64, 48\) in the model and \(48, 64\) in the table",
        ),
    ],
    ids=["missing", "duplicate", "stray", "shape", "order"],
)
def test_a_wrong_rule_is_found(original, change, message):
    with pytest.raises(HFElasticError, match=message):
        check_table(Changed(change), original("nano2"))


def test_a_rule_with_an_unknown_axis_is_found(original):
    table = Changed(_only("lm_head.weight", lambda rule: [replace(rule, dims=(dim(64), dim(Cut("hiden"))))]))
    with pytest.raises(HFElasticError, match=r"lm_head\.weight.*'hiden'"):
        check_table(table, original("nano2"))


# Names on disk


@pytest.mark.parametrize("name", CONFIGS)
def test_disk_names_are_what_the_stock_class_writes(name, original, tmp_path):
    config = original(name).config
    architecture = get_architecture(config.model_type)
    original(name).save_pretrained(tmp_path / "made")
    AutoModelForCausalLM.from_pretrained(tmp_path / "made").save_pretrained(tmp_path / "loaded")
    full = architecture.full(config)
    expected = {}
    for rule in architecture.rules(config):
        if rule.tied:
            continue
        shape = rule.shape(full.at(rule.layer))
        experts = range(shape[0]) if rule.stacked else [None]
        expected |= {rule.disk_name(e): shape[1:] if rule.stacked else shape for e in experts}
    for folder in ("made", "loaded"):
        with safe_open(tmp_path / folder / "model.safetensors", framework="pt") as file:
            written = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        assert written == expected


def test_nemotron_is_stored_as_on_the_hub(original):
    config = original("nano3").config
    names = [r.disk_name(5) for r in get_architecture("nemotron_h").rules(config)]
    assert "backbone.layers.1.mixer.experts.5.up_proj.weight" in names
    assert "backbone.embeddings.weight" in names
    assert "lm_head.weight" in names
    assert not any(name.startswith("model.") for name in names)


@pytest.mark.parametrize("case", [case for case in CASES if case.name.startswith(("full", "all"))], ids=IDS)
def test_a_saved_slice_has_the_names_of_its_own_table(case, checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint(case.parent), budget=case.submodel)
    model.save_pretrained(tmp_path)
    expected = set()
    for piece in pieces(model.architecture, model.config, model.submodel):
        if not piece.rule.tied:
            experts = range(piece.shape[0]) if piece.rule.stacked else [None]
            expected |= {piece.rule.disk_name(e) for e in experts}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == expected


# Numbers


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES]
    + [(case, torch.bfloat16) for case in CASES if case.name.startswith(("full", "all"))],
    ids=lambda value: value.id if hasattr(value, "id") else str(value),
)
def test_counts_and_bytes_are_those_of_the_loaded_slice(case, dtype, checkpoint, original, ids):
    cost = CostModel(original(case.parent).config)(case.submodel)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(case.parent), budget=case.submodel, dtype=dtype)
    assert cost.total_params == model.num_parameters()
    stored = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    assert cost.weight_bytes(dtype) == sum(stored.values())

    def measured(length):
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :length], past_key_values=cache, use_cache=True)
        kv = state = 0
        for layer in cache.layers:
            if getattr(layer, "keys", None) is not None:
                kv += layer.keys.nbytes + layer.values.nbytes
            for name in ("conv_states", "recurrent_states"):
                held = getattr(layer, name, None)
                held = held.values() if isinstance(held, dict) else [held]
                state += sum(tensor.nbytes for tensor in held if tensor is not None)
        return kv, state

    batch, length = ids.shape
    kv, state = measured(length)
    assert kv == batch * length * cost.kv_bytes_per_token(dtype)
    assert state == batch * cost.state_bytes(dtype)
    assert state == measured(length - 5)[1], "states do not grow with the sequence"


def test_router_bias_stays_in_float32(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint("nano3"), budget={"experts": 8}, dtype=torch.bfloat16)
    dtypes = {name.rpartition(".")[2]: tensor.dtype for name, tensor in model.state_dict().items()}
    assert dtypes.pop("e_score_correction_bias") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


@each_case
def test_active_parameters_leave_out_the_experts_a_token_does_not_use(case, original):
    """Counted from the tensors of a built slice, without the table's own idea of what is routed."""
    stock = original(case.parent).config
    architecture = get_architecture(stock.model_type)
    config = architecture.config_for(stock, case.submodel)
    cost = CostModel(stock)(case.submodel)
    idle = 0
    for new, layer in enumerate(case.submodel.layers):
        sizes = case.submodel.at(layer)
        if "experts" in sizes:
            c = config.per_layer_config[new]
            if stock.model_type == "nemotron_h":
                one = 2 * c.moe_intermediate_size * (c.moe_latent_size or c.hidden_size)
            else:
                one = 3 * c.intermediate_size * c.hidden_size
            idle += (sizes["experts"] - sizes["experts_per_token"]) * one
    assert cost.active_params == cost.total_params - idle


def _published(hidden, expert_ffn):
    """Total and active parameters of Nano v3, added up by hand from the model card's sizes."""
    kinds = nano_v3().hybrid_override_pattern
    inner, conv = 64 * 64, 64 * 64 + 2 * 8 * 128
    mamba = (inner + conv + 64) * hidden + (4 + 1) * conv + 3 * 64 + inner + inner * hidden
    attention = 2 * hidden * 32 * 128 + 2 * hidden * 2 * 128
    router_and_shared = 128 * hidden + 2 * 3712 * hidden
    other = (
        2 * 131072 * hidden + hidden + len(kinds) * hidden + kinds.count("M") * mamba + kinds.count("*") * attention
    )
    return tuple(
        other + kinds.count("E") * (experts * 2 * hidden * expert_ffn + router_and_shared) for experts in (128, 6)
    )


def test_published_sizes():
    config = nano_v3()
    architecture, count = get_architecture("nemotron_h"), CostModel(nano_v3())
    full = count.full
    assert (full.total_params, full.active_params) == _published(2688, 1856) == (31_577_937_344, 3_580_073_408)
    cut = count(architecture.submodel(config, {"hidden": 1920, "expert_ffn": 960}))
    assert (cut.total_params, cut.active_params) == _published(1920, 960) == (12_426_655_424, 2_082_617_024)
    assert full.total_params == on_meta(config).num_parameters()
