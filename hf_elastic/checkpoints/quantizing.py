"""Quantising the files of a family: from one folder or repository into another, without a model, one matrix in memory at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import GENERATION_CONFIG_NAME

from ..architectures.submodel import Submodel
from ..configuration.budgets import Budget
from ..configuration.leaving_out import note_left_out
from ..configuration.quantized import QUANTIZATION
from ..configuration.remote_code import write_module
from ..configuration.section import CUT_FROM
from ..configuration_elastic import ElasticConfig, read_fields
from ..errors import ElasticConfigError
from ..quantization.recipes import Recipe, quantized_config
from ..routing.router import read_router
from ..storage.checksums import write_checksums
from ..storage.files import HUB_ARGUMENTS, find_file
from ..storage.sources import pinned
from ..storage.streaming import size_of, write_shards
from ..storage.tokenizer_files import tokenizer_files
from .encoding import encoded_content
from .export import write_stock_config
from .loading import load_config
from .memory import resolve_for_loading
from .nested import FOLDER
from .opening import open_checkpoint
from .origin import cut_from
from .passengers import not_passengers, open_passengers, processor_files
from .released import with_encodings
from .replacing import checked_target, replacing
from .saving import Layout, check_layout, nest, written_config


def quantize_checkpoint(
    repo: str | os.PathLike[str],
    output: str | os.PathLike[str],
    recipe: Any,
    *,
    keep: str | Iterable[str] = (),
    budget: Budget | Submodel = None,
    layout: Layout = "stock",
    elastic_config: Any = None,
    max_shard_size: int | str = "5GB",
    verify: bool = False,
    progress: bool = True,
    **hub: Any,
) -> None:
    """Quantise an elastic checkpoint into a new folder. Every size of the result has the codes and scales of the largest, cut.

    The largest tensor is in memory, not the model. Tokenizer, generation config, router and what else a larger model has come along.

    Args:
        repo (`str` or `os.PathLike`): Folder or Hub repository of an elastic checkpoint, in either layout.
        output (`str` or `os.PathLike`): Folder to write into. If writing fails, what it held before is untouched.
        recipe (`str`, `os.PathLike`, `dict` or [`Recipe`]):
            `"nvfp4"`, `"fp8"`, a YAML or JSON file, or entries, see [`hf_elastic.quantization.recipes`].
        keep (`str` or `Iterable[str]`, *optional*): Kinds, names or patterns of weights that stay as they are, whatever the recipe says.
        budget (*optional*): Only this size and what nests in it, as [`hf_elastic.configuration.budgets`] has it; scales are then those of this size.
        layout (`str`, *optional*, defaults to `"stock"`): `"stock"` or `"nested"`, as `save_pretrained` takes it; for the latter there is room needed for
            the result twice.
        elastic_config (*optional*): For a plain checkpoint whose weights are sorted already, as `from_pretrained` takes it.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Of one file.
        verify (`bool`, *optional*, defaults to `False`): Compare what is read with its checksums, as `from_pretrained` does.
        progress (`bool`, *optional*, defaults to `True`): Show a bar of the bytes that are written.
        hub: `revision`, `cache_dir`, `token`, `subfolder`, ... as in `from_pretrained`.

    Raises:
        `ElasticConfigError`: a recipe that does not fit, a size that is cut off the blocks of a weight, a checkpoint that is quantised or has no
            sizes, or `output` is what is read. Nothing was written.
        `CheckpointError`: files are missing, damaged, or disagree with the config; a weight is not finite; the disk is full.
    """
    if unknown := [name for name in hub if name not in HUB_ARGUMENTS]:
        raise TypeError(f"unexpected argument {unknown[0]!r} of quantize_checkpoint.")
    check_layout(layout, {})
    taken = Recipe.of(recipe, keep)
    checked_target(output)
    refuse_same(repo, output, hub)
    hub = pinned(repo, hub)
    elastic = _config(repo, elastic_config, hub)
    submodel = elastic.resolve(budget)
    written = _written(elastic, submodel, taken, repo, hub)
    options = {"layout": layout, "max_shard_size": max_shard_size, "verify": verify, "progress": progress}
    _write(repo, output, elastic, submodel, written, "quantize", hub, **options)


def slice_checkpoint(
    repo: str | os.PathLike[str],
    output: str | os.PathLike[str],
    budget: Budget | Submodel,
    *,
    layout: Layout = "stock",
    elastic_config: Any = None,
    max_shard_size: int | str = "5GB",
    verify: bool = False,
    progress: bool = True,
    **hub: Any,
) -> None:
    """Write one size of a checkpoint, and what nests in it, into a new folder, from file to file: what is stored in few bits stays so.

    Args and errors are those of `quantize_checkpoint`; a plain checkpoint that another program quantised becomes an elastic one.
    """
    check_layout(layout, {})
    checked_target(output)
    refuse_same(repo, output, hub)
    hub = pinned(repo, hub)
    elastic = load_config(repo, None, elastic_config, hub)
    elastic = with_encodings(repo, elastic, plain=elastic_config is not None, **hub)
    submodel = resolve_for_loading(elastic, budget, None)
    written = elastic.restrict(submodel)
    written.parent_config.__dict__.pop("quantization_config", None)  # of the whole parent, with its numbers of layers
    if submodel != elastic.architecture.full(elastic.parent_config) or hasattr(elastic, CUT_FROM):
        written.cut_from = cut_from(elastic, submodel, repo, hub)
    options = {"layout": layout, "max_shard_size": max_shard_size, "verify": verify, "progress": progress}
    _write(repo, output, elastic, submodel, written, "slice", hub, **options)


def _write(
    repo: Any,
    output: Any,
    elastic: ElasticConfig,
    submodel: Submodel,
    written: ElasticConfig,
    what: str,
    hub: dict[str, Any],
    *,
    layout: Any,
    max_shard_size: Any,
    verify: Any,
    progress: Any,
) -> None:
    """A size of a checkpoint with the config `written`, and all that is beside it. `what` is what the bar says."""
    causal = elastic.architectures != ["ElasticModel"]
    architecture = elastic.architecture
    stock = architecture.causal_class if causal else architecture.base_class
    ignored = architecture.ignored(stock)
    source = open_checkpoint(repo, elastic, submodel, head=causal, ignored=ignored, verify=verify, **hub)
    source.refuse_unequal(elastic.architecture, elastic.parent_config, submodel)
    note_left_out(written, not_passengers(elastic.host, source.ignored), repo)
    dtype = elastic.dtype if isinstance(elastic.dtype, torch.dtype) else source.dtype()
    beside = files_beside(repo, hub)
    router = read_router(written, repo, verify=verify, **hub)
    passengers = open_passengers(repo, elastic, hub, verify)
    content = encoded_content(source, elastic, submodel, written.encodings, head=causal)
    with replacing(output) as scratch:
        total = sum(map(size_of, content.values()))
        with tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=not progress) as bar:
            write_shards(scratch, "model", content, max_shard_size, bar.update)
        for name, path in beside.items():
            shutil.copyfile(path, scratch / name)
        files = None
        if layout == "nested":
            files, place = nest(scratch, written, max_shard_size)
            smallest = list(written.family().values())[-1]
            config = written.stock_config(smallest)
            config.dtype = dtype
            origin = cut_from(written, smallest, repo, hub)
            write_stock_config(written, config, smallest, place, origin, causal=causal)
        if router is not None:
            router.save(scratch)
        if passengers is not None:
            passengers.save(scratch, submodel.at(None), dtype, processor_files(str(repo), hub))
        write_module(scratch)
        write_checksums(scratch)
        written_config(written, dtype, files, causal=causal).save_pretrained(scratch)


def _config(repo: Any, described: Any, hub: dict[str, Any]) -> ElasticConfig:
    """The config of what is read.

    Raises:
        `ElasticConfigError`: it is quantised, or has no sizes.
    """
    fields = read_fields(repo, **hub)
    section = fields.get("elastic")
    if fields.get("quantization_config") or (isinstance(section, dict) and QUANTIZATION in section):
        raise ElasticConfigError(
            f"{repo} is quantised already, and codes that are quantised again lose more than they have to: quantise the checkpoint that it was made of."
        )
    return load_config(repo, None, described, hub)


def _written(
    elastic: ElasticConfig, submodel: Submodel, recipe: Recipe, repo: Any, hub: dict[str, Any]
) -> ElasticConfig:
    """The config of what is written."""
    sliced = elastic.restrict(submodel)
    made = quantized_config(sliced, recipe)
    if submodel != elastic.architecture.full(elastic.parent_config) or hasattr(elastic, CUT_FROM):
        made.cut_from = cut_from(elastic, submodel, repo, hub)
    return made


def refuse_same(repo: Any, output: Any, hub: dict[str, Any]) -> None:
    """Raise [`ElasticConfigError`] where a result would replace what it is made of."""
    source, target = (os.path.realpath(path) for path in (os.path.join(repo, hub.get("subfolder") or ""), output))
    if os.path.isdir(source) and (target == source or Path(target).is_relative_to(Path(source, FOLDER))):
        raise ElasticConfigError(
            f"{output} {'is' if target == source else 'belongs to'} the checkpoint that is read, and the result does not replace it: give "
            "another folder."
        )


def files_beside(repo: Any, hub: dict[str, Any]) -> dict[str, Path]:
    """Tokenizer and generation config of a checkpoint."""
    files = tokenizer_files(repo, hub)
    if (generation := find_file(repo, GENERATION_CONFIG_NAME, hub)) is not None:
        files[GENERATION_CONFIG_NAME] = generation
    return files
