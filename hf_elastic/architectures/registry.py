"""The tables that are known, by stock `model_type`; a table and its stock classes are imported when they are asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points, requires, version
from typing import Any

from ..errors import UnsupportedArchitectureError, did_you_mean, reason
from .base import Architecture

ENTRY_POINTS = "hf_elastic.architectures"
"""Group of entry points by which an installed package adds tables: `model_type = "module:TheTable"`."""

_OURS = {
    "nemotron_h": "nemotron_h:NemotronH",
    "granitemoehybrid": "granitemoehybrid:GraniteMoeHybrid",
    "bamba": "bamba:Bamba",
    "falcon_h1": "falcon_h1:FalconH1",
    "lfm2": "lfm2:Lfm2",
    "lfm2_moe": "lfm2_moe:Lfm2Moe",
    "qwen3_next": "qwen3_next:Qwen3Next",
    "qwen3_5_text": "qwen3_5:Qwen35",
    "qwen3_5_moe_text": "qwen3_5:Qwen35Moe",
    "jamba": "jamba:Jamba",
    "llama": "dense:Llama",
    "mistral": "dense:Mistral",
    "qwen2": "dense:Qwen2",
    "qwen3": "dense:Qwen3",
    "olmo_hybrid": "olmo_hybrid:OlmoHybrid",
    "kimi_linear": "kimi_linear:KimiLinear",
    "gemma2": "gemma:Gemma2",
    "gemma3_text": "gemma:Gemma3Text",
    "mixtral": "sparse:Mixtral",
    "qwen3_moe": "sparse:Qwen3Moe",
    "zamba2": "zamba2:Zamba2",
}


_FORMS = {"nemotron_h_puzzle": "block_configs:stock_fields"}
"""Forms of a `config.json` that no stock class reads, and what makes one that a stock class does read of them."""


class Registry(Mapping[str, Architecture]):
    """Tables by `model_type`, ours and those that other packages add; see [`hf_elastic.register_architecture`]."""

    def __init__(self, ours: Mapping[str, str]):
        self._places: dict[str, Callable[[], type[Architecture]]] = {
            model_type: lambda place=place: _found(place)  # type: ignore[misc]
            for model_type, place in ours.items()
        }
        self._loaded: dict[str, Architecture] = {}
        self._listeners: list[Callable[[Architecture], None]] = []
        for point in entry_points(group=ENTRY_POINTS):
            if point.name not in self._places:
                self._places[point.name] = partial(_loaded_from, point)

    def __getitem__(self, model_type: str) -> Architecture:
        if model_type not in self._loaded:
            self._load(_table(model_type, self._places[model_type]))
        return self._loaded[model_type]

    def __contains__(self, model_type: object) -> bool:
        return model_type in self._places  # without importing anything

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def register(self, table: type[Architecture]) -> None:
        """Add a table, or put it in the place of another one; `register_architecture` checks it before."""
        self._places[table.model_type] = lambda: table
        self._loaded.pop(table.model_type, None)

    def when_loaded(self, listener: Callable[[Architecture], None]) -> None:
        """Call a function for every table that is loaded, now or later."""
        self._listeners.append(listener)
        for architecture in self._loaded.values():
            listener(architecture)

    def _load(self, table: type[Architecture]) -> None:
        architecture = self._loaded[table.model_type] = table()
        for listener in self._listeners:
            listener(architecture)


ARCHITECTURES = Registry(_OURS)


def get_architecture(model_type: str) -> Architecture:
    """The table of a stock `model_type`.

    Raises:
        `UnsupportedArchitectureError`: no table for it; the message lists the supported ones.
    """
    if model_type not in ARCHITECTURES:
        raise UnsupportedArchitectureError(
            f"no elastic axes are known for model_type {model_type!r}; supported: {', '.join(ARCHITECTURES)}."
            f"{did_you_mean(model_type, ARCHITECTURES)} CONTRIBUTING.md says how to add an architecture. If a package of its own has the table, "
            "install that package, or import it if it calls hf_elastic.register_architecture()."
        )
    return ARCHITECTURES[model_type]


def as_stock(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a `config.json` says, as a stock class reads it.

    Raises:
        `ElasticConfigError`: no stock model computes what it says.
    """
    form = _FORMS.get(str(fields.get("model_type")))
    return dict(fields) if form is None else _found(form)(fields)


def _table(model_type: str, place: Callable[[], type[Architecture]]) -> type[Architecture]:
    """The class of a table, imported now.

    Raises:
        `UnsupportedArchitectureError`: the installed transformers does not have the stock classes, or the place has no such table.
    """
    try:
        table = place()
    except (ImportError, AttributeError) as error:
        raise UnsupportedArchitectureError(
            f"the table of model_type {model_type!r} cannot be imported: {error}. transformers {version('transformers')} is installed, which may be "
            f"too old for it; hf-elastic needs {_needed()}."
        ) from error
    if not (isinstance(table, type) and issubclass(table, Architecture) and table.model_type == model_type):
        raise UnsupportedArchitectureError(
            f"what is registered for model_type {model_type!r} is {table!r}, which is no table of it: it has to be a subclass of "
            f"hf_elastic.architectures.Architecture with model_type = {model_type!r}."
        )
    return table


def _loaded_from(point: EntryPoint) -> type[Architecture]:
    """What another package announces as a table.

    Raises:
        `UnsupportedArchitectureError`: it cannot be imported.
    """
    package = point.dist.name if point.dist is not None else "a package"
    try:
        table: type[Architecture] = point.load()
    except Exception as error:  # whatever the other package does when it is imported
        raise UnsupportedArchitectureError(
            f"{package} brings a table for model_type {point.name!r} ({point.value}), which cannot be imported: {reason(error)}."
        ) from error
    return table


def _needed() -> str:
    """What this package says of transformers where it is installed: `transformers>=5.23`."""
    found = [line for line in requires("hf-elastic") or () if re.match(r"transformers\b", line)]
    return found[0].partition(";")[0].strip() if found else "a newer transformers"


def _found(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(f".{module}", __package__), name)
