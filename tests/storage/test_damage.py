"""Damaged checkpoints: what loads is what the files hold, and all else is an error of this package, at once and in little memory."""

import copy
import json
import os
import shutil
import struct
import sys
import time
from pathlib import Path

import pytest
import torch
from damage import run
from safetensors.torch import load_file, save_file
from sound import differences, sound_checkpoints
from transformers import AutoConfig, AutoModelForCausalLM

from hf_elastic import CheckpointError, ElasticConfig, ElasticConfigError, ElasticForCausalLM
from hf_elastic.commands.plan import plan
from hf_elastic.configuration_elastic import read_config
from hf_elastic.elastification.importance import Scores
from hf_elastic.errors import HFElasticError
from hf_elastic.hub.card_results import read_all
from hf_elastic.hub.publishing import read_published
from hf_elastic.routing.router import ROUTER_FILE
from hf_elastic.storage.json_files import LARGEST_CONFIG, read_json

load = ElasticForCausalLM.from_pretrained
MEGABYTES = 200
LONG = bool(
    os.environ.get("HF_ELASTIC_LONG")
)  # all 3,000 damages, two minutes; CI makes do with 200 and two of every kind


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return {one.name: one for one in sound_checkpoints(tmp_path_factory.mktemp("sound"))}


@pytest.fixture
def own(sound, tmp_path):
    """A copy of a sound checkpoint of one's own."""
    return lambda name: Path(shutil.copytree(sound[name].folder, tmp_path / name))


def edit(folder: Path, change, name: str = "config.json") -> None:
    fields = json.loads((folder / name).read_text())
    change(fields)
    (folder / name).write_text(json.dumps(fields))


def _peak() -> int:
    """Bytes that this process had at most since it was last asked."""
    if sys.platform != "linux":
        return 0
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


class Little:
    """Within a second of the processor's time, and 200 MB."""

    def __enter__(self):
        _peak()
        self.memory, self.begun = _peak(), time.process_time()

    def __exit__(self, *_):
        assert time.process_time() - self.begun < 1
        assert _peak() - self.memory < MEGABYTES * 2**20


# By the thousand


def _nothing_else(tmp_path, sound, cases, at_least, of_a_kind=None):
    _peak()
    before = _peak()
    total, problems = run(tmp_path, cases, list(sound.values()), of_a_kind)
    assert not problems, f"{len(problems)} problems, the first: {problems[0]}"
    assert total.loaded > at_least
    assert total.refused > at_least
    assert _peak() - before < MEGABYTES * 2**20


def test_what_loads_is_what_the_files_hold(tmp_path, sound):
    _nothing_else(tmp_path, sound, range(200), 50)


@pytest.mark.slow
def test_what_loads_is_what_the_files_hold_in_thousands_of_folders(tmp_path, sound):
    _nothing_else(tmp_path, sound, range(200, 3000), 800 if LONG else 20, None if LONG else 2)


@pytest.mark.parametrize("name", ["nemotron single", "nemotron nested", "granite sharded", "granite export"])
def test_the_plain_reader_sees_what_differs(name, sound, own):
    folder, one = own(name), sound[name]
    how = {} if one.described is None else {"elastic_config": copy.deepcopy(one.described)}
    for budget in (None, *one.budgets):
        assert not list(differences(one, folder, budget, load(folder, budget=budget, **how)))
    model = load(folder, **how)
    with torch.no_grad():
        next(model.parameters()).view(-1)[3] += 1
    model.config.initializer_range = 3.0
    model.generation_config.temperature = 0.8
    if model.router is not None:
        next(model.router.parameters()).data[0] += 1
    found = " ".join(differences(one, folder, None, model))
    assert all(word in found for word in ("is not what the file holds", "initializer_range", "temperature"))
    assert (model.router is None) or "router" in found


# config.json

DEEP = "[" * 2000 + "]" * 2000


def _with(section: str) -> str:
    return f'{{"model_type": "elastic", "elastic": {section}}}'


NO_CONFIGS = {
    "null": "null",
    "list": "[]",
    "number": "3",
    "infinity": '{"__float__": "Infinity"}',
    "empty": "",
    "cut off": '{"model_type": "elas',
    "mark of byte order": "\ufeff{}",
    "levels": _with(DEEP),
    "fewer levels": _with("[" * 60 + "]" * 60),
    "levels of nothing": DEEP,
    "key twice": '{"model_type": "elastic", "model_type": "elastic"}',
    "digits": _with("9" * 30),
    "kind": '{"model_type": ["elastic"]}',
    "thousands": "[" + "[]," * 200_000 + "[]]",
}


