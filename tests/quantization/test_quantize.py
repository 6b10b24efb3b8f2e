"""Families quantised from file to file."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hosted import SIZES, save_whole
from quantized import quantizable_family, quantizable_parent, stored
from routed import routed
from safetensors.torch import load_file, save_file

from hf_elastic import ElasticConfig, ElasticForCausalLM, ElasticModel, elastify, quantize_checkpoint
from hf_elastic.architectures.axes import TensorRule
from hf_elastic.checkpoints import encoding as encoding_module
from hf_elastic.cli import main
from hf_elastic.errors import CheckpointError, ElasticConfigError
from hf_elastic.quantization.codec import decode, encode, global_scale_of

NAMES = ["nemotron", "granite"]
FORMATS = ["nvfp4", "fp8"]


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> Callable[[str], Path]:
    """Folder of a family that is not quantised; not to be changed."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "family"
            quantizable_family(name, made[name])
        return made[name]

    return get


@pytest.fixture(scope="module")
def quantized(families, tmp_path_factory) -> Callable[..., Path]:
    """Folder of a quantised family; not to be changed."""
    made: dict[tuple[str, str, str], Path] = {}

    def get(name: str, recipe: str = "nvfp4", layout: str = "stock") -> Path:
        if (key := (name, recipe, layout)) not in made:
            made[key] = tmp_path_factory.mktemp("quantized") / "family"
            quantize_checkpoint(families(name), made[key], recipe, layout=layout, progress=False)
        return made[key]

    return get


def reference(weights: dict[str, torch.Tensor], name: str, format: str) -> torch.Tensor:
    """What a weight is after it was codes, from the definition: matrix by matrix, q, k and v with one global scale."""
    weight, shared = weights[name], None
    if format == "nvfp4" and name.rsplit(".", 2)[-2] in ("q_proj", "k_proj", "v_proj"):
        owner = name.rsplit(".", 2)[0]
        largest = max(weights[f"{owner}.{part}_proj.weight"].abs().max() for part in "qkv").float().view(1)
        shared = 2 ** (256 * 6 / largest).log2().floor()
    matrices = weight if weight.dim() == 3 else weight[None]
    made = [decode(encode(matrix, format, global_scale=shared), format, weight.dtype) for matrix in matrices]
    return torch.stack(made).view(weight.shape)


@pytest.mark.parametrize(
    ("name", "recipe", "layout"),
    [
        ("nemotron", "nvfp4", "nested"),
        ("granite", "nvfp4", "stock"),
        ("granite", "fp8", "nested"),
        ("nemotron", {"attention": "nvfp4", "mamba": "fp8", "experts": "nvfp4"}, "stock"),
    ],
)
def test_weights_are_encoded_and_decoded_and_others_are_the_same(name, recipe, layout, families, tmp_path):
    weights = quantizable_parent(name).state_dict()
    quantize_checkpoint(families(name), tmp_path, recipe, layout=layout, progress=False)
    encodings = ElasticConfig.from_pretrained(tmp_path).encodings
    loaded = ElasticForCausalLM.from_pretrained(tmp_path).state_dict()
    assert len(encodings) > 6
    for key, weight in weights.items():
        if key in encodings:
            assert torch.equal(loaded[key], reference(weights, key, encodings[key].format)), key
            assert not torch.equal(loaded[key], weight), key
        else:
            assert torch.equal(loaded[key], weight), key


