"""Parents inside of a larger model, such as the text model of a vision-language model: which fields of its `config.json` are whose.

A family whose parent is a text model keeps the rest of the larger model's config under `host_config`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from ..architectures import ARCHITECTURES, get_architecture
from ..architectures.hosts import Host
from ..errors import ElasticConfigError, shown
from .leaving_out import LEFT_OUT
from .section import CUT_FROM

HOST = "host_config"

_SHARED = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")
"""What a larger model says for all of its parts, unless a part says otherwise."""
_PARENTS = (CUT_FROM, LEFT_OUT)
"""What is said of the weights in a file, whichever part they are of."""
_NOBODYS = ("transformers_version", "auto_map", "_name_or_path", "dtype", "torch_dtype")


def parted(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The fields of a parent, and those of the larger model around it, `None` where there is none that a table knows.

    Args:
        fields (`dict`): What a `config.json` holds.
    """
    outer = fields.get("model_type")
    sections = [] if outer in ARCHITECTURES else [part for part in fields.values() if isinstance(part, Mapping)]
    for section in sections:
        inner = section.get("model_type")
        if not isinstance(inner, str) or inner not in ARCHITECTURES:
            continue
        host = get_architecture(inner).host(outer)
        if host is not None and fields.get(host.section) is section:
            mine = {key: fields[key] for key in (*_SHARED, *_PARENTS) if fields.get(key) is not None}
            others = {*_PARENTS, *_NOBODYS, host.section}
            # A larger model ties by its own word, whatever its part says; files leave out what the class says by default.
            tied = fields.get("tie_word_embeddings", getattr(CONFIG_MAPPING[outer], "tie_word_embeddings", None))
            ties = {} if tied is None else {"tie_word_embeddings": tied}
            return {**mine, **section, **ties}, {key: value for key, value in fields.items() if key not in others}
    return dict(fields), None


def stock_host(host: Host, fields: Mapping[str, Any], parent: PreTrainedConfig) -> PreTrainedConfig:
    """The stock config of the larger model around a parent."""
    rest = {key: value for key, value in fields.items() if key != "model_type"}
    return AutoConfig.for_model(host.model_type, **rest, **{host.section: parent.to_dict()})


def host_fields(fields: Mapping[str, Any], parent: PreTrainedConfig) -> dict[str, Any] | None:
    """What the larger model of a `config.json` says besides its parent, as its stock class writes it; `None` if there is no larger model."""
    _, others = parted(fields)
    host = get_architecture(parent.model_type).host(others["model_type"]) if others else None
    if host is None or others is None:
        return None
    made = json.loads(stock_host(host, others, parent).to_json_string())
    return {key: value for key, value in made.items() if key not in (*_NOBODYS, host.section)}


def find_host(parent: PreTrainedConfig, fields: Any) -> Host:
    """The larger model that `host_config` is of.

    Raises:
        `ElasticConfigError`: it is of none that parents like this one are part of, or says other sizes than the parent's.
    """
    architecture = get_architecture(parent.model_type)
    known = [host.model_type for host in architecture.hosts]
    host = architecture.host(fields.get("model_type")) if isinstance(fields, Mapping) else None
    if host is None:
        raise ElasticConfigError(
            f"{HOST}={shown(fields)} must be the config of a model around a {architecture.model_type}"
            f"{', which are ' + ', '.join(known) if known else '; none is known'}."
        )
    full = architecture.full(parent).at(None)
    for path, axis in host.sizes.items():
        said: Any = fields
        for key in path.split("."):
            said = said.get(key) if isinstance(said, Mapping) else None
        if said != full[axis]:
            raise ElasticConfigError(
                f"{HOST}.{path}={shown(said)} must be the {axis} of the parent, {full[axis]}; config.json was edited or damaged."
            )
    return host
