"""Bytes that a size has in files and that loading it fetches from the Hub: counted from a config alone, or from headers of files."""

from __future__ import annotations

import math

from ..architectures.encodings import itemsize
from ..architectures.pieces import Piece, stored_pieces
from ..architectures.submodel import Submodel
from ..configuration_elastic import ElasticConfig
from ..storage.streaming import size_of
from .checkpoint import Checkpoint
from .nested import levels_for


def stored_bytes(elastic: ElasticConfig, submodel: Submodel, files: Checkpoint | None = None) -> int:
    """Of the tensors of one size as they are stored.

    Args:
        files (`Checkpoint`, *optional*): The files; without, all that is not stored as codes and scales counts in the type that the config says.
    """
    if files is None:
        return elastic.cost_model()(submodel).stored_bytes(elastic.load_dtype)
    return sum(map(size_of, files.stored_parts(elastic.architecture, elastic.parent_config, submodel)))


def download_bytes(elastic: ElasticConfig, submodel: Submodel, files: Checkpoint | None = None) -> int:
    """Of one size: its files in the nested layout, otherwise the rows of tensors that it keeps a part of, without headers and what is fetched along.

    Rows are whole where columns are cut, because ranges of a file are fetched.

    Args:
        files (`Checkpoint`, *optional*): As in `stored_bytes`.
    """
    if files is not None:
        extents = files.extents(elastic.architecture, elastic.parent_config, submodel)
        return sum(stop - start for ranges in extents.values() for start, stop in ranges)
    if "files" in elastic.elastic:
        return sum(sum(elastic.elastic["files"][level].values()) for level in levels_for(elastic, submodel))
    stored = stored_pieces(elastic.architecture, elastic.parent_config, submodel, elastic.encodings)
    return sum(_row_bytes(piece, elastic.load_dtype.itemsize) for piece in stored if not piece.copy_of)


def _row_bytes(piece: Piece, size: int) -> int:
    rule, kept = piece.rule, piece.shape
    rows = (
        2 if rule.stacked else 1
    )  # dimensions along which a part of a file is left out: experts are tensors of their own
    inner = math.prod(rule.shape(piece.full)[rows:])
    if rule.dtypes:
        size = itemsize(rule.dtypes[0])
    return math.prod(kept[:rows]) * inner * (4 if rule.fp32 and not rule.dtypes else size)
