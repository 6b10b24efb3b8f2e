"""Quantisation-aware distillation: when the model's weights are rounded, and to what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hf_elastic import ElasticConfig, ElasticForCausalLM
from hf_elastic.architectures.encodings import Encoding
from hf_elastic.architectures.submodel import LAYERS
from hf_elastic.configuration.quantized import refuse_off_blocks
from hf_elastic.errors import ElasticConfigError, shown
from hf_elastic.quantization.recipes import Recipe, quantized_config

from .curriculum import first_step
from .elastic_distillation_config import ElasticDistillationConfig


class Quantizing:
    """Rounds the weights of a model while a micro-batch is trained or evaluated.

    Args:
        model ([`ElasticForCausalLM`]): The model that is trained.
        args ([`ElasticDistillationConfig`]): With a `quantization`.
        adapted (`bool`): Whether adapters are trained.

    Raises:
        `ElasticConfigError`: the recipe does not fit the model, a budget or a choice of an axis is cut off the blocks of the format, adapters are
            trained, or rounding would begin after the run.
    """

    def __init__(self, model: ElasticForCausalLM, args: ElasticDistillationConfig, adapted: bool):
        if adapted:
            raise ElasticConfigError(
                f"quantization={shown(args.quantization)} does not work with adapters: no step would change the weights that are rounded, and an "
                "adapter that is merged is rounded with them, which nothing trained it for. Quantise the family first and train the adapter on the "
                "result, which computes with the rounded weights as it is; or train all weights."
            )
        if args.torch_compile:
            raise ElasticConfigError(
                "quantization does not work with torch_compile=True: compiled arithmetic may round the other way where a weight lies between two "
                "codes, and the run would train other weights than are written. Leave one of them out."
            )
        self._model, self._start = model, args.quantization_start
        self.recipe = Recipe.of(args.quantization)
        config = model.elastic_config
        self.encodings = self.recipe.resolve(config.architecture, config.parent_config)
        quantized_config(config, self.recipe)
        if args.router_targets or args.freeze_router:
            _refuse_choices(config, self.encodings)
        if 0 < args.max_steps <= self._start:
            raise ElasticConfigError(
                f"quantization_start={self._start:g}, but the run has {args.max_steps} steps, none of which would be rounded; begin earlier."
            )

    @contextmanager
    def training(self, step: int, steps: int) -> Iterator[None]:
        """Round inside a `with` block, if it is time.

        Args:
            step (`int`): Steps that were made.
            steps (`int`): Of the whole run.
        """
        with self.rounding(step >= first_step(self._start, steps)):
            yield

    @contextmanager
    def rounding(self, rounds: bool = True) -> Iterator[None]:
        """Have `computing` and mixtures round the weights inside a `with` block, and compute with them as they are after it."""
        self._model.round_weights(self.encodings if rounds else None)
        try:
            yield
        finally:
            self._model.round_weights(None)

    def __str__(self) -> str:
        """For people: `nvfp4`, or what becomes of what."""
        given: Any = self.recipe.to_dict()
        if isinstance(given, str):
            return given
        return ", ".join(f"{name}: {format or 'as it is'}" for name, format in given.items())


def _refuse_choices(config: ElasticConfig, encodings: Mapping[str, Encoding]) -> None:
    """Raise for a choice of an axis that a router could decide for, and that is cut off the blocks of a format."""
    architecture, parent = config.architecture, config.parent_config
    whole = {
        LAYERS,
        *architecture.per_token,
        *architecture.per_token.values(),
    }  # layers and experts are taken as they are
    sizes = {
        f"axis {axis}, choice {size}": architecture.submodel(parent, {axis: size}, f"axes[{axis!r}].choices")
        for axis, entry in config.axes.items()
        for size in entry["choices"]
        if axis not in whole
    }
    refuse_off_blocks(architecture, parent, encodings, sizes)
