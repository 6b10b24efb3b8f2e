"""Write one size as a plain checkpoint that transformers loads without this package.

What is written is a checkpoint of the stock model, with its tokenizer. To keep the smaller sizes in it use `hf-elastic slice`.

Of a quantised family codes and scales are cut and written as they are, for vLLM and other engines; --dequantize writes weights instead.

  hf-elastic export family half --budget half
  hf-elastic export family-fp8 half-fp8 --budget half
"""

from __future__ import annotations

import argparse

from ..errors import ElasticConfigError
from .common import add_source, check_dtype, check_output, check_source, is_coded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser, output="folder to write the plain checkpoint to")
    parser.add_argument(
        "--heterogeneous",
        action="store_true",
        help="allow sizes that differ per layer; loading the result needs hf_elastic",
    )
    parser.add_argument(
        "--dequantize", action="store_true", help="of a quantised family, write weights in 16 bits instead of codes"
    )
    parser.add_argument(
        "--layout",
        choices=("compressed-tensors", "modelopt"),
        help="of codes and scales: whose words (default: compressed-tensors)",
    )


def run(args: argparse.Namespace) -> None:
    check_source(args.repo)
    check_output(args.output, args.repo)
    args.dtype = check_dtype(args.dtype)
    coded = is_coded(args.repo, args.elastic_config)
    if not coded and (args.dequantize or args.layout is not None):
        option = "--dequantize" if args.dequantize else "--layout"
        raise ElasticConfigError(f"{option}: {args.repo} is not quantised; leave it out.")
    if args.dequantize and args.layout is not None:
        raise ElasticConfigError("--layout is of codes, and with --dequantize there are none; give one of them.")
    (_export_codes if coded and not args.dequantize else _export_weights)(args)


def _export_codes(args: argparse.Namespace) -> None:
    from ..architectures.portability import words
    from ..checkpoints.exporting import export_checkpoint
    from ..storage.checksums import has_checksums

    if args.dtype != "auto":
        raise ElasticConfigError(
            f"--dtype {args.dtype}: weights of {args.repo} are stored in few bits and are written as they are; leave it out, or give --dequantize."
        )
    obstacles = export_checkpoint(
        args.repo,
        args.output,
        args.budget,
        layout=args.layout or "compressed-tensors",
        heterogeneous=args.heterogeneous,
        elastic_config=args.elastic_config,
        verify=has_checksums(args.repo),
        progress=False,
    )
    if obstacles:
        print(f"not for every program: {words(obstacles)}")
    print(f"exported codes and scales to {args.output}")


def _export_weights(args: argparse.Namespace) -> None:
    from ..architectures.portability import portability, words
    from ..modeling_elastic import ElasticForCausalLM
    from ..storage.checksums import has_checksums

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