@pytest.mark.parametrize("recipe", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_files_hold_codes_under_the_names_of_the_hub(name, recipe, families, quantized):
    before, after = stored(families(name)), stored(quantized(name, recipe))
    suffixes = {"nvfp4": ["weight_packed", "weight_scale", "weight_global_scale"], "fp8": ["weight", "weight_scale"]}
    expected = dict(before)
    for key in before:
        if f"{key.removesuffix('.weight')}.weight_scale" in after:
            weight = expected.pop(key)
            alone = key.rsplit(".", 2)[-2] not in ("q_proj", "k_proj", "v_proj")
            for suffix, part in zip(suffixes[recipe], encode(weight, recipe), strict=True):
                found = after[f"{key.removesuffix('.weight')}.{suffix}"]
                assert found.dtype == part.dtype
                same = torch.equal(found.view(torch.uint8), part.view(torch.uint8))
                assert same or not alone, f"{key} {suffix}"
                expected[f"{key.removesuffix('.weight')}.{suffix}"] = found
    assert expected.keys() == after.keys()
    assert len(after) > len(before) + 10


def test_what_others_read_as_one_matrix_has_one_global_scale(families, tmp_path):
    quantize_checkpoint(families("nemotron"), tmp_path / "n", {"attention": "nvfp4"}, progress=False)
    scales = stored(tmp_path / "n")
    shared = [scales[f"backbone.layers.2.mixer.{part}_proj.weight_global_scale"] for part in "qkv"]
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(shared[0], shared[2])
    weights = quantizable_parent("nemotron").state_dict()
    parts = [weights[f"model.layers.2.mixer.{part}_proj.weight"] for part in "qkv"]
    assert len({part.abs().max().item() for part in parts}) == 3  # so that each would have another
    assert torch.equal(shared[0], global_scale_of(torch.cat(parts)))


def test_a_nested_source_gives_the_same_files(families, quantized, tmp_path):
    name = "nemotron"
    ElasticForCausalLM.from_pretrained(families(name)).save_pretrained(tmp_path / "nested", layout="nested")
    quantize_checkpoint(tmp_path / "nested", tmp_path / "out", "nvfp4", progress=False)
    ours, theirs = stored(tmp_path / "out"), stored(quantized(name))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key].view(torch.uint8), theirs[key].view(torch.uint8)) for key in ours)


def test_a_budget_is_quantised_as_the_slice_that_it_is(families, tmp_path):
    name = "nemotron"
    ElasticForCausalLM.from_pretrained(families(name), budget="mid").save_pretrained(tmp_path / "mid")
    quantize_checkpoint(tmp_path / "mid", tmp_path / "a", "nvfp4", progress=False)
    quantize_checkpoint(families(name), tmp_path / "b", "nvfp4", budget="mid", progress=False)
    ours, theirs = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key].view(torch.uint8), theirs[key].view(torch.uint8)) for key in ours)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["cut_from"] == {"budget": "mid"}
    assert list(ElasticConfig.from_pretrained(tmp_path / "b").budgets) == ["mid", "small"]


def test_sizes_are_cut_from_the_codes(quantized):
    """Equal to the family decoded whole and cut: the parent's scales."""
    folder = quantized("nemotron", "nvfp4")
    whole = ElasticForCausalLM.from_pretrained(folder)
    for budget in ("mid", "small"):
        whole.set_budget(budget)
        cut = ElasticForCausalLM.from_pretrained(folder, budget=budget).state_dict()
        assert all(torch.equal(cut[key], tensor) for key, tensor in whole.state_dict().items())


def test_a_repository_is_quantised_as_a_folder_is(families, quantized, tmp_path, local_hub):
    local_hub.commit("me/family", families("nemotron"))
    quantize_checkpoint("me/family", tmp_path / "out", "nvfp4", cache_dir=tmp_path / "cache", progress=False)
    ours, theirs = stored(tmp_path / "out"), stored(quantized("nemotron"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key].view(torch.uint8), theirs[key].view(torch.uint8)) for key in ours)
    quantize_checkpoint(
        "me/family", tmp_path / "mid", "fp8", budget="mid", cache_dir=tmp_path / "cache", progress=False
    )
    cut = json.loads((tmp_path / "mid" / "config.json").read_text())["cut_from"]
    assert cut["family"] == "me/family"
    with pytest.raises(TypeError, match="unexpected argument 'formt'"):
        quantize_checkpoint("me/family", tmp_path / "x", "fp8", formt="nvfp4")


def test_shards_have_an_index_and_hold_the_same(families, quantized, tmp_path):
    quantize_checkpoint(families("nemotron"), tmp_path, "nvfp4", max_shard_size="60KB", progress=False)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index.values())) == files
    assert all(path.stat().st_size < 90_000 for path in tmp_path.glob("*.safetensors"))
    ours, theirs = stored(tmp_path), stored(quantized("nemotron"))
    assert ours.keys() == theirs.keys() == index.keys()
    assert all(torch.equal(ours[key].view(torch.uint8), theirs[key].view(torch.uint8)) for key in ours)
    assert ElasticForCausalLM.from_pretrained(tmp_path, budget="small", verify=True)


