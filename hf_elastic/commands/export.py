"""Write one size as a plain checkpoint that transformers loads without this package.

What is written is a checkpoint of the stock model, with its tokenizer. To keep the smaller sizes in it use `hf-elastic slice`.

  hf-elastic export family half --budget half
"""

from __future__ import annotations

import argparse

from .common import add_source, check_dtype, check_output, check_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser, output="folder to write the plain checkpoint to")
    parser.add_argument(
        "--heterogeneous",
        action="store_true",
        help="allow sizes that differ per layer; loading the result needs hf_elastic",
    )


def run(args: argparse.Namespace) -> None:
    from ..architectures.portability import portability, words
    from ..modeling_elastic import ElasticForCausalLM
    from ..storage.checksums import has_checksums

    check_source(args.repo)
    check_output(args.output, args.repo)
    args.dtype = check_dtype(args.dtype)
    model = ElasticForCausalLM.from_pretrained(
        args.repo,
        budget=args.budget,
        elastic_config=args.elastic_config,
        dtype=args.dtype,
        verify=has_checksums(args.repo),
    )
    model.export(args.output, heterogeneous=args.heterogeneous)
    config = model.elastic_config
    obstacles = portability(config.architecture, config.parent_config, model.submodel, model.dtype)
    if obstacles:
        print(f"not for every program: {words(obstacles)}")
    print(f"exported {model.num_parameters():,} parameters to {args.output}")
