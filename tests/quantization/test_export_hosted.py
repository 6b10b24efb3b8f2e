"""Exports of a quantised text model inside a vision-language model: all of it, with the text model in few bits."""

import json

import torch
from hosted import SIZES, save_whole
from quantized import stored
from transformers import AutoModelForImageTextToText, CompressedTensorsConfig

from hf_elastic import ElasticForCausalLM, elastify, export_checkpoint, quantize_checkpoint


def test_the_rest_of_the_larger_model_stays_as_it_is(tmp_path):
    save_whole("dense", tmp_path / "whole")
    family = elastify(tmp_path / "whole", budgets={"small": SIZES}, sort=False)
    family.save_pretrained(tmp_path / "family")
    quantize_checkpoint(tmp_path / "family", tmp_path / "q", "fp8", progress=False)
    export_checkpoint(tmp_path / "q", tmp_path / "out", "small", progress=False)
    tensors = stored(tmp_path / "out")
    coded = {name.removesuffix("_scale") for name in tensors if name.endswith("weight_scale")}
    assert coded
    assert all(name.startswith("model.language_model.layers.") for name in coded)
    assert any(name.startswith("model.visual.") for name in tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config["text_config"]
    assert "visual" in str(config["quantization_config"]["ignore"])
    decoding = CompressedTensorsConfig(dequantize=True)
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", quantization_config=decoding, output_loading_info=True
    )
    assert not info["missing_keys"]
    state = model.state_dict()
    small = ElasticForCausalLM.from_pretrained(tmp_path / "q", budget="small").state_dict()
    wrong = [
        name
        for name, tensor in small.items()
        if not torch.equal(state[name.replace("model.", "model.language_model.", 1)], tensor)
    ]
    assert not wrong
