"""Codes of weights in few bits, in plain torch: bit for bit those of compressed-tensors, several times as fast.

NVFP4: every 16 elements of a row share a scale in E4M3, a matrix (an expert) has a global scale, codes are E2M1: `value * scale / global`. FP8: every
row has a scale, codes are E4M3: `value * scale`. All arithmetic is in float32, in bands of rows, so that little more than the result is in memory; and
of operations that IEEE 754 defines to the last bit, in an order that is written out, so that every device finds the same codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache

import torch

from ..errors import CheckpointError, ElasticConfigError, shown

BLOCK = 16
"""Elements of a row with a scale of their own in NVFP4."""

_E4M3_MAX, _E2M1_MAX = 448.0, 6.0
_E4M3_SMALLEST = 2.0**-6  # below, numbers are as far apart as right above
_LARGEST_SCALE = 256.0  # a block whose largest element becomes a 4 has a scale half as large again, which E4M3 holds
# Of elements that are all 0, as compressed-tensors has them.
_EMPTY_BLOCK, _EMPTY_ROW = 0.125, torch.finfo(torch.float32).eps
# Elements that are worked on at a time: on a CPU so that they stay in the cache; elsewhere few large operations are faster.
_BAND, _BAND_ELSEWHERE = 1 << 18, 1 << 23
_FACTOR = "nvfp4-modelopt"  # multiplies by the global scale, where compressed-tensors divides


@cache
def _words(device: torch.device) -> torch.Tensor:
    """Per byte its two values, the low half first, in one word that is looked up at once: `(256,)`."""
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=device)
    values = torch.cat([levels, -levels])
    return torch.stack([values.repeat(16), values.repeat_interleave(16)], -1).view(torch.int64).flatten()


@cache
def _e4m3(device: torch.device) -> torch.Tensor:
    """Per byte its value in E4M3; torch converts them one by one, which takes twice as long."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()


# -- weights to codes --------------------------------------------------------------------------------------------------


def global_scale_of(*weights: torch.Tensor, choose: bool = True) -> torch.Tensor:
    """The global scale, a divisor, that weights share in NVFP4.

    Args:
        weights (`torch.Tensor`): `[rows, columns]`, or stacks `[experts, rows, columns]` of as many experts.
        choose (`bool`, *optional*, defaults to `True`): As `encode` takes it: `256 * 6 / max |w|` and from there down to a power of
            2, with which bfloat16 holds every weight that a code stands for, and whose reciprocal is exact; otherwise `448 * 6 / max |w|`.

    Returns:
        `torch.Tensor`: float32, `[1]`, or `[experts, 1]`.

    Raises:
        `ElasticConfigError`: a weight is not finite.
    """
    ends = [end for weight in weights for end in (weight.detach().amax((-2, -1)), -weight.detach().amin((-2, -1)))]
    largest = torch.stack(ends).amax(0).float()
    _refuse_infinite(largest)
    scale = (_LARGEST_SCALE if choose else _E4M3_MAX) * _E2M1_MAX / largest.clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.where(scale.isfinite(), scale, 1.0).unsqueeze(-1)
    return _power_of_two(scale) if choose else scale


