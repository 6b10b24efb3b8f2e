"""What is wrong is refused by name, with what is allowed, before anything is placed or written."""

import inspect
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from cases import granite, nemotron
from compare import assert_same_weights, logits
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    pipeline,
)

from hf_elastic import (
    CheckpointError,
    ElasticConfig,
    ElasticConfigError,
    ElasticForCausalLM,
    HFElasticError,
    UnknownBudgetError,
    UnsupportedArchitectureError,
)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
load = AutoModelForCausalLM.from_pretrained


@pytest.fixture
def folder(own_folder) -> Path:
    """A checkpoint of one's own, to be damaged."""
    return own_folder("nano3")


@pytest.fixture
def sharded(folder, tmp_path) -> Path:
    load(folder).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


@pytest.fixture
def no_weights_placed(monkeypatch) -> None:
    """Fail if the stock loader is reached."""

    def refuse(*args, **kwargs):
        raise AssertionError("the stock loader was called")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", refuse)


def edit(folder: Path, change) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def rewrite(folder: Path, change, file=WEIGHTS) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


# Budgets


BAD_BUDGETS = [
    ("smal", UnknownBudgetError, r"unknown budget 'smal'.*'full' \(.*'large' \(.*'small' \(.*Did you mean 'small'\?"),
    ("", UnknownBudgetError, r"unknown budget ''"),
    (10, UnknownBudgetError, r"no submodel fits into 10 parameters: the smallest, 'small', needs .*k parameters"),
    ("5k active", UnknownBudgetError, r"fits into 5.00k active parameters.*'small'"),
    ("1kB", UnknownBudgetError, r"fits into 1.00 kB: the smallest, 'small', needs .* kB"),
    (0, ElasticConfigError, "must be a positive number"),
    (-3.5, ElasticConfigError, "must be a positive number"),
    (float("nan"), ElasticConfigError, "must be a positive number"),
    (float("inf"), ElasticConfigError, "must be a positive number"),
    ("0GB", ElasticConfigError, "must be a positive number"),
    (True, ElasticConfigError, "budget=True must be a name"),
    ([32], ElasticConfigError, r"budget=\[32\] must be a name"),
    (
        {"hiden": 32},
        ElasticConfigError,
        r"unknown axis 'hiden' for nemotron_h: it has hidden, .*layers\. Did you mean 'hidden'",
    ),
    ({"hidden": 0}, ElasticConfigError, r"hidden=0 is out of range: the parent has 48, give 1\.\.48"),
    ({"hidden": 49}, ElasticConfigError, r"hidden=49 is out of range: the parent has 48"),
    ({"hidden": "32"}, ElasticConfigError, r"hidden='32' must be a whole number in 1\.\.48"),
    ({"hidden": 32.0}, ElasticConfigError, r"hidden=32\.0 must be a whole number"),
    ({"hidden": True}, ElasticConfigError, r"hidden=True must be a whole number"),
    ({"hidden": [32, 32]}, ElasticConfigError, r"hidden=\[32, 32\] must be a whole number"),
    ({"mamba_heads": 5}, ElasticConfigError, r"mamba_heads=5 does not divide into the 2 n_groups.*multiple of 2"),
    ({"attention_heads": 3}, ElasticConfigError, r"attention_heads=3 does not divide into the 2 num_key_value_heads"),
    ({"experts": 7}, ElasticConfigError, r"experts=7 does not divide into the 2 n_group "),
    ({"experts": 2}, ElasticConfigError, r"experts_per_token=3 is more than the 2 experts kept"),
    ({"experts": 2, "experts_per_token": 1}, ElasticConfigError, r"keep at least 4"),
    ({"experts": 4}, ElasticConfigError, r"experts_per_token=3 is more than the 2 experts in the 1 router groups"),
    ({"experts_per_token": 4}, ElasticConfigError, "experts_per_token.*=4 is out of range: the parent has 3"),
    (
        {"expert_ffn": {0: 8}},
        ElasticConfigError,
        r"names layers \[0\] that do not have the axis; layers \[1, 3, 7\] have it",
    ),
    ({"expert_ffn": {True: 8}}, ElasticConfigError, r"names layers \[True\]"),
    ({"expert_ffn": [8, 8]}, ElasticConfigError, r"has 2 entries; give one per layer of the parent, that is 8"),
    ({"ffn": [8] * 8}, ElasticConfigError, r"layer 0 does not have the axis, give None there"),
    ({"ffn": [None] * 8}, ElasticConfigError, r"ffn\[5\] is missing: layer 5 has the axis"),
    ({"layers": 3}, ElasticConfigError, r"layers=3 must list the indices of the kept layers, each in 0\.\.7"),
    ({"layers": []}, ElasticConfigError, "at least one"),
    ({"layers": [0, 0, 2]}, ElasticConfigError, "different layer indices"),
    ({"layers": [0, 2, 8]}, ElasticConfigError, r"\[8\] is not"),
    ({"layers": [-1, 2]}, ElasticConfigError, r"\[-1\] is not"),
    ({"layers": [0, 1, 3]}, ElasticConfigError, r"drops every attention layer.*keep at least one of \[2, 6\]"),
]
each_bad_budget = pytest.mark.parametrize(("budget", "error", "message"), BAD_BUDGETS, ids=lambda v: str(v)[:40])


