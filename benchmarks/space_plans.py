"""What the chart of the Space shows: every pair of sizes of the `stories` family, who thinks and who answers.

- Accuracy: whole answers right of 100 held-out problems of 5 people (seed 0), by greedy generation. Nothing is chosen by it but where the
  sliders of the Space stand at first.
- Time: of the first 2 of these problems, one at a time on one thread, all plans in turns, means of two rounds; what the thread computes, which
  is wall time on a machine that does nothing else.

The file is what `hf-elastic evaluate` writes as `plans.json`, with machine, versions and commit as all benchmarks have them.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

from harness import ROOT, commit, machine, versions
from kept_runs import KeptRuns, run_arguments
from phase_runs import Answer, Lab

from hf_elastic import PhasePlan
from hf_elastic.evaluation.plans import PREFILL_SPEED

FILE = ROOT.parent / "spaces" / "phase_plans" / "data" / "measurements.json"
TASK, SEED = "stories", 0


def run(options: argparse.Namespace) -> int:
    problems, timed, rounds = (4, 1, 1) if options.quick else (100, 2, 2)
    lab = Lab(TASK, options.quick)
    plans = {f"{a} - {b}": PhasePlan(a, b) for a, b in product(lab.sizes, lab.sizes)}
    runs = KeptRuns(options, steps=0)
    answers = {
        name: runs.run(
            f"space-{lab.key}-{name}".replace(" ", ""), lambda plan=plan: lab.solve(plan, "heldout", SEED, problems)
        )
        for name, plan in plans.items()
    }
    todo = {name: (plan, [answers[name]]) for name, plan in plans.items()}
    times = [
        runs.run(f"space-{lab.key}-turn-{turn}", lambda turn=turn: lab.times(todo, timed, turn))
        for turn in range(rounds)
    ]
    points = [point(lab, plans[name], answers[name], [turn[name] for turn in times]) for name in plans]
    about = {"machine": machine(), "versions": versions(), "commit": commit(), "seed": SEED, "timed_problems": timed}
    for p in points:
        print(
            f"{p['thinking']:>8} thinks, {p['answering']:>8} answers: {p['accuracy']:.2f} right, {p['seconds']:.3f} s"
        )
    output: Path | None = options.output or (None if options.quick else FILE)
    if output:
        output.write_text(json.dumps({"task": TASK, **about, "points": points}, indent=1) + "\n", encoding="utf-8")
    return 0


def point(lab: Lab, plan: PhasePlan, answers: list[Answer], times: list[float]) -> dict[str, Any]:
    """One plan, as the Space reads it."""
    thinking, answering = (phase.budget for phase in plan.phases)
    costs = lab.model.elastic_config.costs()
    tokens = {key: fmean(answer[key] for answer in answers) for key in ("prompt", "thinking", "answer")}
    read = [tokens["prompt"], 0.0 if thinking == answering else tokens["prompt"] + tokens["thinking"]]
    written = [tokens["thinking"], tokens["answer"]]
    active = [costs[size].active_params for size in (thinking, answering)]
    right = fmean(answer["right"] for answer in answers)
    return {
        "plan": plan.to_dict(),
        "thinking": thinking,
        "answering": answering,
        "max_thinking_tokens": None,
        "handover": answers[0]["handover"],
        "accuracy": right,
        "metrics": {"exact": right, "code": fmean(answer["parts"] for answer in answers)},
        "n": len(answers),
        "prompt_tokens": tokens["prompt"],
        "thinking_tokens": tokens["thinking"],
        "answer_tokens": tokens["answer"],
        "cost": sum(a * (w + r / PREFILL_SPEED) for a, w, r in zip(active, written, read, strict=True)),
        "prefill_speed": PREFILL_SPEED,
        "seconds": median(times),
        "seconds_of_rounds": times,
        "device": "cpu",
        "dtype": "float32",
    }


if __name__ == "__main__":
    sys.exit(run(run_arguments(__doc__).parse_args()))