def _power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The largest one that is no larger."""
    return (scale.view(torch.int32) & 0x7F800000).view(torch.float32)


def encode(
    weight: torch.Tensor,
    format: str,
    *,
    global_scale: torch.Tensor | None = None,
    segments: Sequence[int] | None = None,
    choose: bool = True,
) -> tuple[torch.Tensor, ...]:
    """The companions of a weight.

    Args:
        weight (`torch.Tensor`): `[rows, columns]` or `[experts, rows, columns]`.
        format (`str`): `"nvfp4"` or `"fp8"`, as the encodings of these names store it.
        global_scale (`torch.Tensor`, *optional*): Of NVFP4, as `global_scale_of` gives it; that of this weight alone if not given.
        segments (`list[int]`, *optional*):
            Rows (of an expert) that have the first global scale, the second, ..., which is then `[experts, segments]`; all have one if not given.
        choose (`bool`, *optional*, defaults to `True`):
            Scale every block of NVFP4 so that its largest element becomes a 6 or a 4, whichever has the smaller squared error; otherwise a 6.

    Returns:
        `tuple[torch.Tensor, ...]`: NVFP4: codes uint8 `[..., rows, columns / 2]`, scales float8_e4m3fn `[..., rows, columns / 16]`, and the global
            scale. FP8: codes float8_e4m3fn of the weight's shape, and scales float32 `[..., rows, 1]`, which bfloat16 can hold.

    Raises:
        `ElasticConfigError`: the weight is not finite, its columns are no whole blocks, or the global scale is not as it has to be.
    """
    flat, device = _flat(weight, format), weight.device
    if format == "fp8":
        codes = torch.empty(flat.shape, dtype=torch.float8_e4m3fn, device=device)
        scales = torch.empty(len(flat), 1, device=device)
        for band in _bands(flat):
            steps, scales[band] = _in_steps_of_rows(flat[band].float())
            codes[band] = steps.to(codes.dtype)
        return codes.view(weight.shape), scales.view(*weight.shape[:-1], 1)
    scale, last = _global_rows(weight, global_scale, segments, choose)
    packed = torch.empty(len(flat), flat.shape[1] // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(len(flat), flat.shape[1] // BLOCK, dtype=torch.float8_e4m3fn, device=device)
    for band in _bands(flat):
        steps, found, _, negative = _in_steps_of_blocks(flat[band], last[band], choose)
        scales[band] = found.view(-1, scales.shape[1])
        packed[band].view(-1, BLOCK // 2).copy_(_packed(steps, negative).t())
    return packed.view(*weight.shape[:-1], -1), scales.view(*weight.shape[:-1], -1), scale


def rounded(
    weight: torch.Tensor,
    format: str,
    *,
    global_scale: torch.Tensor | None = None,
    segments: Sequence[int] | None = None,
    choose: bool = True,
) -> torch.Tensor:
    """What `decode` makes of what `encode` makes of a weight, in its type; arguments and errors as those of `encode`."""
    flat = _flat(weight, format)
    out = torch.empty(flat.shape, dtype=flat.dtype, device=flat.device)
    last = None if format == "fp8" else _global_rows(weight, global_scale, segments, choose)[1]
    for band in _bands(flat):
        if last is None:
            steps, scale = _in_steps_of_rows(flat[band].float())
            out[band] = _nearest(steps.abs(), _E4M3_SMALLEST, 3).copysign_(steps).mul_(scale)
        else:
            steps, _, step, negative = _in_steps_of_blocks(flat[band], last[band], choose)
            values = steps.mul_(step).mul_(1 - 2 * negative)
            out[band].view(-1, BLOCK).copy_(values.t())
    return out.view(weight.shape)


def _flat(weight: torch.Tensor, format: str) -> torch.Tensor:
    """All its rows: `[experts * rows, columns]`."""
    if format not in ("nvfp4", "fp8"):
        raise ElasticConfigError(f"format={shown(format)} must be 'nvfp4' or 'fp8'.")
    if weight.dim() not in (2, 3) or not weight.is_floating_point():
        raise ElasticConfigError(
            f"a weight of shape {tuple(weight.shape)} and type {str(weight.dtype).removeprefix('torch.')} cannot be quantised; "
            "a matrix or a stack of matrices of floating-point numbers can."
        )
    if format == "nvfp4" and weight.shape[-1] % BLOCK:
        raise ElasticConfigError(
            f"a weight of shape {tuple(weight.shape)} has {weight.shape[-1]} columns, NVFP4 takes multiples of {BLOCK}; keep it as it is."
        )
    return weight.detach().reshape(-1, weight.shape[-1])


def _bands(flat: torch.Tensor) -> Iterator[slice]:
    rows, columns = flat.shape
    step = max(1, (_BAND if flat.device.type == "cpu" else _BAND_ELSEWHERE) // max(1, columns))
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def _global_rows(
    weight: torch.Tensor, scale: torch.Tensor | None, segments: Sequence[int] | None, choose: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The global scale, and that of every row, `[experts * rows, 1]`."""
    experts, rows, lengths = math.prod(weight.shape[:-2]), weight.shape[-2], tuple(segments or (weight.shape[-2],))
    if scale is None:
        scale = global_scale_of(weight, choose=choose)
        scale = scale.expand(*scale.shape[:-1], len(lengths)).contiguous()
    if scale.numel() != experts * len(lengths) or sum(lengths) != rows:
        raise ElasticConfigError(
            f"global_scale of shape {tuple(scale.shape)} and segments {lengths} do not fit a weight of shape {tuple(weight.shape)}: "
            f"there is a scale for each segment of its {experts} x {rows} rows."
        )
    if not (scale.isfinite().all() and (scale > 0).all()):
        raise ElasticConfigError("global_scale has to be positive and finite.")
    return scale, _per_row(scale, experts, lengths)