@each_bad_budget
def test_bad_budgets_are_refused_when_loading(budget, error, message, family_folder, no_weights_placed):
    with pytest.raises(error, match=message):
        load(family_folder("nano3"), budget=budget)


@pytest.fixture(scope="module")
def family(family_folder):
    return load(family_folder("nano3"))


@each_bad_budget
def test_bad_budgets_leave_a_live_model_as_it_is(budget, error, message, family, ids):
    family.set_budget("large")
    before, names = logits(family, ids), list(family.state_dict())
    with pytest.raises(error, match=message):
        family.set_budget(budget)
    with pytest.raises(error, match=message), family.at(budget):
        pass
    assert family.budget == "large"
    assert list(family.state_dict()) == names
    assert torch.equal(logits(family, ids), before)


@each_bad_budget
def test_bad_budgets_write_nothing(budget, error, message, family, tmp_path):
    for write in (family.save_pretrained, family.export):
        with pytest.raises(error, match=message):
            write(tmp_path / "new", budget=budget)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden": 40}, r"mamba_heads=24 \* mamba_head_dim=8 = 192 is no whole multiple of hidden=40"),
        ({"mamba_heads": 10}, r"= 80 is no whole multiple of hidden=48"),
        ({"ffn": 8}, "unknown axis 'ffn' for granitemoehybrid"),
        ({"attention_heads": 5}, "multiple of 2"),
        ({"experts": 2}, "experts_per_token=3 is more than the 2 experts kept"),
    ],
    ids=str,
)
def test_sizes_that_granite_cannot_have(sizes, message, family_folder, no_weights_placed):
    with pytest.raises(ElasticConfigError, match=message):
        load(family_folder("granite"), budget=sizes)


def test_an_axis_that_no_layer_has(original):
    with pytest.raises(ElasticConfigError, match="no layer of this nemotron_h parent has axis 'experts'"):
        ElasticConfig.from_parent(original("nano2").config, {"small": {"experts": 2}})


@pytest.mark.parametrize("budget", ["small", 1e9, None])
def test_a_plain_parent_is_refused(budget, original, tmp_path, no_weights_placed):
    original("nano2").save_pretrained(tmp_path)
    with pytest.raises(ElasticConfigError, match=r"plain nemotron_h checkpoint without budgets.*elastify"):
        ElasticForCausalLM.from_pretrained(tmp_path, budget=budget)


@pytest.mark.parametrize("name", ["nano2", "granite"])
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
def test_a_plain_parent_is_refused_through_the_auto_classes(auto, name, original, tmp_path, no_weights_placed):
    """Also as the pipeline does it, which collects what the classes say."""
    original(name).save_pretrained(tmp_path)
    message = "is a plain .* checkpoint without budgets.*without budget=.*elastify"
    for budget in ("small", 1e9, {"hidden": 24}, None):
        with pytest.raises(ElasticConfigError, match=message):
            auto.from_pretrained(tmp_path, budget=budget)
    with pytest.raises(ElasticConfigError, match=message):
        type(original(name)).from_pretrained(tmp_path, budget="small")
    with pytest.raises(ValueError, match=message):
        pipeline("text-generation", model=str(tmp_path), model_kwargs={"budget": "small"})


