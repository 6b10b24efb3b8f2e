"""Nested self-speculation: a small size drafts, the large one verifies, one set of weights.

- Output: the lab's trained family solves held-out `book` problems of 12 lines greedily, in float32, the whole parent alone and with every
  smaller size as its drafter, for several numbers of drafted tokens per pass. Sequences that differ are counted, and the share of drafted
  tokens that were accepted, and new tokens per pass of the parent, are reported. (These models are so small that Python takes the time.)
- Speed: random parents in bfloat16, large enough that reading weights takes the time, one sequence. The drafter keeps the first quarter of
  the layers. Random weights would agree on nothing, so what the other layers add is scaled by a factor: 0 makes the drafter always right,
  larger ones make it err. **The acceptance is thus set by construction, and what is measured is what speculation costs and saves at that
  acceptance**: the time of `generate` per new token, prompts included, speculative and alone in turns. One parent has dense FFNs, the other
  experts, where a pass over several tokens reads more experts than one over a single token. On a CPU without Mamba kernels the scan over a
  few tokens runs upstream's reference code. Passes over several tokens round otherwise than passes over one, and random logits are often
  nearly tied in bfloat16: how far both texts agree is reported, and not claimed.

Claims: no sequence of the trained family differs; with a drafter that is always right the dense parent takes at most 0.8 of the time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import Claim, Report, in_turns, seconds
from lab_runs import LETTERS, SIZES, Runs, lab_arguments
from processes import in_child
from synthetic import nano_like, write_checkpoint
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hf_elastic.lab.book import THINK_START, problems

DRAFTS = (2, 4, 8)
FACTORS = (0.0, 0.03, 0.1)
PATTERNS = {"dense": "M-M*" * 4, "experts": "MEM*" * 4}
MISMATCHES = "trained family, greedy: sequences that differ from the parent's"
SPEED = "dense, drafter always right: time per token, speculative / alone"
CLAIMS = [Claim(MISMATCHES, 0, "=="), Claim(SPEED, 0.8)]

transformers.logging.set_verbosity_error()  # also in the child processes, which import this module
transformers.logging.disable_progress_bar()


def run(options: argparse.Namespace) -> int:
    report = Report("speculation", CLAIMS)
    for name, pattern in PATTERNS.items():
        ratio = speed(report, name, pattern, options.quick)
        if name == "dense":
            report.settle(SPEED, ratio)
    runs = Runs(options)
    found = runs.run("speculation-0", lambda: accepted(runs, 2 if options.quick else 50))
    for row in found:
        name, about = f"trained family, {row['drafter']} drafts {row['count']}", {"problems": row["problems"]}
        report.measure(f"{name}: accepted / drafted", "share", [row["acceptance"]], **about)
        report.measure(f"{name}: new tokens per pass of the parent", "tokens", [row["per_pass"]], **about)
    report.settle(MISMATCHES, sum(row["mismatches"] for row in found))
    runs.say_commits(report)
    return report.finish(options)


# -- output and acceptance ---------------------------------------------------------------------------------------------


def accepted(runs: Runs, count: int) -> list[dict[str, Any]]:
    """Per drafter and number of drafts what happened on so many problems."""
    family = runs.trained_family("trained-0", 0)
    source = problems("heldout", LETTERS, 1)
    prompts = [runs.tokenizer(next(source).prompt + THINK_START, return_tensors="pt").input_ids for _ in range(count)]
    settings = {"do_sample": False, "max_new_tokens": 12 * LETTERS, "return_dict_in_generate": True}
    alone = [family.generate(ids, **settings).sequences for ids in prompts]
    rows = []
    for drafter in SIZES:
        for k in DRAFTS:
            outs = [family.generate(ids, draft_budget=drafter, num_draft_tokens=k, **settings) for ids in prompts]
            new = sum(out.sequences.shape[1] - ids.shape[1] for out, ids in zip(outs, prompts, strict=True))
            rows.append(
                {
                    "drafter": drafter,
                    "count": k,
                    "problems": count,
                    "mismatches": sum(
                        not torch.equal(out.sequences, text) for out, text in zip(outs, alone, strict=True)
                    ),
                    "acceptance": sum(out.accepted for out in outs) / sum(out.drafted for out in outs),
                    "per_pass": new / sum(1 + out.passes + out.rereads for out in outs),
                }
            )
    return rows


# -- speed -------------------------------------------------------------------------------------------------------------


def speed(report: Report, name: str, pattern: str, quick: bool) -> float:
    """Measure one parent; returns the ratio of times with a drafter that is always right and 4 drafts."""
    config = parent(pattern, quick)
    with tempfile.TemporaryDirectory(prefix="hf-elastic-speculation-") as scratch:
        in_child(write_checkpoint, Path(scratch), config, {"draft": {"layers": list(range(len(pattern) // 4))}})
        rows = in_child(_measure, Path(scratch), quick).result
    for row in rows:
        about = {key: row[key] for key in ("factor", "count", "acceptance", "rereads", "active", "active_drafter")}
        what = f"{name}, {row['count']} drafts, {row['acceptance']:.2f} accepted"
        report.measure(f"{what}: time per token, speculative", "s", row["speculative"], **about)
        report.measure(f"{what}: time per token, alone", "s", row["alone"], **about)
        report.measure(f"{what}: time per token, speculative / alone", "", [row["ratio"]], **about)
        report.measure(f"{what}: share of texts until they first differ", "", [row["agreement"]], **about)
    return next(row["ratio"] for row in rows if row["factor"] == 0 and row["count"] == 4)


def parent(pattern: str, quick: bool) -> PreTrainedConfig:
    """Half the widths of Nemotron Nano v3, with a dense FFN as wide as a Nano v2's is to its hidden width."""
    scale = 8 if quick else 2
    config = nano_like(torch.bfloat16, scale=scale, experts=16 if quick else 32, layers=pattern, vocab_size=8192)
    config.intermediate_size = 3 * config.hidden_size
    return config


