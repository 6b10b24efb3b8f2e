"""Names of what a LoRA adapter is put on: the preset of every family, and names that match nothing."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from cases import BUDGETS, CONFIGS, parent_config
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from runs import family

from hf_elastic import ElasticConfig, ElasticConfigError, lora_targets
from hf_elastic.adapters.targets import check_targets, targets_of
from hf_elastic.architectures import get_architecture
from hf_elastic.commands.train import AdapterArguments
from hf_elastic.submodels.adapters import is_tuner, refuse_unsupported
from hf_elastic.submodels.slicing import build_meta
from hf_elastic.testing.models import tiny_config
from hf_elastic.trainers.lora import check_adapters, check_attached


@pytest.fixture(scope="module")
def models():
    return {name: family(name) for name in ("nano3", "granite")}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_preset_adapts_all_linear_layers_and_experts_of_every_parent(name):
    config = parent_config(name)
    architecture = get_architecture(config.model_type)
    tree = build_meta(architecture, config, architecture.causal_class)
    inject_adapter_in_model(LoraConfig(r=2, **lora_targets(config)), tree, low_cpu_mem_usage=True)
    refuse_unsupported(tree, architecture, config)
    adapted = {
        f"{path.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}"
        for path, layer in tree.named_modules()
        if is_tuner(layer)
    }
    matrices = {
        rule.name: rule for rule in architecture.rules(config) if rule.layer is not None and len(rule.dims) > 1
    }
    left_out = {n for n, rule in matrices.items() if rule.routes or re.search(r"\.(out_proj|conv1d)\.weight$", n)}
    assert adapted == set(matrices) - left_out
    assert any(".experts." in name for name in adapted) == any(rule.routed for rule in matrices.values())


def test_names_that_other_modules_end_in_too_are_said_with_what_is_before_them():
    """Mamba-2's `out_proj` is handed to a kernel, the one of attention beside it is not."""

    class Both(type(get_architecture("bamba"))):
        def rules(self, config):
            return [
                replace(rule, template=rule.template.replace("o_proj", "out_proj")) for rule in super().rules(config)
            ]

    found = targets_of(Both(), tiny_config("bamba"))["target_modules"]
    assert "self_attn.out_proj" in found
    assert not {"out_proj", "mamba.out_proj"} & set(found)


def test_adapters_of_tensors_that_no_table_knows_are_refused():
    config = tiny_config("jamba")
    architecture = get_architecture("jamba")
    tree = build_meta(architecture, config, architecture.causal_class)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["x_proj"]), tree, low_cpu_mem_usage=True)
    refuse_unsupported(tree, architecture, config)

    class Without(type(architecture)):
        def rules(self, config):
            return [rule for rule in super().rules(config) if ".x_proj." not in rule.template]

    with pytest.raises(ElasticConfigError, match=r"adapter of model\.layers\.0\.mamba\.x_proj .* has no such tensor"):
        refuse_unsupported(tree, Without(), config)


def test_adapters_of_what_the_stock_code_never_calls_are_refused():
    config = tiny_config("jamba")
    architecture = get_architecture("jamba")
    tree = build_meta(architecture, config, architecture.causal_class)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["dt_proj"]), tree, low_cpu_mem_usage=True)
    with pytest.raises(ElasticConfigError, match=r"mamba\.dt_proj .* hands this weight to kernels"):
        refuse_unsupported(tree, architecture, config)


def test_the_preset_is_that_of_the_model_in_any_form(models, tmp_path):
    expected = lora_targets(parent_config("granite"))
    assert expected["target_parameters"] == ["experts.gate_up_proj", "experts.down_proj"]
    assert {"in_proj", "q_proj", "input_linear", "output_linear"} <= set(expected["target_modules"])
    model = models["granite"]
    assert lora_targets(model) == lora_targets(model.elastic_config) == expected
    assert "target_parameters" not in lora_targets(parent_config("granite_dense"))
    assert lora_targets(ElasticConfig.from_parent(parent_config("granite"), BUDGETS["granite"])) == expected
    wrapped = get_peft_model(family("granite"), LoraConfig(r=2, task_type="CAUSAL_LM", **lora_targets(model)))
    check_attached(wrapped)


@pytest.mark.parametrize("name", ["nano3", "granite"])
def test_auto_is_the_preset_in_a_run(name, models):
    asked = LoraConfig(r=2, target_modules="auto")
    found = check_adapters(models[name], asked)
    assert {"target_modules": found.target_modules, "target_parameters": found.target_parameters} == lora_targets(
        models[name]
    )
    assert asked.target_modules == "auto"  # what was given is not changed
    own = check_adapters(models[name], LoraConfig(r=2, target_modules="auto", target_parameters=["experts.down_proj"]))
    assert own.target_parameters == ["experts.down_proj"]


