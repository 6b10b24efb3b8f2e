"""Real text with 125M parameters: the family of `text_lm.py`, larger, for a GPU of 80 GB; made to take less than eight minutes there.

As `python benchmarks/text_lm.py --size 100m --device cuda`: matrices are multiplied in bfloat16, steps have 24,576 tokens, the text is about 120 MB.
`--quick --device cpu` goes through everything in its smallest form.
"""

from __future__ import annotations

import sys

import torch
from text_lm import run, text_arguments


def main() -> int:
    parser = text_arguments(__doc__)
    parser.set_defaults(size="100m", device="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("text_lm_gpu.py trains on a CUDA device, and torch sees none.")
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
