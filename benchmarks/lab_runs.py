"""Training runs of the lab's `book` model, shared by `lab_family.py` and the `ablation_*.py` scripts.

They are kept, see `kept_runs.py`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from harness import Report
from kept_runs import KeptRuns
from kept_runs import run_arguments as lab_arguments

from hf_elastic import ElasticConfig, ElasticForCausalLM, elastify
from hf_elastic.architectures.cost import CostModel
from hf_elastic.configuration.budgets import parse_limit
from hf_elastic.elastification.importance import Scores
from hf_elastic.lab.book import EOS, FAMILY, THINK_START, build_tokenizer, evaluate, problems
from hf_elastic.lab.family import (
    BETWEEN,
    ROUTER_TARGETS,
    make_family,
    make_open_family,
    measure_family,
    train_family,
    train_open_family,
)
from hf_elastic.lab.parent import load_parent, train_parent
from hf_elastic.trainers import divergence

LETTERS = 12
SKEWED = {"full": 0.4, "half": 0.3, "third": 0.2, "quarter": 0.1}
"""Probabilities that draw the larger sizes more often."""
SEEDS = (0, 1, 2)
SIZES = tuple(FAMILY)
Entry = dict[str, Any]


class Runs(KeptRuns):
    """Training runs of the lab and what they measured.

    Args:
        options (`argparse.Namespace`): Of [`lab_arguments`].
    """

    def __init__(self, options: argparse.Namespace):
        super().__init__(options, steps=4 if options.quick else 1000)
        self.rows = 4 if options.quick else 32
        self.problems = 1 if options.quick else 200
        self.letters = 2 if options.quick else LETTERS
        self.tokenizer = build_tokenizer()
        self._scores: dict[Any, Scores] = {}

    def parent(self, seed: int) -> Any:
        """The parent of a seed: the one in the package for 0, others are trained once."""
        if seed == 0:
            return load_parent()[0]
        return self.model(f"parent-{seed}", lambda: self._train_parent(seed)[0])

    def _train_parent(self, seed: int, **sizes: Any) -> Any:
        return train_parent(seed=seed, steps=self.steps, batch_size=self.rows, progress=False, **sizes)

    def untrained_family(self, seed: int, budgets: Mapping[str, Any] = FAMILY) -> ElasticForCausalLM:
        """The sorted parent of a seed with untrained budgets. It is scored once for all budgets that cut the same axes."""
        key = seed, frozenset(axis for sizes in budgets.values() for axis in sizes)
        if key in self._scores:
            return elastify(self.parent(seed), budgets=budgets, scores=self._scores[key])
        family = make_family(self.parent(seed), self.tokenizer, budgets, seed=seed)
        self._scores[key] = family.importance_scores
        return family

    def family(self, name: str, seed: int, budgets: Mapping[str, Any] = FAMILY, **options: Any) -> dict[str, Any]:
        """Train budgets of one parent in one run.

        Args:
            options: `measured` (budgets to measure, besides all that are trained), `sort`, and what `train_family` takes.

        Returns:
            `dict`: `untrained` and `trained`, entries of [`measure`], and the `tokens` trained on.
        """
        options = {"steps": self.steps, **options}
        sort, measured = options.pop("sort", True), options.pop("measured", {})
        return self.run(name, lambda: self._family(seed, budgets, sort, measured, options))

    def _family(self, seed: int, budgets: Any, sort: bool, measured: Any, options: dict[str, Any]) -> dict[str, Any]:
        parent = self.parent(seed)
        family = self.untrained_family(seed, budgets) if sort else elastify(parent, budgets=budgets, sort=False)
        measured = {"full": None, **{budget: budget for budget in budgets}, **measured}
        untrained = self.measure(family, parent, measured)
        tokens = self._train(family, seed, options)
        return {"untrained": untrained, "trained": self.measure(family, parent, measured), "tokens": tokens}

    def standard_family(self, seed: int) -> dict[str, Any]:
        """The family as the lab trains it, which ablations compare with."""
        return self.family(f"family-{seed}", seed, measured={"between": BETWEEN})

    def trained_family(self, name: str, seed: int, **options: Any) -> ElasticForCausalLM:
        """The weights of a family of this name, trained as the lab does if it was not yet; for who has more to ask than rates.

        Args:
            options: What `train_family` takes.
        """

        def train() -> ElasticForCausalLM:
            family = self.untrained_family(seed)
            self._train(family, seed, {"steps": self.steps, **options})
            return family

        return self.model(name, train)

    def learned_family(
        self, name: str, seed: int, targets: Mapping[str, Any] = ROUTER_TARGETS, **options: Any
    ) -> dict[str, Any]:
        """As `family`, with sizes that a router decides after the first part of the run; `report` says what and why."""
        options = {"steps": self.steps, "targets": targets, **options}
        return self.run(name, lambda: self._learned(seed, targets, options))

    def _learned(self, seed: int, targets: Any, options: dict[str, Any]) -> dict[str, Any]:
        parent = self.parent(seed)
        family = make_open_family(parent, self.tokenizer, seed=seed)
        tokens = self._train(family, seed, options, train_open_family)
        count = CostModel(family.elastic_config.parent_config)
        rows = []
        for budget, target in targets.items():
            limit, cost = parse_limit(target), count(family.elastic_config.submodel(budget))
            miss = limit.measure(cost, family.dtype) / limit.value - 1
            rows.append({"budget": budget, "target": target, "miss": miss})
        trained = self.measure(family, parent, {"full": None, **{budget: budget for budget in targets}})
        return {"trained": trained, "report": rows, "tokens": tokens}

    def _train(self, family: ElasticForCausalLM, seed: int, options: dict[str, Any], train: Any = train_family) -> int:
        options = {"per_device_train_batch_size": self.rows, **options}
        with tempfile.TemporaryDirectory(prefix="hf-elastic-lab-") as scratch:
            history = train(family, self.tokenizer, Path(scratch), seed=seed, progress=False, **options)
        return int(max(entry.get("num_tokens", 0) for entry in history))

    def from_scratch(self, name: str, seed: int, sizes: Mapping[str, Any]) -> Entry:
        """A model of these sizes trained on the problems themselves, as the parent was, with the same number of steps."""

        def action() -> Entry:
            config = ElasticConfig.from_parent(load_parent()[0].config, {"size": sizes})
            stock = config.stock_config(config.submodel("size"))
            overrides = {axis.field: getattr(stock, axis.field) for axis in config.architecture.axes}
            model, _ = self._train_parent(seed, **overrides)
            return asdict(evaluate(model, self.tokenizer, letters=self.letters, count=self.problems))

        return self.run(name, action)

    def measure(self, family: ElasticForCausalLM, parent: Any, budgets: Mapping[str, Any]) -> list[Entry]:
        """Rates by generation on held-out problems, as `measure_family`, and `kl`, the divergence from the parent in nats per token."""
        entries = measure_family(family, self.tokenizer, budgets, count=self.problems, size=self.letters)
        source = problems("heldout", self.letters, 1)
        texts = [next(source).text + EOS for _ in range(min(self.problems, 64))]
        ids = torch.tensor(self.tokenizer(texts)["input_ids"])
        start = ids[0].tolist().index(self.tokenizer.convert_tokens_to_ids(THINK_START))
        with torch.no_grad():
            teacher = parent(ids).logits[:, start:-1].flatten(0, 1)
            for entry, budget in zip(entries, budgets.values(), strict=True):
                with family.at(budget):
                    student = family(ids).logits[:, start:-1].flatten(0, 1)
                entry["kl"] = float(divergence(student, teacher).mean())
        return entries


def compare(report: Report, ways: Mapping[str, Sequence[Entry]], **about: Any) -> dict[tuple[str, str, str], float]:
    """Record the rates of several ways to get the same budgets; returns them by `(way, budget, rate)`."""
    values = {}
    for way, entries in ways.items():
        for entry in entries:
            cost = {key: entry[key] for key in ("active_params", "total_params")}
            for rate in ("exact", "trace", "code", "kl"):
                unit = "nats per token" if rate == "kl" else "share"
                what = f"{way}: {entry['name']}, {rate}"
                values[way, entry["name"], rate] = report.measure(what, unit, [entry[rate]], **cost, **about)
    return values


def by_name(entries: Sequence[Entry]) -> dict[str, Entry]:
    return {entry["name"]: entry for entry in entries}


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


__all__ = [
    "BETWEEN",
    "FAMILY",
    "LETTERS",
    "SEEDS",
    "SIZES",
    "SKEWED",
    "Runs",
    "by_name",
    "compare",
    "lab_arguments",
    "mean",
]
