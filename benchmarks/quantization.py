"""Quantised families: bytes on disk, and loading them decoded as lean as a family in bfloat16.

Bytes of the published 30B family (`KNOWN`) in bfloat16, NVFP4 and FP8 are counted from its config by the default recipes.

Then a random `nemotron_h` MoE parent in the proportions of Nemotron Nano v3 (bfloat16, 3.4 GB, one tensor per expert) with the 23B and 12B sizes of the
family is quantised from file to file, and loaded: in bfloat16 and decoded from both formats, the whole parent and the 12B size, each in a process of its
own, in turns, files in the page cache. Times are taken as in `loading.py`. Memory is the highest anonymous memory, of which the weights themselves are a
part.

Claims: bytes of the files are those that are counted; NVFP4 takes at most 18.1 / 13.6 / 7.6 GiB at the published widths and FP8 30.2 / 22.7 / 12.2; peak
memory of loading at most 1.15 times the bytes of the weights, decoded.
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import Claim, Report, arguments, in_turns
from loading import report_times, timed
from processes import ChildRun, backed_memory, in_child
from synthetic import PUBLISHED_LAYERS, nano_like, published_family, write_checkpoint
from transformers import AutoModelForCausalLM

from hf_elastic import ElasticConfig
from hf_elastic.checkpoints.quantizing import quantize_checkpoint
from hf_elastic.configuration.known import KNOWN
from hf_elastic.quantization.recipes import quantized_config

FORMATS = ("nvfp4", "fp8")
PUBLISHED = {"nvfp4": (18.1, 13.6, 7.6), "fp8": (30.2, 22.7, 12.2)}
"""GiB at most, for the sizes of `KNOWN`."""
BYTES = "{}: GiB of {} at the published widths"
COUNTED = "{}: bytes of all tensors in the files / bytes counted from the config"
PEAK = "{}: peak anonymous memory of loading / bytes of the decoded weights"
NAMES = list(next(iter(KNOWN.values())).budgets)
SMALLEST = "12b"
CLAIMS = [
    *(
        Claim(BYTES.format(format, name), most)
        for format, limits in PUBLISHED.items()
        for name, most in zip(NAMES, limits, strict=True)
    ),
    *(Claim(COUNTED.format(format), 1, "==") for format in FORMATS),
    *(Claim(PEAK.format(format), 1.15) for format in FORMATS),
]

transformers.logging.set_verbosity_error()  # also in the child processes, which import this module
transformers.logging.disable_progress_bar()


def main() -> int:
    options = arguments(__doc__).parse_args()
    report = Report("quantization", CLAIMS)
    published(report)
    parent, budgets = published_family(torch.bfloat16, **({"scale": 2, "experts": 16} if options.quick else {}))
    budgets = {name: {axis: size // 16 * 16 for axis, size in sizes.items()} for name, sizes in budgets.items()}
    with tempfile.TemporaryDirectory(prefix="hf-elastic-quantization-") as scratch:
        folders = {name: Path(scratch, name) for name in ("bf16", *FORMATS)}
        for name, folder in folders.items():
            seconds = in_child(_prepare, folder, folders["bf16"], name, parent, budgets).seconds
            if name != "bf16":
                report.measure(
                    f"{name}: time of quantising {parent.hidden_size} wide, from file to file", "s", [seconds]
                )
        held = 3 * ElasticConfig.from_pretrained(folders["bf16"]).costs()["full"].weight_bytes(torch.bfloat16)
        with backed_memory(held):
            load(report, folders, 2 if options.quick else 7)
    return report.finish(options)


def published(report: Report) -> None:
    """Bytes of the released sizes, counted."""
    (known,) = KNOWN.values()
    parent = nano_like(torch.bfloat16, scale=1, experts=128, layers=PUBLISHED_LAYERS, vocab_size=131072)
    plain = ElasticConfig.from_parent(parent, known.budgets)
    for name, cost in plain.costs().items():
        report.measure(BYTES.format("bf16", name), "GiB", [cost.stored_bytes(torch.bfloat16) / 2**30])
    for format in FORMATS:
        for name, cost in quantized_config(plain, format).costs().items():
            gib = cost.stored_bytes(torch.bfloat16) / 2**30
            report.measure(BYTES.format(format, name), "GiB", [gib])
            report.settle(BYTES.format(format, name), gib)


def load(report: Report, folders: dict[str, Path], rounds: int) -> None:
    """Bytes of the files, then time and memory of loading in turns."""
    weights = {}
    for name, folder in folders.items():
        elastic = ElasticConfig.from_pretrained(folder)
        size = sum(map(_tensor_bytes, folder.glob("*.safetensors")))
        report.measure(f"{name}: bytes of all tensors in the files", "bytes", [size])
        if name != "bf16":
            report.settle(COUNTED.format(name), size / elastic.costs()["full"].stored_bytes(torch.bfloat16))
        weights = {budget: cost.weight_bytes(torch.bfloat16) for budget, cost in elastic.costs().items()}
    peaks: dict[str, float] = dict.fromkeys(folders, 0.0)
    for budget in ("full", SMALLEST):
        actions = {name: partial(in_child, _load, folder, budget) for name, folder in folders.items()}
        in_turns(actions, 1)  # fills the page cache
        runs: dict[str, list[ChildRun]] = in_turns(actions, rounds)
        report_times(report, {f"{name}, {budget}": results for name, results in runs.items()}, "warm", "format")
        for name, results in runs.items():
            relative = [run.peak_anonymous_bytes / weights[budget] for run in results]
            report.measure(f"{name}, {budget}: peak anonymous memory / weights", "", relative, format=name)
            peaks[name] = max(peaks[name], *relative)
    for format in FORMATS:
        report.settle(PEAK.format(format), peaks[format])


def _tensor_bytes(file: Path) -> int:
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    header.pop("__metadata__", None)
    return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())


# -- in processes of their own -----------------------------------------------------------------------------------------


def _prepare(folder: Path, source: Path, name: str, parent: transformers.NemotronHConfig, budgets: Any) -> None:
    if name == "bf16":
        folder.mkdir()
        write_checkpoint(folder, parent, budgets)
    else:
        quantize_checkpoint(source, folder, name, progress=False)


def _load(folder: Path, budget: str) -> dict[str, Any]:
    return timed(lambda: AutoModelForCausalLM.from_pretrained(folder, budget=budget))


if __name__ == "__main__":
    sys.exit(main())
