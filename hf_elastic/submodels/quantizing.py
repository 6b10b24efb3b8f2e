"""`quantize`: a live family whose weights become codes, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..architectures.axes import TensorRule
from ..architectures.encodings import Encoding
from ..architectures.submodel import Submodel
from ..configuration_elastic import ElasticConfig
from ..errors import ElasticConfigError
from ..quantization.codec import encode, global_scale_of
from ..quantization.recipes import Recipe, fused_groups, quantized_config
from .adapters import attached
from .packed import is_packed, pack

Coded = Iterator[tuple[str, dict[str, torch.Tensor]]]
"""Names of weights in the live model, and their companions by theirs."""


@torch.no_grad()
def quantize(model: Any, recipe: Any, *, keep: str | Iterable[str] = (), again: bool = False) -> Any:
    """Quantise a family in place: from now on it holds codes and scales, and decodes weights when they are used.

    It is for inference: `save_pretrained`, `export` and the nested layout write the codes as they are, and its sizes are the codes, cut. What is
    written is what [`hf_elastic.quantize_checkpoint`] writes, which needs memory for one matrix and not for the model.

    Args:
        model ([`ElasticForCausalLM`]): With everything that is loaded as its active size.
        recipe (`str`, `os.PathLike`, `dict` or [`Recipe`]):
            `"nvfp4"`, `"fp8"`, a YAML or JSON file, or entries, see [`hf_elastic.quantization.recipes`].
        keep (`str` or `Iterable[str]`, *optional*): Kinds, names or patterns of weights that stay as they are, whatever the recipe says.
        again (`bool`, *optional*, defaults to `False`):
            Quantise weights, too, that were codes when they were loaded. What is lost adds up, unless they were trained since.

    Returns:
        The model, in evaluation mode.

    Raises:
        `ElasticConfigError`: it is no causal family, quantised already, at a smaller size, spread over files, has adapters, or the recipe does not fit. Nothing was
            changed.
    """
    taken = Recipe.of(recipe, keep)
    elastic = _checked(model, again)
    made = quantized_config(elastic, taken)
    encodings = made.encodings
    architecture, config = elastic.architecture, elastic.parent_config
    rules = [rule for rule in architecture.rules(config) if rule.name in encodings]
    _refuse_infinite(model, rules)
    model.forget_budgets()
    model.eval()
    full = architecture.full(config)
    pack(model, architecture, coded(model.get_parameter, rules, encodings, full), encodings)
    elastic.elastic = made.elastic
    return model


def coded(
    weight: Callable[[str], torch.Tensor],
    rules: Iterable[TensorRule],
    encodings: Mapping[str, Encoding],
    full: Submodel,
) -> Coded:
    """The companions of one weight after the other, by the names and in the shapes that they have in the live model.

    Args:
        weight (`Callable`): Gives a weight by its name in the live model; asked for one group of weights at a time, so that others can be gone.
        rules (`Iterable[TensorRule]`): Theirs.
        encodings (`dict[str, Encoding]`): What each becomes.
        full (`Submodel`): Sizes of the model.
    """
    for group in fused_groups(rules):
        encoding, shared = encodings[group[0].name], None
        if encoding.format == "nvfp4":
            shared = global_scale_of(*(weight(rule.name) for rule in group))
        for rule in group:
            made = encode(weight(rule.name), encoding.format, global_scale=shared)
            companions = [companion.rule(rule) for companion in encoding.companions]
            yield (
                rule.name,
                {
                    companion.name: part.expand(companion.shape(full.at(rule.layer))).contiguous()
                    for companion, part in zip(companions, made, strict=True)
                },
            )


def _checked(model: Any, again: bool) -> ElasticConfig:
    """The config of a family that can be quantised."""
    model = getattr(model, "_orig_mod", model)
    elastic = getattr(model, "elastic_config", None)
    if isinstance(model, PreTrainedModel) and hasattr(model, "peft_config") or _has_adapters(model):
        raise ElasticConfigError(
            "adapters are attached, and codes have no place for them: call merge_and_unload() first, and quantise what it returns."
        )
    if not isinstance(model, PreTrainedModel) or not isinstance(elastic, ElasticConfig):
        raise ElasticConfigError(
            f"quantize() takes an elastic model, not {type(model).__name__}: make one of a stock model with hf_elastic.elastify(), or load one with "
            "ElasticForCausalLM."
        )
    if not model.can_generate():
        raise ElasticConfigError(
            "quantize() takes a causal model, and this one has no head: load it with ElasticForCausalLM. quantize_checkpoint() quantises files of "
            "both kinds."
        )
    if is_packed(model):
        raise ElasticConfigError(
            "this model is quantised already. Load the family that it was made of, and quantise that with another recipe."
        )
    if (source := getattr(model, "_decoded_from", None)) is not None and not again:
        raise ElasticConfigError(
            f"the weights of this model were codes in {source}, and what quantising loses adds up: quantise the family that was made of, or load the "
            "codes as they are, packed=True. If it was trained since, give again=True."
        )
    if model.submodel != elastic.architecture.full(elastic.parent_config):
        raise ElasticConfigError(
            f"the active size is {elastic.name_of(model.submodel) or 'one without a name'}, and all sizes are quantised together: call set_budget(None) "
            "first. To quantise one size alone, load it with budget=, or take it with sized()."
        )
    away = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if away:
        raise ElasticConfigError(
            f"{len(away)} tensors, such as {away[0]}, have no storage: device_map put them on disk or away from their device. quantize_checkpoint() "
            "quantises files, and needs no more memory than the largest tensor; or load the model whole."
        )
    return elastic


def _has_adapters(model: Any) -> bool:
    return isinstance(model, torch.nn.Module) and bool(attached(model))


def _refuse_infinite(model: PreTrainedModel, rules: Iterable[TensorRule]) -> None:
    """Before anything is changed."""
    for rule in rules:
        if not model.get_parameter(rule.name).isfinite().all():
            raise ElasticConfigError(f"{rule.name} has elements that are NaN or infinite, which no code stands for.")
