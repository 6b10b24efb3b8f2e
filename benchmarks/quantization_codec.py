"""Codes to weights and weights to codes: elements per second and core, against compressed-tensors.

A matrix of 16.8 million normal numbers in bfloat16, as wide as an expert of Nemotron Nano v3, on one core, the ways in turns. Time is
that of the thread; the fastest run counts, for what else the machine does only makes runs slower. Results are compared bit for bit first.

- `decode`: codes and scales to bfloat16, into memory that is there, as reading a checkpoint does; in compressed-tensors `decompress` of its compressor.
- `encode`: bfloat16 to codes and scales, of NVFP4 with blocks scaled by their largest element (`six`), which is what compressed-tensors
  does, and by the better of two scales (`better`), which is what `quantize` does; in compressed-tensors `calculate_qparams` and `compress`.
- `rounded`: what a step of quantisation-aware distillation does to a weight.

Claims: decoding takes at least 500 million elements per second and core in both formats, and nothing differs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import thread_time
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from harness import Claim, Report, arguments, in_turns

from hf_elastic.quantization.codec import decode, encode, rounded

COLUMNS = 2688
DECODED = {name: f"{name}: million elements decoded per second and core" for name in ("nvfp4", "fp8")}
DIFFERENT = "tensors that differ from those of compressed-tensors"
CLAIMS = [*(Claim(label, 500, ">=") for label in DECODED.values()), Claim(DIFFERENT, 0, "==")]
SCHEMES = {"nvfp4": ("NVFP4A16", "nvfp4-pack-quantized"), "fp8": ("FP8_DYNAMIC", "float-quantized")}


def main() -> int:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    rows = 256 if options.quick else 6250
    weight = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16()
    report = Report("quantization_codec", CLAIMS)
    different = 0
    for name in SCHEMES:
        different += compare(report, name, weight, 3 if options.quick else 9)
    report.settle(DIFFERENT, different)
    return report.finish(options)


def compare(report: Report, name: str, weight: torch.Tensor, rounds: int) -> int:
    """Measure one format; returns how many tensors differ."""
    scheme, compressor = preset_name_to_scheme(SCHEMES[name][0], ["Linear"]), _compressor(name)
    parts = encode(weight, name, choose=False)
    state = dict(zip(compressor.compression_param_names(scheme), parts, strict=True))
    stored = _compressed(compressor, scheme, weight, parts)
    different = sum(not torch.equal(_bits(stored[key]), _bits(part)) for key, part in state.items())
    values = compressor.decompress(state, scheme)["weight"].to(weight.dtype)
    different += not torch.equal(decode(parts, name, weight.dtype), values)
    out = torch.empty_like(weight)
    ways: dict[str, Callable[[], Any]] = {
        "decode": lambda: decode(parts, name, weight.dtype, out=out),
        "decode, compressed-tensors": lambda: compressor.decompress(state, scheme),
        "encode": lambda: encode(weight, name),
        "encode, compressed-tensors": lambda: _compressed(compressor, scheme, weight, parts),
        "rounded": lambda: rounded(weight, name),
    }
    if name == "nvfp4":
        ways["encode, six"] = lambda: encode(weight, name, choose=False)
        ways["encode, better"] = ways.pop("encode")
    timed = {way: _timed(action) for way, action in ways.items()}
    in_turns(timed, 1)  # warm up: tables, memory
    for way, runs in in_turns(timed, rounds).items():
        speeds = [weight.numel() / taken / 1e6 for taken in runs]
        report.measure(f"{name}: {way}", "M elements/s", speeds, fastest=max(speeds))
        if way == "decode":
            report.settle(DECODED[name], max(speeds))
    return different


def _compressor(name: str) -> Any:
    return BaseCompressor.get_value_from_registry(SCHEMES[name][1])


def _compressed(
    compressor: Any, scheme: QuantizationScheme, weight: torch.Tensor, parts: tuple[torch.Tensor, ...]
) -> dict[str, torch.Tensor]:
    """What it stores. Our FP8 scales are rounded up to bfloat16, so that they are given to it; it computes its own to be timed alike."""
    weight = weight.float()
    groups = weight.unflatten(-1, (-1, 16)) if len(parts) == 3 else weight[:, None]
    last = parts[2] if len(parts) == 3 else None
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights, last)
    state = {"weight": weight, "weight_scale": scale if len(parts) == 3 else parts[1]}
    return compressor.compress(state if last is None else {**state, "weight_global_scale": last}, scheme)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _timed(action: Callable[[], Any]) -> Callable[[], float]:
    def timed() -> float:
        start = thread_time()
        action()
        return thread_time() - start

    return timed


if __name__ == "__main__":
    sys.exit(main())
