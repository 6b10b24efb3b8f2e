"""NVFP4 and FP8 from their definitions: every number is the nearest of all that a code can be. What the codec of the library is compared with."""

from __future__ import annotations

import torch

BLOCK = 16
"""Elements of a row that share a scale in NVFP4."""

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""Values of 4 bits without the sign, by code: one bit of mantissa, two of exponent."""

E4M3 = torch.tensor([(m if e == 0 else 8 + m) * 2.0 ** (max(e, 1) - 10) for e in range(16) for m in range(8)][:127])
"""Values of 8 bits without the sign, by code: three bits of mantissa, four of exponent; the last is NaN and left out."""

_MOST = {"nvfp4": 256.0 * 6.0, "fp8": 448.0}


def global_scale(*weights: torch.Tensor) -> torch.Tensor:
    """The divisor that matrices, or stacks `[experts, rows, columns]` of them, share in NVFP4, a power of 2: `[1]` or `[experts, 1]`."""
    joined = torch.cat(weights, dim=-2).float()
    most = _MOST["nvfp4"] / joined.abs().flatten(-2).amax(-1, keepdim=True)
    return torch.ldexp(torch.ones_like(most), torch.frexp(most).exponent - 1)


def nvfp4(weight: torch.Tensor, divisor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, two in a byte, scales, and the values that they stand for.

    Args:
        weight (`torch.Tensor`): `[..., rows, columns]`.
        divisor (`torch.Tensor`): Of every matrix, `[..., 1]`.
    """
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    tries = [_nvfp4_block(blocks, divisor[..., None, None], largest) for largest in (6.0, 4.0)]
    wrong = [(values - blocks).square().sum(-1, keepdim=True) for _, _, values in tries]
    codes, scale, values = (torch.where(wrong[1] < wrong[0], four, six) for six, four in zip(*tries, strict=True))
    low, high = codes.flatten(-2).unflatten(-1, (-1, 2)).unbind(-1)
    return (
        (low + 16 * high).to(torch.uint8),
        scale[..., 0].to(torch.uint8).view(torch.float8_e4m3fn),
        values.flatten(-2),
    )


def _nvfp4_block(
    blocks: torch.Tensor, divisor: torch.Tensor, largest: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wanted = divisor * (blocks.abs().amax(-1, keepdim=True) / largest)
    scale = nearest(wanted, E4M3)
    scale = torch.where(scale == 0, nearest(torch.tensor(0.125), E4M3), scale)
    step = E4M3[scale] / divisor
    codes = nearest((blocks / step).abs(), E2M1)
    sign = blocks / step < 0
    return codes + 8 * sign, scale, E2M1[codes] * torch.where(sign, -1.0, 1.0) * step


def fp8_scale(weight: torch.Tensor) -> torch.Tensor:
    """The scale of every row, `[..., rows, 1]`: the least of the numbers in bfloat16 with which none is beyond what a code can be."""
    scale = weight.float().abs().amax(-1, keepdim=True) / _MOST["fp8"]
    rough = scale.bfloat16()
    scale = torch.where(rough.float() < scale, (rough.view(torch.int16) + 1).view(torch.bfloat16), rough).float()
    return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)


def fp8(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and the values that they stand for."""
    value = weight.float() / scale
    codes, sign = nearest(value.abs(), E4M3), value.signbit()
    values = E4M3[codes] * torch.where(sign, -1.0, 1.0) * scale
    return (codes + 128 * sign).to(torch.uint8).view(torch.float8_e4m3fn), values


def unpacked(codes: torch.Tensor) -> torch.Tensor:
    """What bytes of two codes stand for, before they are scaled: `[..., columns / 2]` to `[..., columns]`."""
    code = torch.stack([codes % 16, codes // 16], -1).flatten(-2).int()
    return E2M1[code % 8] * torch.where(code >= 8, -1.0, 1.0)


def nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Which of the levels is nearest, the even one of two that are; the last for all beyond."""
    between = ((levels[1:].double() + levels[:-1].double()) / 2).contiguous()
    index = torch.bucketize(values.double(), between)
    tie = values.double() == torch.cat([between, torch.tensor([torch.inf])])[index]
    return index + (tie & (index % 2 == 1))
