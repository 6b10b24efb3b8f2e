"""Exports of quantised families: the parent's codes and scales, cut, under the names and in the words that other programs read."""

import json
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from cases import granite, nemotron, randomize
from quantized import CONFIGS, WIDTHS, quantizable_family, stored
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

from hf_elastic import ElasticConfig, ElasticForCausalLM, render_card
from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.pieces import pieces
from hf_elastic.checkpoints.exporting import export_checkpoint
from hf_elastic.checkpoints.quantizing import quantize_checkpoint
from hf_elastic.cli import main
from hf_elastic.errors import CheckpointError, ElasticConfigError, ExportError, PortabilityWarning
from hf_elastic.quantization.codec import encode
from hf_elastic.quantization.layouts import relabelled

ALL = dict.fromkeys(("attention", "mamba", "mlp", "experts", "shared_experts"), "nvfp4")
HEADS = {"mamba_num_heads": 4, "mamba_head_dim": 32}
PARENTS = {
    "nemotron": lambda: nemotron("ME*EM-*E", **(WIDTHS | HEADS)),
    "granite": lambda: granite(
        hidden_size=64, intermediate_size=32, shared_intermediate_size=48, num_attention_heads=4, mamba_n_heads=4, mamba_d_head=32,
        mamba_expand=2, mamba_d_state=16, num_local_experts=4,
    ),
}  # fmt: skip
CUTS = {
    "nemotron": [
        {}, {"hidden": 32}, {"ffn": 48}, {"attention_heads": 2}, {"mamba_heads": 2}, {"mamba_head_dim": 16}, {"experts": 4},
        {"experts_per_token": 1}, {"expert_ffn": 16}, {"shared_expert_ffn": 16}, {"layers": [1, 2, 4, 5]},
        {"hidden": 48, "mamba_head_dim": 16, "experts": 4, "expert_ffn": 16, "layers": [0, 2, 3, 6, 7]},
    ],
    "granite": [
        {}, {"hidden": 32}, {"attention_heads": 2}, {"mamba_head_dim": 16, "hidden": 32}, {"experts": 3}, {"experts_per_token": 1},
        {"expert_ffn": 16}, {"shared_expert_ffn": 32}, {"layers": [1, 2]}, {"experts": 2, "experts_per_token": 1, "expert_ffn": 16, "layers": [0, 1, 3]},
    ],
}  # fmt: skip


def family_of(config, folder, choices):
    """Write a family of these sizes, not quantised; gives its weights."""
    architecture = get_architecture(config.model_type)
    model = architecture.causal_class(config).eval()
    randomize(model)
    model.to(torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):  # which stock classes keep in float32
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    model.save_pretrained(folder)
    elastic = ElasticConfig.from_parent(
        model.config, {}, choices=choices, layer_ranking=list(range(architecture.depth(config)))
    )
    elastic.dtype = torch.bfloat16
    elastic.save_pretrained(folder)
    return model.state_dict()


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    made = {}

    def get(name, recipe):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            config = PARENTS[name]()
            full = get_architecture(config.model_type).full(config)
            choices = {}
            for axis in {axis for cut in CUTS[name] for axis in cut}:
                sizes = {cut[axis] if axis != "layers" else len(cut[axis]) for cut in CUTS[name] if axis in cut}
                choices[axis] = sorted(
                    {full.depth if axis == "layers" else max(full.values(axis)), *sizes}, reverse=True
                )
            made[name] = SimpleNamespace(
                folder=folder, weights=family_of(config, folder / "plain", choices), config=config
            )
        there = made[name]
        if not (quantised := there.folder / str(recipe)[:5]).exists():
            quantize_checkpoint(there.folder / "plain", quantised, recipe, progress=False)
        return SimpleNamespace(quantised=quantised, **vars(there))

    return get


def row_scales(weight):
    """Of FP8, from the definition: the largest of a row over 448, in the next bfloat16."""
    scale = weight.float().abs().amax(-1, keepdim=True) / 448
    near = scale.bfloat16().float()
    up = torch.where(near < scale, torch.nextafter(near.bfloat16(), torch.tensor(torch.inf).bfloat16()).float(), near)
    return up.where(up > 0, torch.finfo(torch.float32).eps)


