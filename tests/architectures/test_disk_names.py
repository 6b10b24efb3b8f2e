"""What a table says tensors are called and how long they are on disk, against what stock classes write."""

from __future__ import annotations

import pytest
from compare import assert_same_weights
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

from hf_elastic import ElasticConfig, ElasticForCausalLM
from hf_elastic.architectures import get_architecture
from hf_elastic.submodels.slicing import build_meta
from hf_elastic.testing.models import random_model, tiny_config
from hf_elastic.testing.tiny import TINY

VARIANTS = [(model_type, variant) for model_type, tiny in TINY.items() for variant in range(len(tiny))]


@pytest.mark.parametrize(("model_type", "variant"), VARIANTS, ids=[f"{name}-{variant}" for name, variant in VARIANTS])
def test_stock_classes_write_the_names_of_the_table(model_type, variant):
    config = tiny_config(model_type, variant)
    architecture = get_architecture(model_type)
    model = build_meta(architecture, config, architecture.causal_class)
    rules = [rule for rule in architecture.rules(config) if not rule.tied]
    names = {rule.name for rule in rules}
    written = revert_weight_conversion(model, {name: t for name, t in model.state_dict().items() if name in names})
    full = architecture.full(config)
    expected = {}
    for rule in rules:
        sizes = full.at(rule.layer)
        for expert in range(rule.shape(sizes)[0]) if rule.stacked else (None,):
            here = [rule.disk_name(expert, segment) for segment in rule.segments]
            shapes = rule.stored_shapes(sizes)
            if rule.parted and not rule.stacked:  # stock classes cut these into equal parts: as long in a row
                assert sum(written[name].shape[0] for name in here) == sum(shape[0] for shape in shapes)
                shapes = [(written[name].shape[0], *shape[1:]) for name, shape in zip(here, shapes, strict=True)]
            expected |= dict(zip(here, shapes, strict=True))
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == expected


HUB = {
    "kimi_linear": (".block_sparse_moe.", ".mlp.", "mlp"),  # dense layers
    "olmo_hybrid": (".feedforward_layer_norm.", ".post_attention_layernorm.", "attention"),
}


@pytest.mark.parametrize("model_type", HUB)
def test_names_of_the_hub_that_stock_classes_do_not_write_are_read(model_type, tmp_path):
    model = random_model(tiny_config(model_type))
    model.save_pretrained(tmp_path)
    file, (written, there, part) = tmp_path / "model.safetensors", HUB[model_type]
    tensors, architecture = load_file(file), get_architecture(model_type)
    renamed = dict(tensors)
    for layer in range(architecture.depth(model.config)):
        if part in architecture.parts(model.config, layer):
            mine = [name for name in tensors if name.startswith(f"model.layers.{layer}{written}")]
            renamed |= {name.replace(written, there): renamed.pop(name) for name in mine}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file, metadata={"format": "pt"})
    ElasticConfig.from_parent(model.config, {}).save_pretrained(tmp_path)
    assert_same_weights(ElasticForCausalLM.from_pretrained(tmp_path), model)