@torch.no_grad()
def _measure(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Child process: set how often the drafter is right, then generate alone and with it in turns."""
    family = AutoModelForCausalLM.from_pretrained(folder)
    costs = family.elastic_config.costs()
    drafter = family.elastic_config.submodel("draft")
    ends = ("out_proj.weight", "o_proj.weight", "down_proj.weight", "down_proj")  # what a layer adds to the residual
    written = [
        (p, p.clone())
        for i, layer in enumerate(family.architecture.layers_of(family))
        if i not in drafter.layers
        for key, p in layer.named_parameters()
        if key.endswith(ends)
    ]
    ids = torch.randint(3, family.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
    tokens, rounds = (8, 1) if quick else (48, 3)
    settings = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None, "pad_token_id": 0}
    rows = []
    for factor in FACTORS:
        for parameter, values in written:
            parameter.copy_(values * factor)
        for k in (4,) if quick else DRAFTS:
            last: dict[str, Any] = {}

            def generate(name: str, last: dict[str, Any] = last, **options: Any) -> float:
                def action() -> None:
                    last[name] = family.generate(ids, return_dict_in_generate=True, **settings, **options)

                return seconds(action) / tokens

            actions = {
                "alone": lambda: generate("alone"),
                "speculative": lambda: generate("speculative", draft_budget="draft", num_draft_tokens=k),  # noqa: B023
            }
            in_turns(actions, 1)  # warm up
            times = in_turns(actions, rounds)
            out, same = last["speculative"], last["alone"].sequences == last["speculative"].sequences
            medians = {name: statistics.median(runs) for name, runs in times.items()}
            rows.append(
                {
                    **times,
                    "factor": factor,
                    "count": k,
                    "acceptance": out.acceptance,
                    "rereads": out.rereads,
                    "ratio": medians["speculative"] / medians["alone"],
                    "agreement": same[0, ids.shape[1] :].long().cumprod(0).float().mean().item(),
                    "active": costs["full"].active_params,
                    "active_drafter": costs["draft"].active_params,
                }
            )
    return rows


if __name__ == "__main__":
    sys.exit(run(lab_arguments(__doc__).parse_args()))
