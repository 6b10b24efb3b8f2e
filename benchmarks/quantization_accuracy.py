"""What few bits cost in accuracy: the lab's family of whole blocks, per size and format, calibrated and distilled while it is rounded.

Per size, the share of held-out problems of 12 lines whose whole answer is right, by generation, and the divergence from the whole
model in nats per token. Weights are cut from the files of each format and decoded, and all compute in float32, but `bfloat16`:

- *float32* and *bfloat16*: the family as it ships, not quantised;
- *fp8*: every matrix but embeddings, head and router in FP8, a scale per row, by calibration alone: nothing is trained;
- *nvfp4*: the default recipe, by calibration alone: attention, and the Mamba layer that feeds it, stay as they are;
- *nvfp4, everything*: attention and that layer as well;
- *nvfp4, distilled*: the default recipe after 150 steps of distillation of the rounded weights, three seeds of problems and of sizes drawn;
- *nvfp4, everything, distilled*: the same with attention and that layer in 4 bits, one seed;
- *nvfp4, not rounded*: the control, as many steps without rounding, then the default recipe, one seed.

The family is one, that of the package: these are not seeds of the family. It takes about 15 minutes of one core; runs are kept, see `lab_runs`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Claim, Report
from lab_runs import Runs, by_name, lab_arguments, mean

from hf_elastic import ElasticForCausalLM
from hf_elastic.lab.formats import measure_stored, write_quantized
from hf_elastic.lab.quantized import BLOCKS, EVERYTHING, QUANTIZED_STEPS, load_block_family, train_quantized

SIZES = ("full", *BLOCKS)
REFERENCE = "bfloat16"
LIMIT = 0.01
PROBLEMS = 400
SEEDS = (7, 8, 9)
"""Of the steps while weights are rounded; the family was trained with seed 0."""
HELD = {"fp8": "fp8 by calibration alone", "nvfp4, distilled": "nvfp4 distilled, mean of seeds"}
"""What has to be within the limit of bfloat16, and how claims call it."""


def claim(name: str, size: str) -> str:
    return f"{name}: {size}, exact answers lost against bfloat16"


CLAIMS = [Claim(claim(name, size), LIMIT) for name in HELD.values() for size in SIZES]

CALIBRATED = {
    "float32": (None, torch.float32),
    REFERENCE: (None, torch.bfloat16),
    "fp8": ("fp8", torch.float32),
    "nvfp4": ("nvfp4", torch.float32),
    "nvfp4, everything": (EVERYTHING, torch.float32),
}
"""Recipes by calibration alone, and what is computed in."""
CONTROL = "nvfp4, not rounded"
DISTILLED = {
    "nvfp4, distilled": ("nvfp4", "nvfp4", SEEDS),
    "nvfp4, everything, distilled": (EVERYTHING, EVERYTHING, SEEDS[:1]),
    CONTROL: (None, "nvfp4", SEEDS[:1]),
}
"""What is rounded in training, what the files are in, and seeds."""


def distilled(runs: Runs, name: str, recipe: Any, seed: int, steps: int) -> ElasticForCausalLM:
    """The family after some steps while its weights are rounded; `None` does not round them."""

    def train() -> ElasticForCausalLM:
        family = load_block_family()[0]
        options = {"steps": steps, "seed": seed, "progress": False, "per_device_train_batch_size": runs.rows}
        with tempfile.TemporaryDirectory(prefix="hf-elastic-lab-") as scratch:
            train_quantized(family, runs.tokenizer, Path(scratch), recipe, **options)
        return family

    model: ElasticForCausalLM = runs.model(f"{name}-{seed}", train)
    return model


def measured(
    runs: Runs, name: str, family: Callable[[], ElasticForCausalLM], recipe: Any, dtype: torch.dtype, count: int
) -> dict[str, Any]:
    """Rates of every size of a family in a format, by size."""

    def action() -> list[dict[str, Any]]:
        options = {"letters": runs.letters, "count": count, "dtype": dtype}
        with tempfile.TemporaryDirectory(prefix="hf-elastic-lab-") as scratch:
            write_quantized(family(), runs.tokenizer, Path(scratch), recipe)
            return measure_stored(Path(scratch), runs.tokenizer, load_block_family()[0], **options)

    return by_name(runs.run(f"formats-{name}", action))


def run(options: argparse.Namespace) -> int:
    runs = Runs(options)
    count, steps = (2, 1) if options.quick else (PROBLEMS, options.steps)
    longer = "" if options.quick or steps == QUANTIZED_STEPS else f"-{steps}"
    report = Report("quantization_accuracy", CLAIMS)
    found: dict[str, tuple[tuple[int, ...], list[dict[str, Any]]]] = {}
    for way, (recipe, dtype) in CALIBRATED.items():
        found[way] = (), [measured(runs, file_name(way), lambda: load_block_family()[0], recipe, dtype, count)]
    for way, (trained, recipe, seeds) in DISTILLED.items():
        name, used = file_name(way) + longer, seeds[:1] if options.quick else seeds
        entries = []
        for seed in used:
            family = partial(distilled, runs, name, trained, seed, steps)
            entries.append(measured(runs, f"{name}-{seed}", family, recipe, torch.float32, count))
        found[way] = used, entries
    exact = {}
    for way, (used, done) in found.items():
        for size in SIZES:
            entries = [rates[size] for rates in done]
            about = {key: entries[0][key] for key in ("active_params", "total_params", "stored_bytes")}
            about |= {"seeds": list(used), "problems": count}
            for rate in ("exact", "trace", "kl"):
                unit = "nats per token" if rate == "kl" else "share"
                values = [entry[rate] for entry in entries]
                report.measure(f"{way}: {size}, {rate}", unit, values, mean=mean(values), **about)
            exact[way, size] = mean([entry["exact"] for entry in entries])
    for way, name in HELD.items():
        for size in SIZES:
            report.settle(claim(name, size), exact[REFERENCE, size] - exact[way, size])
    runs.say_commits(report)
    return report.finish(options)


def file_name(way: str) -> str:
    return way.replace(", ", "-").replace(" ", "-")


if __name__ == "__main__":
    parser = lab_arguments(__doc__)
    parser.add_argument(
        "--steps",
        type=int,
        default=QUANTIZED_STEPS,
        help="steps while weights are rounded; for others than 150 give --output, too",
    )
    sys.exit(run(parser.parse_args()))
