"""Codes of weights in few bits, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_E2M1 = torch.cat([_LEVELS, -_LEVELS])


def decode(
    parts: Sequence[torch.Tensor],
    encoding: str,
    dtype: torch.dtype,
    segments: Sequence[int] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight `[rows, columns]` that its companions stand for."""
    codes, scale, *rest = parts
    step = scale.float()
    if rest:
        one = rest[0].float().repeat_interleave(torch.tensor(list(segments or (len(codes),))), 0)[:, None]
        step = (step / one if encoding == "nvfp4" else step * one).repeat_interleave(16, 1)
        values = torch.stack([_E2M1[(codes & 15).long()], _E2M1[(codes >> 4).long()]], -1).flatten(-2)
    else:
        values = codes.float()
        if scale.dim() == 1:
            step = step.repeat_interleave(torch.tensor(list(segments or (len(codes),))), 0)[:, None]
    weight = values * step
    if out is None:
        return weight.to(dtype)
    return out.copy_(weight)
