"""Drawing all sizes alike against drawing the larger ones more often, in one run of the lab's family each.

The papers draw 0.5 / 0.3 / 0.2 from large to small where contexts are long, because the largest member gets worse otherwise. Here the
largest has to come out at least as near to the parent. One seed.
"""

from __future__ import annotations

import sys

from harness import Claim, Report
from lab_runs import BETWEEN, SKEWED, Runs, compare, lab_arguments

CLAIM = "divergence of the largest size from the parent, skewed / uniform"


def main() -> int:
    options = lab_arguments(__doc__).parse_args()
    runs, report = Runs(options), Report("ablation_sampling", [Claim(CLAIM, 1.0)])
    uniform = runs.standard_family(0)
    skewed = runs.family("sampling-skewed-0", 0, budget_probabilities=SKEWED, measured={"between": BETWEEN})
    values = compare(
        report, {"uniform": uniform["trained"], "skewed": skewed["trained"]}, steps=runs.steps, probabilities=SKEWED
    )
    report.settle(CLAIM, values["skewed", "full", "kl"] / values["uniform", "full", "kl"])
    runs.say_commits(report)
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(main())
