"""Save one size of an elastic checkpoint as an elastic checkpoint that still nests the smaller sizes.

For a plain checkpoint of one size use `hf-elastic export`. Weights that are stored in few bits stay so: their codes and scales are cut.

  hf-elastic slice family family-half --budget half
"""

from __future__ import annotations

import argparse

from ..errors import ElasticConfigError
from .common import add_source, check_config, check_dtype, check_output, check_source, is_coded, save_with_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser, output="folder to save the slice to")


def run(args: argparse.Namespace) -> None:
    from ..modeling_elastic import ElasticForCausalLM
    from ..storage.checksums import has_checksums
    from ..storage.tokenizer_files import optional_tokenizer
    from .plan import plan, render

    check_source(args.repo)
    check_output(args.output, args.repo)
    args.dtype = check_dtype(args.dtype)
    check_config(args.repo)
    if is_coded(args.repo, args.elastic_config):
        _slice_coded(args)
        print(render(plan(args.output)))
        print(f"saved to {args.output}")
        return
    tokenizer = optional_tokenizer(args.repo)
    model = ElasticForCausalLM.from_pretrained(
        args.repo,
        budget=args.budget,
        elastic_config=args.elastic_config,
        dtype=args.dtype,
        verify=has_checksums(args.repo),
    )
    save_with_tokenizer(model, tokenizer, args.output)
    print(render(plan(args.output)))
    print(f"saved to {args.output}")


def _slice_coded(args: argparse.Namespace) -> None:
    from ..checkpoints.quantizing import slice_checkpoint
    from ..storage.checksums import has_checksums

    if args.dtype != "auto":
        raise ElasticConfigError(
            f"--dtype {args.dtype}: weights of {args.repo} are stored in few bits and stay as they are; leave it out. To decode them, load the size with "
            "from_pretrained(..., budget=...) and save it with save_pretrained."
        )
    slice_checkpoint(
        args.repo,
        args.output,
        args.budget,
        elastic_config=args.elastic_config,
        verify=has_checksums(args.repo),
        progress=False,
    )
