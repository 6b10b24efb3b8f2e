"""Quantised checkpoints are loaded decoded: released ones as their layouts define it, only the slice's codes are fetched, and damage is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import nemotron
from coded import BUDGETS, codes_of, encodings_of, family, file_bytes, tensors_of, write_family, write_released
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_elastic import CheckpointError, ElasticConfig, ElasticConfigError, ElasticForCausalLM
from hf_elastic.architectures.encodings import ENCODINGS
from hf_elastic.architectures.pieces import stored_pieces
from hf_elastic.checkpoints.checkpoint import Checkpoint
from hf_elastic.checkpoints.quantizing import slice_checkpoint
from hf_elastic.cli import main
from hf_elastic.commands.plan import plan
from hf_elastic.quantization.recipes import quantized_config
from hf_elastic.storage import checksums, fetching
from hf_elastic.submodels.slicing import slice_state_dict

load = ElasticForCausalLM.from_pretrained
IN_PROJ, SCALE = "backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.experts.0.up_proj.weight_scale"


def _group(**weights: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


def _compressed(format: str, **weights: Any) -> dict[str, Any]:
    said = {"quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed"}
    return {"quantization_config": {**said, "config_groups": _group(**weights)}}


FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
LAYOUTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "nvfp4": ("nvfp4", "nvfp4", _compressed("nvfp4-pack-quantized", **FP4)),
    "fp8": ("fp8", "fp8", _compressed("float-quantized", **FP8, strategy="channel")),
    "fp8-tensor": ("fp8", "fp8-tensor", _compressed("naive-quantized", **FP8, strategy="tensor")),
    "modelopt-nvfp4": (
        "nvfp4",
        "nvfp4-modelopt",
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
    ),
    "modelopt-fp8": ("fp8", "fp8-tensor", {}),  # an older version, which says it in a file of its own
}


def release(
    folder: Path, name: str, layout: str, renamed: bool = False, **extra: torch.Tensor
) -> tuple[PreTrainedModel, dict[str, str]]:
    """A checkpoint as another program writes it, and what every weight of it is stored in."""
    recipe, encoding, fields = LAYOUTS[layout]
    encodings = encodings_of(family(name)[0], recipe, **{recipe: encoding})
    model = write_released(
        folder, name, encodings, fields, extra, scalars=layout.startswith("modelopt"), renamed=renamed
    )
    if not fields:
        about = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
        (folder / "hf_quant_config.json").write_text(json.dumps(about))
    return model, {weight: encoding.name for weight, encoding in encodings.items()}


def values_of(parts: tuple[torch.Tensor, ...], encoding: str) -> torch.Tensor:
    """What a weight in few bits is, by the definition of its layout."""
    codes, scale, *last = parts
    if not encoding.startswith("nvfp4"):
        return codes.float() * (scale if encoding == "fp8" else scale[..., None])
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = torch.stack([levels[(codes & 15).long()], levels[(codes >> 4).long()]], -1).flatten(-2)
    whole = last[0][..., None]
    step = scale.float() * whole if encoding.endswith("modelopt") else scale.float() / whole
    return values * step.repeat_interleave(16, -1)


def decoded_state(model: PreTrainedModel, encodings: dict[str, str]) -> dict[str, torch.Tensor]:
    coded = codes_of(model, {weight: ENCODINGS[name] for weight, name in encodings.items()})
    return {
        **model.state_dict(),
        **{weight: values_of(parts, encodings[weight]).bfloat16() for weight, parts in coded.items()},
    }


def assert_slice(model: PreTrainedModel, whole: dict[str, torch.Tensor], elastic: ElasticConfig, budget: Any) -> None:
    """A loaded size has the weights that slicing the decoded parent gives."""
    cut = slice_state_dict(elastic.architecture, elastic.parent_config, whole, elastic.resolve(budget))
    state = model.state_dict()
    assert state.keys() >= cut.keys()
    for weight, tensor in cut.items():
        assert torch.equal(state[weight], tensor), weight


# Checkpoints of other programs


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("nemotron", "nvfp4"),
        ("granite, one by one", "modelopt-nvfp4"),
        *(pytest.param("nemotron", layout, marks=pytest.mark.slow) for layout in LAYOUTS if layout != "nvfp4"),
        *(pytest.param("granite", layout, marks=pytest.mark.slow) for layout in ("nvfp4", "modelopt-fp8")),
        pytest.param("granite, one by one", "fp8", marks=pytest.mark.slow),
    ],
)
def test_released_checkpoints_are_what_their_layout_says(name, layout, tmp_path):
    beside = {f"{IN_PROJ}.input_scale": torch.ones(()), "backbone.layers.2.mixer.k_proj.k_scale": torch.ones(1)}
    name, _, renamed = name.partition(", ")
    parent, encodings = release(tmp_path, name, layout, bool(renamed), **beside)
    _, elastic = family(name)
    whole = decoded_state(parent, encodings)
    moved = sum(not torch.equal(whole[weight], parent.state_dict()[weight]) for weight in encodings)
    assert moved == len(encodings) > 10
    for budget in (None, "half", "small"):
        model = load(tmp_path, elastic_config=BUDGETS[name], budget=budget)
        assert_slice(model, whole, elastic, budget)
        assert "quantization" not in model.elastic_config.elastic
        assert not hasattr(model.config, "quantization_config")
        assert model.dtype == torch.bfloat16


def test_a_plan_of_a_released_checkpoint_reads_headers_only(tmp_path, local_hub, monkeypatch):
    release(tmp_path / "repo", "nemotron", "fp8")
    content = load_file(tmp_path / "repo/model.safetensors")
    halved = {name: value.bfloat16() if name.endswith("_scale") else value for name, value in content.items()}
    save_file(halved, tmp_path / "repo/model.safetensors")
    local_hub.commit("org/released", tmp_path / "repo")
    (full,) = plan("org/released")
    assert full["formats"] == ["fp8"]
    assert full["stored_bytes"] == full["download_bytes"] == file_bytes(tmp_path / "repo"), "with scales in bfloat16"
    header = int.from_bytes((tmp_path / "repo/model.safetensors").read_bytes()[:8], "little")
    assert local_hub.sent["model.safetensors"] <= header + 8
    model = load(tmp_path / "repo", elastic_config={}, budget=None)
    assert full["weight_bytes"]["bfloat16"] == sum(tensor.nbytes for tensor in model.state_dict().values())


METHODS = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq"},
    "bitsandbytes": {"quant_method": "bitsandbytes"},
    "mxfp4": {"quant_method": "mxfp4"},
    "128 x 128": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "'mxfp4-pack-quantized'": _compressed("mxfp4-pack-quantized", **FP4)["quantization_config"],
    "'pack-quantized'": _compressed("pack-quantized", num_bits=4, type="int")["quantization_config"],
    "'block'": _compressed("float-quantized", **FP8, strategy="block")["quantization_config"],
    "'group_size': 32": _compressed("nvfp4-pack-quantized", **FP4 | {"group_size": 32})["quantization_config"],
    "'symmetric': False": _compressed("float-quantized", **FP8 | {"symmetric": False}, strategy="channel")[
        "quantization_config"
    ],
    "'frozen'": {"quant_method": "compressed-tensors", "quantization_status": "frozen"},
    "transforms": {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}},
    "sparse": {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
    "quant_algo 'W4A8_AWQ'": {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
    "quant_algo 'MXFP8'": {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "MXFP8"}},
    },
}


@pytest.mark.parametrize("named", list(METHODS))
def test_other_methods_are_refused_by_name(named, tmp_path, monkeypatch):
    release(tmp_path, "nemotron", "fp8")
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "quantization_config": METHODS[named]}))
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", lambda *args: pytest.fail("the loader was called"))
    for ask in (lambda: load(tmp_path, elastic_config={"half": {"hidden": 32}}), lambda: plan(str(tmp_path))):
        with pytest.raises(ElasticConfigError) as caught:
            ask()
        assert named in str(caught.value)
        assert "nvfp4-pack-quantized and float-quantized" in str(caught.value)


def _without(content: dict[str, torch.Tensor]) -> None:
    del content[f"{IN_PROJ}.weight_scale"]


def _narrower(content: dict[str, torch.Tensor]) -> None:
    content[f"{IN_PROJ}.weight_scale"] = content[f"{IN_PROJ}.weight_scale"][:-1].clone()


def _whole(content: dict[str, torch.Tensor]) -> None:
    content[f"{IN_PROJ}.weight"] = content[f"{IN_PROJ}.weight"].bfloat16()


def _zero_point(content: dict[str, torch.Tensor]) -> None:
    content[f"{IN_PROJ}.weight_zero_point"] = content[f"{IN_PROJ}.weight_scale"].to(torch.uint8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without, "in_proj.weight_scale is missing"),
        (_narrower, r"in_proj.weight_scale is \(\d+, 1\) in the file, the config says"),
        (_whole, "in_proj.weight is stored as BF16, not as F8_E4M3|in_proj.weight_scale belongs to no part"),
        (_zero_point, "in_proj.weight_zero_point belongs to no part"),
    ],
)
@pytest.mark.parametrize("own", [False, True], ids=["released", "section"])
def test_codes_scales_and_what_is_said_of_them_have_to_agree(own, damage, message, tmp_path, monkeypatch):
    if own:
        write_family(tmp_path, "nemotron", "fp8")
    else:
        release(tmp_path, "nemotron", "fp8")
    content = load_file(tmp_path / "model.safetensors")
    damage(content)
    save_file(content, tmp_path / "model.safetensors")
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", lambda *args: pytest.fail("the loader was called"))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, **({} if own else {"elastic_config": BUDGETS["nemotron"]}), budget="half")


def test_a_config_that_speaks_of_codes_where_there_are_none(tmp_path):
    write_released(tmp_path, "nemotron", {}, LAYOUTS["nvfp4"][2], {})
    with pytest.raises(CheckpointError, match=r"quantised \(compressed-tensors\), and its files hold no codes"):
        load(tmp_path, elastic_config=BUDGETS["nemotron"])


@pytest.mark.parametrize(
    ("recipe", "scale", "value", "message"),
    [
        ("fp8", f"{IN_PROJ}.weight_scale", 0.0, "0 or negative"),
        ("fp8", f"{IN_PROJ}.weight_scale", float("nan"), "NaN"),
        ("fp8", f"{IN_PROJ}.weight_scale", float("inf"), "infinite"),
        ("fp8", f"{IN_PROJ}.weight_scale", -1.0, "0 or negative"),
        ("nvfp4", SCALE, float("nan"), "NaN"),
        ("nvfp4", SCALE, -1.0, "negative"),
        ("nvfp4", SCALE.replace("weight_scale", "weight_global_scale"), 0.0, "0 or negative"),
        ("nvfp4", SCALE.replace("weight_scale", "weight_global_scale"), float("inf"), "infinite"),
    ],
)
def test_scales_that_are_none_are_refused_before_anything_is_loaded(
    recipe, scale, value, message, tmp_path, monkeypatch
):
    write_family(tmp_path, "nemotron", recipe)
    content = load_file(tmp_path / "model.safetensors")
    damaged = content[scale].float()
    damaged.flatten()[0] = value
    content[scale] = damaged.to(content[scale].dtype)
    save_file(content, tmp_path / "model.safetensors")
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", lambda *args: pytest.fail("the loader was called"))
    with pytest.raises(CheckpointError, match=f"holds scales that are {message}; no weight was decoded"):
        load(tmp_path, budget="small")


def test_scales_of_a_whole_matrix_that_are_0_are_refused(tmp_path):
    write_family(tmp_path, "nemotron")
    content = load_file(tmp_path / "model.safetensors")
    content[SCALE] = torch.zeros_like(content[SCALE].float()).to(torch.float8_e4m3fn)
    save_file(content, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"experts.up_proj.weight_scale holds scales that are 0 in a whole matrix"
    ):
        load(tmp_path, budget="half")


def test_a_section_of_a_newer_version_is_refused(tmp_path):
    write_family(tmp_path, "nemotron")
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["elastic"]["quantization"]["version"] = 2
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ElasticConfigError, match="quantised in format 2, this hf_elastic reads up to 1"):
        load(tmp_path)


def test_matrices_that_are_one_here_can_have_scales_of_their_own(tmp_path, monkeypatch, local_hub):
    """Experts of this parent are stacks of gate and up, which other programs store one by one, each with its scales."""
    parent, encodings = release(tmp_path / "repo", "granite", "nvfp4", renamed=True)
    monkeypatch.setattr("hf_elastic.checkpoints.opening.MOSTLY", 2)  # parts, however many
    local_hub.commit("org/one", tmp_path / "repo")
    fetched = load("org/one", elastic_config=BUDGETS["granite"], budget="small", cache_dir=tmp_path / "cache")
    assert_slice(fetched, decoded_state(parent, encodings), family("granite")[1], "small")
    slice_checkpoint(tmp_path / "repo", tmp_path / "nested", None, layout="nested", elastic_config=BUDGETS["granite"])
    assert_slice(load(tmp_path / "nested"), decoded_state(parent, encodings), family("granite")[1], None)
    file = tmp_path / "repo/model.safetensors"
    content = load_file(file)
    content["model.layers.1.block_sparse_moe.experts.2.up_proj.weight_global_scale"] *= 2
    save_file(content, file)
    other = load(tmp_path / "repo", elastic_config=BUDGETS["granite"]).state_dict()  # a divisor
    name = "model.layers.1.block_sparse_moe.experts.gate_up_proj"
    before, rows = decoded_state(parent, encodings)[name][2], other[name].shape[1] // 2
    assert torch.equal(other[name][2], torch.cat([before[:rows], before[rows:] / 2]))
    with pytest.raises(CheckpointError, match="are stored with scales of their own"):
        load(tmp_path / "repo", elastic_config=BUDGETS["granite"], budget="half", packed=True)
    with pytest.raises(CheckpointError, match="stored with scales of their own"):
        slice_checkpoint(tmp_path / "repo", tmp_path / "half", "half", elastic_config=BUDGETS["granite"])
    assert not (tmp_path / "half").exists()


# Only what a size needs is fetched


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A quantised family in both layouts, with checksums of small blocks."""
    made: Path = tmp_path_factory.mktemp("quantised")
    write_family(made / "source", "nemotron")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "BLOCK_BYTES", 256)
        for layout in ("stock", "nested"):
            slice_checkpoint(made / "source", made / layout, None, layout=layout, progress=False)
    return made


