"""The nested layout: files per budget, so that a size needs exactly the files up to its own.

```
config.json                                 elastic; `elastic.files` lists the files of every budget and their bytes
budgets/12b/config.json model.safetensors   the smallest budget: a stock checkpoint of that size
budgets/23b/added.safetensors               what 23b keeps and 12b does not
budgets/full/added.safetensors              what the parent keeps and 23b does not
```

A tensor of the parent is cut into *parts*: the smallest budget's region of it, and for every larger budget what its region has more.
Regions are products of ranges along the dimensions, nested in each other, so the rest of one without the other is at most one block per
dimension: new rows over all columns, then new columns of the old rows. Parts do not overlap, so together they are as large as the parent.

In the smallest budget's files tensors have the names that they have in a stock checkpoint of that size, and experts are stored one by one
where they are in stock checkpoints. Elsewhere the experts of a layer are one tensor, as in the live model (thousands of small parts would take
longer to read than what is in them), and the name is the parent's with `.level1.dim0` behind it: what the first larger budget adds along
dimension 0; `.level1` alone where nothing smaller has the tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from ..architectures import Architecture
from ..architectures.axes import Run, TensorRule, indices_of, places_of, shape_of, without
from ..architectures.pieces import Piece, pieces
from ..architectures.submodel import Submodel
from ..configuration_elastic import ElasticConfig
from ..errors import CheckpointError
from ..storage.files import INDEX_NAME
from ..storage.reading import Block, Joined, Places, Readable
from .checkpoint import Checkpoint, Names, is_base, stored_names

FOLDER = "budgets"
Region = list[list[Run]]
"""Per dimension the ranges that are kept of a tensor of the parent."""


@dataclass(frozen=True)
class Part:
    """A block of a tensor of the parent that is stored as a tensor, or as one per expert.

    Args:
        level (`int`): Which budget's files hold it, 0 for the smallest.
        names (`list[tuple[str, ...]]`): Its name there, or one entry per expert, with one name or those of the segments of dimension 1.
        region (`list[list[tuple[int, int]]]`): What it holds.
        split (`list[int]`, *optional*): If it is one or several tensors per expert, how long these are.
    """

    level: int
    names: list[Names]
    region: Region
    split: list[int] | None = None

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Of every tensor."""
        whole = shape_of(self.region)
        shapes = [whole] if self.split is None else [(size, *whole[2:]) for size in self.split]
        for names in self.names:
            yield from zip(names, shapes, strict=True)


@dataclass(frozen=True)
class Stored:
    """A tensor of the parent, and the parts that hold it in the nested layout.

    Args:
        rule (`TensorRule`): The tensor.
        sources (`list[str]`): Its names in the parent's stock checkpoint: one, or one per expert.
        parts (`list[Part]`): In the order of their levels.
    """

    rule: TensorRule
    sources: list[Names]
    parts: list[Part]


def split(name: str, first: str, regions: Sequence[Region | None]) -> Iterator[Part]:
    """Cut a tensor into the parts that every budget adds.

    Args:
        name (`str`): Its name in the parent.
        first (`str`): Its name in the smallest budget.
        regions (`list`): What every budget keeps of it, smallest first; `None` where it keeps nothing.
    """
    old: Region | None = None
    for level, region in enumerate(regions):
        if region is None:
            continue
        if old is None:
            yield Part(level, [(first if level == 0 else f"{name}.level{level}",)], region)
        else:
            for i, runs in enumerate(region):
                if added := without(runs, old[i]):
                    yield Part(level, [(f"{name}.level{level}.dim{i}",)], [*old[:i], added, *region[i + 1 :]])
        old = region


def common(runs: Sequence[Run], others: Sequence[Run]) -> Iterator[tuple[Run, Run]]:
    """The indices in both, as ranges of positions: in what `runs` keeps, and in what `others` keep."""
    at = 0
    for start, stop in runs:
        other_at = 0
        for first, last in others:
            low, high = max(start, first), min(stop, last)
            if low < high:
                yield (at + low - start, at + high - start), (other_at + low - first, other_at + high - first)
            other_at += last - first
        at += stop - start


def layouts(rule: TensorRule, levels: Sequence[Piece | None], architecture: Architecture) -> Iterator[Stored]:
    """The ways in which a tensor may be stored: under each of the names it can have, and experts one by one or stacked.

    Args:
        rule (`TensorRule`): Tensor of the parent.
        levels (`list[Piece | None]`): What every budget keeps of it, smallest first.
    """
    regions = [None if piece is None else piece.runs for piece in levels]
    target = rule if levels[0] is None else levels[0].target
    names, firsts = stored_names(rule, architecture), stored_names(target, architecture)
    whole = [list(split(name, first, regions)) for name, first in zip(names, firsts, strict=True)]
    if rule.stacked:
        full = rule.shape(next(piece.full for piece in levels if piece is not None))
        sources = _expert_names(rule, architecture, full[0])
        kept = _expert_names(target, architecture, levels[0].shape[0] if levels[0] is not None else 0)
        for here, first, parts in zip(sources, kept, whole, strict=True):
            sizes = target.segment_sizes(levels[0].kept) if levels[0] is not None else None
            one_by_one = [replace(part, names=first, split=sizes) if part.level == 0 else part for part in parts]
            yield Stored(rule, here, one_by_one)
    for name, parts in zip(names, whole, strict=True):
        yield Stored(rule, [(name,)], parts)


