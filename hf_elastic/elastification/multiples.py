"""Numbers that sizes are multiples of: what the user wants, and what formats need whose blocks no cut may divide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from ..architectures import Architecture
from ..architectures.alignment import block_steps
from ..architectures.submodel import LAYERS, Submodel
from ..errors import ElasticConfigError, did_you_mean, shown
from ..quantization.recipes import Recipe

WIDTHS = 8
"""Widths of a multiple of 8 keep expert kernels and 16-bit loads aligned."""

FORMATS: Mapping[str, tuple[str, int]] = {"nvfp4": ("nvfp4", 16), "nvfp4-gguf": ("nvfp4", 64), "fp8": ("fp8", 1)}
"""Per format the recipe that says which weights are in it, and the elements of a row that it stores together: NVFP4 has a scale for 16; blocks of NVFP4 in
GGUF files, and tiles of the Marlin kernels, are 64 wide."""


@dataclass(frozen=True)
class Multiples:
    """What sizes are rounded to and held to.

    Args:
        widths (`int`, *optional*, defaults to 8): Widths given as shares are rounded to it, but where the parent's own is no multiple.
        axes (`dict[str, int]`, *optional*): Per axis what shares are rounded to instead.
        blocks (`dict[str, int]`, *optional*): Per axis what every size that is cut has to be a multiple of.
        formats (`tuple[str, ...]`, *optional*): Of which formats these are.
    """

    widths: int = WIDTHS
    axes: Mapping[str, int] = field(default_factory=dict)
    blocks: Mapping[str, int] = field(default_factory=dict)
    formats: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        config: PreTrainedConfig,
        multiple_of: Any = WIDTHS,
        formats: str | Iterable[str] | None = None,
    ) -> Multiples:
        """From what a user gives.

        Args:
            multiple_of (`int` or `dict[str, int]`): One number for all widths, or one per axis.
            formats (`str` or `list[str]`, *optional*): Formats that every size shall be held in: `"nvfp4"`, `"nvfp4-gguf"` or `"fp8"`.

        Raises:
            `ElasticConfigError`: no such axis or format, numbers below 1, or the parent is itself no whole number of blocks of a format.
        """
        numbers = multiple_of if isinstance(multiple_of, Mapping) else {None: multiple_of}
        for axis, number in numbers.items():
            where = "multiple_of" if axis is None else f"multiple_of[{axis!r}]"
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ElasticConfigError(f"{where}={shown(number)} must be a whole number of at least 1.")
            if axis is not None:
                if axis == LAYERS:
                    raise ElasticConfigError(f"{where}: layers are counted one by one.")
                architecture.axis(axis)
        wanted = (formats,) if isinstance(formats, str) else tuple(formats or ())
        blocks: dict[str, int] = {}
        for name in wanted:
            if name not in FORMATS:
                raise ElasticConfigError(
                    f"formats={shown(formats)}: there are {', '.join(FORMATS)}.{did_you_mean(str(name), FORMATS)}"
                )
            recipe, block = FORMATS[name]
            if block > 1:
                names = Recipe.of(recipe).resolve(architecture, config)
                for axis, step in block_steps(architecture, config, names, block).items():
                    blocks[axis] = math.lcm(step, blocks.get(axis, 1))
        given = {axis: number for axis, number in numbers.items() if axis is not None}
        return cls(numbers.get(None, WIDTHS), given, blocks, wanted)

    def step(self, architecture: Architecture, axis: str, full: int, groups: int) -> int:
        """What sizes of an axis that are given as shares are multiples of.

        Args:
            full (`int`): The whole axis.
            groups (`int`): So many groups share it.
        """
        step = math.lcm(groups, self.blocks.get(axis, 1), self.axes.get(axis, 1))
        if axis not in self.axes and not architecture.counts(axis) and full % self.widths == 0:
            step = math.lcm(step, self.widths)
        return step

    def check(self, architecture: Architecture, config: PreTrainedConfig, submodel: Submodel, name: str) -> None:
        """Raise [`ElasticConfigError`] for a size that cuts an axis where no block ends; names the axis and what it can have."""
        whole = architecture.full(config)
        for axis in (axis for axis in self.blocks if axis in submodel):
            for layer in (None, *submodel.layers):
                size, full = submodel.at(layer).get(axis), whole.at(layer).get(axis)
                if size is not None and full is not None and size != full:
                    self._check_size(axis, size, full, name)

    def check_choices(self, axis: str, sizes: Sequence[int], full: int) -> None:
        """The same for the sizes that a user lets an axis have."""
        for size in sizes if axis in self.blocks else ():
            if size != full:
                self._check_size(axis, size, full, f"axes[{axis!r}]")

    def only(self, choices: Mapping[str, list[int]], together: Iterable[str]) -> dict[str, list[int]]:
        """Choices without those that cut a block; the axes `together` have as many, and lose the same ones."""
        linked = [axis for axis in together if axis in choices]
        rows = zip(*(choices[axis] for axis in linked), strict=True)
        kept = [
            row for row in rows if all(size % self.blocks.get(a, 1) == 0 for a, size in zip(linked, row, strict=True))
        ]
        kept = kept if len(kept) > 1 or not linked else [tuple(choices[axis][0] for axis in linked)]
        return {**choices, **{axis: [row[i] for row in kept] for i, axis in enumerate(linked)}}

    def _check_size(self, axis: str, size: int, full: int, name: str) -> None:
        step = self.blocks[axis]
        if size % step:
            near = sorted({max(step, size // step * step), min(full, -(-size // step) * step)})
            raise ElasticConfigError(
                f"{name}: {axis}={size} cannot be held in {', '.join(self.formats)}, whose blocks end at its multiples of {step}; give "
                f"{' or '.join(map(str, near))}, or leave formats out."
            )