@pytest.mark.parametrize(
    ("layout", "verify"),
    [
        ("stock", False),
        ("nested", True),
        pytest.param("stock", True, marks=pytest.mark.slow),
        pytest.param("nested", False, marks=pytest.mark.slow),
    ],
)
def test_a_size_fetches_its_codes_and_no_others(layout, verify, folder, local_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "_GAP", 0)  # in tiny files everything is near
    monkeypatch.setattr("hf_elastic.checkpoints.opening.MOSTLY", 2)  # parts, however many
    local_hub.commit("org/family", folder / layout)
    elastic = ElasticConfig.from_pretrained(folder / layout)
    for size in ("small", "half"):
        local_hub.reset()
        model = AutoModelForCausalLM.from_pretrained(
            "org/family", budget=size, verify=verify, cache_dir=tmp_path / f"{size}"
        )
        expected = load(folder / "source", budget=size)
        for weight, tensor in expected.state_dict().items():
            assert torch.equal(model.state_dict()[weight], tensor)
        sent = sum(count for name, count in local_hub.sent.items() if name.endswith(".safetensors"))
        (entry,) = (entry for entry in plan(elastic) if entry["name"] == size)
        if layout == "nested":
            assert sent == entry["download_bytes"]
            continue
        file = folder / "stock/model.safetensors"
        whole = Checkpoint([file], elastic.encodings)
        extents = whole.extents(elastic.architecture, elastic.parent_config, elastic.submodel(size))[file]
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        blocks = checksums.read_checksums(folder / "stock" / checksums.CHECKSUMS_NAME)["model.safetensors"]
        wanted = fetching._merged(blocks.covering([(0, header), *extents]))
        assert sent == sum(stop - start for start, stop in wanted)
        assert sum(stop - start for start, stop in extents) == entry["download_bytes"] < sent < file.stat().st_size