@pytest.mark.parametrize("content", NO_CONFIGS.values(), ids=NO_CONFIGS)
def test_what_is_no_config(content, own):
    folder = own("nemotron single")
    (folder / "config.json").write_text(content, encoding="utf-8")
    for call in (load, read_config, lambda f: plan(read_config(f, plain=True))):
        with Little(), pytest.raises(CheckpointError, match=r"config\.json"):
            call(folder)
    for call in (ElasticConfig.from_pretrained, read_published):
        with pytest.raises(HFElasticError):
            call(folder)


def test_a_config_that_is_not_a_file_or_a_hundred_megabytes(own):
    folder = own("nemotron single")
    path = folder / "config.json"
    os.truncate(path, 100 * 2**20)
    with Little(), pytest.raises(CheckpointError, match=f"at most {LARGEST_CONFIG:,} are read"):
        load(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load(folder)
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load(folder)


def test_no_utf8(own):
    folder = own("nemotron single")
    (folder / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(CheckpointError, match="utf-8"):
        load(folder)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_size", "16", ": hidden_size='16' must be an int"),
        ("hidden_size", 0, "hidden_size=0 must be at least 1"),
        ("vocab_size", -1, "has the shape|would have the shape"),
        ("conv_kernel", 0, "would have the shape"),
        ("num_attention_heads", None, "num_attention_heads"),
        ("hybrid_override_pattern", 3, "make no config of nemotron_h"),
        ("layers_block_type", ["mlp", "x"], "invalid types"),
        ("layers_block_type", None, "fit the config|layers"),
        ("mlp_hidden_act", "relu3", "mlp_hidden_act='relu3' is no activation. Did you mean 'relu"),
        ("mamba_hidden_act", "swosh", "mamba_hidden_act='swosh' is no activation"),
        ("dtype", "float33", "float33"),
        ("dtype", 3, "dtype"),
        ("per_layer_config", {"1": {"moe_intermediate_size": 7.5}}, "moe_intermediate_size"),
        ("per_layer_config", {"1": {"hidden_size": 7}}, "hidden_size"),
        ("per_layer_config", [3], "make no config of nemotron_h"),
        ("per_layer_config", {"1": {"mlp_hidden_act": "relu3"}}, "mlp_hidden_act, which"),
        ("quantization_config", "int8", "quantization_config='int8' must be"),
        ("quantization_config", {"a": 1}, "must be a dict with a `quant_method`"),
        ("num_labels", 10**9, "num_labels: 1,000,000,000 is more than"),
    ],
)
def test_fields_of_the_parent(field, value, said, own):
    folder = own("nemotron single")
    edit(folder, lambda c: c["parent_config"].update({field: value}))
    if field == "hybrid_override_pattern" or value is None:
        edit(folder, lambda c: c["parent_config"].pop("layers_block_type"))
    with Little(), pytest.raises((ElasticConfigError, CheckpointError), match=said):
        load(folder)
    with (
        Little(),
        pytest.raises((ElasticConfigError, CheckpointError)),
    ):  # through AutoConfig: no error of the class below it
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("dtype", value) for value in ("float33", 3, [], True)),
        *(("architectures", value) for value in (3, "x", {})),
        *(("cut_from", value) for value in (3, [], "x", {"family": 3}, {"budget": []}, {"sizes": 3}, {"commit": {}})),
        ("cut_from", {"repo": 5}),
        *(("left_out", value) for value in (3, [1], {"a": 1}, "mtp")),
        *(("auto_map", value) for value in (3, None, [], {"AutoConfig": 3})),
        *(("parent_config", value) for value in (3, None, [], "x", {"model_type": []}, {"model_type": "gpt2"})),
        *(("elastic", value) for value in (3, None, [], "x", {"axes": 3}, {"version": "3"})),
        ("id2label", {"x": "y"}),
    ],
)
def test_fields_beside_it(field, value, own):
    folder = own("nemotron slice")
    edit(folder, lambda c: c.update({field: value}))
    with pytest.raises(HFElasticError) as error:
        load(folder)
    assert len(str(error.value)) < 1500
    with pytest.raises(HFElasticError):
        read_config(folder)


def test_cut_from_of_an_export(own):
    folder = own("nemotron export")
    edit(folder, lambda c: c.update(cut_from=[3]))
    with pytest.raises(ElasticConfigError, match=r"cut_from=\[3\] must be a dict"):
        read_published(folder)


