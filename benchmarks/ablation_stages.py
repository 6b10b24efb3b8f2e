"""One stage against two, in runs of the lab's family with as many steps.

One stage: whole problems (up to 130 tokens), all sizes alike. Two stages, as the papers have them: short rows with all sizes alike, then
whole ones with the larger sizes drawn more often. Short rows make the first stage cheaper, and hold no answers of long problems. One seed.
"""

from __future__ import annotations

import sys

from harness import Claim, Report
from lab_runs import BETWEEN, SKEWED, Runs, compare, lab_arguments

SHORT_TOKENS = 80
CLAIM = "tokens of two stages / tokens of one"


def main() -> int:
    options = lab_arguments(__doc__).parse_args()
    runs, report = Runs(options), Report("ablation_stages", [Claim(CLAIM, 1.0)])
    first = runs.steps * 6 // 10
    stages = [
        {"steps": first, "max_length": SHORT_TOKENS},
        {"steps": runs.steps - first, "budget_probabilities": SKEWED},
    ]
    one = runs.standard_family(0)
    two = runs.family("stages-two-0", 0, stages=stages, measured={"between": BETWEEN})
    compare(report, {"one stage": one["trained"], "two stages": two["trained"]}, stages=stages)
    report.settle(CLAIM, two["tokens"] / one["tokens"])
    runs.say_commits(report)
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(main())
