"""A router that learns sizes on mixtures against one that only ever sees hard samples (with straight-through gradients).

Same run of the lab's family otherwise: its router decides after 30 % of the steps. One seed.
"""

from __future__ import annotations

import sys

from harness import Claim, Report
from lab_runs import SIZES, Runs, by_name, compare, lab_arguments

CLAIM = "mean divergence of the chosen sizes from the parent, soft / hard"


def main() -> int:
    options = lab_arguments(__doc__).parse_args()
    runs, report = Runs(options), Report("ablation_router", [Claim(CLAIM, 1.0)])
    ways = {
        "soft": runs.learned_family("router-0", 0),
        "hard": runs.learned_family("router-hard-0", 0, router_hard_share=1.0),
    }
    values = compare(report, {way: run["trained"] for way, run in ways.items()}, steps=runs.steps)
    for way, run in ways.items():
        for row in run["report"]:
            sizes = by_name(run["trained"])[row["budget"]]["sizes"]
            report.measure(f"{way}: {row['budget']}, distance from its target", "", [row["miss"]], sizes=sizes)
    soft, hard = (sum(values[way, size, "kl"] for size in SIZES) for way in ("soft", "hard"))
    report.settle(CLAIM, soft / hard)
    runs.say_commits(report)
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(main())
