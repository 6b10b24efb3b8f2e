"""The stock config of a parent, from what a `config.json` says: made, checked, or refused with a word on why."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from ..architectures import as_stock, get_architecture
from ..errors import CheckpointError, ElasticConfigError, HFElasticError, did_you_mean, reason, shown
from ..storage.json_files import read_json
from .hosting import parted
from .known import KNOWN
from .leaving_out import LEFT_OUT
from .newer import warn_of_newer_fields
from .section import CUT_FROM, check_left_out, check_origin

_MOST = {
    **dict.fromkeys(("num_hidden_layers", "layer_types", "layers_block_type", "hybrid_override_pattern"), 256),
    **dict.fromkeys(("num_labels", "id2label", "label2id"), 10_000),
}
"""Layers and labels that a config may have; no hybrid has more than some 120 layers."""


def refuse_adapter(repo: str | os.PathLike[str]) -> None:
    """Refuse a folder that holds an adapter and no model, which is what a LoRA run saves.

    Raises:
        `ElasticConfigError`: says how the adapter gets into a model.
    """
    folder = Path(repo)
    if (folder / "config.json").is_file() or not (folder / "adapter_config.json").is_file():
        return
    if (folder / "merged" / "config.json").is_file():
        raise ElasticConfigError(
            f"{folder} holds an adapter, not a model. The family with the adapter merged is in {folder / 'merged'}; give that."
        )
    try:
        family = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "FAMILY"
    except (CheckpointError, AttributeError):
        family = "FAMILY"
    raise ElasticConfigError(
        f"{folder} holds an adapter, not a model. Merge it into the family that it was trained on, and give that folder: train with "
        f"`merge_adapter: true`, which saves it in {folder / 'merged'}, or in Python PeftModel.from_pretrained(ElasticForCausalLM.from_pretrained("
        f"{str(family)!r}), {str(folder)!r}).merge_and_unload().save_pretrained('merged')."
    )


def plain_parent_error(repo: Any, model_type: Any) -> ElasticConfigError:
    """What to say to a budget for a checkpoint that has none."""
    known = (
        "its sizes are known, give elastic_config='auto'" if str(repo) in KNOWN else "describe it with elastic_config="
    )
    return ElasticConfigError(
        f"{repo} is a plain {model_type} checkpoint without budgets. Load it with AutoModelForCausalLM and without budget=, or make it "
        "elastic with hf_elastic.elastify() or `hf-elastic elastify`. If its weights are sorted by importance already, load it with "
        f"ElasticForCausalLM and {known}."
    )


def parent_from_dict(fields: Mapping[str, Any], written: Any = None) -> PreTrainedConfig:
    """The stock config of a parent from the dict in its `config.json`, or in that of a larger model around it.

    Sizes that differ per layer are set last: some stock classes check global fields when they are made, which then may not be read.

    Args:
        fields (`dict[str, Any]`): What the file says.
        written (`str`, *optional*): The version of transformers that wrote it, if `fields` do not say so.

    Raises:
        `ElasticConfigError`: the stock class refuses them, or fails.
        `UnsupportedArchitectureError`: no table for their `model_type`.
    """
    refuse_huge(fields)
    written = written or fields.get("transformers_version")
    fields, _ = parted(as_stock(fields))
    model_type = fields.pop("model_type", None)
    architecture = get_architecture(str(model_type))
    fields.pop("auto_map", None)  # of the repository's own code, which is not run
    differences = fields.pop("per_layer_config", None)
    check_origin(fields.get(CUT_FROM))
    check_left_out(fields.get(LEFT_OUT))
    quantized = fields.get("quantization_config")
    if quantized is not None and not (isinstance(quantized, Mapping) and "quant_method" in quantized):
        raise ElasticConfigError(f"quantization_config={shown(quantized)} must be a dict with a `quant_method`.")
    with explained(architecture.model_type):
        config = AutoConfig.for_model(model_type, **fields)
        _refuse_contradictions(fields, config)
        if differences:
            config.per_layer_config = differences
        config.to_dict()  # which every slice is made from
        check_stock(config)
        warn_of_newer_fields(fields, config, architecture, written)
    return config


def refuse_huge(fields: Mapping[str, Any]) -> None:
    """Refuse counts that stock config classes make lists of, before they do; a damaged file can say any number."""
    for field, most in _MOST.items():
        value = fields.get(field)
        count = len(value) if isinstance(value, (str, list, dict)) else value
        if isinstance(count, (int, float)) and count > most:
            raise ElasticConfigError(
                f"{field}: {count:,} is more than the {most:,} that are read; config.json was edited or damaged."
            )


def _refuse_contradictions(fields: Mapping[str, Any], config: PreTrainedConfig) -> None:
    """Refuse a size that the stock class takes from another field: exports give some twice, under names that other programs read.

    What a class computes from what was said, and writes again as it was said, is none.
    """
    written = config.to_dict()
    for field, said in fields.items():
        if type(said) not in (int, float) or field == "num_hidden_layers":  # which follows from the list of layers
            continue
        if type(taken := getattr(config, field, said)) in (int, float) and said not in (taken, written.get(field)):
            raise ElasticConfigError(
                f"{field}={said}, but another field says {taken}, which the stock class takes; config.json was edited or damaged. Give both the same "
                "value."
            )


@contextmanager
def explained(model_type: str) -> Iterator[None]:
    """Errors of stock config classes as one of this package: they check some fields, compute with others, and may end in anything."""
    try:
        yield
    except (HFElasticError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise ElasticConfigError(
            f"these fields make no config of {model_type}, config.json was edited or damaged: {reason(error)}."
        ) from error


_unseen: ContextVar[bool] = ContextVar("unseen", default=False)


@contextmanager
def unshown() -> Iterator[None]:
    """Upstream writes every config that it reads into a log, and so makes its text where nobody sees the log: a tenth of the time to load a small model."""
    token = _unseen.set(not logging.getLogger("transformers.configuration_utils").isEnabledFor(logging.INFO))
    try:
        yield
    finally:
        _unseen.reset(token)


def is_shown() -> bool:
    """Whether somebody may see a config's text now; see [`unshown`]."""
    return not _unseen.get()