def test_a_changed_code_is_found_by_checksums(folder, tmp_path):
    copy = Path(shutil.copytree(folder / "nested", tmp_path / "copy"))
    file = copy / "budgets/small/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"budgets/small/model.safetensors"):
        load(copy, budget="small", verify=True)


# Slices stay quantised, decoded models do not


@pytest.mark.parametrize("layout", [pytest.param("stock", marks=pytest.mark.slow), "nested"])
def test_a_slice_of_a_quantised_family_is_one(layout, folder, tmp_path, capsys):
    assert main(["slice", str(folder / layout), str(tmp_path / "half"), "--budget", "half"]) == 0
    assert main(["slice", str(tmp_path / "half"), str(tmp_path / "small"), "--budget", "small"]) == 0
    assert "stored in nvfp4" in capsys.readouterr().out
    elastic = ElasticConfig.from_pretrained(folder / layout)
    for size in ("half", "small"):
        own = ElasticConfig.from_pretrained(tmp_path / size)
        assert own.encodings == elastic.restrict(elastic.submodel(size)).encodings
        assert file_bytes(tmp_path / size) == own.costs()[size].stored_bytes(torch.bfloat16)
        model, expected = load(tmp_path / size), load(folder / "source", budget=size)
        assert model.elastic_config.elastic == expected.elastic_config.elastic
        for weight, tensor in expected.state_dict().items():
            assert torch.equal(model.state_dict()[weight], tensor)
    assert own.elastic["quantization"]["tensors"]["nvfp4"]["model.layers.{layer}.mixer.experts.up_proj"] == [1]
    assert own.cut_from["budget"] == "small"
    target = tmp_path / "float"
    assert main(["slice", str(folder / layout), str(target), "--budget", "half", "--dtype", "fp32"]) == 2
    assert "stored in few bits and stay as they are" in capsys.readouterr().err
    assert not target.exists()