def global_scales(name, weights):
    """Of NVFP4: of every expert, or of what other programs make one matrix of."""
    parts = [name]
    for part in ("q_proj", "k_proj", "v_proj"):
        if part in name:
            parts = [name.replace(part, other) for other in ("q_proj", "k_proj", "v_proj")]
    largest = torch.stack([weights[part].float().abs().amax((-2, -1), keepdim=True) for part in parts]).amax(0)
    return 2 ** (256 * 6 / largest).log2().floor()


def as_stored(rule, sliced, scale, format, layout):
    """What one weight of a slice is in the files, by Hub names."""
    stack = sliced if sliced.dim() == 3 else sliced[None]
    scales = scale if scale.dim() == 3 else scale[None]
    found = {}
    for expert, (matrix, steps) in enumerate(zip(stack, scales, strict=True)):
        module = rule.disk_name().removesuffix(".weight")
        parts = {module: slice(None)}
        if sliced.dim() == 3:
            owner, leaf = rule.name.rpartition(".")[0], rule.name.rpartition(".")[2]
            owner = owner.replace("model.", "backbone.", 1) if "mixer" in owner else owner
            half = len(matrix) // 2
            parts = {f"{owner}.{expert}.{leaf}": slice(None)}
            if leaf == "gate_up_proj":
                parts = {f"{owner}.{expert}.gate_proj": slice(0, half), f"{owner}.{expert}.up_proj": slice(half, None)}
        for prefix, rows in parts.items():
            if format == "fp8":
                codes = (matrix[rows].float() / steps[rows, :1]).clamp(-448, 448).to(torch.float8_e4m3fn)
                found |= {f"{prefix}.weight": codes, f"{prefix}.weight_scale": steps[rows, :1]}
                continue
            last = steps.flatten()[:1]
            codes, scale, _ = encode(matrix[rows], "nvfp4", global_scale=last)
            modelopt = layout == "modelopt"
            found |= {f"{prefix}.{'weight' if modelopt else 'weight_packed'}": codes, f"{prefix}.weight_scale": scale}
            found |= (
                {f"{prefix}.weight_scale_2": (1 / last).view(())}
                if modelopt
                else {f"{prefix}.weight_global_scale": last}
            )
    return found


def identical(tensor, other):
    """In shape, type and bits."""
    raw, wanted = (
        t.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8) for t in (tensor, other)
    )
    return tensor.shape == other.shape and tensor.dtype == other.dtype and torch.equal(raw, wanted)


def reference(made, cut, format, layout, encodings):
    """A size of the parent, cut, then quantised with the parent's scales."""
    architecture = get_architecture(made.config.model_type)
    expected = {}
    for piece in pieces(architecture, made.config, architecture.submodel(made.config, cut)):
        weight = made.weights[piece.rule.name]
        if piece.rule.name not in encodings:
            name = piece.target.disk_name() if not piece.target.apart else piece.target.name
            expected[name] = piece.narrow(weight)
            continue
        scale = row_scales(weight) if format == "fp8" else global_scales(piece.rule.name, made.weights)
        whole = scale.expand_as(weight) if weight.dim() == 2 else scale.expand(weight.shape)
        expected |= as_stored(piece.target, piece.narrow(weight), piece.narrow(whole), format, layout)
    return expected


WAYS = {"nvfp4": (ALL, "compressed-tensors"), "modelopt": (ALL, "modelopt"), "fp8": ("fp8", "compressed-tensors")}


def check_cut(made, cut, way, out):
    recipe, layout = WAYS[way]
    encodings = ElasticConfig.from_pretrained(made.quantised).encodings
    export_checkpoint(made.quantised, out, dict(cut), layout=layout, progress=False)
    found, expected = stored(out), reference(made, cut, "fp8" if recipe == "fp8" else "nvfp4", layout, encodings)
    assert found.keys() == expected.keys()
    assert [key for key, tensor in found.items() if not identical(tensor, expected[key])] == []
    assert (out / "hf_quant_config.json").exists() == (layout == "modelopt")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PARENTS)