@pytest.mark.parametrize("name", ["nano2", "granite"])
def test_a_plain_parent_without_a_budget_is_upstreams_business(name, original, tmp_path):
    stock = type(original(name))
    original(name).save_pretrained(tmp_path)
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), stock.from_pretrained(tmp_path, dtype="float32")):
        assert type(loaded) is stock
        assert_same_weights(loaded, original(name))
    assert inspect.signature(stock.from_pretrained) == inspect.signature(PreTrainedModel.from_pretrained)
    with pytest.raises(TypeError, match="unexpected keyword argument 'bugdet'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, bugdet="small")

    class Mine(stock):
        def __init__(self, config, budget):
            super().__init__(config)
            self.mine = budget

    assert Mine.from_pretrained(tmp_path, budget="small").mine == "small"


def test_a_budget_needs_a_checkpoint(original):
    config = ElasticConfig.from_parent(original("nano2").config, {})
    with pytest.raises(ElasticConfigError, match="needs a checkpoint"):
        ElasticForCausalLM.from_pretrained(None, config=config, state_dict={}, budget="small")


def test_an_unsupported_parent(tmp_path):
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8)
    message = r"model_type 'gpt2'; supported: nemotron_h, granitemoehybrid"
    with pytest.raises(UnsupportedArchitectureError, match=message):
        ElasticConfig.from_parent(config, {})
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ElasticConfigError, match="plain gpt2 checkpoint"):
        ElasticForCausalLM.from_pretrained(tmp_path)