def test_a_slice_of_a_released_checkpoint_is_an_elastic_one(tmp_path):
    parent, encodings = release(tmp_path / "released", "granite", "modelopt-nvfp4")
    _, elastic = family("granite")
    slice_checkpoint(
        tmp_path / "released", tmp_path / "half", "half", elastic_config=BUDGETS["granite"], progress=False
    )
    own = ElasticConfig.from_pretrained(tmp_path / "half")
    assert {encoding.name for encoding in own.encodings.values()} == {"nvfp4-modelopt"}
    assert not hasattr(own.parent_config, "quantization_config")
    whole = decoded_state(parent, encodings)
    assert_slice(load(tmp_path / "half"), whole, elastic, "half")
    assert_slice(load(tmp_path / "half", budget="small"), whole, elastic, "small")


@pytest.mark.parametrize("name", ["nemotron", pytest.param("granite", marks=pytest.mark.slow)])
def test_a_decoded_model_is_saved_as_a_plain_one(name, tmp_path):
    write_family(tmp_path / "coded", name)
    model = load(tmp_path / "coded", budget="half", device_map="cpu")
    assert not hasattr(model, "hf_quantizer")
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "nested", layout="nested")
    model.export(tmp_path / "export")
    for made in ("plain", "nested"):
        assert "quantization" not in (tmp_path / made / "config.json").read_text()
        again = load(tmp_path / made)
        for weight, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[weight], tensor)
            assert tensor.dtype in (torch.bfloat16, torch.float32)
        with again.at("small"):
            assert again.state_dict()["model.norm_f.weight" if name == "nemotron" else "model.norm.weight"].shape
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert all(torch.equal(stock.state_dict()[weight], tensor) for weight, tensor in model.state_dict().items())
    assert model.num_parameters() == stock.num_parameters()