REFUSED = {
    "nothing": (
        "granite",
        {"target_modules": ["up_proj", "down_proj"]},
        "target_modules: 'down_proj', 'up_proj' match no module",
    ),
    "in_part": ("granite", {"target_modules": ["q_proj", "up_proj"]}, "target_modules: 'up_proj' matches no module"),
    "mistyped": ("nano3", {"target_modules": ["q_porj", "k_proj"]}, "'q_porj' matches no .* Did you mean 'q_proj'"),
    "pattern": ("nano3", {"target_modules": r".*\.qkv_proj"}, r"qkv_proj' matches no module of this nemotron_h model"),
    "auto_in_a_list": ("nano3", {"target_modules": ["auto"]}, "'auto' matches no module"),
    "experts": (
        "granite",
        {"target_modules": ["q_proj", "gate_up_proj"]},
        "Experts are no modules: name them in target_parameters",
    ),
    "parameters": (
        "nano3",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.up_proj"]},
        "target_parameters: 'experts.gate_up_proj' matches no parameter",
    ),
    "layers": ("nano3", {"target_modules": ["q_proj", "in_proj"], "layers_to_transform": [0]}, "'q_proj' matches no"),
    "ranks": (
        "nano3",
        {"target_modules": ["q_proj"], "rank_pattern": {"q_prj": 4}},
        "rank_pattern: 'q_prj' matches no",
    ),
    "alphas": ("nano3", {"target_modules": ["q_proj"], "alpha_pattern": {"x": 4}}, "alpha_pattern: 'x' matches no"),
}


@pytest.mark.parametrize(("name", "fields", "message"), REFUSED.values(), ids=REFUSED)
def test_names_that_match_nothing_are_refused_with_those_that_there_are(name, fields, message, models):
    with pytest.raises(ElasticConfigError, match=message) as caught:
        check_adapters(models[name], LoraConfig(r=2, **fields))
    for field, names in lora_targets(models[name]).items():
        assert f"{field} {', '.join(names)}" in str(caught.value)
    assert "target_modules='auto' (lora_targets: auto in a recipe)" in str(caught.value)
    assert not any(is_tuner(module) for module in models[name].modules())


def test_an_attached_adapter_with_a_name_that_matched_nothing_is_refused():
    config = LoraConfig(r=2, target_modules=["q_proj", "gate_proj"])
    with pytest.raises(ElasticConfigError, match="'gate_proj' matches no module of this granitemoehybrid model"):
        check_attached(get_peft_model(family("granite"), config))


def test_names_that_match_are_let_through(models):
    """Suffixes of several parts, patterns and the layers of some pass."""
    model = models["nano3"]
    for fields in (
        {"target_modules": ["mixer.q_proj", "model.layers.0.mixer.in_proj"]},
        {"target_modules": r".*\.[qk]_proj", "rank_pattern": {"q_proj": 3, r".*\.k_proj": 1}},
        {"target_modules": ["q_proj"], "layers_to_transform": [2]},
        {"target_parameters": ["mixer.experts.up_proj", "gate.weight"]},
    ):
        lora = LoraConfig(r=2, **fields)
        check_targets(lora, model, model.architecture, model.config)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"lora_targets": "auto"}, "auto"),
        ({"lora_target_modules": "auto"}, "auto"),
        ({"lora_target_modules": ["q_proj"]}, ["q_proj"]),
        ({"lora_target_modules": "q_proj"}, ["q_proj"]),
        ({"lora_target_modules": r".*\.q_proj"}, r".*\.q_proj"),
        ({"lora_target_modules": [r".*q_proj"]}, r".*q_proj"),  # as an option
        ({}, None),
    ],
)
def test_targets_in_a_recipe(fields, expected):
    """One name alone is a name; upstream makes it a pattern of a whole path, which matches nothing."""
    assert AdapterArguments(use_peft=True, **fields).peft_config().target_modules == expected


def test_presets_in_a_recipe_are_checked():
    with pytest.raises(ElasticConfigError, match="lora_targets='all' must be auto"):
        AdapterArguments(use_peft=True, lora_targets="all")
    with pytest.raises(ElasticConfigError, match="either lora_targets: auto or lora_target_modules"):
        AdapterArguments(use_peft=True, lora_targets="auto", lora_target_modules=["q_proj"])
    with pytest.raises(ElasticConfigError, match="lora_targets would be ignored without use_peft: true"):
        AdapterArguments(lora_targets="auto")
