"""Recipes for one run that loses nothing: the largest size stays what its parent is, smaller ones become what they are when trained alone.

With S steps for a size *alone* (`--steps`; by default the task's own), per task and seed:

- *alone*: every smaller size distilled in a run of its own, S steps each;
- *standard*: one run of S steps for all sizes, drawn alike, as the lab's first recipe was;
- the other ways of [`WAYS`]: one run of at most 0.6 x (number of smaller sizes) x S steps.

The goal is largest >= parent - 0.01, and every smaller size >= alone - 0.02. A way is chosen by `validation`: problems of the training split, of a
seed that nothing is trained on. What is published is `exact`, on held-out problems.

`--task` takes any task of the lab, or `cup`, see `cup.py`. `--seeds 1 --ways longer` does only these runs and writes no result, so that a
benchmark of hours can be done in parts; runs are kept, see `kept_runs`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from harness import Claim, Report
from kept_runs import KeptRuns, run_arguments
from lab_runs import SEEDS, mean

from hf_elastic.lab.exercises import EOS, THINK_START, LabTask
from hf_elastic.lab.family import make_family, train_family
from hf_elastic.lab.parent import load_parent, train_parent
from hf_elastic.lab.tasks import get_task
from hf_elastic.trainers import divergence

SHARE = 0.6
"""Steps of the one run, as a share of those of all runs alone together."""
VALIDATION_SEED = 777
SMALLER_BATCH = {"cup": 16}
"""Rows of a step, where they are not 32."""


def _stages(steps: int, *shares: tuple[float, Mapping[str, float]]) -> list[dict[str, Any]]:
    ends = [round(steps * sum(share for share, _ in shares[: i + 1])) for i in range(len(shares))]
    starts = [0, *ends[:-1]]
    return [
        {"steps": end - start, "budget_probabilities": dict(drawn)}
        for start, end, (_, drawn) in zip(starts, ends, shares, strict=True)
    ]


def _alike(names: list[str]) -> dict[str, float]:
    return dict.fromkeys(names, 1 / len(names))


def _progressive(names: list[str], steps: int, rows: int) -> dict[str, Any]:
    """Sizes come in one after the other, the largest cut first (arXiv 1908.09791): the newest in half of the steps, those before it in the others."""
    smaller = names[1:]
    drawn = [{smaller[i]: 0.5, **dict.fromkeys(names[: i + 1], 0.5 / (i + 1))} for i in range(len(smaller))]
    return {"stages": _stages(steps, *[(1 / len(smaller), d) for d in drawn])}


def _progressive_then_alike(names: list[str], steps: int, rows: int) -> dict[str, Any]:
    smaller = names[1:]
    drawn = [{smaller[i]: 0.5, **dict.fromkeys(names[: i + 1], 0.5 / (i + 1))} for i in range(len(smaller))]
    return {"stages": _stages(steps, *[(0.5 / len(smaller), d) for d in drawn], (0.5, _alike(names)))}


def _skewed_last(names: list[str], steps: int, rows: int) -> dict[str, Any]:
    weights = range(len(names), 0, -1)
    skewed = {name: weight / sum(weights) for name, weight in zip(names, weights, strict=True)}
    return {"stages": _stages(steps, (0.7, _alike(names)), (0.3, skewed))}


def _smallest_more(names: list[str], steps: int, rows: int) -> dict[str, Any]:
    weights = range(1, len(names) + 1)
    return {"budget_probabilities": {n: w / sum(weights) for n, w in zip(names, weights, strict=True)}}


def _several(names: list[str], steps: int, rows: int) -> dict[str, Any]:
    return {"per_device_train_batch_size": rows // 4, "gradient_accumulation_steps": 4}


def _rate(rate: float) -> Callable[..., dict[str, Any]]:
    return lambda names, steps, rows: {"learning_rate": rate}


def _decay(share: float) -> Callable[..., dict[str, Any]]:
    return lambda names, steps, rows: {
        "lr_scheduler_kwargs": {"num_decay_steps": int(steps * share), "min_lr_ratio": 0.02}
    }


WAYS: dict[str, Callable[..., dict[str, Any]]] = {
    "standard": lambda names, steps, rows: {},
    "longer": lambda names, steps, rows: {},
    "half the rate": _rate(3e-3),
    "several sizes a step": _several,
    "progressive": _progressive,
    "progressive, then alike": _progressive_then_alike,
    "skewed last": _skewed_last,
    "smaller ones more": _smallest_more,
    "decay of four fifths": _decay(0.8),
    "beta2 0.999": lambda names, steps, rows: {"adam_beta2": 0.999},
}
"""Fields of `ElasticDistillationConfig` by budgets (the largest first), steps, and rows of a step."""


class Lab(KeptRuns):
    """Runs of a task."""

    def __init__(self, options: argparse.Namespace):
        if options.task == "cup":
            from cup import TASK

            self.task: LabTask = TASK
        else:
            self.task = get_task(options.task)
        steps = 4 if options.quick else options.steps or self.task.family_steps
        super().__init__(options, steps)
        self.rows = 4 if options.quick else SMALLER_BATCH.get(self.task.name, 32)
        self.problems = 2 if options.quick else 200
        self.quick = options.quick
        self.tokenizer = self.task.build_tokenizer()
        self.smaller = list(self.task.sizes)

    def parent(self, seed: int) -> Any:
        if seed == 0 and self.task.name != "cup":
            return load_parent(self.task)[0]
        steps = 4 if self.quick else self.task.parent_steps
        name = f"parent-{seed}" if self.task.name == "book" else f"{self.task.name}-parent-{seed}"
        return self.model(
            name, lambda: train_parent(self.task, seed=seed, steps=steps, batch_size=self.rows, progress=False)[0]
        )

    def way(self, way: str, seed: int) -> dict[str, Any]:
        """One run for all sizes."""
        steps = self.steps if way == "standard" else int(SHARE * len(self.smaller) * self.steps)
        options = WAYS[way](["full", *self.smaller], steps, self.rows)
        name = f"recipe-{self.task.name}-{way.replace(' ', '-').replace(',', '')}-{steps}-{seed}"
        return self.run(name, lambda: self._train(seed, self.task.sizes, steps, options))

    def alone(self, size: str, seed: int) -> dict[str, Any]:
        """One run for one size."""
        options = {"budget_probabilities": {size: 1.0}}
        name = f"recipe-{self.task.name}-alone-{size}-{self.steps}-{seed}"
        return self.run(name, lambda: self._train(seed, {size: self.task.sizes[size]}, self.steps, options))

    def untrained(self, seed: int) -> dict[str, Any]:
        return self.run(f"recipe-{self.task.name}-parent-{seed}", lambda: {"full": self._rates(self.parent(seed))})

    def _train(self, seed: int, sizes: Mapping[str, Any], steps: int, options: dict[str, Any]) -> dict[str, Any]:
        parent = self.parent(seed)
        family = make_family(parent, self.tokenizer, sizes, seed=seed, task=self.task)
        options = {"per_device_train_batch_size": self.rows, **options}
        if "stages" in options:
            options["max_steps"] = -1
        started = time.process_time()
        with tempfile.TemporaryDirectory(prefix="hf-elastic-lab-") as scratch:
            history = train_family(
                family,
                self.tokenizer,
                Path(scratch),
                steps=steps,
                seed=seed,
                progress=False,
                task=self.task,
                **options,
            )
        found: dict[str, Any] = {"cpu_seconds": time.process_time() - started, "steps": steps}
        found["history"] = [{k: round(v, 5) for k, v in e.items() if k == "step" or k.endswith("kl")} for e in history]
        for budget in ("full", *sizes):
            with family.at(budget):
                found[budget] = self._rates(family, parent)
        print(
            {b: (found[b]["validation"], found[b]["exact"], round(found[b]["kl"], 4)) for b in ("full", *sizes)},
            flush=True,
        )
        return found

    def _rates(self, model: Any, parent: Any = None) -> dict[str, float]:
        # Greedy generation of many short rows: a whole batch costs little more than one row.
        count = {"count": self.problems, "batch_size": self.problems}
        score = self.task.evaluate(model, self.tokenizer, **count)
        validation = self.task.evaluate(model, self.tokenizer, split="train", seed=VALIDATION_SEED, **count)
        rates = {"exact": score.exact, "trace": score.trace, "code": score.code, "validation": validation.exact}
        return rates if parent is None else {**rates, "kl": self._divergence(model, parent)}

    def _divergence(self, model: Any, parent: Any) -> float:
        """Nats per token of thinking and answer of held-out problems."""
        source, start = (
            self.task.problems("heldout", self.task.measured, 1),
            self.tokenizer.convert_tokens_to_ids(THINK_START),
        )
        total, count = 0.0, 0
        for _ in range(min(self.problems, 64)):
            ids = self.tokenizer(self.task.solved(next(source)) + EOS, add_special_tokens=False, return_tensors="pt")[
                "input_ids"
            ]
            first = ids[0].tolist().index(start)
            with torch.no_grad():
                kl = divergence(model(ids).logits[0, first:-1], parent(ids).logits[0, first:-1])
            total, count = total + float(kl.sum()), count + len(kl)
        return total / count


def run(options: argparse.Namespace) -> int:
    lab = Lab(options)
    seeds = [0] if options.quick else options.seeds or list(SEEDS)
    ways = options.ways or [*WAYS, "alone"]
    for seed in seeds:
        for way in ways:
            if way in WAYS:
                lab.way(way, seed)
                continue
            lab.untrained(seed)
            for size in lab.smaller:
                lab.alone(size, seed)
    if (options.ways or options.seeds) and not options.publish:
        return 0
    return publish(lab, [way for way in ways if way in WAYS], seeds, options)


def publish(lab: Lab, ways: list[str], seeds: list[int], options: argparse.Namespace) -> int:
    """Write the result: the last way of `ways` is the one whose claims are settled."""
    chosen = ways[-1]
    claims = [Claim(f"{chosen}: full - parent, exact", -0.01, ">=")]
    claims += [Claim(f"{chosen} - alone: {size}, exact", -0.02, ">=") for size in lab.smaller]
    report = Report(f"recipe_{lab.task.name}", claims)
    exact: dict[tuple[str, str], float] = {}
    table: dict[str, dict[str, list[dict[str, Any]]]] = {"parent": {"full": [lab.untrained(s)["full"] for s in seeds]}}
    table["alone"] = {size: [lab.alone(size, s)[size] for s in seeds] for size in lab.smaller}
    for way in ways:
        runs = [lab.way(way, s) for s in seeds]
        table[way] = {size: [run[size] for run in runs] for size in ("full", *lab.smaller)}
        report.measure(f"{way}: steps", "steps", [run["steps"] for run in runs])
    for way, sizes in table.items():
        for size, entries in sizes.items():
            for rate in [name for name in ("exact", "validation", "kl") if name in entries[0]]:
                unit = "nats per token" if rate == "kl" else "share"
                values = [entry[rate] for entry in entries]
                report.measure(
                    f"{way}: {size}, {rate}", unit, values, mean=mean(values), seeds=seeds, alone_steps=lab.steps
                )
            exact[way, size] = mean([entry["exact"] for entry in entries])
    report.settle(claims[0].name, exact[chosen, "full"] - exact["parent", "full"])
    for claim, size in zip(claims[1:], lab.smaller, strict=True):
        report.settle(claim.name, exact[chosen, size] - exact["alone", size])
    lab.say_commits(report)
    return report.finish(options)


if __name__ == "__main__":
    parser = run_arguments(__doc__)
    parser.add_argument("--task", default="cup", help="task of the lab, or cup (default: cup)")
    parser.add_argument("--steps", type=int, help="steps of a size alone (default: those of the task's family)")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
    parser.add_argument(
        "--ways", nargs="+", choices=[*WAYS, "alone"], help="only these ways; the last one is what is claimed"
    )
    parser.add_argument("--publish", action="store_true", help="write a result also with --seeds or --ways")
    sys.exit(run(parser.parse_args()))
