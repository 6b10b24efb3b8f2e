"""Baselines."""

from __future__ import annotations

import argparse
import sys

from baseline_task import TASKS
from baseline_ways import WAYS, Bench
from lab_runs import SEEDS, Runs, lab_arguments

STEPS = 600


def run(options: argparse.Namespace) -> int:
    runs = Runs(options)
    if not options.quick:
        runs.steps = options.steps
    bench = Bench(runs, TASKS[options.task], options.quick)
    for seed in options.seeds:
        for way in options.only or WAYS:
            bench.run(way, seed)
    return 0


if __name__ == "__main__":
    parser = lab_arguments(__doc__)
    parser.add_argument("--task", choices=sorted(TASKS), default="book")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", nargs="+", choices=list(WAYS))
    sys.exit(run(parser.parse_args()))
