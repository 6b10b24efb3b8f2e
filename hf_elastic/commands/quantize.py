"""Quantise a family once, so that every size of it is small: codes and scales of the largest, cut.

REPO is a family in 16 or 32 bits. Its weights become codes of 8 bits (fp8, a scale per row) or of 4 (nvfp4, a scale per 16 of a row),
one at a time, so that a model of any size fits. Embeddings, head, router, convolutions and norms stay as they are. So do, with nvfp4,
attention and the Mamba layers that feed it. --keep keeps more; --recipe says it by kinds or names of weights.

The kinds: attention, linear_attention, mamba, short_convolution, mlp, experts, shared_experts; mamba_before_attention are those of the
Mamba layers right before attention. A recipe is a YAML or JSON file such as

  experts: nvfp4
  mamba: fp8
  attention: null

With nvfp4 every size has to be cut at multiples of 16.

  hf-elastic quantize family family-fp8 --format fp8
  hf-elastic quantize family family-4bit --format nvfp4 --keep shared_experts
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import ElasticConfigError
from .common import BUDGET_HELP, add_elastic_config, check_config, check_output, check_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", metavar="REPO", help="Hub repository or folder of an elastic checkpoint")
    parser.add_argument("output", metavar="OUTPUT", help="folder to save the quantised checkpoint to")
    parser.add_argument("--format", metavar="nvfp4|fp8", help="what weights become, by the recipe of that name")
    parser.add_argument("--recipe", metavar="FILE", help="YAML or JSON file that says which weights become what")
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="WEIGHTS",
        help="weights that stay as they are: a kind, a name, or a pattern such as '*.layers.0.*'; may be given several times",
    )
    parser.add_argument(
        "--layout",
        choices=("stock", "nested"),
        default="stock",
        help="nested: files per size, so that who wants one downloads no more (default: stock)",
    )
    parser.add_argument("--budget", help=BUDGET_HELP)
    add_elastic_config(parser)


def run(args: argparse.Namespace) -> None:
    from ..checkpoints.quantizing import quantize_checkpoint
    from ..storage.checksums import has_checksums
    from .plan import plan, render

    recipe = _recipe(args)
    check_source(args.repo)
    check_output(args.output, args.repo)
    check_config(args.repo)
    quantize_checkpoint(
        args.repo,
        args.output,
        recipe,
        keep=args.keep,
        budget=args.budget,
        layout=args.layout,
        elastic_config=args.elastic_config,
        verify=has_checksums(args.repo),
    )
    print(render(plan(args.output)))
    print(f"saved to {args.output}")


def _recipe(args: argparse.Namespace) -> Any:
    if (args.format is None) == (args.recipe is None):
        raise ElasticConfigError("give either --format nvfp4, --format fp8 or --recipe FILE.")
    if args.recipe is not None and not Path(args.recipe).is_file():
        raise ElasticConfigError(f"--recipe={args.recipe} is no file; formats are given as --format.")
    if args.format is not None and args.format not in (known := ("nvfp4", "fp8")):
        raise ElasticConfigError(f"--format={args.format} must be {' or '.join(known)}; files are given as --recipe.")
    return args.format or Path(args.recipe)
