"""All sizes in one run, against other ways to get them: every way has the same number of steps and rows in total.

Ways, each cut from the task's parent in the package and taught by it:

- *one-run*: all sizes and the parent together, one drawn per step, with the lab's recipe;
- *sequential*: prune and distil size after size, each from the one before, scored anew (arXiv 2504.11409); the steps are split among them;
- *alone*: every size cut from the parent and distilled in a run of its own; the steps are split among them;
- *depth*: whole layers dropped instead of widths cut, by importance, to about the same active parameters, in one run;
- *random*, *unsorted*: one run of the parent sorted at random, and as it is, instead of by importance;
- *one-shot*: the same sizes, and fewer experts, in all three orders without training (experts by REAP);
- *experts*: fewer experts in one run;
- *between*, *router*, *offered*: sizes between those that are drawn - given, or offered by a router - never drawn, and drawn as well;
- *skewed*, *progressive*, *stages*, *router-hard*: larger sizes drawn more often; sizes added one after another; short rows first; a router
  that only sees hard samples.

The seed is that of calibration, rows, budgets and random orders; the parent is one. Finished runs are kept, see `lab_runs`. `--only` and
`--seeds` do some of them and write no result; `--kept` writes what the finished ones say, and which were not run. A run takes some minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from baseline_ways import WAYS, Bench, Outcome
from harness import Claim, Report
from lab_runs import SEEDS, Entry, Runs, lab_arguments, mean

from hf_elastic.lab.tasks import TASKS, get_task

STEPS = 600
RATES = {"exact": "share", "trace": "share", "code": "share", "kl": "nats per token"}
ORDERS = ("importance", "random", "unsorted")
"""What is measured without training."""
Done = dict[str, dict[int, Outcome]]
"""Per way and seed, what was measured."""


def finished(bench: Bench, options: argparse.Namespace, ways: Iterable[str]) -> Done:
    """All runs, or with `--kept` those that are done."""
    done: Done = {}
    for seed in options.seeds:
        for way in ways:
            if not options.kept or bench.is_kept(way, seed):
                done.setdefault(way, {})[seed] = bench.run(way, seed)
    return done


def measured(done: Done, way: str, when: str = "trained") -> dict[str, dict[int, Entry]]:
    """Per size and seed the entry of a way; empty if it was not run."""
    found: dict[str, dict[int, Entry]] = {}
    for seed, outcome in done.get(way, {}).items():
        for entry in outcome.get(when, ()):
            found.setdefault(entry["name"], {})[seed] = entry
    return found


def write(report: Report, done: Done, **about: Any) -> None:
    """Record every rate of every way and size."""
    for way in done:
        for when in ("trained", "offered", *ORDERS):
            for size, entries in measured(done, way, when).items():
                first = next(iter(entries.values()))
                costs = {key: first[key] for key in ("active_params", "total_params", "sizes")}
                for rate, unit in RATES.items():
                    values = [entry[rate] for entry in entries.values()]
                    name = f"{way}, {when}: {size}, {rate}"
                    report.measure(name, unit, values, mean=mean(values), seeds=list(entries), **costs, **about)
        report.measure(f"{way}: tokens", "tokens", [outcome["tokens"] for outcome in done[way].values()])


Side = tuple[str, str]
"""A way, and when it was measured."""


def both(done: Done, ours: Side, theirs: Side, rate: str, sizes: Iterable[str]) -> tuple[list[float], list[float]]:
    """A rate of two sides, wherever both have the size with the same seed."""
    pairs: tuple[list[float], list[float]] = ([], [])
    one, other = measured(done, *ours), measured(done, *theirs)
    for size in sizes:
        for seed in one.get(size, {}).keys() & other.get(size, {}).keys():
            pairs[0].append(one[size][seed][rate])
            pairs[1].append(other[size][seed][rate])
    return pairs


def comparisons(bench: Bench, done: Done) -> list[tuple[Claim, float]]:
    """What the runs that are there decide."""
    sizes, settled = list(bench.task.sizes), []
    for way in ("sequential", "alone", "depth"):
        for size in sizes:
            ours, theirs = both(done, ("one-run", "trained"), (way, "trained"), "exact", [size])
            if ours:
                settled.append((Claim(f"one run - {way}: {size}, exact", 0.0, ">="), mean(ours) - mean(theirs)))
    for order in ORDERS[1:]:
        for when, one, other in (
            ("without training", ("one-shot", "importance"), ("one-shot", order)),
            ("after training", ("one-run", "trained"), (order, "trained")),
        ):
            ours, theirs = both(done, one, other, "kl", sizes)
            if ours:
                claim = Claim(f"mean divergence {when}, sorted by importance / {order}", 1.0)
                settled.append((claim, mean(ours) / mean(theirs)))
    fewer = [name for name in measured(done, "experts") if name != "full"]
    ours, theirs = both(done, ("experts", "trained"), ("one-shot", "importance"), "kl", fewer)
    if ours:
        settled.append(
            (Claim("mean divergence with fewer experts, trained / one-shot", 1.0), mean(ours) / mean(theirs))
        )
    for name, sides in {
        "between": (("between", "trained"), ("one-run", "trained")),
        "offered": (("offered", "offered"), ("router", "offered")),
    }.items():
        ours, theirs = both(done, *sides, "exact", measured(done, *sides[1]) if name == "offered" else ["between"])
        if ours:
            claim = Claim(f"sizes between ({name}), exact: drawn - never drawn", 0.0, ">=")
            settled.append((claim, mean(ours) - mean(theirs)))
    return settled


def run(options: argparse.Namespace) -> int:
    runs = Runs(options)
    if not options.quick:
        runs.steps = options.steps
    bench = Bench(runs, get_task(options.task), options.quick)
    some = options.only or options.seeds != list(SEEDS)
    if options.quick:
        options.seeds = [0]
    ways = [way for way in options.only or WAYS if WAYS[way].applies(bench.task)]
    done = finished(bench, options, ways)
    if some and not (options.quick or options.kept):
        return 0
    settled = comparisons(bench, done)
    report = Report(f"baselines_{bench.task.name}", [claim for claim, _ in settled])
    write(report, done, steps=runs.steps, rows=runs.rows, problems=runs.problems)
    missing = {way: [seed for seed in options.seeds if seed not in done.get(way, {})] for way in ways}
    labels = {way: WAYS[way].label for way in ways}
    count = sum(map(len, missing.values()))
    report.measure("runs that were not done", "runs", [count], missing=missing, labels=labels)
    for claim, value in settled:
        report.settle(claim.name, value)
    runs.say_commits(report)
    return report.finish(options)


def main(arguments: list[str] | None = None) -> int:
    parser = lab_arguments(__doc__)
    parser.add_argument("--task", choices=list(TASKS), default="book", help="task of the lab (default: book)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of every way in total (default: {STEPS})")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="do only the runs of these seeds")
    parser.add_argument("--only", nargs="+", choices=list(WAYS), help="do only the runs of these ways")
    parser.add_argument("--kept", action="store_true", help="run nothing: write what the finished runs say")
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
