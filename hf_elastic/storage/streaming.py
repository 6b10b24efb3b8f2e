"""Safetensors files written tensor by tensor: the largest one is in memory, not the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from .files import INDEX_NAME
from .reading import Readable

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}


def write_shards(
    folder: Path,
    stem: str,
    content: Mapping[str, Readable],
    max_shard_size: int | str,
    progress: Callable[[int], object] = lambda count: None,
) -> dict[str, list[str]]:
    """Write tensors into one or more files, and a list of them if they are several and called `model`.

    Args:
        folder (`Path`): Where to.
        stem (`str`): How names of files begin.
        content (`dict[str, Readable]`): Tensors, each read when its turn comes, in this order within a file.
        max_shard_size (`int` or `str`): Of one file.
        progress (`Callable[[int], None]`, *optional*): Told the bytes of every tensor that was written.

    Returns:
        `dict[str, list[str]]`: Per file the names in it.
    """
    if not content:
        return {}
    shards = split_state_dict_into_shards_factory(
        dict(content),
        get_storage_size=size_of,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, keys in shards.filename_to_tensors.items():
        write_tensors(folder / file, {key: content[key] for key in keys}, progress)
    if shards.is_sharded and stem == "model":
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return shards.filename_to_tensors


def write_tensors(
    path: Path, content: Mapping[str, Readable], progress: Callable[[int], object] = lambda count: None
) -> None:
    """Write one safetensors file. Large elements lie first in it, so that all are aligned; they are written in the order of `content`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    offset = 0
    for name, part in sorted(content.items(), key=lambda item: -item[1].dtype.itemsize):
        places[name] = offset
        offset += size_of(part)
        offsets = [places[name], offset]
        header[name] = {"dtype": _NAMES[part.dtype], "shape": list(part.shape), "data_offsets": offsets}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    start = 8 + len(encoded)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, part in content.items():
            tensor = part[...].contiguous()
            file.seek(start + places[name])
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            progress(tensor.nbytes)


def size_of(part: Readable) -> int:
    """Bytes of a tensor."""
    return int(torch.Size(part.shape).numel()) * part.dtype.itemsize