@pytest.mark.parametrize("name", NAMES)
def test_one_matrix_at_a_time_and_each_once(name, families, tmp_path, monkeypatch):
    seen: list[torch.Size] = []

    def watched(weight, *args, **kwargs):
        seen.append(weight.shape)
        return encode(weight, *args, **kwargs)

    monkeypatch.setattr(encoding_module, "encode", watched)
    quantize_checkpoint(families(name), tmp_path, "nvfp4", progress=False)
    elastic = ElasticConfig.from_pretrained(tmp_path)
    full = elastic.architecture.full(elastic.parent_config)
    rules: list[TensorRule] = [
        rule for rule in elastic.architecture.rules(elastic.parent_config) if rule.name in elastic.encodings
    ]
    shapes = [rule.shape(full.at(rule.layer)) for rule in rules]
    assert sorted(seen) == sorted(shape[-2:] for shape in shapes for _ in range(shape[0] if len(shape) == 3 else 1))


def test_float32_and_a_base_model(tmp_path):
    model = quantizable_family("nemotron", tmp_path / "a", torch.float32)
    quantize_checkpoint(tmp_path / "a", tmp_path / "b", "fp8", progress=False)
    loaded = ElasticForCausalLM.from_pretrained(tmp_path / "b")
    assert loaded.dtype == torch.float32
    name = "model.layers.0.mixer.in_proj.weight"
    assert torch.equal(loaded.state_dict()[name], reference(model.state_dict(), name, "fp8"))
    ElasticModel.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "base")
    quantize_checkpoint(tmp_path / "base", tmp_path / "c", "fp8", progress=False)
    base = ElasticModel.from_pretrained(tmp_path / "c").state_dict()
    assert torch.equal(base[name.removeprefix("model.")], loaded.state_dict()[name])
    assert ElasticConfig.from_pretrained(tmp_path / "c").architectures == ["ElasticModel"]