def _per_row(scale: torch.Tensor, experts: int, lengths: Sequence[int]) -> torch.Tensor:
    each = torch.tensor(lengths, device=scale.device)
    return scale.float().reshape(experts, len(lengths)).repeat_interleave(each, 1).reshape(-1, 1)


def _in_steps_of_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8: elements as multiples of their row's scale, not rounded yet, and the scales `[rows, 1]`, rounded up to what bfloat16 holds.

    Who keeps scales in bfloat16, as stock transformers does, then computes the same.
    """
    largest = rows.abs().amax(-1, keepdim=True)
    _refuse_infinite(largest)
    bits = (largest / _E4M3_MAX).view(torch.int32)
    scale = ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
    scale = torch.where(scale == 0, _EMPTY_ROW, scale)
    return (rows / scale).clamp_(-_E4M3_MAX, _E4M3_MAX), scale


def _in_steps_of_blocks(
    rows: torch.Tensor, last: torch.Tensor, choose: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """NVFP4: sizes of elements as multiples of their block's step, rounded to E2M1.

    Returns:
        `(sizes, scales, steps, negative)`: float32 `[16, blocks]`, float8_e4m3fn and float32 `[blocks]`; and 1.0 where elements are negative, 0.0
            elsewhere. Elements of a block lie along the first dimension: operations along them are then operations on long rows.
    """
    last = last.expand(-1, rows.shape[-1] // BLOCK).flatten()
    blocks = torch.empty(BLOCK, last.shape[0], device=rows.device).copy_(rows.reshape(-1, BLOCK).t())
    negative = torch.lt(blocks, 0, out=torch.empty_like(blocks))
    sizes = blocks.abs_()
    largest = sizes.amax(0)
    _refuse_infinite(largest)
    scale, step = _block_scale(largest, _E2M1_MAX, last)
    steps = _e2m1(sizes, step)
    if choose:
        other_scale, other_step = _block_scale(largest, 4.0, last)
        other = _e2m1(sizes, other_step)
        better = _error(sizes, other, other_step) < _error(sizes, steps, step)
        # `torch.where` along a broadcast condition takes five times as long; differences of values of E2M1 are exact.
        steps += other.sub_(steps).mul_(better.float())
        scale = torch.where(better, other_scale.view(torch.uint8), scale.view(torch.uint8)).view(scale.dtype)
        step = torch.where(better, other_step, step)
    return steps, scale, step, negative


def _block_scale(largest: torch.Tensor, becomes: float, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and steps with which the largest elements of blocks become that value."""
    scale = (last * (largest / becomes)).clamp_(max=_E4M3_MAX).to(torch.float8_e4m3fn).float()
    scale = torch.where(scale == 0, _EMPTY_BLOCK, scale)
    return scale.to(torch.float8_e4m3fn), scale / last


