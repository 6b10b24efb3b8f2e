"""Which weights of a tiny model NVFP4 can hold, and which sizes leave whole blocks of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from transformers import AutoConfig, PreTrainedConfig

from ..architectures import Architecture, get_architecture
from ..architectures.encodings import ENCODINGS, Encoding
from ..architectures.pieces import pieces
from ..architectures.submodel import Submodel
from ..configuration.quantized import refuse_off_blocks
from .formats import BLOCK
from .tiny import BLOCKS, TINY


class Blocks:
    """The weights of a model that a format can hold.

    Args:
        config (`PreTrainedConfig`): Stock config of the parent.
        format (`str`): `"nvfp4"` or `"fp8"`.

    Attributes:
        encodings (`dict[str, Encoding]`): Of these weights, by their names in the live parent.
        left_out (`list[str]`): Weights that could be quantised but for the number of their columns.
    """

    def __init__(self, config: PreTrainedConfig, format: str):
        self.architecture: Architecture = get_architecture(config.model_type)
        self.config, self._per = config, BLOCK if format == "nvfp4" else 1
        full = self.architecture.full(config)
        rules = [rule for rule in self.architecture.rules(config) if rule.kind is not None and rule.copy_of is None]
        whole = [rule for rule in rules if rule.shape(full.at(rule.layer))[-1] % self._per == 0]
        self.encodings: dict[str, Encoding] = {rule.name: ENCODINGS[format] for rule in whole}
        self.left_out = [rule.name for rule in rules if rule.name not in self.encodings]
        self._columns = {(rule.dims[-1], tuple(full.at(rule.layer).items())) for rule in whole}

    def leaves_whole(self, axis: str, size: int) -> bool:
        """Whether an axis, cut to a size in all layers, leaves whole blocks."""
        for dim, full in self._columns:
            kept = {name: min(size, largest) if name == axis else largest for name, largest in full}
            if any(index % self._per for run in dim.runs(dict(full), kept) for index in run):
                return False
        return True

    def refuse(self, submodel: Submodel) -> None:
        """Raise `ElasticConfigError` for a size that does not leave whole blocks, as it is raised for a budget."""
        refuse_off_blocks(self.architecture, self.config, self.encodings, {"the case": submodel})

    def broken(self, submodel: Submodel) -> Iterator[str]:
        """Names of the weights of which a size would keep a part of a block, found by looking at every column that is kept."""
        for piece in pieces(self.architecture, self.config, submodel):
            if piece.rule.stored.name in self.encodings:
                columns = piece.rule.shape(piece.full)[-1]
                kept = torch.zeros(columns, dtype=torch.bool)
                for start, stop in replace(piece.rule.dims[-1], per=1).runs(piece.full, piece.kept):
                    kept[start:stop] = True
                blocks = kept.view(-1, self._per)
                if bool((blocks.any(1) != blocks.all(1)).any()):
                    yield piece.rule.name


def config_in_blocks(config: PreTrainedConfig) -> PreTrainedConfig:
    """One of the tiny configs of the kit, in sizes that NVFP4 can hold; any other config as it is."""
    first, *others = TINY.get(config.model_type, ({},))
    for fields in (first, *({**first, **other} for other in others)):
        tiny = AutoConfig.for_model(config.model_type, **fields)
        if fields and tiny.to_dict() == config.to_dict():
            return AutoConfig.for_model(config.model_type, **{**fields, **BLOCKS[config.model_type]})
    return config
