"""What `hf-elastic lab --task book --quantize` does: all sizes in 8 and in 4 bits, measured side by side."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .common import table

_DISTILLED = "nvfp4-distilled"


def quantize_sizes(trained: Any, tokenizer: Any, output: Path, args: argparse.Namespace, say: Any) -> dict[str, Any]:
    """Write a family in every format asked for into `OUTPUT/quantized`, measure all sizes, and compare them on the cards.

    Args:
        trained (`ElasticForCausalLM` or `None`): A family from `hf-elastic lab --train`, to train the sizes here; `None` takes them from the package.
    """
    from ..lab.formats import compare_formats, write_formats
    from ..lab.quantized import (
        QUANTIZED_STEPS,
        load_block_family,
        make_block_family,
        train_block_family,
        train_quantized,
    )

    start, folder, quiet = time.perf_counter(), output / "quantized", args.json
    options: dict[str, Any] = {"count": args.problems, "letters": args.size, "seed": args.seed}
    say(
        "\nIn few bits: a family whose every cut is at a multiple of 16, as NVFP4 has a scale for 16 elements of a row ..."
    )
    if trained is None:
        family = load_block_family()[0]
    else:
        family = make_block_family(trained)
        with tempfile.TemporaryDirectory(prefix="hf-elastic-lab-") as scratch:
            steps = max(1, args.steps * 3 // 5)
            train_block_family(family, tokenizer, Path(scratch), steps=steps, seed=args.seed, progress=not quiet)
    formats: dict[str, Any] = {"float32": None, "fp8": "fp8"}
    distilled = {}
    if args.quantize == "nvfp4":
        formats |= {"nvfp4": "nvfp4", _DISTILLED: "nvfp4"}
        steps = min(QUANTIZED_STEPS, args.steps)
        say(f"     Distilling it while its weights are rounded to NVFP4, {steps} steps ...")
        distilled[_DISTILLED] = make_block_family(family)  # a trainer has wrapped the other's forward
        with tempfile.TemporaryDirectory(prefix="hf-elastic-lab-") as scratch:
            run: dict[str, Any] = {"steps": steps, "seed": args.seed + 7, "progress": not quiet}
            train_quantized(distilled[_DISTILLED], tokenizer, Path(scratch), **run)
    folder.mkdir(parents=True, exist_ok=True)
    found = compare_formats(family, tokenizer, folder, formats, distilled=distilled, say=say, **options)
    about = {"letters": args.size, "problems": args.problems, "seed": args.seed}
    results = write_formats(folder, found, [name for name in formats if name != "float32"], **about)
    say(render_formats(found, folder, time.perf_counter() - start))
    return results


def render_formats(found: Mapping[str, list[dict[str, Any]]], folder: Path, seconds: float) -> str:
    """Answers right and divergence per size, and bytes, a column per format."""
    names = [entry["name"] for entry in next(iter(found.values()))]
    rows = [["size", *(f"{name}: right (KL)" for name in found), *(f"{name}: bytes" for name in found)]]
    for i, name in enumerate(names):
        entries = [column[i] for column in found.values()]
        rates = [f"{entry['exact']:.3f} ({entry['kl']:.4f})" for entry in entries]
        rows.append([name, *rates, *(f"{entry['stored_bytes']:,}" for entry in entries)])
    return "\n".join(
        [
            "",
            table(rows, right=frozenset(range(1, 1 + 2 * len(found)))),
            "",
            "KL: the divergence from the whole model as it was before, in nats per token. bytes: of the weights, those that are not quantised in bfloat16;",
            "embeddings, head, norms and scans are not, and are half of so small a model.",
            f"Took {seconds:.0f} s; see {folder / 'formats.json'} and the README.md of each checkpoint in {folder}.",
        ]
    )
