"""What the stock loader does to names and tensors, for elastic classes: as for stock ones, but segments are saved as long as they were.

Stock classes cut a concatenation into equal parts when they save it, and load parts of any length. Programs that take the parts as they are need
them as the Hub's repository has them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, WeightConverter

from ..architectures.pieces import pieces
from .names import stored_names


class Apart(Chunk):
    """Cut a concatenation at the ends of its segments, which the model's table says."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        (found,) = input_dict.values()
        tensor = found[0] if isinstance(found, list) else found
        lengths = _lengths(kwargs["model"], kwargs["full_layer_name"])
        if sum(lengths) != tensor.shape[0] or len(lengths) != len(target_patterns):
            return super().convert(input_dict, source_patterns, target_patterns, **kwargs)  # type: ignore[no-any-return]
        parts = (part.contiguous() for part in tensor.split(lengths))
        return dict(zip(target_patterns, parts, strict=True))


class Together(Concatenate):
    """Put segments together, and cut them apart again as they were."""

    @property
    def reverse_op(self) -> Apart:
        return Apart(self.dim)


def conversions(model_type: str) -> list[Any] | None:
    """The stock conversions of a `model_type`, with segments along the first dimension cut as its table says."""
    found: list[Any] | None = get_checkpoint_conversion_mapping(model_type)
    for converter in found or ():
        if isinstance(converter, WeightConverter) and [type(op) for op in converter.operations] == [Concatenate]:
            (operation,) = converter.operations
            if operation.dim == 0 and operation.num_shards_attribute is None:
                converter.operations = [Together(0)]
    return found


def _lengths(model: Any, first: str) -> list[int]:
    """Of the segments of a tensor, whose first one has that name in a file."""
    elastic = model.elastic_config
    for piece in pieces(elastic.architecture, elastic.parent_config, model.submodel):
        rule = piece.target
        if (
            rule.parted
            and not rule.stacked
            and first in stored_names(rule, elastic.architecture, None, rule.segments[0])
        ):
            return [shape[0] for shape in rule.stored_shapes(piece.kept)]
    return []
