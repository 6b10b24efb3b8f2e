"""Google Gemma 2 and the text models of Gemma 3: four norms per layer, embeddings scaled by the root of the width, sliding windows."""

from __future__ import annotations

from dataclasses import replace

from transformers import Gemma2ForCausalLM, Gemma2Model, Gemma3ForCausalLM, Gemma3TextModel, PreTrainedConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer

from .axes import Sizes, TensorRule
from .dense import Dense


class Gemma2(Dense):
    model_type = "gemma2"
    causal_class = Gemma2ForCausalLM
    base_class = Gemma2Model
    layer_class = Gemma2DecoderLayer
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    centre = 1.0

    def rules(self, config: PreTrainedConfig) -> list[TensorRule]:
        embeddings, *rest = super().rules(config)
        return [replace(embeddings, scale=_root_of_width), *rest]


class Gemma3Text(Gemma2):
    model_type = "gemma3_text"
    causal_class = Gemma3ForCausalLM
    base_class = Gemma3TextModel
    layer_class = Gemma3DecoderLayer
    head_norms = True


def _root_of_width(sizes: Sizes) -> float:
    return sizes["hidden"] ** 0.5