def test_the_live_sizes_of_a_decoded_family_are_its_slices(folder):
    model = load(folder / "stock", device_map={"": "cpu"})
    assert list(model.budgets) == ["half", "small"]
    for size in ("half", "small"):
        expected = load(folder / "nested", budget=size)
        with model.at(size):
            for weight, tensor in model.state_dict().items():
                assert torch.equal(tensor, expected.state_dict()[weight])
    assert load(folder / "stock", dtype=torch.float32).dtype == torch.float32


def test_tensors_of_both_kinds_are_written_by_name(folder):
    """What the tests' own writer makes and what a copy from file to file holds are the same tensors."""
    model, elastic = family("nemotron")
    written, copied = (load_file(folder / place / "model.safetensors") for place in ("source", "stock"))
    assert written.keys() == copied.keys() == tensors_of(model, encodings_of(model, "nvfp4")).keys()
    assert all(
        torch.equal(copied[weight].view(torch.uint8), tensor.view(torch.uint8)) for weight, tensor in written.items()
    )
    assert elastic.budgets


# Memory

_MEASURED = """
import sys
from hf_elastic import ElasticForCausalLM

def memory(what):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

ElasticForCausalLM.from_pretrained(sys.argv[1])  # imports what loading needs
open("/proc/self/clear_refs", "w").write("5")  # the highest value from here on
before = memory("VmRSS:")
model = ElasticForCausalLM.from_pretrained(sys.argv[2], budget=sys.argv[3])
held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
print(memory("VmHWM:") - before, held)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(("format", "budget"), [("nvfp4", "full"), ("fp8", "half")])
def test_loading_takes_little_more_memory_than_the_weights(format, budget, folder, tmp_path):
    config = nemotron(
        "ME*EME",
        hidden_size=1024,
        vocab_size=1024,
        mamba_num_heads=16,
        mamba_head_dim=64,
        num_attention_heads=16,
        head_dim=64,
        n_routed_experts=32,
        moe_intermediate_size=1024,
        moe_shared_expert_intermediate_size=1024,
        dtype="bfloat16",
    )
    plain = ElasticConfig.from_parent(config, {"half": {"hidden": 768, "expert_ffn": 768}})
    elastic = quantized_config(plain, format)
    random = torch.Generator().manual_seed(0)
    types = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}
    content = {}
    for piece in stored_pieces(elastic.architecture, config, elastic.submodel("full"), elastic.encodings):
        rule = piece.rule
        dtype = types[rule.dtypes[0]] if rule.dtypes else torch.float32 if rule.fp32 else torch.bfloat16
        for expert in range(piece.shape[0]) if rule.stacked else (None,):
            shape = piece.shape[1:] if rule.stacked else piece.shape
            tensor = torch.ones(shape, dtype=dtype)
            if dtype.itemsize == 1:  # codes, and scales of blocks: any bytes that are no NaN and not negative
                tensor = torch.randint(1, 120, shape, dtype=torch.uint8, generator=random).view(dtype)
            content[rule.disk_name(expert)] = tensor
    save_file(content, tmp_path / "model.safetensors", metadata={"format": "pt"})
    elastic.save_pretrained(tmp_path)
    script = tmp_path / "measured.py"
    script.write_text(_MEASURED)
    weights = elastic.costs()[budget].weight_bytes(torch.bfloat16)
    command = [sys.executable, str(script), str(folder / "stock"), str(tmp_path), budget]
    peak, held = map(int, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())
    assert weights <= held < 1.001 * weights, "with buffers that are not saved"
    assert weights > 200e6
    assert 0.98 * weights < peak <= 1.15 * weights
