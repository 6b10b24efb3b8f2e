"""The nested layout: files per budget, so that a size needs exactly the files up to its own.

```
config.json                                 elastic; `elastic.files` lists the files of every budget and their bytes
budgets/12b/config.json model.safetensors   the smallest budget: a stock checkpoint of that size
budgets/23b/added.safetensors               what 23b keeps and 12b does not
budgets/full/added.safetensors              what the parent keeps and 23b does not
```

What the parts of a tensor are, and how they are named, says [`hf_elastic.checkpoints.parts`].
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from transformers import PreTrainedConfig

from ..architectures import Architecture
from ..architectures.axes import Run, TensorRule, indices_of, places_of, shape_of
from ..architectures.encodings import Encoding
from ..architectures.pieces import Piece
from ..architectures.submodel import Submodel
from ..configuration_elastic import ElasticConfig
from ..storage.reading import Block, Joined, Places, Readable
from ..storage.streaming import write_shards
from .checkpoint import Checkpoint, Shapes
from .names import Names, is_base
from .parts import Part, Region, Stored, common, tensors

FOLDER = "budgets"


class NestedCheckpoint(Checkpoint):
    """The files of one or more budgets of the nested layout, opened: to whoever asks, the stock checkpoint that they are parts of.

    Args:
        files (`list[Path]`): Files of all budgets of `levels`.
        architecture (`Architecture`): Table of the parent.
        config (`PreTrainedConfig`): The parent's stock config.
        levels (`list[Submodel]`): Those budgets, smallest first, without gaps.
        encodings (`dict[str, Encoding]`, *optional*): As in [`Checkpoint`].
    """

    def __init__(
        self,
        files: list[Path],
        architecture: Architecture,
        config: PreTrainedConfig,
        levels: Sequence[Submodel],
        encodings: Mapping[str, Encoding] | None = None,
    ):
        super().__init__(files, encodings)
        self._largest = levels[-1]
        self._refuse_far_off(architecture, config, self._largest)

        def is_there(tensor: Stored) -> bool:
            return tensor.parts[0].names[0][0] in self._where

        found = tensors(architecture, config, levels, is_there, self.encodings)
        self._stored = {tensor.rule.name: tensor for tensor in found}

    def _held(self, architecture: Architecture, config: PreTrainedConfig) -> Submodel:
        return self._largest

    def _expected(
        self, architecture: Architecture, config: PreTrainedConfig, head: bool
    ) -> Iterator[tuple[TensorRule, Shapes, bool]]:
        for tensor in self._stored.values():
            required = head or is_base(tensor.rule.name, architecture)
            yield tensor.rule, [pair for part in tensor.parts for pair in part.shapes()], required

    def _sources(self, piece: Piece, architecture: Architecture) -> list[Names]:
        return [(piece.rule.stored.name,)]

    def block(self, sources: Sequence[Names], runs: Region, places: Places | None = None) -> Block | Joined:
        shape, blocks = shape_of(runs), []
        for part in self._stored[sources[0][0]].parts:
            pairs = [list(common(region, kept)) for region, kept in zip(part.region, runs, strict=True)]
            if all(pairs):
                kept, into = ([[pair[i] for pair in along] for along in pairs] for i in range(2))
                if shape_of(kept) == shape:  # all of it lies here, in order
                    return super().block(part.names, kept, places)
                blocks.append(super().block(part.names, kept, into))
        return Joined(shape, [leaf for block in blocks for leaf in block.leaves()])


def write_nested(
    directory: Path, source: Checkpoint, elastic: ElasticConfig, max_shard_size: int | str = "5GB"
) -> dict[str, dict[str, int]]:
    """Write the weight files of the nested layout from a checkpoint in the stock layout; one tensor is in memory at a time.

    Args:
        directory (`Path`): Root of the new checkpoint.
        source (`Checkpoint`): The parent's weights.
        elastic (`ElasticConfig`): Its config; every member of the family gets files.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Of one file.

    Returns:
        `dict[str, dict[str, int]]`: Per budget its files and their bytes, the `elastic.files` of the config.
    """
    family = dict(reversed(elastic.family().items()))
    contents: list[dict[str, Readable]] = [{} for _ in family]

    def is_there(tensor: Stored) -> bool:
        return tensor.sources[0][0] in source

    levels = list(family.values())
    for tensor in tensors(elastic.architecture, elastic.parent_config, levels, is_there, source.encodings):
        if is_there(tensor):  # a base model has no head
            for part in tensor.parts:
                contents[part.level].update(_contents(source, tensor.sources, part))
    files: dict[str, dict[str, int]] = {}
    for (name, folder), content in zip(folder_names(list(family)).items(), contents, strict=True):
        place = f"{FOLDER}/{folder}"
        (directory / place).mkdir(parents=True)
        stem = "model" if content is contents[0] else "added"
        files[name] = {}
        for file in write_shards(directory / place, stem, content, max_shard_size):
            files[name][f"{place}/{file}"] = (directory / place / file).stat().st_size
    return files


def _contents(source: Checkpoint, sources: list[Names], part: Part) -> dict[str, Readable]:
    if part.apart is None:
        return {part.names[0][0]: source.block(sources, part.region)}
    leading = len(part.region) - len(part.apart[0])  # dimensions of which every index is stored by itself
    rows, *inner = part.region[leading:]
    bounds = list(accumulate((shape[0] for shape in part.apart), initial=0))
    content: dict[str, Readable] = {}
    for index, names in zip(indices_of(part.region[0]) if leading else (0,), part.names, strict=True):
        for name, start, stop in zip(names, bounds, bounds[1:], strict=False):
            content[name] = source.block([sources[index]], [between(rows, start, stop), *inner])
    return content


def between(runs: Sequence[Run], start: int, stop: int) -> list[Run]:
    """The ranges at the positions between two."""
    found = []
    for run, place in places_of(runs):
        low, high = max(place.start, start), min(place.stop, stop)
        if low < high:
            found.append((run.start + low - place.start, run.start + high - place.start))
    return found


def folder_names(budgets: Sequence[str]) -> dict[str, str]:
    """A folder for every budget, named after it as far as names of folders go, and no two alike on any system."""
    folders: dict[str, str] = {}
    for name in budgets:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "budget"
        folder, count = stem, 1
        while folder.lower() in {other.lower() for other in folders.values()}:
            count += 1
            folder = f"{stem}-{count}"
        folders[name] = folder
    return folders


def levels_for(elastic: ElasticConfig, submodel: Submodel) -> dict[str, Submodel]:
    """The budgets whose files a submodel needs, smallest first: up to the first that it nests in."""
    levels: dict[str, Submodel] = {}
    for name, member in reversed(elastic.family().items()):
        if name in elastic.elastic["files"]:
            levels[name] = member
            if submodel.nests_in(member):
                break
    return levels
