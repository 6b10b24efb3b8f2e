"""Make a plain checkpoint elastic: score it, sort it, and save it with its budgets.

PARENT is the model you have. Some of your texts (--calibration) are run through it, so that every channel, head, neuron and expert gets a
score; then the weights are sorted by these scores. Every smaller size is the first part of every tensor, and the whole model computes what
it did before. The smaller sizes are good after training: `hf-elastic train`.

Calibration data are rows, one JSON object per line: {"messages": [...]}, {"text": "..."} or {"input_ids": [...]}.

An axis is something that can be cut: `hf-elastic plan PARENT` lists the axes of a model and their sizes. A budget is a size with a name:
NAME:AXIS=SIZE,... with sizes, or shares of the parent's (layers takes a number); or NAME=TARGET, for which the best choices of the axes
(--axis) are searched: 50% (or 0.5) of the parent's parameters, "50% active", 6B, "2.1B active", 24GB. --spec takes both as JSON, with
sizes per layer: {"axes": ..., "budgets": ...}.

  hf-elastic elastify model family --calibration chats.jsonl --budget half:hidden=0.5
  hf-elastic elastify model family2 --calibration chats.jsonl --axis hidden=1.0,0.75,0.5,0.25 --budget small=50%
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ..errors import ElasticConfigError
from .common import (
    add_device,
    check_device,
    check_dtype,
    check_output,
    check_source,
    load_tokenizer,
    parse_sizes,
    parse_value,
    save_with_tokenizer,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parent", metavar="PARENT", help="Hub repository or folder of the plain checkpoint")
    parser.add_argument("output", metavar="OUTPUT", help="folder to save the elastic checkpoint to")
    parser.add_argument(
        "--calibration",
        metavar="DATA",
        help="file (.jsonl, .json, .parquet, .csv, .txt) or Hub dataset with text, messages or input_ids",
    )
    parser.add_argument("--split", default="train", help="split of a Hub dataset (default: train)")
    parser.add_argument(
        "--axis",
        action="append",
        default=[],
        metavar="AXIS[=CHOICES]",
        help="elastic axis, with its sizes or shares: hidden=1.0,0.75,0.5; may be given several times",
    )
    parser.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="BUDGET",
        help="NAME:AXIS=SIZE,... or NAME=TARGET (half=50%%); may be given several times",
    )
    parser.add_argument("--spec", metavar="FILE", help="JSON file with axes and budgets")
    parser.add_argument("--scores", metavar="FILE", help="reuse scores instead of scoring")
    parser.add_argument("--save-scores", metavar="FILE", help="keep the scores for another run")
    parser.add_argument("--no-sort", action="store_true", help="the weights are sorted already")
    parser.add_argument(
        "--portable",
        action="store_true",
        help="only sizes that every program runs that runs PARENT (llama.cpp, vLLM, ...)",
    )
    parser.add_argument(
        "--for",
        dest="formats",
        action="append",
        metavar="FORMAT",
        help="only sizes that can be held in nvfp4, nvfp4-gguf (llama.cpp) or fp8 later; may be given several times",
    )
    parser.add_argument(
        "--multiple-of",
        action="append",
        default=[],
        metavar="N|AXIS=N",
        help="what widths given as shares are rounded to, all or one (default: 8); may be given several times",
    )
    parser.add_argument("--samples", type=int, default=1024, help="calibration rows (default: 1024)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per forward pass (default: 8)")
    parser.add_argument("--max-length", type=int, help="cut rows to this many tokens")
    parser.add_argument("--dtype", default="auto", help="load the parent in this type (default: the checkpoint's)")
    add_device(parser, "score")


def run(args: argparse.Namespace) -> None:
    from ..configuration_elastic import read_fields
    from ..elastification.elastify import elastify
    from ..storage.tokenizer_files import optional_tokenizer
    from .plan import plan, render

    axes, budgets = _spec(args)
    if args.save_scores and (args.scores or not args.calibration):
        raise ElasticConfigError("--save-scores needs --calibration, and no --scores.")
    if args.save_scores and not Path(args.save_scores).resolve().parent.is_dir():
        raise ElasticConfigError(f"--save-scores={args.save_scores}: there is no such folder.")
    check_source(args.parent)
    check_output(args.output, args.parent)
    check_device(args.device)
    args.dtype = check_dtype(args.dtype)
    read_fields(args.parent)  # a damaged one, before it is taken for a missing tokenizer
    tokenizer = optional_tokenizer(args.parent)
    options: dict[str, Any] = {}
    data = None
    if args.calibration and not args.scores:
        data = load_calibration(args.calibration, args.split)
        options = {"samples": args.samples, "batch_size": args.batch_size, "max_length": args.max_length}
        if not {"input_ids"} & set(data.column_names or ["input_ids"]):
            options["tokenizer"] = load_tokenizer(args.parent) if tokenizer is None else tokenizer
    options |= {"dtype": args.dtype, "device": args.device}
    options |= {"scores": args.scores, "sort": not args.no_sort, "portable": args.portable}
    options |= {"formats": args.formats, "multiple_of": _multiples(args.multiple_of)}
    with _kept_scores(args.save_scores) if data is not None else nullcontext() as save_scores:
        model = elastify(args.parent, data, axes, budgets, save_scores=save_scores, **options)
        save_with_tokenizer(model, tokenizer, args.output)
    print(render(plan(args.output)))
    print(f"saved to {args.output}")


def _multiples(given: Sequence[str]) -> int | dict[str, int]:
    """What --multiple-of says: one number for all widths, or one per axis."""
    if len(given) == 1 and "=" not in given[0]:
        return _number(given[0])
    if any("=" not in entry for entry in given):
        raise ElasticConfigError("--multiple-of takes one number for all widths, or AXIS=N for each axis.")
    return {axis: _number(number) for axis, _, number in (entry.partition("=") for entry in given)} or 8


def _number(text: str) -> int:
    """A whole number of `--multiple-of`."""
    if not text.isdecimal() or int(text) < 1:
        raise ElasticConfigError(f"--multiple-of={text} must be a whole number of at least 1.")
    return int(text)


@contextmanager
def _kept_scores(path: str | None) -> Iterator[str]:
    """Where scores are kept until the checkpoint is saved: if that fails, or there is no room for it, they are not lost."""
    if path is not None:
        yield path
        return
    descriptor, name = tempfile.mkstemp(prefix="hf-elastic-scores-", suffix=".safetensors")
    os.close(descriptor)
    try:
        yield name
    except BaseException:
        if os.path.getsize(name):
            print(
                f"the scores are kept in {name}; --scores {name} uses them instead of scoring again", file=sys.stderr
            )
        else:
            os.unlink(name)
        raise
    os.unlink(name)


def _spec(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    try:
        spec = json.loads(Path(args.spec).read_text(encoding="utf-8")) if args.spec else {}
    except (ValueError, RecursionError) as error:
        raise ElasticConfigError(f"{args.spec} is no JSON: {error}.") from error
    if not isinstance(spec, dict) or set(spec) - {"axes", "budgets"} or not isinstance(spec.get("budgets", {}), dict):
        raise ElasticConfigError(
            f"{args.spec} must hold an object with `axes` and `budgets`; budgets is an object from names to sizes or targets."
        )
    axes: dict[str, Any] = {}
    for text in args.axis:
        name, equals, values = text.partition("=")
        axes[name] = [parse_value(value) for value in values.split(",")] if equals else None
    budgets = {name: _layer_numbers(budget) for name, budget in spec.get("budgets", {}).items()}
    for text in args.budget:
        name, budget = parse_budget(text)
        if name in budgets:
            raise ElasticConfigError(f"budget {name!r} is given twice.")
        budgets[name] = budget
    return axes or spec.get("axes"), budgets


def _layer_numbers(budget: Any) -> Any:
    """JSON has no number keys: `{"ffn": {"3": 64}}` is size 64 in layer 3."""
    if not isinstance(budget, dict):
        return budget
    return {
        axis: {int(k) if str(k).isdigit() else k: v for k, v in size.items()} if isinstance(size, dict) else size
        for axis, size in budget.items()
    }


def parse_budget(text: str) -> tuple[str, Any]:
    """`small:hidden=0.75,ffn=0.5` or `half=6B`."""
    head, _, _ = text.partition("=")
    if ":" in head:
        name, _, sizes = text.partition(":")
        return name, parse_sizes(sizes.split(","))
    name, equals, target = text.partition("=")
    if not equals or not name:
        raise ElasticConfigError(f"budget {text!r} must be NAME:AXIS=SIZE,... or NAME=TARGET.")
    return name, target


def load_calibration(name: str, split: str, *, streaming: bool = True) -> Any:
    """A dataset from a file, by its ending, from a folder that `save_to_disk` wrote, or from the Hub, then streamed or whole.

    Raises:
        `ElasticConfigError`: it is missing, has no rows, or cannot be read.
        `CheckpointError`: there is nothing at a path, or the Hub cannot be asked.
    """
    import datasets

    from ..storage.sources import pinned

    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
    path = Path(name)
    if path.suffix in kinds and not path.is_file():
        raise ElasticConfigError(f"file {name} does not exist.")
    if path.is_file() and path.suffix not in kinds:
        raise ElasticConfigError(f"{name} must end with {', '.join(kinds)}, which says how to read it.")
    if path.is_file() and not path.stat().st_size:
        raise ElasticConfigError(f"{name} is empty.")
    if not path.exists():
        pinned(name, {}, kind="dataset", what="file or folder")
    try:
        if path.is_file():
            data = datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train")
        elif path.is_dir():
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, split=split, streaming=streaming)
    except Exception as error:  # of many kinds: of datasets, pyarrow, pandas, json, the Hub
        empty = "corresponds to no data" in str(error)
        why = "it has no rows" if empty else str(error.__cause__ or error).strip() or type(error).__name__
        raise ElasticConfigError(f"{name} cannot be read as a dataset: {why}") from error
    if isinstance(data, dict):
        if split not in data:
            raise ElasticConfigError(f"{name} has no split {split!r}; it has {', '.join(data)}.")
        data = data[split]
    if hasattr(data, "__len__") and not len(data):
        raise ElasticConfigError(f"{name} has no rows.")
    return data
