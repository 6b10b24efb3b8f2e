"""Packed models from files and into files: codes are read as they are, and written as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..architectures.encodings import Encoding
from ..architectures.pieces import companions, pieces
from ..configuration_elastic import ElasticConfig
from ..errors import ElasticConfigError
from ..storage.reading import Block, Readable


def refuse_unpackable(elastic: ElasticConfig, repo: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise [`ElasticConfigError`] for what `packed=True` cannot be honoured for."""
    if not elastic.encodings:
        raise ElasticConfigError(
            f"packed=True, but {repo} is not quantised: its weights are no codes. Quantise it first (hf-elastic quantize), or load it without packed."
        )
    if (place := kwargs.get("device_map")) not in (None, "cpu"):
        raise ElasticConfigError(
            f"packed=True does not work with device_map={place!r}; load it without, then move it: model.to('cuda')."
        )


@dataclass(frozen=True)
class _Nothing(Readable):
    """What stands for a weight until its codes are there: one zero, as large as it may look."""

    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    def leaves(self) -> Iterator[Block]:
        return iter(())

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.zeros((), dtype=self.dtype).expand(self.size)[index]


def without_weights(lazy: Mapping[str, Readable], encodings: Mapping[str, Encoding]) -> dict[str, Readable]:
    """A state dict in which encoded weights take no memory."""
    return {name: _Nothing(part.shape, part.dtype) if name in encodings else part for name, part in lazy.items()}


def read_codes(coded: Mapping[str, Readable], elastic: ElasticConfig) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The companions of every encoded weight, read when their turn comes.

    Args:
        coded (`dict[str, Readable]`): From `Checkpoint.coded_slice`.
        elastic ([`ElasticConfig`]): That of the slice.
    """
    architecture, config, encodings = elastic.architecture, elastic.parent_config, elastic.encodings
    for piece in pieces(architecture, config, architecture.full(config)):
        if piece.rule.name in encodings and not piece.copy_of:
            names = [part.rule.name for part in companions(piece, encodings[piece.rule.name])]
            yield piece.rule.name, {name: coded[name][...] for name in names}
