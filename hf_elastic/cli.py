"""The `hf-elastic` command. One module of `hf_elastic.commands` per subcommand; they import the heavy libraries when they run."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ._version import __version__
from .errors import BudgetWarning, PortabilityWarning

COMMANDS = ("lab", "plan", "elastify", "train", "slice", "export", "generate", "evaluate", "push")

_EXPLAIN = ("datasets", "jinja2", "pyarrow", "safetensors", "yaml")
"""Libraries that say what is wrong with files, in errors of classes of their own."""


def build_parser() -> argparse.ArgumentParser:
    """All subcommands with their options."""
    parser = argparse.ArgumentParser(prog="hf-elastic", description="One LLM checkpoint in many sizes.")
    parser.add_argument("--version", action="version", version=f"hf-elastic {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f".commands.{name}", __package__)
        summary = str(module.__doc__).strip().splitlines()[0]
        subparser = subparsers.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 2 after printing what is wrong, or 1 for an error that nobody expected. Tracebacks are for `--debug`."""
    args = build_parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
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
