"""Quantisation-aware distillation: when the model's weights are rounded, and to what."""

from __future__ import annotations

from peft import PeftConfig

from hf_elastic import ElasticForCausalLM
from hf_elastic.errors import ElasticConfigError
from hf_elastic.quantization.recipes import Recipe

from .elastic_distillation_config import ElasticDistillationConfig


class Quantizing:
    """Rounds the weights of a model from a step on.

    Args:
        model ([`ElasticForCausalLM`]): The model that is trained.
        args ([`ElasticDistillationConfig`]): With a `quantization`.
        adapted (`PeftConfig` or `bool`): Whether adapters are trained.

    Raises:
        `ElasticConfigError`: the recipe does not fit the model, a budget is cut off the blocks of the format, or adapters are trained.
    """

    def __init__(self, model: ElasticForCausalLM, args: ElasticDistillationConfig, adapted: PeftConfig | bool | None):
        if adapted:
            raise ElasticConfigError(
                f"quantization={args.quantization!r} does not work with adapters: rounding the frozen weights teaches them nothing, and an adapter "
                "that is merged later is rounded anew. Merge the adapter first, or train all weights."
            )
        if args.torch_compile:
            raise ElasticConfigError("quantization does not work with torch_compile=True; leave one of them out.")
        self._model, self._start = model, args.quantization_start
        config = model.elastic_config
        self.encodings = Recipe.of(args.quantization).resolve(config.architecture, config.parent_config)
        config.quantized(self.encodings)  # refuses sizes that are cut off the blocks
        self.running = False

    def at(self, step: int, steps: int) -> None:
        """Round from now on, if it is time. The step is the number of those that were made."""
        running = step >= self._start * steps
        if running != self.running:
            self._model.round_weights(self.encodings if running else None)
            self.running = running

    def stop(self) -> None:
        """Leave the model computing with the weights that it has."""
        self._model.round_weights(None)
        self.running = False