# Arguments


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel, ElasticForCausalLM])
def test_a_misspelt_argument_is_named(auto, family_folder, no_weights_placed):
    with pytest.raises(TypeError, match=r"unexpected argument 'bugdet'.*Did you mean 'budget'\?"):
        auto.from_pretrained(family_folder("nano3"), bugdet="small")
    with pytest.raises(TypeError, match=r"'use_cash'.*Did you mean 'use_cache'\?"):
        auto.from_pretrained(family_folder("nano3"), use_cash=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 32}, r"hidden_size=32 is a size.*budget=\{'hidden': \.\.\.\}"),
        ({"num_experts_per_tok": 1}, r"num_experts_per_tok=1 is a size.*'experts_per_token'"),
        ({"vocab_size": 100}, "vocab_size=100 does not fit the weights"),
        ({"mlp_bias": True}, "mlp_bias=True does not fit the weights"),
        ({"n_groups": 4}, "n_groups=4 does not fit the weights"),
        ({"dtype": "float33"}, "dtype='float33' must be 'auto'"),
        ({"dtype": torch.int8}, r"dtype=torch\.int8 must be 'auto', a floating-point"),
        ({"use_safetensors": False}, "safetensors only"),
        ({"ignore_mismatched_sizes": True}, "random values"),
        ({"state_dict": {}}, "either a checkpoint or state_dict"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_arguments_that_do_not_fit_the_weights(arguments, message, family_folder, no_weights_placed):
    with pytest.raises(ElasticConfigError, match=message):
        load(family_folder("nano3"), budget="small", **arguments)


# Configurations


BAD_SECTIONS = {
    "no section": (lambda c: c.pop("elastic"), "no `elastic` section"),
    "newer": (
        lambda c: c["elastic"].update(version=5),
        r"elastic format 5, this hf_elastic reads up to 4; pip install",
    ),
    "version 0": (lambda c: c["elastic"].update(version=0), "version=0 must be a whole number"),
    "version true": (lambda c: c["elastic"].update(version=True), "version=True must be"),
    "unknown key": (lambda c: c["elastic"].update(axis={}), r"unknown key 'axis' in elastic.*Did you mean 'axes'"),
    "unknown axis": (
        lambda c: c["elastic"]["axes"].update(heads=c["elastic"]["axes"]["hidden"]),
        "unknown axis 'heads'",
    ),
    "unknown axis key": (
        lambda c: c["elastic"]["axes"]["hidden"].update(choises=[]),
        r"unknown key 'choises' in elastic\.axes\['hidden'\].*Did you mean 'choices'",
    ),
    "ranking of another axis": (
        lambda c: c["elastic"]["axes"]["hidden"].update(ranking=[]),
        "unknown key 'ranking'",
    ),
    "unknown budget key": (
        lambda c: c["elastic"]["budgets"]["small"].update(size={}),
        "unknown key 'size' in budget 'small'",
    ),
    "axes a list": (lambda c: c["elastic"].update(axes=[]), r"elastic\.axes=\[\] must be a dict"),
    "budgets a list": (lambda c: c["elastic"].update(budgets=["small"]), r"elastic\.budgets=.* must be a dict"),
    "axis a list": (lambda c: c["elastic"]["axes"].update(hidden=[48, 32]), "must be a dict"),
    "budget a number": (lambda c: c["elastic"]["budgets"].update(small=3), "must be a dict with `sizes`"),
    "budget without a name": (
        lambda c: c["elastic"]["budgets"].update({" ": c["elastic"]["budgets"].pop("small")}),
        "a name must be",
    ),
    "two names alike": (
        lambda c: c["elastic"]["budgets"].update(SMALL=c["elastic"]["budgets"]["small"]),
        "'SMALL' and 'small'|'small' and 'SMALL'",
    ),
    "policy": (
        lambda c: c["elastic"]["axes"]["mamba_heads"].update(policy="prefix"),
        r"policy='prefix' is not how nemotron_h weights are cut; it must be 'prefix per group of n_groups'",
    ),
    "no choices": (lambda c: c["elastic"]["axes"]["hidden"].pop("choices"), r"choices=None must be a list"),
    "choices too large": (
        lambda c: c["elastic"]["axes"]["hidden"].update(choices=[64, 48, 32]),
        r"choices=\[64, 48, 32\] must go down, without repeats, within 1\.\.48",
    ),
    "choices unsorted": (
        lambda c: c["elastic"]["axes"]["hidden"].update(choices=[32, 40, 48]),
        "must go down",
    ),
    "size not a choice": (
        lambda c: c["elastic"]["axes"]["hidden"].update(choices=[48, 40]),
        r"hidden=\[32\] is not among the axis's choices \[48, 40\]",
    ),
    "axis not listed": (
        lambda c: c["elastic"]["axes"].pop("hidden"),
        "cuts 'hidden', which elastic.axes does not list",
    ),
    "ranking": (
        lambda c: c["elastic"]["axes"]["layers"].update(ranking=[0, 1]),
        r"ranking=\[0, 1\] must list every layer 0\.\.7 once",
    ),
    "ranking of texts": (
        lambda c: c["elastic"]["axes"]["layers"].update(ranking=["0", 1]),
        r"must list every layer 0\.\.7 once",
    ),
    "wrong total": (
        lambda c: c["elastic"]["budgets"]["small"].update(total_params=5),
        r"budget 'small' says total_params=5, its sizes have \d+",
    ),
    "wrong active": (
        lambda c: c["elastic"]["budgets"]["small"].update(active_params=5),
        "says active_params=5",
    ),
    "wrong size": (
        lambda c: c["elastic"]["budgets"]["small"]["sizes"].update(mamba_heads=7),
        r"budget 'small', layer 0: mamba_heads=7 does not divide",
    ),
    "not nested": (
        lambda c: (
            c["elastic"]["budgets"].pop("small"),
            c["elastic"]["budgets"]["medium"]["sizes"].update(mamba_heads=12),
            [c["elastic"]["budgets"]["medium"].pop(key) for key in ("total_params", "active_params")],
        ),
        r"budget 'medium' does not nest in 'large': its mamba_heads is larger",
    ),
    "full is smaller": (
        lambda c: c["elastic"]["budgets"].update(Full=c["elastic"]["budgets"].pop("small")),
        "stands for the whole parent",
    ),
    "parent unsupported": (lambda c: c["parent_config"].update(model_type="gpt2"), "model_type 'gpt2'; supported"),
    "parent without a type": (lambda c: c["parent_config"].pop("model_type"), "model_type 'None'; supported"),
    "no parent": (lambda c: c.pop("parent_config"), "parent_config=None must be the stock config"),
}


@pytest.mark.parametrize("name", BAD_SECTIONS)
def test_bad_configurations_are_refused(name, folder, no_weights_placed):
    change, message = BAD_SECTIONS[name]
    edit(folder, change)
    for read in (ElasticConfig.from_pretrained, AutoConfig.from_pretrained, load):
        with pytest.raises(HFElasticError, match=message) as caught:
            read(folder)
        assert isinstance(caught.value, ValueError)


def test_nesting_is_checked_in_every_layer(original):
    budgets = {"large": {"expert_ffn": {1: 8, 3: 16, 7: 12}}, "small": {"expert_ffn": {1: 12, 3: 8, 7: 8}}}
    with pytest.raises(
        ElasticConfigError, match="'small' does not nest in 'large': its expert_ffn is larger in layer 1, 12 against 8"
    ):
        ElasticConfig.from_parent(original("nano3").config, budgets)


def test_layers_have_to_nest(original):
    budgets = {"large": {"layers": [0, 1, 2, 3, 4]}, "small": {"layers": [2, 5]}}
    with pytest.raises(ElasticConfigError, match="'small' does not nest in 'large': it keeps layers \\[5\\] that"):
        ElasticConfig.from_parent(original("nano3").config, budgets)


def test_equal_budgets_are_refused(original):
    with pytest.raises(ElasticConfigError, match="are the same submodel"):
        ElasticConfig.from_parent(original("nano3").config, {"a": {"hidden": 32}, "b": {"hidden": 32}})


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"hiden": [32]}, "unknown axis 'hiden'"),
        ({"hidden": [64]}, r"within 1\.\.48"),
        ({"hidden": 32}, r"choices\['hidden'\]=32 must be a list"),
        ({"mamba_heads": [12, 7]}, r"mamba_heads'\]\.choices=\[12, 7\]: \[7\] cannot be shared.*multiples of 2"),
        ({"ffn": [8], "layers": [0]}, r"within 1\.\.8"),
    ],
    ids=str,
)
def test_choices_are_checked(choices, message, original):
    with pytest.raises(ElasticConfigError, match=message):
        ElasticConfig.from_parent(original("nano3").config, {}, choices=choices)


