"""Recipes: which weights they name, and what is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cases import CONFIGS as ODD
from cases import nemotron
from quantized import BUDGETS, CONFIGS, WIDTHS

from hf_elastic import ElasticConfig, ElasticConfigError
from hf_elastic.architectures import get_architecture
from hf_elastic.quantization.recipes import Recipe, fused_groups, quantized_config, resolve_recipe


def resolved(recipe, name="nemotron"):
    config = CONFIGS[name]()
    return {
        tensor: encoding.name
        for tensor, encoding in resolve_recipe(recipe, get_architecture(config.model_type), config).items()
    }


def layers_of(encodings: dict[str, str], leaf: str) -> list[int]:
    return [int(name.split(".")[2]) for name in encodings if name.endswith(leaf)]


def test_nvfp4_keeps_attention_and_the_mamba_layer_that_feeds_it():
    found = resolved("nvfp4")  # ME*EM-*E: layer 0 feeds attention in 2, with experts between, and 4 that in 6
    assert set(found.values()) == {"nvfp4"}
    assert layers_of(found, "in_proj.weight") == []
    assert layers_of(found, "q_proj.weight") == []
    assert layers_of(found, "experts.up_proj") == [1, 3, 7]
    assert layers_of(found, "mixer.up_proj.weight") == [5]
    assert layers_of(found, "shared_experts.down_proj.weight") == [1, 3, 7]
    assert not any("gate" in name or "conv" in name or "norm" in name or "embed" in name for name in found)
    granite = resolved("nvfp4", "granite")  # Mamba, attention, Mamba, attention
    assert layers_of(granite, "in_proj.weight") == []
    assert layers_of(granite, "experts.gate_up_proj") == [0, 1, 2, 3]


def test_only_the_mamba_layer_right_before_attention_is_kept():
    config = nemotron("MME*M-", **WIDTHS)
    found = resolve_recipe("nvfp4", get_architecture("nemotron_h"), config)
    assert layers_of(found, "in_proj.weight") == layers_of(found, "out_proj.weight") == [0, 4]


def test_fp8_takes_all_kinds():
    found = resolved("fp8")
    assert set(found.values()) == {"fp8"}
    assert layers_of(found, "in_proj.weight") == [0, 4]
    assert layers_of(found, "q_proj.weight") == [2, 6]
    assert "lm_head.weight" not in found


def test_names_go_before_patterns_and_patterns_before_kinds():
    recipe = {
        "experts": "nvfp4",
        "*.layers.3.*experts*": "fp8",
        "model.layers.3.mixer.experts.down_proj": None,
        "mamba": "nvfp4",
        "mamba_before_attention": "fp8",
    }
    for entries in (recipe, dict(reversed(recipe.items()))):  # the order says nothing
        found = resolved(entries)
        assert found["model.layers.1.mixer.experts.down_proj"] == "nvfp4"
        assert found["model.layers.3.mixer.experts.up_proj"] == "fp8"
        assert found["model.layers.3.mixer.shared_experts.up_proj.weight"] == "fp8"
        assert "model.layers.3.mixer.experts.down_proj" not in found
        assert found["model.layers.0.mixer.in_proj.weight"] == "fp8"


def test_what_is_kept_goes_before_everything():
    recipe = Recipe.of({"*": "fp8"}).keeping("attention", "*.layers.0.*")
    encodings = recipe.resolve(get_architecture("nemotron_h"), CONFIGS["nemotron"]())
    assert layers_of(encodings, "q_proj.weight") == []
    assert layers_of(encodings, "in_proj.weight") == [4]
    assert Recipe.of({"*": "fp8"}, keep=["attention", "*.layers.0.*"]) == recipe
    assert Recipe.of("fp8", keep="attention") == Recipe.of("fp8").keeping("attention")
    assert Recipe.of("fp8").keeping().to_dict() == "fp8"
    with pytest.raises(ElasticConfigError, match="keep has 3"):
        Recipe.of("fp8", keep=[3])
    assert Recipe.of("fp8").keeping("attention").to_dict()["attention"] is None


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_files(tmp_path: Path, ending):
    entries = {"experts": "nvfp4", "attention": None, "mamba": "fp8"}
    file = tmp_path / f"recipe.{ending}"
    text = "experts: nvfp4\nattention: null\nmamba: fp8\n" if ending == "yaml" else json.dumps(entries)
    file.write_text(text, encoding="utf-8")
    assert resolved(file) == resolved(str(file)) == resolved(entries)


WRONG = {
    "nvfp5": "'nvfp5' is no format; there are nvfp4, fp8. Did you mean 'nvfp4'?",
    "gone.yaml": "the recipe gone.yaml is no file",
    "recipe.txt": "must end with .yaml, .yml, .json",
}


@pytest.mark.parametrize("name", WRONG)
def test_unknown_formats_and_files(name):
    with pytest.raises(ElasticConfigError, match="nvfp4, fp8") as refused:
        Recipe.of(name)
    assert WRONG[name] in str(refused.value)


ENTRIES = [
    ({}, "it must be a format"),
    (["experts"], "it must be a format"),
    (4, "it must be a format"),
    ({"experts": "int4"}, "the recipe has experts: 'int4'; it must be nvfp4, fp8, or null"),
    ({"experts": "nvfp"}, "Did you mean 'nvfp4'?"),
    ({"attention": "none"}, "or null"),
    ({7: "fp8"}, "entries are kinds or names"),
    ({"expert": "fp8"}, "Did you mean 'experts'?"),
    ({"experts": "fp8", "model.layers.0.mixer.in_prj.weight": None}, "in_proj.weight'?"),
    ({"*.layers.9.*": "fp8"}, "fits the name of no weight of this model, such as model.layers.0"),
    ({"lm_head.weight": "fp8"}, "never quantised"),
    ({"experts": None}, "quantises nothing of this nemotron_h"),
    ({"linear_attention": "fp8"}, "quantises nothing of this nemotron_h"),
    ({"*": "fp8", "attention": None}, "'attention': None decides nothing"),
    ({"*.layers.3.*": "fp8", "*experts*": None}, "both fit model.layers.3.mixer.experts.up_proj, and disagree"),
    ({"*.q_proj.weight": "fp8"}, "read these weights as one matrix (qkv_proj)"),
]


@pytest.mark.parametrize(("recipe", "said"), ENTRIES)
def test_entries_that_say_nothing_or_two_things(recipe, said):
    with pytest.raises(ElasticConfigError) as refused:
        resolved(recipe)
    assert said in str(refused.value)


def test_a_damaged_file_is_named(tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text("experts: [", encoding="utf-8")
    with pytest.raises(ElasticConfigError, match="recipe.yaml cannot be read as YAML"):
        Recipe.of(file)


def test_a_parent_with_weights_that_are_no_whole_blocks():
    config = ODD["nano3"]()  # a shared expert of 24
    architecture = get_architecture(config.model_type)
    with pytest.raises(
        ElasticConfigError, match=r"the whole parent, .*shared_experts\.down_proj\.weight in nvfp4.*shared_expert_ffn"
    ) as refused:
        resolve_recipe("nvfp4", architecture, config)
    assert "keep this weight as it is, or take fp8" in str(refused.value)
    assert resolve_recipe("fp8", architecture, config)
    assert resolve_recipe(Recipe.of("nvfp4").keeping("shared_experts", "mlp"), architecture, config)


def test_sizes_off_the_blocks_are_refused_with_and_without_a_name():
    parent = CONFIGS["nemotron"]()
    good = BUDGETS["nemotron"]
    assert quantized_config(ElasticConfig.from_parent(parent, good), "nvfp4").encodings
    odd = ElasticConfig.from_parent(parent, {"odd": {"expert_ffn": 24}})
    with pytest.raises(ElasticConfigError, match=r"'?odd'?.*experts\.down_proj in nvfp4.*expert_ffn"):
        quantized_config(odd, "nvfp4")
    assert quantized_config(odd, "fp8").encodings
    assert not odd.encodings
    family = ElasticConfig.from_parent(parent, {"large": {"hidden": 48}, "small": {"hidden": 48, "expert_ffn": 16}})
    section = {
        "axes": family.axes,
        "budgets": family.budgets,
        "interpolated": [{"sizes": {"hidden": 48, "expert_ffn": 24}}],
    }
    section["axes"]["expert_ffn"]["choices"] = [32, 24, 16]
    between = ElasticConfig(parent_config=parent, elastic=section)
    with pytest.raises(ElasticConfigError, match=r"interpolated\[0\].*expert_ffn"):
        quantized_config(between, "nvfp4")


def test_what_others_read_as_one_matrix_is_one_group():
    config = CONFIGS["nemotron"]()
    rules = [rule for rule in get_architecture("nemotron_h").rules(config) if rule.kind]
    groups = [[rule.name.split(".")[-2] for rule in group] for group in fused_groups(rules) if len(group) > 1]
    assert groups == [["q_proj", "k_proj", "v_proj"]] * 2
    assert sum(map(len, fused_groups(rules))) == len(rules)


def test_the_section_says_the_recipe_and_what_it_came_to(tmp_path: Path):
    elastic = quantized_config(ElasticConfig.from_parent(CONFIGS["nemotron"](), BUDGETS["nemotron"]), "nvfp4")
    section = elastic.elastic["quantization"]
    assert section["recipe"] == "nvfp4"
    assert section["version"] == 1
    assert section["tensors"]["nvfp4"]["model.layers.{layer}.mixer.experts.up_proj"] == [1, 3, 7]
    elastic.save_pretrained(tmp_path)
    again = ElasticConfig.from_pretrained(tmp_path)
    assert again.encodings == elastic.encodings
    kept = Recipe.of("fp8").keeping("attention")
    assert quantized_config(elastic, kept).elastic["quantization"]["recipe"]["attention"] is None
