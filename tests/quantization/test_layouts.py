"""What a quantised checkpoint says of itself, read by compressed-tensors itself and as readers of modelopt match names."""

import re
from fnmatch import fnmatchcase
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.utils.match import match_named_modules
from quantized import CONFIGS

from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.encodings import ENCODINGS
from hf_elastic.configuration.quantized import renumbered
from hf_elastic.errors import ElasticConfigError, ExportError
from hf_elastic.quantization.layouts import encodings_said, modelopt_file, quantization_config
from hf_elastic.quantization.recipes import resolve_recipe

MIXED = {"experts": "nvfp4", "shared_experts": "nvfp4", "mamba": "fp8"}


def said(name, recipe, layout="compressed-tensors", submodel=None):
    """The section of a size, its table, its stock config and encodings."""
    config = CONFIGS[name]()
    architecture = get_architecture(config.model_type)
    encodings = resolve_recipe(recipe, architecture, config)
    if submodel is not None:
        made = architecture.submodel(config, submodel)
        encodings, config = (
            renumbered(architecture, config, encodings, made),
            architecture.config_for(config, made),
        )
    section = quantization_config(encodings, architecture, config, layout)
    return SimpleNamespace(section=section, architecture=architecture, config=config, encodings=encodings)


def linear_modules(made):
    with torch.device("meta"):
        model = made.architecture.causal_class(made.config)
    return model, {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


@pytest.mark.parametrize(("recipe", "preset"), [("nvfp4", "NVFP4A16"), ("fp8", "FP8_DYNAMIC")])
def test_one_format_is_a_preset_of_compressed_tensors(recipe, preset):
    section = said("nemotron", recipe).section
    read = QuantizationConfig.model_validate(section)
    (scheme,) = read.config_groups.values()
    wanted = preset_name_to_scheme(preset, ["Linear"])
    for part in ("weights", "input_activations"):
        fields = {"num_bits", "type", "strategy", "group_size", "symmetric", "dynamic", "scale_dtype"}
        ours, theirs = getattr(scheme, part), getattr(wanted, part)
        assert (ours is None) == (theirs is None)
        assert ours is None or ours.model_dump(include=fields) == theirs.model_dump(include=fields)
    assert read.format == scheme.format
    assert read.quantization_status == "compressed"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("recipe", ["nvfp4", "fp8", MIXED], ids=str)
def test_live_names_of_a_slice_are_matched(name, recipe):
    """Dropped layers renumber what comes after them; who reads the file knows the new numbers only."""
    layers = [0, 2, 3, 4, 7] if name == "nemotron" else [1, 2, 3]
    made = said(name, recipe, submodel={"layers": layers})
    read = QuantizationConfig.model_validate(made.section)
    model, linear = linear_modules(made)
    quantised = {name.removesuffix(".weight") for name in made.encodings} & linear
    assert quantised
    assert quantised != linear
    found = {}
    for scheme in read.config_groups.values():
        for module, _ in match_named_modules(model, scheme.targets, read.ignore):
            found.setdefault(module, []).append(scheme.weights.num_bits)
    assert found.keys() == quantised
    bits = {"nvfp4": 4, "fp8": 8}
    assert found == {module: [bits[made.encodings[f"{module}.weight"].format]] for module in quantised}


def test_vllm_finds_experts_and_fused_matrices_by_their_parts():
    """It asks for `.0.gate_proj`, `.0.up_proj` and `.0.down_proj` of a module of experts, whether they have a gate or not."""
    section = said("nemotron", MIXED).section
    experts = [f"model.layers.1.mixer.experts.0.{part}" for part in ("gate_proj", "up_proj", "down_proj")]

    def matched(name, patterns):
        return any(re.match(pattern[3:], name) for pattern in patterns if pattern.startswith("re:"))

    four = next(group for group in section["config_groups"].values() if group["weights"]["num_bits"] == 4)
    assert all(matched(name, four["targets"]) and not matched(name, section["ignore"]) for name in experts)
    assert all(matched(f"model.layers.2.mixer.{part}_proj", section["ignore"]) for part in "qkvo")
    assert not matched("model.layers.10.mixer.q_proj", section["ignore"])
    plain = said("nemotron", {"attention": "fp8"}).section
    assert all(matched(name, plain["ignore"]) for name in [*experts, "model.layers.1.mixer.experts"])


@pytest.mark.parametrize("name", CONFIGS)
def test_modelopt_excludes_by_hub_names(name):
    made = said(name, "nvfp4", "modelopt", {"layers": [0, 1, 3] if name == "granite" else [0, 1, 2, 3]})
    assert made.section["quant_method"] == "modelopt"
    assert made.section["quant_algo"] == "W4A16_NVFP4"
    beside = modelopt_file(made.section)["quantization"]
    assert beside["exclude_modules"] == made.section["ignore"]
    assert beside["group_size"] == 16
    for rule in made.architecture.rules(made.config):
        if rule.kind is None and not rule.name.endswith((".gate.weight", "lm_head.weight")):
            continue
        hub = rule.disk_name(0, "").removesuffix(".weight")
        excluded = any(fnmatchcase(hub, pattern) for pattern in beside["exclude_modules"])
        assert excluded == (rule.name not in made.encodings), hub


@pytest.mark.parametrize("recipe", ["nvfp4", "fp8", MIXED, {"attention": "fp8"}, {"experts": "nvfp4"}], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_said_is_what_is_stored(name, recipe):
    made = said(name, recipe)
    assert encodings_said(made.section, made.architecture, made.config) == made.encodings
    if all(encoding.format == "nvfp4" for encoding in made.encodings.values()):
        made = said(name, recipe, "modelopt")
        found = encodings_said(made.section, made.architecture, made.config)
        assert found == dict.fromkeys(made.encodings, ENCODINGS["nvfp4-modelopt"])


def test_unquantised_experts_are_a_wildcard_of_modelopt():
    ignore = said("nemotron", {"mamba": "nvfp4"}, "modelopt").section["ignore"]
    assert "backbone.layers.1.mixer.experts*" in ignore


def test_modelopt_has_no_fp8_of_ours():
    with pytest.raises(ExportError, match="no place for fp8"):
        said("nemotron", MIXED, "modelopt")
    with pytest.raises(ElasticConfigError, match="did you mean 'modelopt'|Did you mean 'modelopt'"):
        said("nemotron", "nvfp4", "model-opt")


def test_codes_of_modelopt_are_written_as_compressed_tensors():
    config = CONFIGS["nemotron"]()
    architecture = get_architecture(config.model_type)
    encodings = dict.fromkeys(resolve_recipe("nvfp4", architecture, config), ENCODINGS["nvfp4-modelopt"])
    assert quantization_config(encodings, architecture, config) == said("nemotron", "nvfp4").section