@pytest.mark.parametrize("kind", ["nemotron export", "nemotron slice"])
@pytest.mark.parametrize("field", [{"left_out": [1]}, {"left_out": 3}, {"cut_from": {"repo": 5}}])
def test_what_a_push_reads_beside_the_sizes(kind, field, own):
    folder = own(kind)
    edit(folder, lambda c: c.update(field))
    with pytest.raises(ElasticConfigError, match=f"^{next(iter(field))}"):
        read_published(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("null", "null"),
        ("true", "true"),
        ("[1]", r"a list, \[1\]"),
        ("3", "the number 3"),
        ('"x"', "a text, 'x'"),
    ],
)
def test_what_is_no_object_is_called_as_json_calls_it(text, said, tmp_path):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"file\.json holds {said}, it must hold a JSON object"):
        read_json(tmp_path / "file.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_that_may_not_be_read_are_not_called_missing_or_damaged(name, own, monkeypatch):
    folder = own("nemotron single")

    def watched(real):
        def call(path, *args, **kwargs):
            if str(path) == str(folder / name):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **kwargs)

        return call

    for place in ("os.open", "io.open", "builtins.open"):
        monkeypatch.setattr(place, watched(os.open if place == "os.open" else open))
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: permission denied"):
        load(folder)


def test_long_values_are_cut_in_messages(own):
    folder = own("nemotron single")
    edit(folder, lambda c: c["elastic"]["axes"]["hidden"].update(choices=["x" * 50] * 10_000))
    with pytest.raises(ElasticConfigError, match=r"choices=.* \.\.\. must be a list of whole numbers") as error:
        load(folder)
    assert len(str(error.value)) < 1000


def test_a_ranking_of_other_numbers(own):
    folder = own("nemotron single")
    ranking = read_config(folder).axes["layers"]["ranking"]
    for wrong in ([float(layer) for layer in ranking], [True if layer == 1 else layer for layer in ranking]):
        edit(folder, lambda c, wrong=wrong: c["elastic"]["axes"]["layers"].update(ranking=wrong))
        with pytest.raises(ElasticConfigError, match="must list every layer"):
            load(folder)


# Sizes that take memory and time


@pytest.mark.parametrize("layout", ["single", "sharded", "nested", "slice"])
@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("nemotron", "n_routed_experts", 100_002),
        ("nemotron", "moe_intermediate_size", 10**9),
        ("nemotron", "vocab_size", 2**62),
        ("nemotron", "layers_block_type", ["mlp"] * 1000),
        ("nemotron", "layers_block_type", ["moe"] * 256),
        ("nemotron", "layers_block_type", ["moe"] * 10**5),
        ("granite", "num_local_experts", 10**8),
        ("granite", "num_hidden_layers", 10**8),
    ],
    ids=lambda value: str(value)[:30],
)
def test_sizes_that_no_file_holds(layout, kind, field, value, own):
    folder = own(f"{kind} {layout}")

    def change(config):
        config["parent_config"][field] = value
        if field == "num_hidden_layers":
            config["parent_config"].pop("layer_types")
        elastic = config["elastic"]
        elastic.update(budgets={}, axes={})  # so that nothing in there refuses it first
        for key in ("interpolated", "router"):
            elastic.pop(key, None)
        if "files" in elastic:
            elastic["files"] = {
                "full": {name: size for files in elastic["files"].values() for name, size in files.items()}
            }

    edit(folder, change)
    with Little(), pytest.raises(HFElasticError):
        load(folder)
    with Little():
        try:
            plan(read_config(folder))
        except ElasticConfigError:
            assert "layer" in field


def test_more_submodels_than_anyone_has(own):
    folder = own("nemotron single")
    edit(folder, lambda c: c["elastic"].update(interpolated=c["elastic"]["interpolated"] * 5000))
    with Little(), pytest.raises(ElasticConfigError, match="at most 256 are read"):
        load(folder)


# The router


def test_a_router_of_another_width_takes_no_memory(own):
    for kind in ("nemotron", "granite"):
        folder = own(f"{kind} single")
        for width in (10**6, 5):
            edit(folder, lambda c, width=width: c["elastic"]["router"].update(width=width))
            with Little(), pytest.raises(CheckpointError, match="does not fit the router of this config"):
                load(folder)
        edit(folder, lambda c: c["elastic"]["router"].update(width=10**8))
        with Little(), pytest.raises(ElasticConfigError, match="width=100000000 of the router must be"):
            load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"width": "4"},
        {"width": None},
        {"width": 2**63},
        {"per_layer": None},
        {"per_layer": 3},
        {"per_layer": [["x"]]},
        {"targets": []},
        {"targets": {"half": 10**400}},
        {"targets": {"half": [0.5]}},
        {"targets": {"half": {"memory": None}}},
        {"targets": {"half": float("nan")}},
        {"targets": {f"size {i}": 0.9 for i in range(10**4)}},
    ],
    ids=lambda change: f"{change}"[:40],
)
def test_routers_that_are_none(change, own):
    folder = own("nemotron single")
    edit(folder, lambda c: c["elastic"]["router"].update(change))
    with Little(), pytest.raises(HFElasticError):
        load(folder)


def test_a_router_of_another_type_or_not_finite(own):
    folder = own("nemotron single")
    held = load_file(folder / ROUTER_FILE)
    for other in ({k: v.double() for k, v in held.items()}, {k: v * torch.inf for k, v in held.items()}):
        save_file(other, folder / ROUTER_FILE)
        with pytest.raises(CheckpointError, match="does not fit the router"):
            load(folder)


