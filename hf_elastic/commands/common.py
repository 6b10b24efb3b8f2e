"""What several commands need: sizes from the command line, tables, tokenizers that come along."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ElasticConfigError

BUDGET_HELP = (
    "which size: a name, a number of parameters ('1.2B'), active parameters ('300M active'), a share of the parent's ('50%%', '50%% active'), "
    "weight memory ('24GB') or what is free ('auto'), for which the largest size that fits is taken; everything if not given"
)


def parse_value(text: str) -> int | float | list[int]:
    """`960` is a size, `0.5` a share of the parent's, `0,1,3` a list (layers)."""
    try:
        if "," in text:
            return [int(part) for part in text.split(",") if part.strip()]
        return float(text) if any(c in text for c in ".eE") else int(text)
    except ValueError:
        raise ElasticConfigError(f"{text!r} must be a size (960), a share (0.5) or a list (0,1,3).") from None


def parse_sizes(pairs: Sequence[str]) -> dict[str, Any]:
    """`["hidden=1920", "expert_ffn=0.5"]` as a dict."""
    sizes: dict[str, Any] = {}
    for pair in pairs:
        axis, equals, value = pair.partition("=")
        if not equals or not axis.strip():
            raise ElasticConfigError(f"{pair!r} must be AXIS=SIZE, for example hidden=1920.")
        if axis.strip() in sizes:
            raise ElasticConfigError(f"axis {axis.strip()!r} is given twice.")
        sizes[axis.strip()] = parse_value(value)
    return sizes


def table(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> str:
    """Rows as aligned text; the first is the header, columns in `right` are set to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def check_output(output: str, source: str) -> None:
    """Refuse, before anything else is done, a folder that cannot be written to, or that would replace what is read."""
    if not output:
        raise ElasticConfigError("OUTPUT is '', which names no folder; for the current one give '.'.")
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise ElasticConfigError(f"{output} is a file; give a folder to save into.")
    if not Path(source).exists():
        return
    read, written = Path(source).resolve(), path.resolve()
    if written == read or written.is_relative_to(read / "budgets"):
        where = "is" if written == read else "belongs to"
        raise ElasticConfigError(
            f"{output} {where} the checkpoint that is read, and would be replaced; give another folder."
        )


def check_source(source: str) -> None:
    """Refuse a file, a path with nothing at it, and a repository that nobody can be asked for, before any library tries that again and again."""
    from ..storage.sources import pinned

    if Path(source).is_file():
        raise ElasticConfigError(f"{source} is a file; give the folder of a checkpoint, or a Hub repository.")
    pinned(source, {})


def check_dtype(name: str, where: str = "--dtype") -> str:
    """The type of weights that was asked for, by torch's name; refuses one that is none. Short names are those that `plan` takes."""
    import torch

    from ..configuration.budgets import DTYPES

    if name == "auto":
        return name
    dtype = DTYPES.get(name) or (getattr(torch, name, None) if name else None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ElasticConfigError(
            f"{where}={name!r} must be auto or a floating-point type of torch, such as bfloat16 (bf16) or float32 (fp32)."
        )
    return str(dtype).removeprefix("torch.")


def add_device(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        metavar="auto|cpu|cuda|...",
        help=f"where to {what} (default: auto, which is the accelerator if there is one)",
    )


def check_device(name: str | None) -> Any:
    """The device that was asked for, or the one to take; refuses one that torch does not know or this machine does not have."""
    from ..checkpoints.devices import checked_device

    return checked_device(name, "--device")


def check_config(source: str) -> None:
    """Refuse a folder with a damaged `config.json`: upstream, which reads it for the tokenizer, would say that this is damaged."""
    from ..storage.json_files import read_json

    if (path := Path(source, "config.json")).is_file():
        read_json(path)


def load_tokenizer(source: str) -> Any:
    """The tokenizer beside a checkpoint.

    Raises:
        `ElasticConfigError`: There is none, or none that can be loaded.
    """
    from transformers import AutoTokenizer

    from ..storage.tokenizer_files import tokenizer_files

    check_source(source)
    check_config(source)
    try:
        if Path(source).is_dir():
            tokenizer_files(source, {})
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # of many kinds, for what is missing or damaged
        path = Path(source)
        above = path.parent.parent if path.parent.name == "budgets" else path
        where = f"; the one of the family lies in {above}" if (above / "tokenizer_config.json").is_file() else ""
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if path.is_dir() and not any(path.glob("tokenizer*")):
            why = "there are no files of one"
        raise ElasticConfigError(
            f"{source} has no tokenizer that can be loaded ({why}). Save the one that the model was trained with there: "
            f"tokenizer.save_pretrained({source!r}){where if above != path else ''}."
        ) from error


def save_with_tokenizer(model: Any, tokenizer: Any, target: str | Path) -> None:
    """Save a checkpoint and its tokenizer, if it has one, at once, so that a kill leaves no tokenizer of another one."""
    from ..checkpoints.replacing import replacing

    with replacing(target) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def add_source(parser: argparse.ArgumentParser, output: str | None = None) -> None:
    """`REPO [OUTPUT] --budget --dtype`: which size of which checkpoint."""
    parser.add_argument("repo", metavar="REPO", help="Hub repository or folder of an elastic checkpoint")
    if output:
        parser.add_argument("output", metavar="OUTPUT", help=output)
    parser.add_argument("--budget", help=BUDGET_HELP)
    add_elastic_config(parser)
    parser.add_argument("--dtype", default="auto", help="type of the weights (default: the checkpoint's)")


def add_elastic_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--elastic-config",
        metavar="FAMILY",
        help="REPO is a plain checkpoint, sorted already: auto, or the name of the known family that it is a copy of",
    )


def add_markers(parser: argparse.ArgumentParser) -> None:
    found = "default: found in the chat template, or"
    parser.add_argument("--start", metavar="TEXT", help=f"marker that opens the thinking, or none ({found} <think>)")
    parser.add_argument("--end", metavar="TEXT", help=f"marker that ends the thinking ({found} </think>)")


def add_choice(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Options of plans that are chosen per prompt; with `several`, thresholds and signals can be repeated."""
    again: dict[str, Any] = {"action": "append"} if several else {}
    repeat = "; repeat it" if several else ""
    parser.add_argument(
        "--escalate-to", metavar="BUDGET", help="who answers where the answering size is not confident"
    )
    parser.add_argument(
        "--confidence",
        metavar="P",
        type=float,
        help=f"below this, from 0 to 1, --escalate-to answers{repeat}",
        **again,
    )
    parser.add_argument(
        "--signal",
        choices=("answer_min", "answer_first", "thinking_mean", "thinking_min"),
        help=f"what the confidence is: the least or first probability of the answer's tokens, the mean or least of the thinking's (default: answer_min){repeat}",
        **again,
    )


def markers(args: argparse.Namespace) -> dict[str, Any]:
    """`--start` and `--end` as arguments of [`PhasePlan`]."""
    given = {"start": args.start, "end": args.end}
    return {
        key: None if key == "start" and text == "none" else text for key, text in given.items() if text is not None
    }


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for machines instead of text")


def is_coded(repo: str, described: str | None) -> bool:
    """Whether the weights of a checkpoint are stored in few bits."""
    from ..checkpoints.loading import load_config
    from ..checkpoints.released import quantization_of

    elastic = load_config(repo, None, described, {})
    return bool(elastic.encodings) or quantization_of(repo, elastic, {}, described is not None) is not None