# Weights


def test_a_dropped_tensor_is_named(folder, no_weights_placed):
    rewrite(folder, lambda tensors: tensors.pop("backbone.layers.4.mixer.A_log"))
    for budget in (None, "small"):  # `small` drops layer 4, the checkpoint is broken all the same
        with pytest.raises(CheckpointError, match=r"backbone\.layers\.4\.mixer\.A_log is missing.*Nothing was loaded"):
            load(folder, budget=budget)


@pytest.mark.parametrize("name", ["nano3", "granite"])
def test_no_tensor_can_go_missing(name, own_folder, no_weights_placed):
    """Random weights never appear: whichever tensor is dropped, loading fails by its name."""
    folder = own_folder(name)
    tensors = load_file(folder / WEIGHTS)
    for dropped in tensors:
        save_file({k: v for k, v in tensors.items() if k != dropped}, folder / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=dropped.replace(".", r"\.") + " is missing"):
            load(folder, budget="small")


def test_an_unknown_tensor_is_named(folder, no_weights_placed):
    rewrite(folder, lambda tensors: tensors.update({"backbone.layers.8.norm.weight": torch.ones(48)}))
    with pytest.raises(CheckpointError, match=r"backbone\.layers\.8\.norm\.weight belongs to no part"):
        load(folder)


def test_an_expert_too_many_is_named(folder, no_weights_placed):
    extra = {"backbone.layers.1.mixer.experts.12.up_proj.weight": torch.ones(16, 48)}
    rewrite(folder, lambda tensors: tensors.update(extra))
    with pytest.raises(CheckpointError, match=r"experts\.12\.up_proj\.weight belongs to no part"):
        load(folder, budget="small")


def test_what_the_stock_class_ignores_may_be_there(folder):
    rewrite(folder, lambda tensors: tensors.update({"mtp.layers.0.norm.weight": torch.ones(48)}))
    model, info = load(folder, budget="small", output_loading_info=True)
    assert not any("mtp" in name for name in model.state_dict())
    assert not any(info.values())


@pytest.mark.parametrize("field", ["n_groups", "n_group", "num_key_value_heads"])
def test_a_parent_without_groups(field, folder, no_weights_placed):
    edit(folder, lambda c: (c["parent_config"].update({field: 0}), c["elastic"].update(budgets={}, axes={})))
    for budget in (None, {"hidden": 32}):
        with pytest.raises(ElasticConfigError, match=f"the parent's {field}=0 must be at least 1"):
            load(folder, budget=budget)


