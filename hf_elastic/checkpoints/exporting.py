"""Export of a size of a quantised checkpoint, from file to file: its codes and scales, cut, for programs that compute with them."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from tqdm.auto import tqdm

from ..architectures.coded_programs import Coded
from ..architectures.obstacles import SILENT, Obstacle
from ..architectures.portability import portability
from ..architectures.submodel import Submodel
from ..configuration.budgets import Budget
from ..configuration.leaving_out import note_left_out
from ..errors import ElasticConfigError, ExportError
from ..quantization.layouts import CodedLayout, check_coded_layout
from ..storage.files import HUB_ARGUMENTS
from ..storage.sources import pinned
from ..storage.streaming import size_of
from .coded import coded_content, unequal_scales
from .export import exported_config, for_old_readers, write_content, write_stock_config
from .loading import load_config
from .memory import resolve_for_loading
from .opening import open_checkpoint
from .origin import cut_from
from .passengers import add_shard, not_passengers, open_passengers, processor_files
from .quantizing import files_beside, refuse_same
from .released import with_encodings
from .replacing import checked_target, replacing


def export_checkpoint(
    repo: str | os.PathLike[str],
    output: str | os.PathLike[str],
    budget: Budget | Submodel = None,
    *,
    layout: CodedLayout = "compressed-tensors",
    heterogeneous: bool = False,
    text_only: bool = False,
    elastic_config: Any = None,
    max_shard_size: int | str = "5GB",
    verify: bool = False,
    progress: bool = True,
    **hub: Any,
) -> list[Obstacle]:
    """Write one size of a quantised checkpoint as a plain one, for vLLM and other engines. Nothing is decoded, and only what the size has is read.

    What is written has codes and scales of the parent, cut; `config.json` says in the words of the layout which weights are in few bits. Tokenizer,
    generation config and what else a larger model has come along. [`ExportMixin.export`] writes weights, decoded.

    Args:
        repo (`str` or `os.PathLike`): Folder or Hub repository of a quantised family, or of a quantised checkpoint that another program wrote.
        output (`str` or `os.PathLike`): Folder to write into. If writing fails, what it held before is untouched.
        budget (*optional*): Which size, as in `from_pretrained`; the whole parent by default.
        layout (`str`, *optional*, defaults to `"compressed-tensors"`): Or `"modelopt"`, which holds NVFP4 and writes `hf_quant_config.json` as well.
        heterogeneous, text_only: As in `export`.
        elastic_config (*optional*): For a plain checkpoint whose weights are sorted already, as `from_pretrained` takes it.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Of one file.
        verify (`bool`, *optional*, defaults to `False`): Compare what is read with its checksums, as `from_pretrained` does.
        progress (`bool`, *optional*, defaults to `True`): Show a bar of the bytes that are written.
        hub: `revision`, `cache_dir`, `token`, `subfolder`, ... as in `from_pretrained`.

    Returns:
        `list[Obstacle]`: The programs that do not run what was written, or compute something else with it, as far as they are known.

    Raises:
        `ExportError`: the checkpoint is not quantised, sizes differ per layer and `heterogeneous` is not set, or the layout does not hold the same
            numbers. Nothing was written.
        `ElasticConfigError`: no such size or layout, a size that is cut off the blocks of a weight, or `output` is what is read.
        `CheckpointError`: files are missing, damaged, or disagree with the config; the disk is full.
    """
    if unknown := [name for name in hub if name not in HUB_ARGUMENTS]:
        raise TypeError(f"unexpected argument {unknown[0]!r} of export_checkpoint.")
    check_coded_layout(layout)
    checked_target(output)
    refuse_same(repo, output, hub)
    hub = pinned(repo, hub)
    elastic = load_config(repo, None, elastic_config, hub)
    elastic = with_encodings(repo, elastic, plain=elastic_config is not None, **hub)
    if not elastic.encodings:
        raise ExportError(
            f"{repo} is not quantised: it has weights, not codes. Load a size of it and use its export()."
        )
    submodel = resolve_for_loading(elastic, budget, None, packed=True)
    config = exported_config(elastic, submodel, heterogeneous)
    causal, architecture = elastic.architectures != ["ElasticModel"], elastic.architecture
    whole = elastic.host is not None and causal and not text_only
    if whole and config.is_heterogeneous:
        raise ElasticConfigError("sizes that differ per layer are no part of a larger model: give text_only=True.")
    stock = architecture.causal_class if causal else architecture.base_class
    ignored = architecture.ignored(stock)
    source = open_checkpoint(repo, elastic, submodel, head=causal, ignored=ignored, verify=verify, **hub)
    source.check_scales(architecture, elastic.parent_config, submodel, head=causal)
    source.refuse_unequal(architecture, elastic.parent_config, submodel)
    note_left_out(elastic, not_passengers(elastic.host, source.ignored), repo)
    config.dtype = elastic.dtype if isinstance(elastic.dtype, torch.dtype) else source.dtype()
    coded = Coded(elastic.encodings, layout)

    content = coded_content(source, elastic, submodel, layout, head=causal)
    obstacles = portability(architecture, elastic.parent_config, submodel, config.dtype, coded)
    if odd := unequal_scales(source, elastic, submodel):
        why = f"{', '.join(odd[:3])} ... are one matrix there, and their global scales differ, of which it takes the largest"
        obstacles.append(Obstacle("vLLM", SILENT, why))
    beside = files_beside(repo, hub)
    passengers = open_passengers(repo, elastic, hub, verify) if whole else None
    beside |= processor_files(str(repo), hub) if passengers is not None else {}
    host = elastic.host if passengers is not None else None
    with replacing(output) as scratch:
        total = sum(map(size_of, content.values()))
        with tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=not progress) as bar:
            write_content(scratch, content, architecture, host, max_shard_size=max_shard_size, progress=bar.update)
        origin = cut_from(elastic, submodel, repo, hub)
        write_stock_config(
            elastic, config, submodel, scratch, origin, causal=causal, whole=host is not None, coded=coded
        )
        if passengers is not None:
            add_shard(scratch, passengers.at(submodel.at(None), config.dtype))
        for name, path in beside.items():
            shutil.copyfile(path, scratch / name)
        for_old_readers(scratch)
    return obstacles
