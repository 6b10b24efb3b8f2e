"""`elastic.quantization` in `config.json`: which weights of the parent are stored in few bits, and in which encoding."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from ..architectures import Architecture
from ..architectures.axes import TensorRule
from ..architectures.encodings import ENCODINGS, Encoding
from ..architectures.pieces import pieces
from ..architectures.submodel import Submodel
from ..errors import ElasticConfigError, did_you_mean, shown

QUANTIZATION = "quantization"
QUANTIZATION_VERSION = 1
"""Version of this part of the section. A reader refuses newer ones."""

_KEYS = {"version", "recipe", "tensors"}


def quantization_section(
    architecture: Architecture, config: PreTrainedConfig, encodings: Mapping[str, Encoding], recipe: Any
) -> dict[str, Any]:
    """What is written: per encoding and tensor of a layer the numbers of the layers in which it has it.

    Args:
        encodings (`dict[str, Encoding]`): By the name of the weight in the live parent.
        recipe: As the user gave it; it is kept for people, and not read.
    """
    tensors: dict[str, dict[str, list[int]]] = {}
    for rule in _weights(architecture, config).values():
        if (encoding := encodings.get(rule.name)) is not None:
            tensors.setdefault(encoding.name, {}).setdefault(rule.template, []).append(rule.layer or 0)
    return {"version": QUANTIZATION_VERSION, "recipe": copy.deepcopy(recipe), "tensors": tensors}


def _weights(architecture: Architecture, config: PreTrainedConfig) -> dict[str, TensorRule]:
    """Rules of the weights that can be quantised, by name."""
    return {rule.name: rule for rule in architecture.rules(config) if rule.kind is not None and not rule.copy_of}


def encodings_of(
    architecture: Architecture, config: PreTrainedConfig, section: Mapping[str, Any]
) -> dict[str, Encoding]:
    """By the name of the weight in the live parent, what it is stored in. The section was checked."""
    return {
        template.format(layer=layer): ENCODINGS[name]
        for name, templates in section["tensors"].items()
        for template, layers in templates.items()
        for layer in layers
    }


def checked_quantization(
    architecture: Architecture, config: PreTrainedConfig, section: Any, submodels: Mapping[str, Submodel]
) -> dict[str, Any]:
    """Validate the section.

    Args:
        submodels (`dict[str, Submodel]`): All sizes of the family, by what they are called in errors.

    Raises:
        `ElasticConfigError`: it is of a newer version, names what there is not, or a size is cut off the blocks.
    """
    where = f"elastic.{QUANTIZATION}"
    if not isinstance(section, Mapping):
        raise ElasticConfigError(f"{where}={shown(section)} must be a dict.")
    version = section.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ElasticConfigError(f"{where}.version={shown(version)} must be a whole number of at least 1.")
    if version > QUANTIZATION_VERSION:
        raise ElasticConfigError(
            f"this checkpoint is quantised in format {version}, this hf_elastic reads up to {QUANTIZATION_VERSION}; "
            "pip install --upgrade hf-elastic."
        )
    for key in section:
        if key not in _KEYS:
            raise ElasticConfigError(f"unknown key {shown(key)} in {where}; it takes {', '.join(sorted(_KEYS))}.")
    tensors = section.get("tensors")
    if not isinstance(tensors, Mapping) or not tensors:
        raise ElasticConfigError(f"{where}.tensors={shown(tensors)} must be a dict from encoding to tensors.")
    known, seen = _weights(architecture, config), set()
    for name, templates in tensors.items():
        if name not in ENCODINGS:
            raise ElasticConfigError(
                f"{where}.tensors has the encoding {shown(name)}; this hf_elastic reads {', '.join(ENCODINGS)}.{did_you_mean(name, ENCODINGS)}"
            )
        if not isinstance(templates, Mapping):
            raise ElasticConfigError(f"{where}.tensors[{name!r}]={shown(templates)} must be a dict.")
        for template, layers in templates.items():
            if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
                raise ElasticConfigError(
                    f"{where}.tensors[{name!r}][{shown(template)}]={shown(layers)} must be a list of numbers of layers."
                )
            for layer in layers:
                tensor = str(template).replace("{layer}", str(layer))
                if tensor not in known:
                    raise ElasticConfigError(
                        f"{where}.tensors names {shown(tensor)}, which is no weight of this {architecture.model_type} that can be quantised; "
                        f"config.json was edited or damaged.{did_you_mean(tensor, known)}"
                    )
                if tensor in seen:
                    raise ElasticConfigError(f"{where}.tensors names {tensor} twice.")
                seen.add(tensor)
    refuse_off_blocks(architecture, config, encodings_of(architecture, config, section), submodels)
    return copy.deepcopy(dict(section))


def refuse_off_blocks(
    architecture: Architecture,
    config: PreTrainedConfig,
    encodings: Mapping[str, Encoding],
    submodels: Mapping[str, Submodel],
) -> None:
    """Raise [`ElasticConfigError`] for sizes that would take a part of elements that share a scale or a byte; names the axes.

    Args:
        submodels (`dict[str, Submodel]`): By what they are called in errors.
    """
    for called, submodel in {"the whole parent": architecture.full(config), **submodels}.items():
        checked: set[object] = set()  # layers are mostly alike
        for piece in pieces(architecture, config, submodel):
            encoding = encodings.get(piece.rule.stored.name)
            facts = (piece.rule.dims, encoding, tuple(piece.full.items()), tuple(piece.kept.items()))
            if encoding is None or facts in checked:
                continue
            checked.add(facts)
            for rule in encoding.rules(piece.rule):
                try:
                    rule.shape(piece.full)
                    rule.runs(piece.full, piece.kept)
                except ElasticConfigError as error:
                    raise ElasticConfigError(f"{called}, {piece.rule.name} in {encoding.name}: {error}") from error


def renumbered(
    architecture: Architecture, config: PreTrainedConfig, encodings: Mapping[str, Encoding], submodel: Submodel
) -> dict[str, Encoding]:
    """The encodings of a submodel's weights, by their names in it."""
    return {
        piece.target.name: encodings[piece.rule.stored.name]
        for piece in pieces(architecture, config, submodel)
        if not piece.copy_of and piece.rule.stored.name in encodings
    }