def test_another_shape_is_named(folder, no_weights_placed):
    rewrite(folder, lambda tensors: tensors.update({"backbone.layers.0.mixer.D": torch.ones(13)}))
    with pytest.raises(CheckpointError, match=r"mixer\.D is \(13,\) in the file, the config says \(12,\)"):
        load(folder)


def test_integers_are_not_taken_for_weights(folder, no_weights_placed):
    rewrite(folder, lambda tensors: tensors.update({"backbone.layers.0.mixer.D": torch.ones(12, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"mixer\.D is stored as I8, not as F64, F32, F16, BF16"):
        load(folder)


def test_the_config_of_other_weights(folder, no_weights_placed):
    edit(folder, lambda c: (c["parent_config"].update(intermediate_size=44), c["elastic"].update(budgets={}, axes={})))
    with pytest.raises(
        CheckpointError, match=r"layers\.5\.mixer\.up_proj\.weight is \(40, 48\) in the file.*\(44, 48\)"
    ):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 200, -1], ids=["empty", "length only", "half a header", "one byte short"])
def test_truncated_files(keep, folder, no_weights_placed):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors cannot be read as safetensors.*damaged or incomplete"
    ):
        load(folder)


@pytest.mark.parametrize("what", ["header", "length", "text"])
def test_corrupted_files(what, folder, no_weights_placed):
    data = bytearray((folder / WEIGHTS).read_bytes())
    if what == "header":
        data[8:20] = b"\xff" * 12
    elif what == "length":
        data[:8] = (2**60).to_bytes(8, "little")
    else:
        data = b"version https://git-lfs.github.com/spec/v1\n"
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        load(folder, budget="small")


def test_a_missing_shard(sharded, no_weights_placed):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(
        CheckpointError, match=f"{shard.name} is missing, though model.safetensors.index.json lists it"
    ):
        load(sharded)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", 3])
def test_an_index_stays_in_its_folder(name, sharded, no_weights_placed):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="not a safetensors file beside it|no index of safetensors"):
        load(sharded)


@pytest.mark.parametrize("content", ["", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[1]"])
def test_a_broken_index(content, sharded, no_weights_placed):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="is no index of safetensors files"):
        load(sharded)


def test_two_shards_with_one_name(sharded, no_weights_placed):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    rewrite(sharded, lambda tensors: tensors.update({name: tensor}), second.name)
    with pytest.raises(CheckpointError, match="occurs in two files"):
        load(sharded)


def test_pickles_are_not_opened(folder, no_weights_placed, monkeypatch):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(
        CheckpointError, match=r"neither model\.safetensors nor.*pickled.*are not loaded, convert them"
    ):
        load(folder)


def test_a_folder_without_weights(folder, no_weights_placed):
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        load(folder)


def test_weights_of_the_base_model_have_no_head(family_folder, tmp_path):
    AutoModel.from_pretrained(family_folder("nano3")).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_incomplete_state_dict_is_refused(original):
    stock = original("nano2")
    config = ElasticConfig.from_parent(stock.config, {"small": {"hidden": 32}})
    state = dict(stock.state_dict())
    state.pop("model.layers.0.mixer.D")
    with pytest.raises(CheckpointError, match=r"missing_keys.*model\.layers\.0\.mixer\.D"):
        ElasticForCausalLM.from_pretrained(None, config=config, state_dict=state)


# Saving


@pytest.fixture
def failing_disk(monkeypatch):
    """`fail(n)`: the n-th file that is written is the last straw, half of it arrives."""

    def fail(after: int) -> None:
        real, count = safetensors.torch.save_file, iter(range(100))

        def save(tensors, filename, metadata=None):
            if next(count) == after:
                Path(filename).write_bytes(b"half a file")
                raise OSError(28, "No space left on device")
            real(tensors, filename, metadata=metadata)

        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save)

    return fail


