"""What other programs make of weights in few bits: which do not read them, and which compute something else.

Read in November 2026 in the code of transformers 5.23 (and run), vLLM's main branch and llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedConfig

from .base import Architecture
from .encodings import Encoding
from .obstacles import REFUSES, SILENT, Obstacle
from .pieces import Piece, pieces
from .submodel import Submodel

CodedLayout = Literal["compressed-tensors", "modelopt"]
"""Whose words codes and scales are in, see [`hf_elastic.quantization.layouts`]."""

TRANSFORMERS = "plain transformers"
RANDOM = "leaves weights at random, with a warning"
WIDE_BLOCK = 64
"""Columns to one block of NVFP4 in GGUF files, and to a tile of the Marlin kernels."""


@dataclass(frozen=True)
class Coded:
    """What an export is stored in.

    Args:
        encodings (`dict[str, Encoding]`): Of the parent's weights that are codes and scales, by their live names; none of a plain export.
        layout (`str`, *optional*, defaults to `"compressed-tensors"`): Whose words they are in; or `"modelopt"`.
    """

    encodings: Mapping[str, Encoding]
    layout: CodedLayout = "compressed-tensors"


def coded_obstacles(
    architecture: Architecture, config: PreTrainedConfig, submodel: Submodel, coded: Coded
) -> Iterator[Obstacle]:
    """What keeps other programs from running an export of a submodel whose weights are in few bits.

    Args:
        config (`PreTrainedConfig`): The parent's.
        submodel (`Submodel`): Checked sizes.
        coded ([`Coded`]): What is stored in what.
    """
    if not coded.encodings:
        return
    kept = [piece for piece in pieces(architecture, config, submodel) if piece.rule.kind is not None]
    formats = {piece.rule.name: _format(piece, coded) for piece in kept}
    if coded.layout == "modelopt":
        yield Obstacle(TRANSFORMERS, REFUSES, "it does not read modelopt's layout")
    else:
        yield from _in_transformers(kept, formats)
    yield from _by_width([piece for piece in kept if formats[piece.rule.name] == "nvfp4"])


def _format(piece: Piece, coded: Coded) -> str | None:
    encoding = coded.encodings.get(piece.rule.stored.name)
    return None if encoding is None else encoding.format


def _in_transformers(kept: list[Piece], formats: Mapping[str, str | None]) -> Iterator[Obstacle]:
    stacks = [piece for piece in kept if len(piece.rule.dims) > 2]
    inside = {formats[piece.rule.name] for piece in stacks}
    outside = {formats[piece.rule.name] for piece in kept if len(piece.rule.dims) == 2} - {None}
    renamed = any(piece.rule.coded and formats[piece.rule.name] for piece in stacks)
    if renamed:
        yield Obstacle(TRANSFORMERS, RANDOM, "it stacks experts in its own files and does not find quantised ones")
    elif "nvfp4" in inside:
        why = "it leaves the global scale out of experts in NVFP4, huggingface/transformers#48371"
        yield Obstacle(TRANSFORMERS, SILENT, why)
    if None in inside and "nvfp4" in outside and any(piece.rule.apart for piece in stacks):
        why = "beside NVFP4 it drops experts that are stored whole, one by one"
        yield Obstacle(TRANSFORMERS, RANDOM, why)
    if len(outside) > 1:
        yield Obstacle(
            TRANSFORMERS,
            REFUSES,
            f"it reads one format outside of experts, not {' and '.join(sorted(map(str, outside)))}",
        )


def _by_width(four: list[Piece]) -> Iterator[Obstacle]:
    """Programs whose blocks are wider."""
    columns = sorted({width for piece in four if (width := piece.shape[-1]) % WIDE_BLOCK})
    if columns:
        listed = f"rows of {', '.join(map(str, columns))} are no multiples of {WIDE_BLOCK}"
        yield Obstacle("llama.cpp", REFUSES, f"{listed}, its blocks of NVFP4 (its code was read)")
        yield Obstacle(
            "vLLM on GPUs before Blackwell", REFUSES, f"{listed}, which its Marlin kernels need (its code was read)"
        )
