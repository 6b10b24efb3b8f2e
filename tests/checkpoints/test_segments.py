"""One live tensor that is several on disk, one per segment of its first dimension: `q_conv1d | k_conv1d | v_conv1d -> conv1d`."""

import shutil
from pathlib import Path

import pytest
import torch
from cases import randomize
from compare import assert_same_weights
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, OlmoHybridConfig, OlmoHybridForCausalLM

from hf_elastic import CheckpointError, ElasticConfig
from hf_elastic.architectures import get_architecture
from hf_elastic.checkpoints.checkpoint import Checkpoint
from hf_elastic.submodels.slicing import slice_state_dict

load = AutoModelForCausalLM.from_pretrained
CONV = "model.layers.0.linear_attn.conv1d.weight"
PARTS = {CONV.replace("conv1d", f"{part}_conv1d"): rows for part, rows in (("q", 12), ("k", 12), ("v", 32))}
SIZES = {"hidden": 32, "value_heads": 2, "value_head_dim": 6, "layers": [0, 1]}
BUDGETS = {"small": SIZES, "medium": {"hidden": 40, "value_head_dim": 6}}


@pytest.fixture(scope="module")
def stock() -> OlmoHybridForCausalLM:
    config = OlmoHybridConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=6,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        pad_token_id=0,
        eos_token_id=1,
    )
    model = OlmoHybridForCausalLM(config).eval()
    randomize(model)
    return model


def parts_of(stock) -> dict[str, torch.Tensor]:
    return dict(zip(PARTS, stock.state_dict()[CONV].split(list(PARTS.values())), strict=True))


def described(stock, folder: Path) -> Path:
    ElasticConfig.from_parent(stock.config, BUDGETS).save_pretrained(folder)
    return folder


def as_stock(stock, folder: Path) -> Path:
    stock.save_pretrained(folder)
    rows = [load_file(folder / "model.safetensors")[name].shape[0] for name in PARTS]
    assert rows == [19, 19, 18], "stock cuts as the Hub does: hf_elastic.checkpoints.conversions can go"
    return described(stock, folder)


def as_family(stock, folder: Path) -> Path:
    load(as_stock(stock, folder / "stock")).save_pretrained(folder / "ours")
    return folder / "ours"


def fused(stock, folder: Path) -> Path:
    stock.save_pretrained(folder, save_original_format=False)
    assert CONV in load_file(folder / "model.safetensors")
    return described(stock, folder)


WAYS = {"equal parts": as_stock, "as on the Hub": as_family, "one tensor": fused}


@pytest.fixture(scope="module")
def folders(stock, tmp_path_factory) -> dict[str, Path]:
    made = {way: make(stock, tmp_path_factory.mktemp("way")) for way, make in WAYS.items()}
    made["nested"] = tmp_path_factory.mktemp("nested")
    load(made["as on the Hub"]).save_pretrained(made["nested"], layout="nested")
    return made


@pytest.mark.parametrize("way", [*WAYS, "nested"])
def test_every_way_is_read(way, stock, folders):
    assert_same_weights(load(folders[way]), stock)
    for name in BUDGETS:
        sliced = load(folders[way], budget=name)
        kept = sliced.elastic_config.parent_config
        assert kept.hidden_size == BUDGETS[name]["hidden"]
        architecture = get_architecture("olmo_hybrid")
        submodel = architecture.submodel(stock.config, BUDGETS[name])
        assert_same_weights(sliced, slice_state_dict(architecture, stock.config, stock.state_dict(), submodel))


@pytest.mark.parametrize("original", [True, False])
def test_a_base_model(original, stock, folders, tmp_path):
    trunk = AutoModel.from_pretrained(folders["as on the Hub"])
    trunk.save_pretrained(tmp_path, save_original_format=original)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert (CONV.removeprefix("model.") in names) is not original
    small = AutoModel.from_pretrained(tmp_path, budget="small").state_dict()
    expected = load(folders["equal parts"], budget="small").model.state_dict()
    assert_same_weights(small, expected)


def test_saved_under_the_names_and_in_the_lengths_of_the_hub(stock, folders, tmp_path):
    """Of the whole, of a size that is saved, and of one that is exported; stock loads them."""
    whole, equal = (load_file(folders[way] / "model.safetensors") for way in ("as on the Hub", "equal parts"))
    assert whole.keys() == equal.keys()
    for name, part in parts_of(stock).items():
        assert torch.equal(whole[name], part)
    family = load(folders["as on the Hub"])
    family.save_pretrained(tmp_path / "saved", budget="small")
    family.export(tmp_path / "exported", "small")
    small = load(folders["equal parts"], budget="small")
    for folder in (tmp_path / "saved", tmp_path / "exported"):
        saved = load_file(folder / "model.safetensors")
        assert [saved[name].shape[0] for name in PARTS] == [12, 12, 12]
        assert_same_weights(load(folder), small)
    plain, info = OlmoHybridForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(info.values())
    assert_same_weights(plain, small)
    family.save_pretrained(tmp_path / "whole", budget={"value_head_dim": {0: 4, 2: 8}})
    saved = load_file(tmp_path / "whole" / "model.safetensors")
    assert [saved[name].shape[0] for name in PARTS] == [12, 12, 16]
    assert [saved[name.replace("layers.0", "layers.2")].shape[0] for name in PARTS] == [12, 12, 32]


def test_only_the_rows_that_are_kept_are_read(stock, folders):
    architecture = get_architecture("olmo_hybrid")
    submodel = architecture.submodel(stock.config, {"value_heads": 2, "value_head_dim": 6})
    for way in WAYS:
        checkpoint = Checkpoint([folders[way] / "model.safetensors"])
        lazy = checkpoint.lazy_slice(architecture, stock.config, submodel)[CONV]
        read = sum(stop - start for block in lazy.leaves() for start, stop in block.extent)
        assert read == lazy[...].nbytes == (12 + 12 + 2 * 6) * 4 * 4


def drop(tensors, name):
    del tensors[name]


def shorten(tensors, name):
    tensors[name] = tensors[name][:-1].clone()


def widen(tensors, name):
    tensors[name] = tensors[name].repeat(1, 1, 2)


def halve(tensors, name):
    tensors[name] = tensors[name].bfloat16()


DAMAGES = {drop: "{} is missing", shorten: r"{} is \(.*in the file", widen: r"{} is \(.*in the file"}


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("way", ["equal parts", "as on the Hub", "nested"])
def test_damaged_segments_are_named(way, part, folders, tmp_path):
    folder = Path(shutil.copytree(folders[way], tmp_path / "damaged"))
    file = next(path for path in folder.rglob("model.safetensors"))
    name = CONV.replace("conv1d", f"{part}_conv1d")
    sound = load_file(file)
    for damage, message in (DAMAGES | {halve: "the parts of .*conv1d.weight are stored as BF16 and F32"}).items():
        tensors = dict(sound)
        damage(tensors, name)
        save_file(tensors, file, metadata={"format": "pt"})
        if way == "nested":
            note_size(folder, file)
        with pytest.raises(CheckpointError, match=message.format(name.replace(".", r"\."))):
            load(folder, budget="small")


def note_size(folder: Path, file: Path) -> None:
    """What the config says about the size of a file."""
    config = ElasticConfig.from_pretrained(folder)
    config.elastic["files"]["small"][str(file.relative_to(folder))] = file.stat().st_size
    config.save_pretrained(folder)
