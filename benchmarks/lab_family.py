"""One training run for all sizes, against every other way to get them: the `book` family of the lab.

Per seed (of the parent, the problems and the budget stream) and size, the share of held-out problems of 12 lines whose whole answer is
right, by generation:

- *family*: one run for the parent and three sizes, one never-trained size between two of them measured as well;
- *router*: the same run, but its sizes are learned in its first 30 % under targets of active parameters;
- *untrained*: the same sizes cut from the same sorted parent, without training;
- *alone*: every size distilled in a run of its own, each with all the steps of the family (three times the tokens in total);
- *split*: the same with a quarter of the steps each, so that all runs together have the family's tokens;
- *scratch*: models of these sizes trained on the problems themselves, as the parent was, with all the steps.

The parent itself needs no run in *alone* and *split*: distilling it from itself changes nothing. Three seeds take about 80 minutes of
one core; runs are kept, see `lab_runs`. `--seeds 1` does only the runs of that seed, beside others, and writes no result.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from harness import Claim, Report
from lab_runs import FAMILY, SEEDS, SIZES, Runs, by_name, lab_arguments, mean

GOALS = {"full": 0.98, "half": 0.98, "third": 0.95}
"""What the family has to reach; for `quarter` nothing had ever been reached."""
CLAIMS = [Claim(f"family: {size}, exact", goal, ">=") for size, goal in GOALS.items()]
CLAIMS += [Claim(f"family - split: {size}, exact", 0.0, ">=") for size in SIZES]
CLAIMS += [Claim(f"router: {size}, largest distance of any seed from its target", 0.05) for size in SIZES]


def seed_runs(runs: Runs, seed: int) -> dict[str, Any]:
    """All runs of one seed."""
    alone = {size: {size: FAMILY[size]} for size in SIZES}
    only = {size: {"budget_probabilities": {size: 1.0}} for size in SIZES}
    return {
        "family": runs.standard_family(seed),
        "router": runs.learned_family(f"router-{seed}", seed),
        "alone": {s: runs.family(f"alone-{s}-{seed}", seed, alone[s], **only[s]) for s in SIZES},
        "split": {
            s: runs.family(f"split-{s}-{seed}", seed, alone[s], **only[s], steps=runs.steps // 4) for s in SIZES
        },
        "scratch": {s: runs.from_scratch(f"scratch-{s}-{seed}", seed, FAMILY[s]) for s in SIZES},
    }


def run(options: argparse.Namespace) -> int:
    runs = Runs(options)
    seeds = [0] if options.quick else options.seeds or list(SEEDS)
    done = [seed_runs(runs, seed) for seed in seeds]
    if options.seeds and not options.quick:
        return 0
    report = Report("lab_family", CLAIMS)
    family = [by_name(entry["family"]["trained"]) for entry in done]
    untrained = [by_name(entry["family"]["untrained"]) for entry in done]
    router = [by_name(entry["router"]["trained"]) for entry in done]
    about = {"seeds": seeds, "steps": runs.steps, "problems": runs.problems}
    exact: dict[tuple[str, str], float] = {}
    for size in ("full", *SIZES, "between"):
        columns = {"family": [e[size] for e in family], "untrained": [e[size] for e in untrained]}
        if size != "between":
            columns["router"] = [e[size] for e in router]
        if size in SIZES:
            columns["alone"] = [by_name(e["alone"][size]["trained"])[size] for e in done]
            columns["split"] = [by_name(e["split"][size]["trained"])[size] for e in done]
            columns["scratch"] = [e["scratch"][size] for e in done]
        for way, entries in columns.items():
            costs = {
                key: [e[key] for e in entries]
                for key in ("active_params", "total_params", "sizes")
                if key in entries[0]
            }
            for rate in ("exact", "trace", "code", "kl"):
                if rate in entries[0]:
                    unit = "nats per token" if rate == "kl" else "share"
                    values = [e[rate] for e in entries]
                    report.measure(f"{way}: {size}, {rate}", unit, values, mean=mean(values), **costs, **about)
            exact[way, size] = mean([e["exact"] for e in entries])
    report.measure("tokens of the family's run", "tokens", [e["family"]["tokens"] for e in done])
    for size in GOALS:
        report.settle(f"family: {size}, exact", exact["family", size])
    for size in SIZES:
        report.settle(f"family - split: {size}, exact", exact["family", size] - exact["split", size])
        misses = [abs(row["miss"]) for e in done for row in e["router"]["report"] if row["budget"] == size]
        report.settle(f"router: {size}, largest distance of any seed from its target", max(misses))
    runs.say_commits(report)
    return report.finish(options)


if __name__ == "__main__":
    parser = lab_arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", help="do only the runs of these seeds, and write no result")
    sys.exit(run(parser.parse_args()))
