"""What sorting by importance is worth: the lab's family from the sorted parent, and from the parent as it is.

Measured before training, where it decides most, and after it. One seed.
"""

from __future__ import annotations

import sys

from harness import Claim, Report
from lab_runs import BETWEEN, SIZES, Runs, compare, lab_arguments

CLAIMS = [
    Claim("mean divergence from the parent without training, sorted / not sorted", 1.0),
    Claim("mean divergence from the parent after training, sorted / not sorted", 1.0),
]


def main() -> int:
    options = lab_arguments(__doc__).parse_args()
    runs, report = Runs(options), Report("ablation_sorting", CLAIMS)
    ordered = runs.standard_family(0)
    unordered = runs.family("sorting-none-0", 0, sort=False, measured={"between": BETWEEN})
    for claim, when in zip(CLAIMS, ("untrained", "trained"), strict=True):
        ways = {f"sorted, {when}": ordered[when], f"not sorted, {when}": unordered[when]}
        values = compare(report, ways, steps=runs.steps)
        with_order, without = (sum(values[way, size, "kl"] for size in SIZES) for way in ways)
        report.settle(claim.name, with_order / without)
    runs.say_commits(report)
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(main())