def test_tensors_are_the_parents_codes_cut(name, way, families, tmp_path):
    check_cut(families(name, WAYS[way][0]), CUTS[name][-1], way, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "cut"), [(name, cut) for name in PARENTS for cut in CUTS[name][:-1]], ids=str)
def test_every_axis(name, cut, way, families, tmp_path):
    check_cut(families(name, WAYS[way][0]), cut, way, tmp_path / "out")


def loaded_by_transformers(folder):
    """By plain transformers, decoded while it loads; and what it did not find."""
    decoding = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=decoding, output_loading_info=True)


def differing(model, other):
    state, wanted = model.state_dict(), other.state_dict()
    assert state.keys() == wanted.keys()
    return [name for name, tensor in wanted.items() if not torch.equal(state[name], tensor)]


@pytest.mark.parametrize("cut", [{}, CUTS["nemotron"][-1]], ids=["whole", "cut"])
def test_plain_transformers_reads_fp8(cut, families, tmp_path):
    made = families("nemotron", "fp8")
    export_checkpoint(made.quantised, tmp_path / "out", dict(cut), progress=False)
    model, info = loaded_by_transformers(tmp_path / "out")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not differing(model, ElasticForCausalLM.from_pretrained(made.quantised, budget=dict(cut)))


@pytest.mark.parametrize("name", ["dense", "experts kept"])
def test_plain_transformers_reads_dense_nvfp4(name, tmp_path):
    if name == "dense":
        config, cut = nemotron("M-M*-", **WIDTHS), {"hidden": 32, "ffn": 48, "layers": [0, 1, 3, 4]}
    else:
        config, cut = CONFIGS["granite"](), {"experts": 4, "shared_expert_ffn": 16, "layers": [1, 2, 3]}
    full = get_architecture(config.model_type).full(config)
    choices = {axis: [max(full.values(axis)), size] for axis, size in cut.items() if axis != "layers"}
    choices["layers"] = [full.depth, len(cut["layers"])]
    family_of(config, tmp_path / "plain", choices)
    recipe = {kind: format for kind, format in ALL.items() if kind != "experts"}
    recipe = recipe if name != "dense" else dict.fromkeys(("mamba", "mlp", "attention"), "nvfp4")
    recipe.pop("mlp" if name != "dense" else "", None)
    quantize_checkpoint(tmp_path / "plain", tmp_path / "q", recipe, progress=False)
    obstacles = export_checkpoint(tmp_path / "q", tmp_path / "out", dict(cut), progress=False)
    assert "plain transformers" not in {obstacle.program for obstacle in obstacles}
    model, info = loaded_by_transformers(tmp_path / "out")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not differing(model, ElasticForCausalLM.from_pretrained(tmp_path / "q", budget=dict(cut)))


