"""Real text: a byte-level language model of Python's standard library, and a family of sizes distilled from it in one run.

The text is the source of the interpreter's own library (tests, encodings and idlelib left out), one file in sixteen held out by the
checksum of its name. The parent has the layers of the lab's `book` model at width 128. Measured on held-out rows of 256 bytes, per budget:
perplexity per byte and bits per byte (its logarithm to the base 2), before and after the family's run, and for the same sizes distilled
one by one with the family's steps split among them. One seed; about 12 minutes of one core, runs are kept as in `lab_runs`.
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from harness import Claim, Report
from kept_runs import KeptRuns, run_arguments
from language import draw, stream, train
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import NemotronHForCausalLM, PreTrainedTokenizerFast

from hf_elastic import ElasticForCausalLM, elastify
from hf_elastic.lab.book_model import parent_config
from hf_elastic.lab.family import train_family

ROW_BYTES, ROWS = 256, 8
HELD_OUT_EVERY = 16
BUDGETS = {
    "half": {"hidden": 88, "expert_ffn": 48, "shared_expert_ffn": 96},
    "third": {"hidden": 64, "expert_ffn": 24, "shared_expert_ffn": 48},
    "quarter": {"hidden": 48, "expert_ffn": 16, "shared_expert_ffn": 32},
}
BETTER = "bits per byte, {}: family / the same size cut without training"
CLAIMS = [Claim(BETTER.format(name), 1.0) for name in BUDGETS]


def text(held_out: bool) -> torch.Tensor:
    """All files of one split in a row, as bytes in `int64`."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "encodings", "idlelib", "site-packages", "idle_test"}
    parts = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not skipped & set(name.split("/")) and (zlib.crc32(name.encode()) % HELD_OUT_EVERY == 0) == held_out:
            parts.append(path.read_bytes())
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8).long()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte; the trainer asks for a tokenizer though the rows are tokens already."""
    vocabulary = {chr(byte): byte for byte in range(256)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=chr(0)))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=chr(0), eos_token=chr(10))


def train_parent(data: torch.Tensor, steps: int) -> NemotronHForCausalLM:
    torch.manual_seed(0)
    config = parent_config(
        vocab_size=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=10,
        hidden_size=128,
        head_dim=32,
        mamba_head_dim=32,
        moe_intermediate_size=96,
        moe_shared_expert_intermediate_size=192,
        initializer_range=0.02,
        max_position_embeddings=1024,
    )
    return train(NemotronHForCausalLM(config), draw(data, ROW_BYTES, 1), steps=steps, batch_size=ROWS)


@torch.no_grad()
def bits_per_byte(family: ElasticForCausalLM, data: torch.Tensor, budgets: Mapping[str, Any]) -> dict[str, float]:
    """Mean over the rows of the held-out text, each read without what comes before it."""
    rows = data[: len(data) // ROW_BYTES * ROW_BYTES].view(-1, ROW_BYTES)
    rows = rows[:: max(1, len(rows) // 320)]
    bits = {}
    for name, budget in budgets.items():
        with family.at(budget):
            losses = [
                F.cross_entropy(family(part).logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
                for part in rows.split(16)
            ]
        bits[name] = float(sum(losses)) / rows[:, 1:].numel() / math.log(2)
    return bits


def run(options: argparse.Namespace) -> int:
    runs, report = KeptRuns(options, steps=4 if options.quick else 1000), Report("byte_lm", CLAIMS)
    training, held_out = text(held_out=False), text(held_out=True)
    if options.quick:
        held_out = held_out[: 16 * ROW_BYTES]
    parent = runs.model("byte-parent", lambda: train_parent(training, runs.steps))
    calibration = [
        {"input_ids": row.tolist()} for row, _ in zip(draw(training, ROW_BYTES, 2), range(128), strict=False)
    ]
    measured = {"full": None, **{name: name for name in BUDGETS}}

    def distil(steps: int, **settings: Any) -> dict[str, dict[str, float]]:
        family = elastify(parent, calibration, budgets=BUDGETS, batch_size=16, progress=False)
        before = bits_per_byte(family, held_out, measured)
        more = {
            "per_device_train_batch_size": ROWS,
            "learning_rate": 3e-3,
            "rows": stream(training, ROW_BYTES, 3),
            **settings,
        }
        with tempfile.TemporaryDirectory(prefix="hf-elastic-bytes-") as scratch:
            train_family(family, byte_tokenizer(), Path(scratch), steps=steps, progress=False, **more)
        return {"untrained": before, "trained": bits_per_byte(family, held_out, measured)}

    together = runs.run("byte-family", lambda: distil(runs.steps))
    ways = {"family": together["trained"], "untrained": together["untrained"]}
    ways["split"] = {
        name: runs.run(
            f"byte-split-{name}", lambda name=name: distil(runs.steps // 4, budget_probabilities={name: 1.0})
        )["trained"][name]
        for name in BUDGETS
    }
    costs = elastify(parent, budgets=BUDGETS, sort=False).elastic_config.costs()
    about = {"steps": runs.steps, "train_bytes": len(training), "held_out_bytes": len(held_out)}
    for way, bits in ways.items():
        for name, value in bits.items():
            cost = {"active_params": costs[name].active_params, "total_params": costs[name].total_params}
            report.measure(f"{way}: {name}, bits per byte", "bits", [value], **cost, **about)
            report.measure(f"{way}: {name}, perplexity per byte", "", [2**value])
    for name in BUDGETS:
        report.settle(BETTER.format(name), ways["family"][name] / ways["untrained"][name])
    runs.say_commits(report)
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(run(run_arguments(__doc__).parse_args()))
