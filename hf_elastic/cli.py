"""The `hf-elastic` command. One module of `hf_elastic.commands` per subcommand; they import the heavy libraries when they run."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ._version import __version__
from .errors import BudgetWarning, PortabilityWarning

COMMANDS = ("lab", "plan", "elastify", "train", "slice", "quantize", "export", "generate", "evaluate", "push")

_OVERVIEW = """\
One LLM checkpoint that holds many sizes of a model.

Such a checkpoint is called a family here, or elastic. A budget asks for one of its sizes: by name, by parameters, or by memory.
"""

_EXAMPLES = """\
a first look, at a small model that comes along:
  hf-elastic lab

from a model to a family on the Hub:
  hf-elastic plan model
  hf-elastic elastify model family --calibration chats.jsonl --budget half:hidden=0.5
  hf-elastic train recipe.yaml
  hf-elastic evaluate trained --data heldout.jsonl
  hf-elastic push trained me/family --upload

one size of a family:
  hf-elastic generate family "Why is the sky blue?" --budget half
  hf-elastic export family half --budget half

all sizes in 8 bits:
  hf-elastic quantize trained small --format fp8

model, family, trained, half and small are folders; where one is read, a Hub repository (org/name) does as well.
`hf-elastic COMMAND --help` says more of a command.
"""

_EXPLAIN = ("datasets", "jinja2", "pyarrow", "safetensors", "yaml")
"""Libraries that say what is wrong with files, in errors of classes of their own."""


def build_parser() -> argparse.ArgumentParser:
    """All subcommands with their options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="hf-elastic", description=_OVERVIEW, epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"hf-elastic {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f".commands.{name}", __package__)
        summary = str(module.__doc__).strip().splitlines()[0]
        subparser = subparsers.add_parser(name, help=summary, description=module.__doc__, formatter_class=raw)
        module.add_arguments(subparser)
        subparser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        subparser.set_defaults(run=module.run)
    return parser


def _show(command: str, others: Callable[..., None]) -> Callable[..., None]:
    """What shows warnings: those about budgets as messages of the command, once each, without a line of Python."""
    told: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if not issubclass(category, BudgetWarning):
            others(message, category, *where)
        elif str(message) not in told:
            told.add(str(message))
            print(f"hf-elastic {command}: {message}", file=sys.stderr)

    return show


@contextmanager
def _said_once() -> Iterator[None]:
    """Show bars of transformers, such as "Loading weights", the first time that there is one of that name, as commands load and save several models;
    and of the lines on functions for which kernels are missing the first for each package."""
    from transformers.utils.logging import set_tqdm_hook

    seen: set[Any] = set()
    kernels = logging.getLogger("transformers.integrations.hub_kernels")

    def once(make: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        name = options.get("desc")
        again = name in seen
        seen.add(name)
        return make(*args, **(options | {"disable": True} if again else options))

    def first(record: logging.LogRecord) -> bool:
        missing = re.search("because (`[^`]+` is not installed)", record.getMessage())
        again = missing is not None and missing[1] in seen
        seen.update(missing.groups() if missing else ())
        return not again

    before = set_tqdm_hook(once)
    kernels.addFilter(first)
    try:
        yield
    finally:
        kernels.removeFilter(first)
        set_tqdm_hook(before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 2 after printing what is wrong, or 1 for an error that nobody expected. Tracebacks are for `--debug`."""
    args = build_parser().parse_args(argv)
    try:
        with warnings.catch_warnings(), _said_once():
            warnings.simplefilter("ignore", PortabilityWarning)  # commands tell it themselves
            warnings.simplefilter("always", BudgetWarning)
            warnings.showwarning = _show(args.command, warnings.showwarning)
            code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (
        BrokenPipeError
    ):  # whoever read the output has seen enough, and Python shall not try to write the rest at its end
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open for as long as the process lives
        return 1
    except Exception as error:
        if args.debug:
            raise
        if isinstance(error, (ValueError, OSError, ImportError)) or type(error).__module__.split(".")[0] in _EXPLAIN:
            print(f"hf-elastic {args.command}: {error}", file=sys.stderr)
            return 2
        again = f"`hf-elastic --debug {args.command} ...` shows where; please report it"
        print(f"hf-elastic {args.command}: unexpected {type(error).__name__}: {error} ({again})", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
