"""Save one size of an elastic checkpoint as an elastic checkpoint that still nests the smaller sizes.

For a plain checkpoint of one size use `hf-elastic export`.

  hf-elastic slice family family-half --budget half
"""

from __future__ import annotations

import argparse

from .common import add_source, check_config, check_dtype, check_output, check_source, save_with_tokenizer


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
