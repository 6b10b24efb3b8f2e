"""Who should think and who should answer: plans of two sizes, and plans chosen per prompt, against budget control with one size.

Budget control with one size is what everybody has: a size, and a cap on its thinking tokens. A plan of two lets one size think and another
answer (arXiv 2605.07182). A plan chosen per prompt lets a small size answer, and a larger one where the small one is not confident. On every task
of the lab, with its trained family:

- Accuracy: whole answers right (`exact`) and parts of answers (`code`) of held-out problems, by generation. One family, so the three seeds are
  those of the problems. Every size thinks, every size answers, without a cap and under one of half the thinking.
- Time: measured of whole plans, one sequence at a time on one thread, all plans in turns, medians of rounds; see `phase_runs`, also for tasks
  whose sizes take the same time.
- Nothing is chosen on held-out problems: thresholds and signals of plans per prompt, and the plans whose gains are claimed, are those that
  are best on problems of the training split under a seed of their own.
- The goal, on every task: at no more time at least 0.10 more answers right than any one size, or 1.5 times less time at no less accuracy
  (0.01 less is taken for none).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from statistics import fmean as mean
from typing import Any

from harness import Claim, Report
from kept_runs import KeptRuns, run_arguments
from phase_runs import SIGNALS, STAND_IN, VALIDATION, Answer, Lab, auroc, cascade

from hf_elastic import PhasePlan
from hf_elastic.evaluation.plans import pareto_front

TASKS = ("stories", "book")
SEEDS = (0, 1, 2)
CAPS = (0.5, None)
"""Shares of the thinking tokens that the longest of 50 problems takes."""
SHARES = tuple(i / 20 for i in range(1, 20))
"""Shares of validation problems that escalate; each gives a threshold to choose from."""
CHOSEN = 5
"""Plans per prompt that are measured on held-out problems."""
EQUAL = 0.01
GOAL = "{}: the goal (1 is met), the larger of gain / 0.10 and time saved / 1.5"
Point = dict[str, Any]


def run(options: argparse.Namespace) -> int:
    runs = KeptRuns(options, steps=0)
    tasks = options.task or list(TASKS)
    report = Report("phases", [Claim(GOAL.format(task), 1.0, ">=") for task in tasks])
    for name in tasks:
        lab = Lab(name, options.quick)
        points = measured(runs, lab, options.quick)
        describe(report, runs, lab, points)
        goal(report, name, points)
    runs.say_commits(report)
    return report.finish(options)


# -- what is measured --------------------------------------------------------------------------------------------------


def measured(runs: KeptRuns, lab: Lab, quick: bool) -> list[Point]:
    """All plans: their answers on validation and held-out problems, and their times."""
    seeds, count, checks = ([0], 4, 6) if quick else (list(SEEDS), 50, 100)
    fixed = fixed_plans(lab, quick)
    found: dict[str, dict[str, list[list[Answer]]]] = {}
    for label, plan in fixed.items():
        found[label] = _answers(runs, lab, label, plan, seeds, count, checks)
    timed = {label: (plan, found[label]["heldout"]) for label, plan in fixed.items()}
    problems, rounds = (1, 1) if quick else (1 if lab.name in STAND_IN else 2, 3)
    times = timed_in_turns(runs, lab, "times", timed, problems, rounds)
    points = [point(label, fixed[label], found[label], times[label]) for label in fixed]
    chosen = choose(candidates(runs, lab, points, checks), points)
    for label, plan in chosen.items():
        found[label] = _answers(runs, lab, label, plan, seeds, count, checks)
    # The best again, so that all that are compared are timed beside each other.
    single = [p for p in points if p["thinking"] == p["answering"]]
    best = [some[i]["label"] for some in (points, single) for i in pareto_front(some, "seconds")]
    plans = {**{label: fixed[label] for label in best}, **chosen}
    timed = {label: (plan, found[label]["heldout"]) for label, plan in plans.items()}
    again = timed_in_turns(runs, lab, "times-best", timed, problems, rounds)
    points = [p | {"seconds": median(again.get(p["label"], p["times"]))} for p in points]
    return points + [point(label, plan, found[label], again[label]) for label, plan in chosen.items()]


def timed_in_turns(
    runs: KeptRuns, lab: Lab, name: str, plans: Mapping[str, Any], problems: int, rounds: int
) -> dict[str, list[float]]:
    """The time of every plan in every round; a round is kept when it is done."""
    turns = [
        runs.run(f"plans-{lab.key}-{name}-{turn}", lambda turn=turn: lab.times(plans, problems, turn))
        for turn in range(rounds)
    ]
    return {label: [turn[label] for turn in turns] for label in plans}


def _answers(
    runs: KeptRuns, lab: Lab, label: str, plan: PhasePlan, seeds: Sequence[int], count: int, checks: int
) -> dict[str, list[list[Answer]]]:
    def solve() -> dict[str, list[list[Answer]]]:
        return {
            "validation": [lab.solve(plan, "train", VALIDATION, checks)],
            "heldout": [lab.solve(plan, "heldout", seed, count) for seed in seeds],
        }

    kept = runs.run(f"plans-{lab.key}-{label}".replace(" ", "_"), solve)
    first = {"validation": checks, "heldout": count}  # kept runs may have more
    return {split: [answers[: first[split]] for answers in kept[split]] for split in first}


def fixed_plans(lab: Lab, quick: bool) -> dict[str, PhasePlan]:
    """Every size with every size under every cap, by a name."""
    sizes = lab.sizes[-2:] if quick else lab.sizes
    plans = {}
    for share, thinking, answering in product(CAPS[-1:] if quick else CAPS, sizes, sizes):
        cap = None if share is None else int(share * lab.thinking_tokens)
        plans[f"{thinking} - {answering} - {cap}"] = PhasePlan(thinking, answering, max_thinking_tokens=cap)
    return plans


def point(label: str, plan: PhasePlan, found: Mapping[str, Any], times: Sequence[float]) -> Point:
    """A plan with its rates: `accuracy` of held-out problems, `validation`, and what else is said of it."""
    last, heldout = plan.phases[-1], found["heldout"]
    rate = {key: [mean([a[key] for a in answers]) for answers in heldout] for key in ("right", "parts", "trace")}
    told = {key: mean([a[key] for answers in heldout for a in answers]) for key in ("thinking", "answer", "drafted")}
    return {
        "label": label,
        "thinking": plan.phases[0].budget,
        "answering": last.budget,
        "max_thinking_tokens": plan.phases[0].max_new_tokens,
        "escalate_to": last.escalate_to,
        "confidence": last.confidence,
        "signal": last.signal if last.escalate_to else None,
        "handover": heldout[0][0]["handover"],
        "runs": rate,
        "accuracy": mean(rate["right"]),
        "code": mean(rate["parts"]),
        "trace": mean(rate["trace"]),
        "validation": mean([a["right"] for a in found["validation"][0]]),
        "escalated": mean([a["escalated"] for answers in heldout for a in answers]),
        "tokens": told,
        "times": list(times),
        "seconds": median(times),
        "right": [a["right"] for a in found["validation"][0]],
        "heldout_right": [a["right"] for answers in heldout for a in answers],
    }


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


# -- plans that are chosen per prompt ----------------------------------------------------------------------------------


def candidates(runs: KeptRuns, lab: Lab, points: Sequence[Point], checks: int) -> Iterator[Point]:
    """Plans chosen per prompt as validation problems see them: who is right is known of both sizes, who escalates of the confidence."""
    whole = {(p["thinking"], p["answering"]): p for p in points if p["max_thinking_tokens"] is None}
    sizes = [size for size in lab.sizes if (size, size) in whole]
    for (i, small), signal in product(enumerate(sizes), SIGNALS):
        for thinking, larger in product(sizes[i:], sizes[:i]):
            if whole[thinking, larger]["validation"] <= whole[thinking, small]["validation"]:
                continue  # nothing to gain
            values = confidences(runs, lab, thinking, small, signal, checks)
            ordered = sorted(values)
            for share in SHARES:
                threshold = ordered[int(share * len(ordered))]
                low = [value < threshold for value in values]
                first, second = whole[thinking, small], whole[thinking, larger]
                right = [b if is_low else a for a, b, is_low in zip(first["right"], second["right"], low, strict=True)]
                draft = whole[thinking, small]["seconds"] * first["tokens"]["answer"] / sum(first["tokens"].values())
                extra = draft / 2 if signal == "answer_min" else 0.0
                escalated = mean(low)
                time = (1 - escalated) * first["seconds"] + escalated * (second["seconds"] + extra)
                plan = {"thinking": thinking, "answering": small, "larger": larger, "signal": signal}
                yield plan | {"confidence": threshold, "seconds": time, "accuracy": mean(right)}


def confidences(runs: KeptRuns, lab: Lab, thinking: str, small: str, signal: str, checks: int) -> Sequence[float]:
    """What a signal says of every validation problem, where nobody escalates."""
    plan = cascade(thinking, small, lab.sizes[0], signal, 0.0)
    name = f"plans-{lab.key}-{signal}-{thinking}-{small}"
    return runs.run(  # type: ignore[no-any-return]
        name, lambda: [a["confidence"] or 0.0 for a in lab.solve(plan, "train", VALIDATION, checks)]
    )


def choose(found: Iterator[Point], fixed: Sequence[Point]) -> dict[str, PhasePlan]:
    """Those that gain most on validation problems over the best fixed plan in as much time, and are not nearly alike."""

    def gain(plan: Point) -> float:
        affordable = [p["validation"] for p in fixed if p["seconds"] <= plan["seconds"]]
        return float(plan["accuracy"] - max(affordable, default=1.0))

    chosen: dict[str, PhasePlan] = {}
    kept: list[Point] = []
    for plan in sorted(found, key=gain, reverse=True):
        alike = [p for p in kept if abs(p["seconds"] / plan["seconds"] - 1) < 0.1]
        if alike or len(kept) == CHOSEN:
            continue
        kept.append(plan)
        parts = [plan[key] for key in ("thinking", "answering", "larger", "signal")]
        label = " - ".join([*parts, f"{plan['confidence']:.6f}"])
        chosen[label] = cascade(*parts, plan["confidence"])
    return chosen


# -- what is reported --------------------------------------------------------------------------------------------------


def describe(report: Report, runs: KeptRuns, lab: Lab, points: Sequence[Point]) -> None:
    """Every plan: rates and time."""
    costs = lab.model.elastic_config.costs()
    for size in lab.sizes:
        report.measure(f"{lab.name}: {size}: active parameters", "", [costs[size].active_params])
    for p in points:
        about = {key: value for key, value in p.items() if key not in ("runs", "times", "right", "heldout_right")}
        report.measure(f"{lab.name}: {p['label']}: exact", "share", p["runs"]["right"], mean=p["accuracy"])
        report.measure(f"{lab.name}: {p['label']}: time", "s", p["times"], **about)
    whole = {(p["thinking"], p["answering"]): p for p in points if not (p["max_thinking_tokens"] or p["escalate_to"])}
    for size, signal in product(lab.sizes[1:], SIGNALS):
        right = whole[size, size]["right"] if (size, size) in whole else []
        if True in right and False in right:
            values = confidences(runs, lab, size, size, signal, len(right))
            what = f"{lab.name}: {size}: {signal} tells right answers from wrong ones"
            report.measure(what, "AUROC", [auroc(values, right)], problems=len(right), wrong=right.count(False))


def goal(report: Report, task: str, points: Sequence[Point]) -> None:
    """Gains of plans that are no single size, chosen on validation problems and counted on held-out ones."""
    single = [p for p in points if p["thinking"] == p["answering"] and not p["escalate_to"]]
    kinds = {
        "two sizes": [p for p in points if p["thinking"] != p["answering"] and not p["escalate_to"]],
        "per prompt": [p for p in points if p["escalate_to"]],
    }
    kinds["any"] = [*kinds["two sizes"], *kinds["per prompt"]]
    best = {}
    for kind, plans in kinds.items():
        gained = max(plans, key=lambda p: _gain(p, single, "validation"), default=None)
        gain = _gain(gained, single, "accuracy") if gained else 0.0
        saved, plan, one = max(_savings(plans, single), key=lambda s: s[0], default=(1.0, None, None))
        holds = plan is not None and plan["accuracy"] >= one["accuracy"] - EQUAL
        about = {"plan": gained and gained["label"], "validation": gained and _gain(gained, single, "validation")}
        report.measure(f"{task}: {kind}: more answers right at no more time", "share", [gain], **about)
        about = {"plan": plan and plan["label"], "one_size": one and one["label"], "holds": holds}
        about["difference"] = plan["accuracy"] - one["accuracy"] if plan else 0.0
        report.measure(f"{task}: {kind}: time of one size / time, as often right", "", [saved], **about)
        best[kind] = max(gain / 0.10, saved / 1.5 if holds else 0.0)
    report.settle(GOAL.format(task), best["any"])


def _gain(plan: Point, single: Sequence[Point], rate: str) -> float:
    """Over the best single size in no more time; nothing if none is so fast."""
    affordable = [p[rate] for p in single if p["seconds"] <= plan["seconds"]]
    return float(plan[rate] - max(affordable)) if affordable else 0.0


def _savings(plans: Sequence[Point], single: Sequence[Point]) -> list[tuple[float, Point, Point]]:
    """Against single sizes that no other beats, where a plan is no worse, by validation problems."""
    rated = [p | {"accuracy": p["validation"]} for p in single]
    front = [single[i] for i in pareto_front(rated, "seconds")]
    return [
        (one["seconds"] / p["seconds"], p, one) for p in plans for one in front if p["validation"] >= one["validation"]
    ]


if __name__ == "__main__":
    parser = run_arguments(__doc__)
    parser.add_argument("--task", action="append", choices=TASKS, help="only this task (repeat it)")
    sys.exit(run(parser.parse_args()))
