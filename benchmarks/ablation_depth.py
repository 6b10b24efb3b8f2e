"""Width against depth: the lab's parent with about 15 % fewer parameters, by narrower layers or by one layer less.

The layer is the one whose absence changes the logits least (arXiv 2511.16664, eq. A 5) among those of which about 15 % of the parameters
can be had; widths are cut to the same number of parameters by the exact counter. Both are distilled alone, for a quarter of the family's
steps. The papers keep 98.1 % of the parent's score by width and 95.2 % by depth. One seed.
"""

from __future__ import annotations

import sys

from harness import Claim, Report
from lab_runs import Runs, compare, lab_arguments

from hf_elastic import elastify
from hf_elastic.architectures.cost import CostModel
from hf_elastic.lab.book import calibration_dataset

CLAIM = "divergence from the parent, width / depth"
WIDTHS = {"hidden": [48, 44, 40], "expert_ffn": [32, 28, 24, 20], "shared_expert_ffn": [64, 56, 48, 40, 32]}
SHARE = 0.85


def sizes(runs: Runs) -> dict[str, dict[str, object]]:
    """The two submodels."""
    parent = runs.parent(0)
    rows = calibration_dataset(runs.tokenizer, 256, 0)
    depth = len(parent.config.layers_block_type)
    scored = elastify(parent, rows, budgets={"shallow": {"layers": depth - 1}}, batch_size=32, progress=False)
    config, count = scored.elastic_config, CostModel(parent.config)
    dropped = []
    for layer in reversed(config.axes["layers"]["ranking"]):
        kept = [i for i in range(depth) if i != layer]
        try:
            share = count(config.resolve({"layers": kept})).total_params / count.full.total_params
        except ValueError:  # a model needs its attention layer
            continue
        dropped.append((abs(share - SHARE) > 0.05, kept))
    shallow = {"layers": min(dropped, key=lambda entry: entry[0])[1]}
    target = count(config.resolve(shallow)).total_params
    narrow = elastify(parent, rows, axes=WIDTHS, budgets={"narrow": target}, batch_size=32, progress=False)
    return {"width": narrow.budgets["narrow"]["sizes"], "depth": shallow}


def main() -> int:
    options = lab_arguments(__doc__).parse_args()
    runs, report = Runs(options), Report("ablation_depth", [Claim(CLAIM, 1.0)])
    found = runs.run("depth-sizes-0", lambda: sizes(runs))
    ways = {}
    for way, chosen in found.items():
        only = {"budget_probabilities": {way: 1.0}, "steps": runs.steps // 4}
        run = runs.family(f"depth-{way}-0", 0, {way: chosen}, **only)
        for when in ("untrained", "trained"):
            ways[f"{way}, {when}"] = [entry for entry in run[when] if entry["name"] == way]
    values = compare(report, ways, steps=runs.steps // 4, sizes=found)
    report.settle(CLAIM, values["width, trained", "width", "kl"] / values["depth, trained", "depth", "kl"])
    runs.say_commits(report)
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(main())