def check_stock(config: PreTrainedConfig) -> None:
    """Raise an error for what a stock config class takes and no model can be built from: sizes below 1, and unknown activations."""
    architecture = get_architecture(config.model_type)
    full = architecture.full(config)
    for rule in architecture.rules(config):
        shape = rule.shape(full.at(rule.layer))
        if not all(isinstance(size, int) and size > 0 for size in shape):
            raise ElasticConfigError(
                f"{rule.name} would have the shape {shown(shape)}; a size in config.json was edited or damaged."
            )
    for field, value in vars(config).items():
        if field.endswith("hidden_act") and value not in ACT2FN:
            raise ElasticConfigError(f"{field}={shown(value)} is no activation.{did_you_mean(value, ACT2FN)}")
    if config.dtype is not None and not isinstance(config.dtype, torch.dtype):
        raise ElasticConfigError(f"dtype={shown(config.dtype)} must be the name of a torch.dtype, such as 'bfloat16'.")
    for layer in range(full.depth if config.is_heterogeneous else 0):
        layer_config, parts = config.per_layer_config[layer], architecture.parts(config, layer)
        sizes = full.at(layer)
        known = {axis.field for axis in architecture.axes if axis.part in parts}
        known |= {key for part in parts for key in architecture.tied_fields(layer_config, part, sizes)}
        if stray := sorted(config._heterogeneity_spec.per_layer_overrides.get(layer, {}).keys() - known):
            raise ElasticConfigError(
                f"per_layer_config of layer {layer} has {stray[0]}, which no size of that layer is; such models are not supported."
            )
