"""Packed models from files and into files: codes are read as they are, and written as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..architectures import Architecture
from ..architectures.axes import Run, take
from ..architectures.encodings import Encoding
from ..architectures.pieces import Piece, companions, pieces
from ..configuration_elastic import ElasticConfig
from ..errors import ElasticConfigError
from ..storage.reading import Block, Readable
from ..storage.streaming import write_shards
from ..submodels.packed import PackedModule
from .encoding import encoded_content


def refuse_unpackable(elastic: ElasticConfig, repo: Any, kwargs: Mapping[str, Any], causal: bool) -> None:
    """Raise [`ElasticConfigError`] for what `packed=True` cannot be honoured for."""
    if not causal:
        raise ElasticConfigError(
            "packed=True is for causal models; load it with ElasticForCausalLM, or without packed."
        )
    if not elastic.encodings:
        raise ElasticConfigError(
            f"packed=True, but {repo} is not quantised: its weights are no codes. Quantise it first (hf-elastic quantize), or load it without packed."
        )
    if (experts := kwargs.get("experts_implementation")) not in (None, "eager"):
        raise ElasticConfigError(
            f"packed=True decodes one expert at a time, which experts_implementation='eager' does, not {experts!r}; leave that out, or load it "
            "without packed."
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


@dataclass(frozen=True)
class InMemory(Readable):
    """A tensor that is there already."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.tensor.dtype

    def leaves(self) -> Iterator[Block]:
        return iter(())

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor.detach().cpu()[index]


class HeldCodes:
    """The tensors of a packed model that runs everything it has, as [`hf_elastic.checkpoints.encoding`] takes those of a checkpoint.

    Args:
        model ([`ElasticForCausalLM`]): The model.
    """

    def __init__(self, model: Any):
        self.encodings: dict[str, Encoding] = {}
        self._tensors: dict[str, torch.Tensor] = dict(model.state_dict())
        for rule in model.architecture.rules(model.config):
            if rule.copy_of:
                continue
            owner, _, leaf = rule.name.rpartition(".")
            module = model.get_submodule(owner)
            if isinstance(module, PackedModule) and leaf in module.held:
                self.encodings[rule.name] = module.held[leaf].encoding
                names = [companion.rule(rule).name for companion in self.encodings[rule.name].companions]
                self._tensors |= dict(zip(names, module.companions_of(leaf), strict=True))

    def matrices(self, piece: Piece, architecture: Architecture) -> Callable[..., Readable]:
        """As `Checkpoint.matrices`."""

        def at(expert: int | None = None, rows: list[Run] | None = None) -> Readable:
            tensor = self._tensors[piece.rule.name]
            part = tensor if expert is None else tensor[expert : expert + 1]
            if rows is not None:
                part = take(part, [*([[(0, 1)]] if expert is not None else []), rows])
            return InMemory(part)

        return at


def write_codes(model: Any, directory: Path, max_shard_size: int | str) -> None:
    """Write the weights of a packed model, as they are, the configs of transformers beside them."""
    architecture, config = model.architecture, model.config
    held = HeldCodes(model)
    elastic = model.elastic_config.restrict(model.submodel)
    content = encoded_content(held, elastic, architecture.full(config), {})
    directory.mkdir(parents=True, exist_ok=True)
    write_shards(directory, "model", content, max_shard_size)
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.save_pretrained(directory)