def test_what_is_beside_the_weights_comes_along(families, tmp_path):
    family = shutil.copytree(families("nemotron"), tmp_path / "family")
    (family / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    (family / "generation_config.json").write_text('{"temperature": 0.4, "do_sample": true}\n')
    out = tmp_path / "nested"
    quantize_checkpoint(family, out, "fp8", layout="nested", progress=False)
    for file in ("tokenizer_config.json", "generation_config.json"):
        assert (out / file).read_bytes() == (family / file).read_bytes()
    assert (out / "weights.checksums.json").is_file()
    written = json.loads((out / "config.json").read_text())
    assert written["auto_map"]
    assert written["quantization_config"]["quant_method"] == "compressed-tensors"
    assert ElasticForCausalLM.from_pretrained(out, budget="small", verify=True).generation_config.temperature == 0.4
    smallest = tmp_path / "nested" / "budgets" / "small"
    config = json.loads((smallest / "config.json").read_text())
    assert config["architectures"] == ["NemotronHForCausalLM"]
    assert config["hidden_size"] == 32
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (smallest / "generation_config.json").is_file()


def test_the_router_comes_along_with_the_whole_family(tmp_path):
    routed("granite").save_pretrained(tmp_path / "family")
    quantize_checkpoint(tmp_path / "family", tmp_path / "out", "fp8", progress=False)
    router = ElasticForCausalLM.from_pretrained(tmp_path / "out").router
    ours, theirs = (load_file(tmp_path / place / "router.safetensors") for place in ("out", "family"))
    assert router is not None
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    quantize_checkpoint(tmp_path / "family", tmp_path / "slice", "fp8", budget="small", progress=False)
    assert not (tmp_path / "slice" / "router.safetensors").exists()


def test_the_rest_of_a_larger_model_comes_along(tmp_path):
    save_whole("dense", tmp_path / "repo")
    elastify(str(tmp_path / "repo"), budgets={"small": SIZES}, sort=False).save_pretrained(tmp_path / "family")
    quantize_checkpoint(tmp_path / "family", tmp_path / "out", "fp8", progress=False)
    ours, theirs = (load_file(tmp_path / place / "passengers.safetensors") for place in ("out", "family"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    assert ElasticForCausalLM.from_pretrained(tmp_path / "out", budget="small")


def test_a_plain_checkpoint_that_is_sorted_can_be_described(tmp_path):
    model = quantizable_parent("nemotron")
    model.save_pretrained(tmp_path / "plain")
    out = tmp_path / "out"
    with pytest.raises(ElasticConfigError, match="plain nemotron_h checkpoint without budgets.*elastify"):
        quantize_checkpoint(tmp_path / "plain", out, "nvfp4", progress=False)
    sizes = {"half": {"expert_ffn": 16}}
    quantize_checkpoint(tmp_path / "plain", out, "nvfp4", elastic_config=sizes, progress=False)
    assert list(ElasticForCausalLM.from_pretrained(out).budgets) == ["half"]


REFUSED = [
    ({"recipe": "int4"}, "is no format; there are nvfp4, fp8"),
    ({"keep": ["attentions"]}, "Did you mean 'attention'"),
    ({"layout": "flat"}, "layout='flat' must be one of"),
    ({"budget": "mit"}, "Did you mean 'mid'"),
    ({"budget": {"expert_ffn": 24}}, "expert_ffn"),
]


@pytest.mark.parametrize(("changed", "said"), REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(changed, said, families, tmp_path):
    arguments = {"recipe": "nvfp4", "progress": False} | changed
    with pytest.raises(ElasticConfigError, match=said):
        quantize_checkpoint(families("nemotron"), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_codes_are_not_quantised_again(quantized, tmp_path, listing):
    for folder in (quantized("nemotron"), quantized("nemotron", "fp8", "nested")):
        with pytest.raises(
            ElasticConfigError, match="is quantised already.*quantise the checkpoint that it was made of"
        ):
            quantize_checkpoint(folder, tmp_path / "out", "fp8", progress=False)
    plain = tmp_path / "plain"
    quantizable_parent("nemotron").save_pretrained(plain)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "modelopt"}}))
    before = listing(tmp_path)
    with pytest.raises(ElasticConfigError, match="is quantised already"):
        quantize_checkpoint(plain, tmp_path / "out", "fp8", progress=False)
    assert listing(tmp_path) == before


def test_the_folder_that_is_read_is_not_written_to(families, tmp_path, listing):
    family = shutil.copytree(families("nemotron"), tmp_path / "family")
    before = listing(family)
    for target in (family, family / "budgets" / "x", Path(f"{family}/../family")):
        with pytest.raises(ElasticConfigError, match="the checkpoint that is read"):
            quantize_checkpoint(family, target, "nvfp4", progress=False)
    assert listing(family) == before


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(families, quantized, tmp_path, listing):
    family = shutil.copytree(families("nemotron"), tmp_path / "family")
    (family / "weights.checksums.json").unlink(missing_ok=True)
    weights = load_file(family / "model.safetensors")
    weights["backbone.layers.3.mixer.experts.5.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, family / "model.safetensors", metadata={"format": "pt"})
    out = shutil.copytree(quantized("nemotron", "fp8"), tmp_path / "out")
    before = listing(out)
    with pytest.raises(CheckpointError, match=r"model.layers.3.mixer.experts.up_proj, expert 5, .*NaN or infinite"):
        quantize_checkpoint(family, out, "nvfp4", progress=False)
    assert listing(out) == before
    with pytest.raises(CheckpointError, match="NaN"):
        quantize_checkpoint(family, tmp_path / "new", "nvfp4", progress=False)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_what_was_there(families, quantized, tmp_path, listing, monkeypatch):
    out = shutil.copytree(quantized("nemotron", "fp8"), tmp_path / "out")
    before, count = listing(out), 0

    def full(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return encode(*args, **kwargs)

    monkeypatch.setattr(encoding_module, "encode", full)
    with pytest.raises(CheckpointError, match="disk is full|No space|room"):
        quantize_checkpoint(families("nemotron"), out, "nvfp4", progress=False)
    assert count == 20
    assert listing(out) == before


def test_a_quantised_parent_is_not_sorted(quantized, tmp_path, listing):
    plain = tmp_path / "plain"
    quantizable_parent("nemotron").save_pretrained(plain)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    budgets = {"half": {"expert_ffn": 16}}
    with pytest.raises(
        ElasticConfigError, match="plain is quantised, and sorting would move weights out of the blocks"
    ):
        elastify(plain, budgets=budgets, sort=False)
    assert main(["elastify", str(plain), str(tmp_path / "out"), "--no-sort", "--budget", "half:expert_ffn=16"]) == 2
    assert not (tmp_path / "out").exists()
    decoded = ElasticForCausalLM.from_pretrained(quantized("nemotron"))
    with pytest.raises(ElasticConfigError, match="is quantised.*hf-elastic elastify, then hf-elastic quantize"):
        elastify(decoded, budgets=budgets, sort=False)
    live = quantizable_parent("nemotron")
    live.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ElasticConfigError, match="is quantised"):
        elastify(live, budgets=budgets, sort=False)
