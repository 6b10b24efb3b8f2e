"""Plain parents whose JSON files are damaged, whose shards are missing, or that a killed save left: refused as elastic checkpoints are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BUDGETS, build_parent
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_elastic import CheckpointError, ElasticForCausalLM, elastify
from hf_elastic.checkpoints.loading import load_stock
from hf_elastic.cli import main
from hf_elastic.storage.exchanging import Exchange

INDEX = "model.safetensors.index.json"
DEEP = "[" * 3000 + "]" * 3000
TEXTS = {
    "config.json": ["null", "[]", "{", "{}", '{"model_type": []}', DEEP, f'{{"a": {DEEP}}}'],
    INDEX: [
        "null",
        "[]",
        "{",
        "{}",
        '{"weight_map": {"a": "../x"}}',
        '{"weight_map": 3}',
        f'{{"weight_map": {DEEP}}}',
    ],
    "generation_config.json": ["null", "[]", "{", '{"max_new_tokens": "a"}', '{"eos_token_id": {"a": 1}}', DEEP],
}


def elastified(folder: Path) -> Any:
    return elastify(folder, budgets=BUDGETS["nano3"], sort=False)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Callable[[Path], Path]:
    parent = build_parent("nano3")

    def save(folder: Path) -> Path:
        parent.save_pretrained(folder, max_shard_size="20KB")
        return folder

    return save


@pytest.mark.parametrize(("file", "text"), [(file, text) for file, texts in TEXTS.items() for text in texts])
def test_damaged_json(file, text, tmp_path, sharded, capsys):
    folder = sharded(tmp_path / "parent")
    (folder / file).write_text(text)
    with pytest.raises(CheckpointError, match=r"parent") as error:
        elastified(folder)
    with pytest.raises(CheckpointError):
        load_stock(str(folder), dtype=torch.float32)  # as teachers are
    assert main(["elastify", str(folder), str(tmp_path / "out"), "--no-sort", "--budget", "small:hidden=32"]) == 2
    assert str(error.value)[:60] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_shard(tmp_path, sharded):
    folder = sharded(tmp_path)
    shard = sorted(folder.glob("model-*"))[3]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing, though {INDEX} lists it"):
        elastified(folder)


@pytest.mark.parametrize(
    "text", ["null", "{}", '{"weight_map": {"a": "../x.bin"}}', '{"weight_map": {"a": "gone.bin"}}']
)
def test_lists_of_files_in_another_format(text, tmp_path, sharded):
    folder = sharded(tmp_path)
    (folder / INDEX).unlink()
    (folder / "pytorch_model.bin.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="index"):
        elastified(folder)


@pytest.mark.parametrize("text", ["null", '{"weight_map": 3}', '{"weight_map": {"a": "gone.safetensors"}}'])
def test_a_teacher_without_a_table(text, tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=32, **small))
    teacher.save_pretrained(tmp_path)
    loaded = load_stock(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in teacher.state_dict().items())
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError):
        load_stock(tmp_path)


def test_whole_parents_of_both_formats(tmp_path, sharded, original):
    folder = sharded(tmp_path / "sharded")
    weights: dict[str, torch.Tensor] = {}
    for shard in folder.glob("model-*"):
        weights |= load_file(shard)
        shard.unlink()
    half = len(weights) // 2
    names = {"a.bin": list(weights)[:half], "b.bin": list(weights)[half:]}
    for name, keys in names.items():
        torch.save({key: weights[key] for key in keys}, folder / name)
    (folder / INDEX).unlink()
    listing = {"metadata": {}, "weight_map": {key: name for name, keys in names.items() for key in keys}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(listing))
    for made in (elastified(folder), elastified(sharded(tmp_path / "other"))):
        assert all(torch.equal(made.state_dict()[key], t) for key, t in original("nano3").state_dict().items())


# -- killed saves -------------------------------------------------------------------------------------------------------


def interrupt(folder: Path) -> Path:
    """As if a save had been killed when it had moved away all configs."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("config.json")]
    exchange = Exchange(folder / ".saving-scratch-1", [], names)
    for name in names:
        (exchange.scratch / "old" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(exchange.scratch / "old" / name)
    exchange.begin()
    return folder


def test_a_parent_whose_save_was_killed(tmp_path, sharded, capsys):
    folder = interrupt(sharded(tmp_path / "parent"))
    with pytest.raises(CheckpointError, match=r"hf_elastic\.recover"):
        elastified(folder)
    calibration = tmp_path / "text.jsonl"
    calibration.write_text('{"text": "a"}\n')
    for options in (["--no-sort"], ["--calibration", str(calibration)]):
        command = ["elastify", str(folder), str(tmp_path / "out"), "--budget", "small:hidden=32", *options]
        assert main(command) == 2
        assert "hf_elastic.recover" in capsys.readouterr().err


def test_the_stock_folder_of_a_family_whose_save_was_killed(tmp_path, family_folder):
    ElasticForCausalLM.from_pretrained(family_folder("nano3")).save_pretrained(tmp_path / "nested", layout="nested")
    small = interrupt(tmp_path / "nested") / "budgets" / "small"
    assert small.is_dir()
    for load in (
        lambda: ElasticForCausalLM.from_pretrained(small, elastic_config={}),
        lambda: ElasticForCausalLM.from_pretrained(tmp_path / "nested", subfolder="budgets/small", elastic_config={}),
        lambda: elastified(small),
    ):
        with pytest.raises(CheckpointError, match=re.escape(f"hf_elastic.recover({str(tmp_path / 'nested')!r})")):
            load()