def test_loading_a_router_draws_no_numbers(own):
    folder = own("nemotron single")
    load(folder)
    state = torch.get_rng_state()
    assert load(folder).router is not None
    assert torch.equal(torch.get_rng_state(), state)


# generation_config.json


@pytest.mark.parametrize(
    "content",
    [
        *("null", "[]", "", "{", DEEP, f'{{"temperature": {DEEP}}}'),
        *('{"temperature": "hot"}', '{"temperature": NaN}', '{"max_new_tokens": 2.5}', '{"do_sample": 1}', '{"eos_token_id": ["a"]}'),
        *('{"eos_token_id": {}}', '{"early_stopping": []}', '{"watermarking_config": {"x": 1}}', '{"max_new_tokens": -3}'),
    ],
)  # fmt: skip
def test_a_damaged_generation_config_is_not_left_out(content, own):
    folder = own("granite single")
    (folder / "generation_config.json").write_text(content)
    for budget in (None, "small"):
        with Little(), pytest.raises(CheckpointError, match="generation_config"):
            load(folder, budget=budget)


def test_a_generation_config_that_is_no_file_is_not_left_out(own):
    folder = own("granite single")
    (folder / "generation_config.json").unlink()
    assert load(folder).generation_config.temperature is None  # none was saved
    (folder / "generation_config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"generation_config\.json is no file"):
        load(folder)


# Files of weights


def test_files_that_are_none(own):
    for name, file in (
        ("nemotron single", "model.safetensors"),
        ("nemotron sharded", "model.safetensors.index.json"),
        ("nemotron nested", "budgets/small/model.safetensors"),
        ("granite single", ROUTER_FILE),
    ):
        folder = own(name)
        (folder / file).unlink()
        (folder / file).mkdir()
        with Little(), pytest.raises(CheckpointError, match="is no file"):
            load(folder)
        if hasattr(os, "mkfifo"):  # which would be read for ever
            (folder / file).rmdir()
            os.mkfifo(folder / file)
            with Little(), pytest.raises(CheckpointError, match="is no file"):
                load(folder)


def test_an_index_of_other_things(own):
    folder = own("nemotron sharded")
    index = folder / "model.safetensors.index.json"
    for content in (
        DEEP,
        '{"weight_map": {"a": ["b"]}}',
        '{"weight_map": null}',
        '{"weight_map": {}, "weight_map": {}}',
    ):
        index.write_text(content)
        with Little(), pytest.raises(CheckpointError, match="is no index"):
            load(folder)
    os.truncate(index, 10**9)
    with Little(), pytest.raises(CheckpointError, match="is no index"):
        load(folder)


def test_a_header_of_a_hundred_megabytes(own):
    folder = own("nemotron single")
    path = folder / "model.safetensors"
    for length in (10**8, 2**40, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
        with Little(), pytest.raises(CheckpointError, match="cannot be read as safetensors"):
            load(folder)


# What else is read


def test_results_that_are_none(tmp_path):
    path = tmp_path / "plans.json"
    for content in (DEEP, "null", '{"points": 3}', '{"measurements": [{"name": "a", "runs": ["x"], "median": "x", "unit": "s"}]}',
                    '{"evaluation": {"budgets": []}}', '{"measurements": [{"name": "a", "runs": [1.0], "median": 1.0, "unit": "s"}], "machine": 3}'):  # fmt: skip
        path.write_text(content)
        with pytest.raises(ElasticConfigError, match="results file"):
            read_all([str(path)], {})


def test_scores_that_are_none(tmp_path):
    path = tmp_path / "scores.safetensors"
    for layers, info in (("null", "{}"), (DEEP, "{}"), ("[3]", "{}"), ("[[1]]", "{}")):
        save_file({"hidden.0": torch.ones(2)}, path, {"layers": layers, "info": info})
        with pytest.raises(CheckpointError, match="holds no scores"):
            Scores.load(path)


def test_one_reader(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, -2, 18446744073709551615, 1.5, null, {"b": {}}]}')
    assert read_json(path) == {"a": [1, -2, 2**64 - 1, 1.5, None, {"b": {}}]}
    with pytest.raises(CheckpointError, match="is missing|No such file"):
        read_json(tmp_path / "other.json")


def test_auto_config_of_a_damaged_parent(own):
    folder = own("granite slice")
    assert isinstance(AutoConfig.from_pretrained(folder), ElasticConfig)
    edit(folder, lambda c: c["parent_config"].update(mamba_n_heads="x"))
    with pytest.raises(ElasticConfigError, match="mamba_n_heads"):
        AutoConfig.from_pretrained(folder)