def _e2m1(sizes: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    return _nearest((sizes / step).clamp_(max=_E2M1_MAX), 1.0, 1)


def _nearest(values: torch.Tensor, smallest: float, digits: int) -> torch.Tensor:
    """The nearest numbers with so many binary digits after the first, ties to even; those below `smallest` as far apart as right above.

    In place, of numbers that are not negative: a number so large that it ends where they are to end is added and subtracted again.
    """
    large = values.clamp(min=smallest)
    large.view(torch.int32).bitwise_and_(0x7F800000)  # the power of two
    large.mul_(1.5 * 2 ** (23 - digits))
    return values.add_(large).sub_(large)


def _error(sizes: torch.Tensor, steps: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Squared errors of blocks, added up in halves: in the same order everywhere, so that a slice chooses what the whole chose."""
    wrong = (steps * step).sub_(sizes)
    wrong.mul_(wrong)
    while len(wrong) > 1:
        wrong, others = wrong.chunk(2)
        wrong += others
    return wrong[0]


def _packed(steps: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Bytes `[8, blocks]`, not converted yet. Codes are 0.5 apart up to 2, 1 apart up to 4, 2 apart beyond, and 8 more below 0."""
    codes = torch.minimum(steps * 2, steps + 2)
    codes = torch.minimum(codes, steps.div_(2).add_(4), out=codes).add_(negative, alpha=8)
    return codes[::2].add(codes[1::2], alpha=16)


def _refuse_infinite(largest: torch.Tensor) -> None:
    if not largest.isfinite().all():
        raise ElasticConfigError("the weight has elements that are NaN or infinite, which no code stands for.")


# -- codes to weights --------------------------------------------------------------------------------------------------


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
        `CheckpointError`: shapes disagree; scales are negative, NaN or infinite, or 0 where codes are not; or codes are NaN.
    """
    codes, four = parts[0], encoding.startswith("nvfp4")
    shape = (*codes.shape[:-1], codes.shape[-1] * (2 if four else 1))
    scales, along = _scales_of_rows(parts, encoding, shape, segments)
    out = torch.empty(shape, dtype=dtype, device=codes.device) if out is None else out
    flat = out.view(-1, shape[-1])
    codes = codes.reshape(len(flat), -1)
    for band in _bands(flat):
        step = _steps(scales, along, band, encoding)
        zeros = _refuse_scales(step)
        values, step = _values(codes[band], step, four)
        if zeros and ((step == 0) & (values != 0)).any():
            raise CheckpointError("scales are 0 where codes are not; the file is damaged.")
        flat[band].view(values.shape).copy_(values.mul_(step))
    return out


def _scales_of_rows(
    parts: Sequence[torch.Tensor], encoding: str, shape: tuple[int, ...], segments: Sequence[int] | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The scales of the elements of all rows, `[rows, ...]`, and those of whole matrices for every row, `[rows, 1]`, where there are such."""
    codes, scale, *last = parts
    experts, lengths = math.prod(shape[:-2]), tuple(segments or (shape[-2],))
    along = last[0] if last else scale if encoding == "fp8-tensor" else None
    if along is not None:
        if along.numel() != experts * len(lengths) or sum(lengths) != shape[-2]:
            raise CheckpointError(
                f"codes of shape {tuple(codes.shape)} have {along.numel()} scales, not one for each of {experts} x {len(lengths)} matrices."
            )
        along = _per_row(along, experts, lengths)
        _refuse_scales(along)
    if encoding == "fp8-tensor":
        return None, along
    expected = (*shape[:-1], shape[-1] // BLOCK if last else 1)
    if tuple(scale.shape) != expected or (last and shape[-1] % BLOCK):
        raise CheckpointError(
            f"codes of shape {tuple(codes.shape)} and scales of shape {tuple(scale.shape)} do not belong together."
        )
    return scale.reshape(-1, expected[-1]), along


def _steps(scales: torch.Tensor | None, along: torch.Tensor | None, band: slice, encoding: str) -> torch.Tensor:
    """By what the codes of some rows are multiplied."""
    if scales is None or along is None:
        return (along if scales is None else scales)[band].float()  # type: ignore[index]
    fine, whole = scales[band].float(), along[band]
    return fine * whole if encoding == _FACTOR else fine / whole


def _values(codes: torch.Tensor, step: torch.Tensor, four: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What the codes of some rows stand for, to be multiplied by the steps, which are given a shape for that."""
    if four:
        words = _words(codes.device).index_select(0, codes.flatten().int())
        return words.view(torch.float32).view(len(step), -1, BLOCK), step.unsqueeze(-1)
    bytes_ = codes.contiguous().view(torch.uint8).flatten()
    values = _e4m3(codes.device).index_select(0, bytes_.int()).view(codes.shape)
    if not values.sum().isfinite():
        raise CheckpointError("codes are NaN; the file is damaged.")
    return values, step


def _refuse_scales(scales: torch.Tensor) -> bool:
    """Whether some are 0."""
    low, high = (end.item() for end in torch.aminmax(scales))  # NaN if one is
    if not (low >= 0 and high < math.inf):
        raise CheckpointError("scales are negative, NaN or infinite; the file is damaged.")
    return low == 0
