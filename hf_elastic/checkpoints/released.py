"""Plain checkpoints that other programs stored in few bits: which of their weights are, and how, by `config.json` and the headers of the files.

They are read in the layouts of compressed-tensors and modelopt. Only weights are: what such files say of activations and of the KV cache
(`input_scale`, `k_scale`, ...) is for programs that compute in few bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..architectures.encodings import NVFP4_BLOCK, Encoding
from ..architectures.pieces import pieces
from ..configuration_elastic import ElasticConfig
from ..errors import CheckpointError, ElasticConfigError, shown
from ..storage.files import find_file
from ..storage.json_files import read_json
from .checkpoint import Checkpoint
from .opening import open_headers

MODELOPT_NAME = "hf_quant_config.json"
READABLE = "compressed-tensors with the formats nvfp4-pack-quantized and float-quantized (one scale per row or per tensor), and modelopt with FP8 and NVFP4"
_FORMATS = {None, "dense", "nvfp4-pack-quantized", "float-quantized", "naive-quantized", "mixed-precision"}
_ALGORITHMS = {None, "FP8", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"}


def with_encodings(
    repo: Any, elastic: ElasticConfig, variant: str | None = None, *, plain: bool = True, **hub: Any
) -> ElasticConfig:
    """The config of a family, with what its weights are stored in, if only the files say it; see `released`."""
    return released(repo, elastic, variant, plain=plain, **hub)[0]


def released(
    repo: Any, elastic: ElasticConfig, variant: str | None = None, *, plain: bool = True, **hub: Any
) -> tuple[ElasticConfig, Checkpoint | None]:
    """The config of a checkpoint that another program stored in few bits, with what its weights are stored in, and its files; of any other as it is.

    Args:
        repo (`str` or `os.PathLike`): Folder or repository of a plain checkpoint. Headers of its files are read, nothing else.
        elastic (`ElasticConfig`): What it nests.
        plain (`bool`, *optional*, defaults to `True`): Whether it may be a checkpoint of another program, which says it in a file of its own.
        variant, hub: As `find_files` takes them.

    Raises:
        `ElasticConfigError`: it is quantised in a way that is not read, or a size is cut off the blocks of a weight.
        `CheckpointError`: `config.json` says that it is quantised, and its files are not.
    """
    if elastic.encodings or (said := quantization_of(repo, elastic, hub, plain)) is None:
        return elastic, None
    refuse_unreadable(said, str(repo))
    checkpoint = open_headers(repo, variant, **hub)
    checkpoint.encodings = found_encodings(checkpoint, elastic)
    if not checkpoint.encodings:
        raise CheckpointError(
            f"{repo} says that its weights are quantised ({said['quant_method']}), and its files hold no codes of any. They do not belong together, or "
            "the codes have names that this package does not know; save it again, or take quantization_config out of config.json if the "
            "weights are whole."
        )
    return elastic.quantized(checkpoint.encodings), checkpoint


def quantization_of(
    repo: Any, elastic: ElasticConfig, hub: Mapping[str, Any], plain: bool = True
) -> dict[str, Any] | None:
    """What a plain checkpoint says of how it was quantised: in its `config.json`, or beside it where older versions of modelopt do."""
    said = getattr(elastic.parent_config, "quantization_config", None)
    if said is not None:
        return dict(said if isinstance(said, Mapping) else said.to_dict())
    path = find_file(repo, MODELOPT_NAME, hub) if plain else None
    if path is None:
        return None
    quantization = read_json(path).get("quantization")
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"{path}: quantization={shown(quantization)} must be a dict.")
    return {"quant_method": "modelopt", **quantization}


def refuse_unreadable(said: Mapping[str, Any], where: str) -> None:
    """Raise [`ElasticConfigError`] for a way of quantising that is not read; names it, and those that are."""
    method = said.get("quant_method")
    odd: list[str] = []
    if method == "compressed-tensors":
        odd = list(_odd_groups(said))
    elif method == "modelopt":
        layers = said.get("quantized_layers")
        algorithms = [said.get("quant_algo")]
        algorithms += [entry.get("quant_algo") for entry in layers.values()] if isinstance(layers, Mapping) else []
        odd = [f"quant_algo {shown(algorithm)}" for algorithm in algorithms if algorithm not in _ALGORITHMS]
    else:
        odd = ["blocks of 128 x 128"] if method == "fp8" else [""]
    if odd:
        of = f" with {odd[0]}" if odd[0] else ""
        raise ElasticConfigError(
            f"{where} is quantised by {shown(method)}{of}, which is not read here. What is: {READABLE}. Load it with the program that made it and save "
            "it in bfloat16, or take the checkpoint that it was made from."
        )


def _odd_groups(said: Mapping[str, Any]) -> Iterator[str]:
    """What is not read of a config of compressed-tensors."""
    if said.get("transform_config"):
        yield "transforms of the weights (transform_config)"
    sparsity = said.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        yield f"sparse weights ({shown(sparsity['format'])})"
    if (status := said.get("quantization_status", "compressed")) != "compressed":
        yield f"quantization_status {shown(status)}"
    groups = said.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    for format in (said.get("format"), *(group.get("format") for group in groups if isinstance(group, Mapping))):
        if format not in _FORMATS:
            yield f"the format {shown(format)}"
    for group in groups:
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and not _is_readable(weights):
            keys = ("num_bits", "type", "strategy", "group_size", "block_structure", "symmetric")
            yield f"weights of {shown({key: weights[key] for key in keys if weights.get(key) is not None})}"


def _is_readable(weights: Mapping[str, Any]) -> bool:
    facts = (weights.get("type"), weights.get("num_bits"), weights.get("strategy"))
    if weights.get("symmetric") is False:
        return False
    if facts == ("float", 4, "tensor_group"):
        return weights.get("group_size") in (None, NVFP4_BLOCK)
    return facts in (("float", 8, "tensor"), ("float", 8, "channel"))


def found_encodings(checkpoint: Checkpoint, elastic: ElasticConfig) -> dict[str, Encoding]:
    """By the name of the weight in the live parent, what it is stored in, as far as headers tell; `Checkpoint.check` compares shapes."""
    architecture, parent = elastic.architecture, elastic.parent_config
    found = {}
    for piece in pieces(architecture, parent, architecture.full(parent)):
        if piece.rule.kind is not None and not piece.copy_of:
            encoding = checkpoint.encoding_of(piece, architecture)
            if encoding is not None:
                found[piece.rule.name] = encoding
    return found