RECIPES = {
    "dense in two formats": ({"mamba": "fp8", "mlp": "nvfp4", "experts": "fp8"}, "does not load it"),
    "experts in NVFP4": ({"mamba": "fp8", "experts": "nvfp4"}, "computes wrong results"),
    "experts in FP8": ({"mamba": "nvfp4", "mlp": "nvfp4", "experts": "fp8"}, None),
    "experts whole beside NVFP4": ({"mamba": "nvfp4"}, "leaves weights at random"),
    "experts whole beside FP8": ({"mamba": "fp8"}, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_notes_on_plain_transformers_are_true(recipe, tmp_path):
    """What exports say of it, and what it does: both change when it is mended."""
    wanted, does = RECIPES[recipe]
    family_of(nemotron("ME-E", **WIDTHS), tmp_path / "plain", {})
    quantize_checkpoint(tmp_path / "plain", tmp_path / "q", wanted, progress=False)
    obstacles = export_checkpoint(tmp_path / "q", tmp_path / "out", progress=False)
    said = [obstacle.does for obstacle in obstacles if obstacle.program == "plain transformers"]
    assert len(said) == (does is not None)
    assert not said or said[0].startswith(does)
    try:
        model, info = loaded_by_transformers(tmp_path / "out")
    except RuntimeError:
        happens = "does not load it"
    else:
        wrong = differing(model, ElasticForCausalLM.from_pretrained(tmp_path / "q"))
        happens = "leaves weights at random" if info["missing_keys"] else "computes wrong results" if wrong else None
    assert happens == does


def test_global_scales_that_differ_are_said(tmp_path):
    """Those of other programs may: vLLM takes the largest for a matrix that it makes of several."""
    config = nemotron("M*-", **WIDTHS)
    family_of(config, tmp_path / "plain", {})
    quantize_checkpoint(tmp_path / "plain", tmp_path / "q", {"attention": "nvfp4"}, progress=False)
    assert not any(o.program == "vLLM" for o in export_checkpoint(tmp_path / "q", tmp_path / "a", progress=False))
    (path,) = (tmp_path / "q").glob("*.safetensors")
    tensors = load_file(path)
    tensors["backbone.layers.1.mixer.k_proj.weight_global_scale"] *= 2
    save_file(tensors, path, metadata={"format": "pt"})
    for file in (tmp_path / "q").glob("*checksums*"):
        file.unlink()
    (obstacle,) = [o for o in export_checkpoint(tmp_path / "q", tmp_path / "b", progress=False) if o.program == "vLLM"]
    assert "layers.1.mixer.q_proj" in obstacle.why
    assert "their global scales differ" in obstacle.why


def test_the_card_says_it(families, tmp_path):
    made, cut = families("nemotron", ALL), dict(CUTS["nemotron"][-1])
    export_checkpoint(made.quantised, tmp_path / "out", cut, progress=False)
    card = str(render_card(AutoConfig.from_pretrained(tmp_path / "out")))
    assert "plain transformers computes wrong results without an error (it leaves the global scale out" in card
    assert "plain transformers computes wrong results" in str(
        render_card(ElasticConfig.from_pretrained(made.quantised))
    )


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("name", PARENTS)
def test_a_packed_model_exports_the_same(name, layout, families, tmp_path):
    made, cut = families(name, ALL), dict(CUTS[name][-1])
    export_checkpoint(made.quantised, tmp_path / "files", cut, layout=layout, progress=False)
    model = ElasticForCausalLM.from_pretrained(made.quantised, packed=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PortabilityWarning)
        model.export(tmp_path / "model", cut, layout=layout)
    mine, theirs = stored(tmp_path / "model"), stored(tmp_path / "files")
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not identical(mine[key], theirs[key])] == []
    for file in ("config.json", "hf_quant_config.json"):
        paths = [tmp_path / where / file for where in ("model", "files")]
        assert [path.exists() for path in paths] == [file == "config.json" or layout == "modelopt"] * 2
        assert len({path.read_text() for path in paths if path.exists()}) < 2


@pytest.mark.parametrize("name", PARENTS)
def test_weights_instead_of_codes(name, families, tmp_path):
    """From a packed model, from a decoded one, and by the command."""
    made, cut = families(name, ALL), dict(CUTS[name][-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PortabilityWarning)
        ElasticForCausalLM.from_pretrained(made.quantised, packed=True).export(
            tmp_path / "packed", cut, quantized=False
        )
        ElasticForCausalLM.from_pretrained(made.quantised, budget=cut).export(tmp_path / "decoded")
    packed, decoded = stored(tmp_path / "packed"), stored(tmp_path / "decoded")
    assert packed.keys() == decoded.keys()
    assert all(torch.equal(packed[key], decoded[key]) for key in packed)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config == json.loads((tmp_path / "decoded" / "config.json").read_text())


def test_our_own_reader_reads_it_back(families, tmp_path):
    """As a checkpoint of another program: without the section of a family."""
    made, cut = families("nemotron", ALL), dict(CUTS["nemotron"][-1])
    wanted = ElasticForCausalLM.from_pretrained(made.quantised, budget=cut)
    for layout in ("compressed-tensors", "modelopt"):
        export_checkpoint(made.quantised, tmp_path / layout, cut, layout=layout, progress=False)
        assert not differing(ElasticForCausalLM.from_pretrained(tmp_path / layout, elastic_config={}), wanted)
        export_checkpoint(tmp_path / layout, tmp_path / f"{layout} again", elastic_config={}, progress=False)
    again = [stored(tmp_path / f"{layout} again") for layout in ("compressed-tensors", "modelopt")]
    first = stored(tmp_path / "compressed-tensors")
    assert all(found.keys() == first.keys() for found in again)
    assert all(identical(found[key], first[key]) for found in again for key in first)


def test_the_command(tmp_path, capsys):
    quantizable_family("nemotron", tmp_path / "plain")
    main(["quantize", str(tmp_path / "plain"), str(tmp_path / "q"), "--format", "nvfp4"])
    capsys.readouterr()
    main(["export", str(tmp_path / "q"), str(tmp_path / "out"), "--budget", "small", "--layout", "modelopt"])
    said = capsys.readouterr().out
    assert "plain transformers does not load it (it does not read modelopt's layout)" in said
    assert "backbone.layers.1.mixer.experts.3.up_proj.weight_scale_2" in stored(tmp_path / "out")
    main(["export", str(tmp_path / "q"), str(tmp_path / "out"), "--budget", "small"])
    assert (
        "computes wrong results without an error (it leaves the global scale out of experts" in capsys.readouterr().out
    )
    main(["export", str(tmp_path / "q"), str(tmp_path / "whole"), "--budget", "small", "--dequantize"])
    assert not any("scale" in key for key in stored(tmp_path / "whole"))
    for options in (["--layout", "modelopt", "--dequantize"], ["--dtype", "float16"]):
        assert main(["export", str(tmp_path / "q"), str(tmp_path / "bad"), "--budget", "small", *options])
    assert main(["export", str(tmp_path / "plain"), str(tmp_path / "bad"), "--layout", "modelopt"])
    assert not (tmp_path / "bad").exists()


def test_refused_before_anything_is_written(families, tmp_path):
    made, out = families("nemotron", "fp8"), tmp_path / "out"
    with pytest.raises(ExportError, match="modelopt's layout has no place for fp8"):
        export_checkpoint(made.quantised, out, layout="modelopt", progress=False)
    with pytest.raises(ExportError, match="is not quantised"):
        export_checkpoint(made.folder / "plain", out, progress=False)
    with pytest.raises(ElasticConfigError, match="gguf"):
        export_checkpoint(made.quantised, out, layout="gguf", progress=False)
    with pytest.raises(ElasticConfigError, match="is the checkpoint that is read"):
        export_checkpoint(made.quantised, made.quantised, {"hidden": 32}, progress=False)
    four = families("nemotron", ALL)
    with pytest.raises(ElasticConfigError, match=r"cut by the axes: hidden"):
        export_checkpoint(four.quantised, out, {"hidden": 40}, progress=False)
    decoded = ElasticForCausalLM.from_pretrained(four.quantised, budget={"experts": 4})
    for options in ({"quantized": True}, {"layout": "modelopt"}):
        with pytest.raises(ExportError, match="holds weights, not codes"):
            decoded.export(out, **options)
    assert not out.exists()


def test_damaged_scales_are_not_exported(families, tmp_path):
    made = families("granite", ALL)
    shutil.copytree(made.quantised, tmp_path / "q")
    (path,) = (tmp_path / "q").glob("*.safetensors")
    tensors = load_file(path)
    tensors["model.layers.1.block_sparse_moe.input_linear.weight_global_scale"][2] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    for file in (tmp_path / "q").glob("*checksums*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="input_linear|gate_up_proj"):
        export_checkpoint(tmp_path / "q", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_layout_that_would_round_is_refused(families, tmp_path):
    """Global scales of other programs are no powers of 2, and then a factor may give another bfloat16."""
    from hf_elastic.architectures.encodings import ENCODINGS

    last = torch.tensor([2553.3505859375])
    assert relabelled(last, ENCODINGS["nvfp4"]) is None
    assert relabelled(last.new_tensor([4096.0]), ENCODINGS["nvfp4"]).item() == 1 / 4096