@pytest.mark.parametrize("shard", [0, 1, 2])
@pytest.mark.parametrize("method", ["save_pretrained", "export"])
def test_a_failed_save_leaves_the_old_checkpoint(shard, method, folder, family_folder, failing_disk, listing):
    model = load(family_folder("nano3"), budget="small")
    before = listing(folder)
    failing_disk(shard)
    with pytest.raises(OSError, match="No space left"):
        getattr(model, method)(folder, max_shard_size="10KB")
    assert listing(folder) == before
    assert model.budget == "small"
    assert_same_weights(load(folder), load(family_folder("nano3")))


def test_a_failed_save_leaves_no_new_folder(tmp_path, family_folder, failing_disk):
    model = load(family_folder("nano3"), budget="small")
    failing_disk(0)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "deep" / "new")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_while_switched_leaves_the_budget(folder, family_folder, failing_disk, listing, ids):
    model = load(family_folder("nano3"))
    model.set_budget("medium")
    logits_before, before = logits(model, ids), listing(folder)
    failing_disk(0)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder, budget="small")
    assert listing(folder) == before
    assert model.budget == "medium"
    assert torch.equal(logits(model, ids), logits_before)


def test_an_interrupted_save_leaves_the_old_checkpoint(folder, monkeypatch, listing):
    model, before = load(folder), listing(folder)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(folder)
    assert listing(folder) == before


@pytest.mark.parametrize("after", range(4))
def test_a_save_that_fails_while_files_are_exchanged_leaves_the_old_checkpoint(
    after, sharded, family_folder, monkeypatch, listing
):
    """The new files are all there, and one of them cannot take its place: a file in use, a disk that went away."""
    model = load(family_folder("nano3"), budget="small")
    real, done = os.replace, []

    def replace(source, destination):
        if Path(destination).parent == sharded and len(done) == after:
            done.append(None)
            raise PermissionError(13, "in use", str(destination))
        real(source, destination)
        if Path(destination).parent == sharded:
            done.append(destination)

    monkeypatch.setattr(os, "replace", replace)
    (sharded / "generation_config.json").unlink()
    before = listing(sharded)
    with pytest.raises(CheckpointError, match="in use"):
        model.save_pretrained(sharded, max_shard_size="20KB")
    assert listing(sharded) == before
    assert None in done


def test_saving_over_a_sharded_checkpoint_leaves_no_stale_shard(sharded, family_folder):
    (sharded / "notes.txt").write_text("mine")
    load(family_folder("nano3"), budget="small").save_pretrained(sharded)
    assert [file.name for file in sharded.glob("*.safetensors*")] == [WEIGHTS]
    assert (sharded / "notes.txt").read_text() == "mine"
    assert load(sharded).budget == "small"


def test_a_misspelt_budget_does_not_save_everything(tmp_path, family):
    for write, name, meant in (
        (family.save_pretrained, "bugdet", "budget"),
        (family.export, "bugdet", "budget"),
        (family.export, "heterogenous", "heterogeneous"),
    ):
        with pytest.raises(TypeError, match=f"unexpected argument '{name}'. Did you mean '{meant}'"):
            write(tmp_path / "new", **{name: "small"})
    assert not list(tmp_path.iterdir())
    family.export(tmp_path / "new", "small", token=None, variant="fp32", max_shard_size="1MB")


def test_saving_over_a_file(tmp_path, family):
    (tmp_path / "file").write_text("mine")
    for write in (family.save_pretrained, family.export):
        with pytest.raises(CheckpointError, match="is a file; give a folder"):
            write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_saving_over_a_folder_in_the_way(folder, listing):
    """A folder where a file has to go is found before any file is exchanged."""
    model = load(folder)
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    (folder / CONFIG / "mine").write_text("mine")
    before = listing(folder)
    with pytest.raises(CheckpointError, match=r"config\.json is a folder"):
        model.save_pretrained(folder, max_shard_size="10KB")
    assert listing(folder) == before


@pytest.mark.parametrize("config", [nemotron("M*"), granite()], ids=["nemotron_h", "granitemoehybrid"])
def test_errors_are_also_the_builtin_that_callers_expect(config):
    for wrong in ({"hidden": 10**6}, {"no_such_axis": 1}):
        with pytest.raises(ValueError, match="hidden|no_such_axis"):
            ElasticConfig.from_parent(config, {"x": wrong})
    assert issubclass(CheckpointError, OSError)
