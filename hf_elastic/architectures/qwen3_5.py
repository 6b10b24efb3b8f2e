"""Qwen3.5's text models: as Qwen3-Next with projections of their own for every input of the DeltaNet; dense or with experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextModel,
    Qwen3_5TextModel,
)
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeDecoderLayer

from .base import Architecture, Axis
from .hosts import Host
from .qwen3_next import DENSE, SHARED, SPARSE, Qwen3Next


def _host(model_type: str, whole_class: type[PreTrainedModel]) -> Host:
    """The vision-language model that the text model is published in; its last projection writes into the residual stream."""
    out = "model.visual.merger.linear_fc2"
    return Host(
        model_type,
        whole_class,
        prefix="model.language_model.",
        passengers=("model.visual.",),
        along={f"{out}.weight": {0: "hidden"}, f"{out}.bias": {0: "hidden"}},
        sizes={"vision_config.out_hidden_size": "hidden"},
    )


class Qwen35(Qwen3Next):
    model_type = "qwen3_5_text"
    causal_class = Qwen3_5ForCausalLM
    base_class = Qwen3_5TextModel
    layer_class = Qwen3_5DecoderLayer
    hosts = (_host("qwen3_5", Qwen3_5ForConditionalGeneration),)
    axes: ClassVar[tuple[Axis, ...]] = SHARED[:1] + DENSE + SHARED[1:]
    joined = False

    def is_sparse(self, config: PreTrainedConfig, layer: int) -> bool:
        return False

    def layer_fields(self, config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
        return Architecture.layer_fields(self, config, kept)


class Qwen35Moe(Qwen35):
    model_type = "qwen3_5_moe_text"
    causal_class = Qwen3_5MoeForCausalLM
    base_class = Qwen3_5MoeTextModel
    layer_class = Qwen3_5MoeDecoderLayer
    hosts = (_host("qwen3_5_moe", Qwen3_5MoeForConditionalGeneration),)
    axes = SHARED + SPARSE

    def is_sparse(self, config: PreTrainedConfig, layer: int) -> bool:
        return True
