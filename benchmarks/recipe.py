"""Recipes for one run that loses nothing: the largest size stays what its parent is, smaller ones become what they are when trained alone.

With S steps for a size *alone* (`--steps`; by default the task's own), per task and seed:

- *alone*: every smaller size distilled in a run of its own, S steps each;
- *standard*: one run of S steps for all sizes, drawn alike, as the lab's first recipe was;
- the other ways of [`WAYS`]: one run of at most 0.6 x (number of smaller sizes) x S steps.

The goal is largest >= parent - 0.01, and every smaller size >= alone - 0.02. A way is chosen by `validation`: problems of the training split, of a
seed that nothing is trained on. What is published is `exact`, on held-out problems.

`--task` takes any task of the lab, or `cup`, see `cup.py`. `--seeds 1 --ways longer` does only these runs and writes no result, so that a
benchmark of hours can be done in parts; runs are kept, see `kept_runs`. `--kept` writes the result of those that there are.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Claim, Report
from kept_runs import KeptRuns, run_arguments
from lab_runs import SEEDS, Entry, mean

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

    def steps_of(self, way: str) -> int:
        """Steps of the one run for all sizes."""
        return self.steps if way == "standard" else round(SHARE * len(self.smaller) * self.steps)

    def name(self, what: str, seed: int) -> str:
        """Under which a run is kept."""
        return f"recipe-{self.task.name}-{what.replace(' ', '-').replace(',', '')}-{self.steps}-{seed}"

    def is_kept(self, name: str) -> bool:
        return self.path(f"{name}.json").exists()

    def way(self, way: str, seed: int) -> dict[str, Any]:
        """One run for all sizes."""
        steps = self.steps_of(way)
        options = WAYS[way](["full", *self.smaller], steps, self.rows)
        return self.run(self.name(way, seed), lambda: self._train(seed, self.task.sizes, steps, options))

    def alone(self, size: str, seed: int) -> dict[str, Any]:
        """One run for one size."""
        options = {"budget_probabilities": {size: 1.0}}
        sizes = {size: self.task.sizes[size]}
        return self.run(self.name(f"alone-{size}", seed), lambda: self._train(seed, sizes, self.steps, options))

    def untrained(self, seed: int) -> dict[str, Any]:
        return self.run(self.name("parent", seed), lambda: {"full": self._rates(self.parent(seed))})

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
        measured = ["full", *sizes] if len(sizes) > 1 else list(sizes)
        for budget in measured:
            with family.at(budget):
                found[budget] = self._rates(family, parent)
        said = {budget: (found[budget]["validation"], round(found[budget]["kl"], 4)) for budget in measured}
        print(f"{said} {found['cpu_seconds']:.0f} s", flush=True)
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
    for seed, way in [] if options.kept else itertools.product(seeds, ways):
        if way in WAYS:
            lab.way(way, seed)
            continue
        lab.untrained(seed)
        for size in lab.smaller:
            lab.alone(size, seed)
    if (options.ways or options.seeds) and not (options.kept or options.quick):
        return 0
    return publish(lab, [way for way in ways if way in WAYS], seeds, options)


def publish(lab: Lab, ways: Sequence[str], seeds: Sequence[int], options: argparse.Namespace) -> int:
    """Write the result: every way with the seeds that it was run with, and the claims of the last one, on the seeds that both sides have."""
    table: dict[tuple[str, str], dict[int, Entry]] = {("parent", "full"): {}}
    for seed in seeds:
        if lab.is_kept(lab.name("parent", seed)):
            table["parent", "full"][seed] = lab.untrained(seed)["full"]
        for size in lab.smaller:
            if lab.is_kept(lab.name(f"alone-{size}", seed)):
                table.setdefault(("alone", size), {})[seed] = lab.alone(size, seed)[size]
        for way in [way for way in ways if lab.is_kept(lab.name(way, seed))]:
            for size in ("full", *lab.smaller):
                table.setdefault((way, size), {})[seed] = lab.way(way, seed)[size]
    chosen = [way for way in ways if (way, "full") in table][-1]
    against = {f"{chosen} - parent: full, exact": (("parent", "full"), "full", -0.01)}
    against |= {f"{chosen} - alone: {size}, exact": (("alone", size), size, -0.02) for size in lab.smaller}
    gaps = {}
    for claim, (other, size, _) in against.items():
        both = [seed for seed in table.get(other, {}) if seed in table[chosen, size]]
        if both:
            gaps[claim] = mean([table[chosen, size][seed]["exact"] - table[other][seed]["exact"] for seed in both])
    report = Report(f"recipe_{lab.task.name}", [Claim(claim, against[claim][2], ">=") for claim in gaps])
    for (way, size), entries in table.items():
        about = {"seeds": list(entries), "steps": lab.steps if way in ("parent", "alone") else lab.steps_of(way)}
        for rate in [
            name for name in ("exact", "validation", "kl") if all(name in entry for entry in entries.values())
        ]:
            values = [entry[rate] for entry in entries.values()]
            if values:
                unit = "nats per token" if rate == "kl" else "share"
                report.measure(f"{way}: {size}, {rate}", unit, values, mean=mean(values), **about)
    for claim, gap in gaps.items():
        report.settle(claim, gap)
    lab.say_commits(report)
    return report.finish(options)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = run_arguments(__doc__)
    parser.add_argument("--task", default="cup", help="task of the lab, or cup (default: cup)")
    parser.add_argument("--steps", type=int, help="steps of a size alone (default: those of the task's family)")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
    parser.add_argument(
        "--ways", nargs="+", choices=[*WAYS, "alone"], help="only these ways; claims are of the last one"
    )
    parser.add_argument("--kept", action="store_true", help="run nothing: write the result of the runs that are kept")
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