def _expert_names(rule: TensorRule, architecture: Architecture, count: int) -> list[list[Names]]:
    """The names of so many experts, in each of the ways in which they can be named."""
    experts = [[stored_names(rule, architecture, e, segment) for segment in rule.segments] for e in range(count)]
    ways = range(len(stored_names(rule, architecture)))
    return [[tuple(names[way] for names in segments) for segments in experts] for way in ways]


def _tensors(
    architecture: Architecture,
    config: PreTrainedConfig,
    levels: Sequence[Submodel],
    fits: Callable[[Stored], bool],
) -> Iterator[Stored]:
    """Every stored tensor, in the first layout that `fits`; in the Hub's where none does.

    Args:
        levels (`list[Submodel]`): Nested budgets, smallest first.
    """
    kept = [
        {piece.rule.stored.name: piece for piece in pieces(architecture, config, level) if not piece.copy_of}
        for level in levels
    ]
    for name, largest in kept[-1].items():
        here, rule = [level.get(name) for level in kept], largest.rule.stored
        found = (tensor for tensor in layouts(rule, here, architecture) if fits(tensor))
        yield next(found, None) or next(layouts(rule, here, architecture))


class NestedCheckpoint(Checkpoint):
    """The files of one or more budgets of the nested layout, opened: to whoever asks, the stock checkpoint that they are parts of.

    Args:
        files (`list[Path]`): Files of all budgets of `levels`.
        architecture (`Architecture`): Table of the parent.
        config (`PreTrainedConfig`): The parent's stock config.
        levels (`list[Submodel]`): Those budgets, smallest first, without gaps.
    """

    def __init__(
        self, files: list[Path], architecture: Architecture, config: PreTrainedConfig, levels: Sequence[Submodel]
    ):
        super().__init__(files)
        self._largest = levels[-1]
        self._refuse_far_off(architecture, config, self._largest)
        tensors = _tensors(architecture, config, levels, lambda tensor: tensor.parts[0].names[0][0] in self._where)
        self._stored = {tensor.rule.name: tensor for tensor in tensors}

    def check(
        self, architecture: Architecture, config: PreTrainedConfig, *, head: bool = True, ignored: Iterable[str] = ()
    ) -> None:
        super().check(architecture, config, head=head, ignored=ignored)
        for tensor in self._stored.values():
            names = [name for part in tensor.parts for name, _ in part.shapes() if name in self._where]
            types = {self._stored_dtype(name) for name in names}
            if len(types) > 1:
                raise CheckpointError(f"the parts of {tensor.rule.name} are stored as {' and '.join(sorted(types))}.")

    def _held(self, architecture: Architecture, config: PreTrainedConfig) -> Submodel:
        return self._largest

    def _expected(
        self, architecture: Architecture, config: PreTrainedConfig, head: bool
    ) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        for tensor in self._stored.values():
            required = head or is_base(tensor.rule.name, architecture)
            yield from ((name, shape, required) for part in tensor.parts for name, shape in part.shapes())

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
    """Write the weight files of the nested layout from a checkpoint in the stock layout; one file is in memory at a time.

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

    for tensor in _tensors(elastic.architecture, elastic.parent_config, list(family.values()), is_there):
        if is_there(tensor):  # a base model has no head
            for part in tensor.parts:
                contents[part.level].update(_contents(source, tensor.sources, part))
    files: dict[str, dict[str, int]] = {}
    for (name, folder), content in zip(folder_names(list(family)).items(), contents, strict=True):
        place = f"{FOLDER}/{folder}"
        (directory / place).mkdir(parents=True)
        stem = "model" if content is contents[0] else "added"
        files[name] = {}
        for file in _write_shards(directory / place, stem, content, max_shard_size):
            files[name][f"{place}/{file}"] = (directory / place / file).stat().st_size
    return files


def _contents(source: Checkpoint, sources: list[Names], part: Part) -> dict[str, Readable]:
    if part.split is None:
        return {part.names[0][0]: source.block(sources, part.region)}
    experts, rows, *inner = part.region
    content, bounds = {}, [0, *accumulate(part.split)]
    for expert, names in zip(indices_of(experts), part.names, strict=True):
        for i, name in enumerate(names):  # of a part, the rows of one segment are those of one stored tensor
            kept = [run for run, _ in _between(rows, bounds[i], bounds[i + 1])]
            before = sum(source._stored_shape(other)[0] for other in sources[expert][:i])
            shifted = [(start - before, stop - before) for start, stop in kept] if len(names) > 1 else kept
            content[name] = source.block([(sources[expert][i],)], [shifted, *inner])
    return content


def _between(runs: Sequence[Run], start: int, stop: int) -> Iterator[tuple[Run, Run]]:
    """The ranges at the positions between two, and these positions."""
    for run, place in places_of(runs):
        low, high = max(place.start, start), min(place.stop, stop)
        if low < high:
            yield (run.start + low - place.start, run.start + high - place.start), (low, high)


def _write_shards(folder: Path, stem: str, content: dict[str, Readable], max_shard_size: int | str) -> list[str]:
    if not content:  # a budget that differs in what has no weights, such as experts per token
        return []
    shards = split_state_dict_into_shards_factory(
        content, get_storage_size=_bytes, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, keys in shards.filename_to_tensors.items():
        save_file({key: content[key][...] for key in keys}, folder / file, metadata={"format": "pt"})
    if shards.is_sharded and stem == "model":
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return list(shards.filename_to_tensors)


def _bytes(block: Readable) -> int:
    return int(torch.Size(block.shape).numel()) * block.dtype.itemsize


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
