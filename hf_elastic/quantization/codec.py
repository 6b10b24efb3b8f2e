"""Codes of weights in few bits, in plain torch: bit for bit those of compressed-tensors, ten times as fast.

NVFP4: every 16 elements of a row share a scale in E4M3, a matrix (an expert) has a global scale, codes are E2M1: `value * scale / global`. FP8: every
row has a scale, codes are E4M3: `value * scale`. All arithmetic is in float32, in bands of rows, so that little more than the result is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache

import torch

from ..errors import CheckpointError, ElasticConfigError

BLOCK = 16
"""Elements of a row with a scale of their own in NVFP4."""

_E4M3_MAX, _E2M1_MAX = 448.0, 6.0
_LARGEST_SCALE = (
    256.0  # a block whose largest element becomes a 4 has a scale half as large again, which E4M3 has to hold
)
_EMPTY_SCALE = {
    "nvfp4": 0.125,
    "fp8": torch.finfo(torch.float32).eps,
}  # of elements that are all 0, as compressed-tensors has it
_BAND = 1 << 18  # elements that are worked on at a time: they stay in the cache
_FACTOR = "nvfp4-modelopt"  # multiplies by the global scale, where compressed-tensors divides


@cache
def _levels(device: torch.device) -> torch.Tensor:
    return torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=device)


@cache
def _words(device: torch.device) -> torch.Tensor:
    """Per byte its two values, the low half first, as bfloat16 in one word: `(256,)`."""
    values = torch.cat([_levels(device), -_levels(device)])
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], -1)
    return pairs.bfloat16().view(torch.int32).flatten()


@cache
def _e4m3(device: torch.device) -> torch.Tensor:
    """Per byte its value in E4M3; torch converts them one by one, which takes twice as long."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()


def global_scale_of(*weights: torch.Tensor, choose: bool = True) -> torch.Tensor:
    """The global scale, a divisor, that weights share in NVFP4.

    Args:
        weights (`torch.Tensor`): `[rows, columns]`, or stacks `[experts, rows, columns]` of as many experts.
        choose (`bool`, *optional*, defaults to `True`): As `encode` takes it: `256 * 6 / max |w|`, otherwise `448 * 6 / max |w|`.

    Returns:
        `torch.Tensor`: float32, `[1]`, or `[experts, 1]`.

    Raises:
        `ElasticConfigError`: a weight is not finite.
    """
    largest = torch.stack([weight.detach().abs().amax((-2, -1)).float() for weight in weights]).amax(0)
    _refuse_infinite(largest)
    scale = (_LARGEST_SCALE if choose else _E4M3_MAX) * _E2M1_MAX / largest.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(scale.isfinite(), scale, 1.0).unsqueeze(-1)


def encode(
    weight: torch.Tensor, format: str, *, global_scale: torch.Tensor | None = None, choose: bool = True
) -> tuple[torch.Tensor, ...]:
    """The companions of a weight.

    Args:
        weight (`torch.Tensor`): `[rows, columns]` or `[experts, rows, columns]`.
        format (`str`): `"nvfp4"` or `"fp8"`, as the encodings of these names store it.
        global_scale (`torch.Tensor`, *optional*): Of NVFP4, as `global_scale_of` gives it; that of this weight alone if not given.
        choose (`bool`, *optional*, defaults to `True`):
            Scale every block of NVFP4 so that its largest element becomes a 6 or a 4, whichever has the smaller squared error; otherwise a 6.

    Returns:
        `tuple[torch.Tensor, ...]`: NVFP4: codes uint8 `[..., rows, columns / 2]`, scales float8_e4m3fn `[..., rows, columns / 16]`, and the global
            scale. FP8: codes float8_e4m3fn of the weight's shape, and scales float32 `[..., rows, 1]`, which bfloat16 can hold.

    Raises:
        `ElasticConfigError`: the weight is not finite, or its columns are no whole blocks.
    """
    parts: list[tuple[torch.Tensor, ...]] = []
    last = _global_rows(weight, format, global_scale, choose)
    for rows in _bands(weight):
        codes, scale, _ = _coded(_flat(weight)[rows], format, None if last is None else last[rows], choose)
        parts.append((_packed(codes), scale) if format == "nvfp4" else (codes.to(torch.float8_e4m3fn), scale))
    codes, scale = (torch.cat(part).view(*weight.shape[:-1], -1) for part in zip(*parts, strict=True))
    if last is None:
        return codes, scale
    return codes, scale, global_scale_of(weight, choose=choose) if global_scale is None else global_scale


