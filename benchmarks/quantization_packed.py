"""Packed families: memory that codes take in place of weights, and what decoding them costs per token.

A random `nemotron_h` MoE parent with half the widths of Nemotron Nano v3 (bfloat16, 16 experts) is quantised in memory to both formats. The decoded model
and the packed ones write tokens one by one, after a prompt of 16, in turns in one process and on one thread.

Claims: NVFP4 is held in at most 0.45 times the bytes of the bfloat16 weights, FP8 in at most 0.65. Embeddings, head, and in NVFP4 attention and the layer before it stay
as they are, and are a larger part of so small a model than of the published one.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
import transformers
from harness import Claim, Report, arguments, in_turns, seconds
from synthetic import published_family

import hf_elastic
from hf_elastic import ElasticConfig, ElasticForCausalLM

HELD = "{}: bytes held, packed / decoded"
TIME = "{}: time per token of a packed model / of the decoded one"
CLAIMS = [Claim(HELD.format("nvfp4"), 0.45), Claim(HELD.format("fp8"), 0.65)]
PROMPT = 16

transformers.logging.set_verbosity_error()


def main() -> int:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    report = Report("quantization_packed", CLAIMS)
    tokens, rounds = (4, 2) if options.quick else (16, 7)
    plain = made(options.quick)
    plain.set_experts_implementation("eager")  # as packed ones have it
    models: dict[str, Any] = {"decoded": plain}
    for format in ("nvfp4", "fp8"):
        models[format] = hf_elastic.quantize(made(options.quick), format)
        held = models[format].get_memory_footprint() / plain.get_memory_footprint()
        report.measure(HELD.format(format), "ratio", [held])
        report.settle(HELD.format(format), held)
    for model in models.values():
        write(model, 2)
    times = in_turns({name: partial(seconds, partial(write, model, tokens)) for name, model in models.items()}, rounds)
    for name, runs in times.items():
        report.measure(f"{name}: time per token", "ms", [1000 * run / tokens for run in runs])
    for format in ("nvfp4", "fp8"):
        ratios = [packed / whole for packed, whole in zip(times[format], times["decoded"], strict=True)]
        report.measure(TIME.format(format), "ratio", ratios)
    return report.finish(options)


def made(quick: bool) -> ElasticForCausalLM:
    """The same random family every time."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"scale": 4, "experts": 8, "layers": "MEM*E"} if quick else {"scale": 2, "experts": 16}
    parent, _ = published_family(torch.bfloat16, vocab_size=8192, **small)
    family = ElasticForCausalLM._from_config(ElasticConfig.from_parent(parent, {}), dtype=torch.bfloat16)
    return family.eval()  # type: ignore[no-any-return]


def write(model: Any, tokens: int) -> None:
    """So many tokens after a prompt."""
    ids = torch.arange(PROMPT)[None]
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)


if __name__ == "__main__":
    sys.exit(main())
