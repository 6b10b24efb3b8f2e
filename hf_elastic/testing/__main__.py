"""`python -m hf_elastic.testing MODEL_TYPE ...`: check tables and print what was found."""

from __future__ import annotations

import argparse
import sys

import transformers

from .conformance import check_architecture
from .tiny import TINY


def main() -> int:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(prog="python -m hf_elastic.testing", description="Check tables of architectures.")
    parser.add_argument("model_types", nargs="+", help=f"one or more of {', '.join(TINY)}")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    arguments = parser.parse_args()
    passed = True
    for model_type in arguments.model_types:
        report = check_architecture(model_type, seed=arguments.seed, raise_on_failure=False)
        print(report)  # noqa: T201 - that is what the command is for
        passed = passed and report.passed
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
