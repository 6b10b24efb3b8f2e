"""`config.json` of an export, as programs read it that parse it themselves: what each of them accepts, in a table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BUDGETS, CASES, HOMOGENEOUS, IDS, granite, randomize
from compare import assert_same_weights, logits
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_elastic import ElasticConfig, ElasticConfigError, ElasticForCausalLM
from hf_elastic.cli import main
from hf_elastic.configuration.parent import parent_from_dict

MOE_WORDS = ("expert", "moe", "topk", "router")
LETTERS = {"mamba": "M", "attention": "*", "moe": "E", "mlp": "-"}


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def strict_json(folder: Path) -> dict[str, Any]:
    """As readers that are not Python's: no `Infinity`, no `NaN`."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((folder / "config.json").read_text(), parse_constant=refuse)


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def any_reader(config: dict[str, Any], there: dict[str, tuple[int, ...]]) -> None:
    assert "__float__" not in leaves(config)
    assert not {"linear_attention", "full_attention"} & {leaf for leaf in leaves(config) if isinstance(leaf, str)}
    layers = {int(key.split("layers.")[1].split(".")[0]) for key in there if "layers." in key}
    assert config["num_hidden_layers"] == len(layers)
    assert config["hidden_size"] == next(shape for key, shape in there.items() if "embed" in key)[1]


def old_transformers_granite(config: dict[str, Any], there: dict[str, tuple[int, ...]]) -> None:
    """Also llama.cpp and mistral.rs, which know these two words only."""
    mamba = [any(f"layers.{i}.mamba." in key for key in there) for i in range(config["num_hidden_layers"])]
    assert config["layer_types"] == ["mamba" if here else "attention" for here in mamba]
    assert config["rope_theta"] == 10000.0


def mistral_rs(config: dict[str, Any], there: dict[str, tuple[int, ...]]) -> None:
    assert config["position_embedding_type"] in ("rope", "nope")  # a string, not null


def llama_cpp_granite(config: dict[str, Any], there: dict[str, tuple[int, ...]]) -> None:
    shared = there["model.layers.0.shared_mlp.output_linear.weight"][1]
    assert config["shared_intermediate_size"] == shared
    if any("block_sparse_moe" in key for key in there):
        assert config["num_local_experts"] == there["model.layers.0.block_sparse_moe.input_linear.weight"][0]
        assert config["intermediate_size"] == there["model.layers.0.block_sparse_moe.output_linear.weight"][2]
    else:  # `intermediate_size` is the width of its dense MLP, and 0 experts say that it is dense
        assert config["intermediate_size"] == shared
        assert config["num_local_experts"] == config["num_experts_per_tok"] == 0


def pattern_readers(config: dict[str, Any], there: dict[str, tuple[int, ...]]) -> None:
    """NVIDIA's own files: list and pattern say the same."""
    pattern = config["hybrid_override_pattern"]
    assert "".join(LETTERS[kind] for kind in config["layers_block_type"]) == pattern
    assert len(pattern) == config["num_hidden_layers"]


def llama_cpp_nemotron(config: dict[str, Any], there: dict[str, tuple[int, ...]]) -> None:
    has_experts = any(".experts." in key for key in there)
    assert ("num_experts_per_tok" in config) == has_experts
    if has_experts:
        assert config["moe_intermediate_size"] == next(s for k, s in there.items() if "experts.0.up_proj" in k)[0]
        assert config["n_routed_experts"] == next(s for k, s in there.items() if "mixer.gate.weight" in k)[0]
    else:
        assert not [key for key in config if any(word in key for word in MOE_WORDS)]
    if (mlp := next((s for k, s in there.items() if "mixer.up_proj" in k), None)) is not None:
        assert config["intermediate_size"] == mlp[0]
    assert config.get("moe_latent_size", 1) is not None


def sglang_nemotron(config: dict[str, Any], there: dict[str, tuple[int, ...]]) -> None:
    assert set(config["layers_block_type"]) <= LETTERS.keys()
    assert set(config.get("mtp_layers_block_type", [])) <= LETTERS.keys()
    assert config["mamba_n_groups"] == config["n_groups"]  # it knows only the first, and takes 8 where it is missing


READERS: dict[str, list[Callable[[dict[str, Any], dict[str, tuple[int, ...]]], None]]] = {
    "granitemoehybrid": [any_reader, old_transformers_granite, llama_cpp_granite, mistral_rs],
    "nemotron_h": [any_reader, pattern_readers, llama_cpp_nemotron, sglang_nemotron],
}


def check_readers(folder: Path) -> None:
    config, there = strict_json(folder), shapes(folder)
    for reader in READERS[config["model_type"]]:
        reader(config, there)


def check_stock_class(folder: Path, reference: Any, scratch: Path, ids: torch.Tensor) -> None:
    """The stock class reads the export as it reads the same weights beside a config in its own words, bit by bit."""
    reference.save_pretrained(scratch)
    assert (scratch / "config.json").read_bytes() != (folder / "config.json").read_bytes()
    shutil.copyfile(folder / "model.safetensors", scratch / "model.safetensors")
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    expected = AutoModelForCausalLM.from_pretrained(scratch)
    assert not any(info.values())
    assert type(theirs) is type(expected)
    assert_same_weights(theirs, expected)
    assert torch.equal(logits(theirs, ids), logits(expected, ids))
    assert theirs.dtype == expected.dtype
    assert theirs.config.layer_types == expected.config.layer_types
    if any(shape[0] for key, shape in shapes(folder).items() if ".experts." in key or "block_sparse_moe" in key):
        mine, stock = theirs.config.to_diff_dict(), expected.config.to_diff_dict()
        del mine["cut_from"]
        for one in (mine, stock):
            one.pop("position_embedding_type", None)  # "nope" is what `None` means
        assert mine == stock