def rounded(
    weight: torch.Tensor, format: str, *, global_scale: torch.Tensor | None = None, choose: bool = True
) -> torch.Tensor:
    """What `decode` makes of what `encode` makes of a weight, in its type; arguments and errors as those of `encode`."""
    out = torch.empty_like(weight, memory_format=torch.contiguous_format, requires_grad=False)
    last = _global_rows(weight, format, global_scale, choose)
    for rows in _bands(weight):
        codes, scale, step = _coded(_flat(weight)[rows], format, None if last is None else last[rows], choose)
        if format == "nvfp4":
            values = _valued(codes) * step[..., None]
        else:
            values = codes.to(torch.float8_e4m3fn).float() * scale
        _flat(out)[rows] = values.flatten(1).to(out.dtype)
    return out


def _flat(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().reshape(-1, weight.shape[-1])


def _bands(weight: torch.Tensor) -> Iterator[slice]:
    count, step = weight.shape[:-1].numel(), max(1, _BAND // max(1, weight.shape[-1]))
    return (slice(start, min(count, start + step)) for start in range(0, count, step))


def _global_rows(
    weight: torch.Tensor, format: str, global_scale: torch.Tensor | None, choose: bool
) -> torch.Tensor | None:
    """Per row of all experts its global scale, `[rows, 1]`; `None` if the format has none."""
    if format == "fp8":
        return None
    if format != "nvfp4":
        raise ElasticConfigError(f"format={format!r} must be 'nvfp4' or 'fp8'.")
    if weight.shape[-1] % BLOCK:
        raise ElasticConfigError(
            f"a weight of shape {tuple(weight.shape)} has {weight.shape[-1]} columns, NVFP4 takes multiples of {BLOCK}; keep it as it is."
        )
    scale = global_scale_of(weight, choose=choose) if global_scale is None else global_scale
    return scale.float().reshape(-1, 1).repeat_interleave(weight.shape[-2], 0)


def _coded(
    weight: torch.Tensor, format: str, last: torch.Tensor | None, choose: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and steps of some rows."""
    weight = weight.float()
    if last is None:
        largest = weight.abs().amax(-1, keepdim=True)
        _refuse_infinite(largest)
        scale = _up_to_bfloat16(largest / _E4M3_MAX)
        scale = torch.where(scale == 0, _EMPTY_SCALE["fp8"], scale)
        return (weight / scale).clamp(-_E4M3_MAX, _E4M3_MAX), scale, scale
    blocks = weight.unflatten(-1, (-1, BLOCK))
    codes, scale, step = _with_largest(blocks, _E2M1_MAX, last)
    if choose:
        others = _with_largest(blocks, 4.0, last)
        wrong, less = (_error(blocks, *found) for found in ((codes, step), (others[0], others[2])))
        better = (less < wrong)[..., None]
        codes = torch.where(better, others[0], codes)
        scale = torch.where(better[..., 0], others[1].view(torch.uint8), scale.view(torch.uint8)).view(scale.dtype)
        step = torch.where(better[..., 0], others[2], step)
    return codes, scale, step


def _with_largest(
    blocks: torch.Tensor, largest: float, last: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes `[rows, blocks, 16]`, scales and steps `[rows, blocks]` with which the largest element of every block becomes that value."""
    amax = blocks.abs().amax(-1)
    _refuse_infinite(amax)
    scale = (last * (amax / largest)).clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn)
    scale = torch.where(scale.view(torch.uint8) == 0, _empty(scale.device), scale.view(torch.uint8)).view(scale.dtype)
    step = scale.float() / last
    value = blocks / step[..., None]
    size = value.abs()
    # Codes are 0.5 apart up to 2, 1 apart up to 4, 2 apart beyond; ties go to the even code, as `round` takes them.
    code = torch.minimum((size * 2).round_(), size.round() + 2)
    code = torch.minimum(code, (size / 2).round_().add_(4)).clamp_(max=7)
    codes = code.to(torch.uint8)
    return codes + (value < 0).to(torch.uint8) * 8, scale, step


@cache
def _empty(device: torch.device) -> torch.Tensor:
    return torch.tensor(_EMPTY_SCALE["nvfp4"], device=device).to(torch.float8_e4m3fn).view(torch.uint8)


def _error(blocks: torch.Tensor, codes: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    return (_valued(codes) * step[..., None] - blocks).square().sum(-1)


def _valued(codes: torch.Tensor) -> torch.Tensor:
    levels = torch.cat([_levels(codes.device), -_levels(codes.device)])
    return levels.index_select(0, codes.flatten().int()).view(codes.shape)


def _packed(codes: torch.Tensor) -> torch.Tensor:
    low, high = codes.flatten(1).unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def _up_to_bfloat16(scale: torch.Tensor) -> torch.Tensor:
    """The next number that bfloat16 holds, so that who keeps scales in it computes the same."""
    bits = scale.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _refuse_infinite(largest: torch.Tensor) -> None:
    if not largest.isfinite().all():
        raise ElasticConfigError("the weight has elements that are NaN or infinite, which no code stands for.")


def decode(
    parts: Sequence[torch.Tensor],
    encoding: str,
    dtype: torch.dtype,
    segments: Sequence[int] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight that its companions stand for.

    Args:
        parts (`list[torch.Tensor]`): As the encoding of that name lists them; codes `[rows, ...]` or `[experts, rows, ...]`.
        encoding (`str`): A name of [`hf_elastic.architectures.encodings.ENCODINGS`].
        dtype (`torch.dtype`): Type of the weight.
        segments (`list[int]`, *optional*): Rows (of an expert) that have the first global scale, the second, ...; all have one if not given.
        out (`torch.Tensor`, *optional*): Where the weight goes, contiguous and of that type.

    Raises:
        `CheckpointError`: shapes disagree, or scales are negative, NaN or infinite, or 0 where codes are not.
    """
    codes, scale, *last = parts
    four = encoding.startswith("nvfp4")
    shape = (*codes.shape[:-1], codes.shape[-1] * (2 if four else 1))
    experts, rows = math.prod(shape[:-2]), shape[-2]
    step = scale.float()
    if four:
        step = step.reshape(experts * rows, -1)
        along = _per_row(last[0], experts, rows, segments)
        step = step * along if encoding == _FACTOR else step / along
        fits = step.shape[-1] * BLOCK == shape[-1]
    else:
        fits = scale.numel() == experts * rows or encoding == "fp8-tensor"
        step = step.reshape(-1, 1) if encoding != "fp8-tensor" else _per_row(scale, experts, rows, segments)
    if not fits:
        raise CheckpointError(f"codes {tuple(codes.shape)} and scales {tuple(scale.shape)} do not belong together.")
    out = torch.empty(shape, dtype=dtype, device=codes.device) if out is None else out
    _refuse_scales(step)
    flat, codes = out.view(-1, shape[-1]), codes.reshape(experts * rows, -1)
    for band in _bands(flat):
        (_decode_nvfp4 if four else _decode_fp8)(codes[band], step[band], flat[band])
    return out


def _decode_nvfp4(codes: torch.Tensor, step: torch.Tensor, out: torch.Tensor) -> None:
    words = _words(codes.device).index_select(0, codes.flatten().int())
    values = words.view(torch.bfloat16).view(len(codes), -1, BLOCK)
    if not step.all():
        _refuse_lost((step == 0)[..., None] & (values != 0))
    out.view(len(codes), -1, BLOCK).copy_(values.float().mul_(step[..., None]))


def _decode_fp8(codes: torch.Tensor, step: torch.Tensor, out: torch.Tensor) -> None:
    bytes_ = codes.contiguous().view(torch.uint8).flatten()
    values = _e4m3(codes.device).index_select(0, bytes_.int()).view(codes.shape)
    if not step.all():
        _refuse_lost((step == 0) & (values != 0))
    out.copy_(values.mul_(step))


def _per_row(scale: torch.Tensor, experts: int, rows: int, segments: Sequence[int] | None) -> torch.Tensor:
    lengths = list(segments or (rows,))
    if scale.numel() != experts * len(lengths) or sum(lengths) != rows:
        raise CheckpointError(f"{scale.numel()} scales are not one for each of {experts} x {len(lengths)} matrices.")
    each = torch.tensor(lengths, device=scale.device)
    return scale.float().reshape(experts, len(lengths)).repeat_interleave(each, 1).reshape(-1, 1)


def _refuse_scales(step: torch.Tensor) -> None:
    if step.numel() and not (step.isfinite().all() and (step >= 0).all()):
        raise CheckpointError("scales are negative, NaN or infinite; the file is damaged.")


def _refuse_lost(lost: torch.Tensor) -> None:
    if lost.any():
        raise CheckpointError("scales are 0 where codes are not; the file is damaged.")
