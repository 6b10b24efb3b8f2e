"""Fields of a `config.json` that a newer transformers wrote and the installed one does not know: it keeps them and computes without them."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

from ..architectures import Architecture
from ..errors import users_level
from .leaving_out import LEFT_OUT
from .section import CUT_FROM


def warn_of_newer_fields(
    fields: Mapping[str, Any], config: PreTrainedConfig, table: Architecture, written: Any
) -> None:
    """Warn if a newer transformers wrote fields that the installed one does not know.

    Stock configs take any field, so a new one that says how to compute would have no effect here, without an error.

    Args:
        fields (`dict[str, Any]`): From `config.json`.
        config (`PreTrainedConfig`): What the stock class made of them.
        table (`Architecture`): Of the config's `model_type`.
        written: What the file says of the version that wrote it.
    """
    if not _is_newer(written):
        return
    unknown = [
        name for name in _unknown(fields, config, table) if fields[name] is not None and fields[name] is not False
    ]
    if unknown:
        warnings.warn(
            f"this config.json was written by transformers {written}, and {transformers.__version__} is installed, whose {type(config).__name__} "
            f"does not know {', '.join(unknown)}. What is not known has no effect: if it changes what the model computes, results are wrong "
            "without an error. Update transformers, or compare a few logits with the version that wrote it.",
            stacklevel=users_level(),
        )


def _is_newer(written: Any) -> bool:
    return isinstance(written, str) and _release(written) > _release(transformers.__version__)


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version starts with; none if it is no version."""
    found = re.match(r"\d+(\.\d+)*", version.strip())
    return tuple(int(number) for number in found[0].split(".")) if found else ()


def _unknown(fields: Mapping[str, Any], config: PreTrainedConfig, table: Architecture) -> list[str]:
    """The fields that nothing declares: not the stock class, not the table, and that are not what the class computes itself."""
    said = {CUT_FROM, LEFT_OUT, *config.attribute_map, *table.export_fields(config)}
    said |= {field.name for field in dataclasses.fields(config)}
    full = table.full(config)
    for layer in range(full.depth):
        layer_config, sizes = config.per_layer_config[layer], full.at(layer)
        for part in table.parts(config, layer):
            said |= table.tied_fields(layer_config, part, sizes).keys()
    left = [name for name in fields if name in vars(config) and not hasattr(type(config), name) and name not in said]
    left = [name for name in left if not name.startswith("_")]
    if not left:
        return []
    rest = {name: value for name, value in fields.items() if name not in left}
    return [name for name in left if not hasattr(AutoConfig.for_model(config.model_type, **rest), name)]