@pytest.mark.parametrize("case", HOMOGENEOUS, ids=IDS)
def test_every_export_is_read_alike(case, checkpoint, tmp_path, ids):
    sliced = AutoModelForCausalLM.from_pretrained(checkpoint(case.parent), budget=case.submodel)
    sliced.export(tmp_path / "export")
    check_readers(tmp_path / "export")
    reference = sliced.elastic_config.stock_config(sliced.submodel)
    reference.architectures, reference.dtype = [type(sliced)._stock_class.__name__], sliced.dtype
    check_stock_class(tmp_path / "export", reference, tmp_path / "reference", ids)


@pytest.mark.parametrize("case", [case for case in CASES if case not in HOMOGENEOUS][:6], ids=IDS)
def test_a_heterogeneous_export_has_the_same_names(case, checkpoint, tmp_path):
    sliced = AutoModelForCausalLM.from_pretrained(checkpoint(case.parent), budget=case.submodel)
    sliced.export(tmp_path, heterogeneous=True)
    any_reader(strict_json(tmp_path), shapes(tmp_path))
    assert_same_weights(ElasticForCausalLM.from_pretrained(tmp_path), sliced)


@pytest.mark.parametrize("name", ["nano3", "granite"])
def test_the_stock_folder_of_the_nested_layout(name, original, tmp_path, ids):
    model = ElasticForCausalLM.from_pretrained(
        None,
        config=ElasticConfig.from_parent(original(name).config, BUDGETS[name]),
        state_dict=original(name).state_dict(),
    )
    model.save_pretrained(tmp_path, layout="nested")
    check_readers(tmp_path / "budgets/small")
    small = model.elastic_config.submodel("small")
    reference = model.elastic_config.stock_config(small)
    reference.architectures, reference.dtype = [type(original(name)).__name__], torch.float32
    check_stock_class(tmp_path / "budgets/small", reference, tmp_path / "reference", ids)


def test_values_that_are_not_the_defaults_stay(tmp_path, ids):
    """A time step limit of one's own, long contexts: as published files spell them."""
    config = granite(
        time_step_limit=(0.01, float("inf")),
        rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
        output_router_logits=False,
    )
    parent = AutoModelForCausalLM.from_config(config).eval()
    randomize(parent)
    model = ElasticForCausalLM.from_pretrained(
        None, config=ElasticConfig.from_parent(config, {}), state_dict=parent.state_dict()
    )
    model.export(tmp_path / "export")
    written = json.loads((tmp_path / "export/config.json").read_text())
    assert written["time_step_limit"] == [0.01, float("inf")]
    assert written["rope_theta"] == 5e5
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert again.config.time_step_limit == (0.01, float("inf"))
    assert again.config.rope_parameters == parent.config.rope_parameters
    assert_same_weights(again, parent)


def test_an_exported_config_is_a_parent_again(tmp_path, checkpoint):
    """What was left out as a default comes back with the same value."""
    for name in ("nano2", "granite_tied"):
        sliced = AutoModelForCausalLM.from_pretrained(checkpoint(name))
        sliced.export(tmp_path / name)
        again = ElasticForCausalLM.from_pretrained(
            tmp_path / name, elastic_config={"half": {"hidden": 36 if name == "nano2" else 24}}
        )
        assert_same_weights(again, sliced)
        assert again.config.time_step_limit in ((0.0, float("inf")), [0.0, float("inf")])


# Tokenizers


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1")


@pytest.mark.parametrize("field", ["n_groups", "mamba_n_groups"])
def test_two_names_for_one_size_say_the_same(field, family_folder, tmp_path):
    """The stock class takes `mamba_n_groups` and says nothing of the other, which other programs read."""
    AutoModelForCausalLM.from_pretrained(family_folder("nano3"), budget="small").export(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, field: 1}))
    assert config[field] == 2
    taken = 1 if field == "mamba_n_groups" else 2
    with pytest.raises(ElasticConfigError, match=f"n_groups={3 - taken}, but another field says {taken}"):
        ElasticConfig.from_parent(parent_from_dict(json.loads(path.read_text())), {})


@pytest.mark.parametrize("how", ["copied", "given", "command"])
def test_the_tokenizer_has_a_class_that_old_versions_know(how, tokenizer, own_folder, tmp_path):
    folder, out = own_folder("nano3"), tmp_path / "export"
    tokenizer.save_pretrained(folder)
    source = json.loads((folder / "tokenizer_config.json").read_text())
    assert source["tokenizer_class"] == "TokenizersBackend", (
        "upstream writes another class now; the rewriting is not needed"
    )
    if how == "command":
        assert main(["export", str(folder), str(out), "--budget", "small"]) == 0
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, budget="small")
        model.export(out, **({"tokenizer": tokenizer} if how == "given" else {}))
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert written == {**source, "tokenizer_class": "PreTrainedTokenizerFast"}
    assert json.loads((folder / "tokenizer_config.json").read_text()) == source, "the source is left as it is"
    assert AutoTokenizer.from_pretrained(out)("t5 t7").input_ids == [5, 7]


def test_other_tokenizer_files_are_copied_as_they_are(own_folder, tmp_path):
    folder = own_folder("nano3")
    text = '{"tokenizer_class": "GPT2Tokenizer",\n "x": "\\u00e9"}'
    (folder / "tokenizer_config.json").write_text(text)
    AutoModelForCausalLM.from_pretrained(folder, budget="small").export(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == text
