"""Every way to get the sizes of a task's family that `baselines.py` compares, all at equal tokens: the steps of all runs of a way add up to
the steps of one.

A way gives `{"trained": [...], "tokens": ...}`, entries of [`Bench.measure`], and some give more lists of them.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from baseline_task import EXTRAS, Extras
from lab_runs import Entry, Runs

from hf_elastic import ElasticForCausalLM, elastify
from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.cost import CostModel
from hf_elastic.elastification.importance import Scores
from hf_elastic.errors import PortabilityWarning
from hf_elastic.lab.exercises import EOS, THINK_START, LabTask
from hf_elastic.lab.family import measure_family, router_steps, train_family
from hf_elastic.lab.parent import load_parent
from hf_elastic.trainers import divergence

Outcome = dict[str, Any]


@dataclass
class Bench:
    """A task, the steps of one run, and what all ways share.

    Args:
        runs ([`Runs`]): Keeps what was measured; says how many rows a step and how many problems a measurement has.
        task ([`LabTask`]): What is learned.
        quick (`bool`): Short problems.
    """

    runs: Runs
    task: LabTask
    quick: bool = False
    _scores: dict[Any, Scores] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parent, self.tokenizer = load_parent(self.task)
        self.extras = _extras(self.task)
        self.length = self.task.trained[0] if self.quick else self.task.measured
        self.steps = self.runs.steps
        self.count = CostModel(self.parent.config)
        self.rows_to_score = 8 if self.quick else 256

    def name(self, way: str, seed: int) -> str:
        """Name of a kept run."""
        return f"baselines-{self.task.name}-{self.steps}-{way}-{seed}"

    def is_kept(self, way: str, seed: int) -> bool:
        """Whether a run is done."""
        return self.runs.kept(self.name(way, seed))

    def run(self, way: str, seed: int) -> Outcome:
        """What a way gives with a seed; it is done if it was not yet."""
        outcome: Outcome = self.runs.run(self.name(way, seed), lambda: WAYS[way].action(self, seed))
        return outcome

    def cut(self, parent: Any, budgets: Mapping[str, Any], seed: int, **options: Any) -> ElasticForCausalLM:
        """A sorted family of a parent. The task's own parent is scored once per seed for all budgets that cut the same axes."""
        if options.get("sort", True) is False or "scores" in options:
            return elastify(parent, budgets=budgets, **options)
        key = (seed, frozenset(axis for sizes in budgets.values() for axis in sizes), str(options))
        if parent is self.parent and key in self._scores:
            return elastify(parent, budgets=budgets, scores=self._scores[key], **options)
        rows = self.task.calibration_dataset(self.tokenizer, self.rows_to_score, seed)
        family = elastify(parent, rows, budgets=budgets, batch_size=32, progress=False, **options)
        if parent is self.parent and family.importance_scores is not None:
            self._scores[key] = family.importance_scores
        return family

    def train(self, family: ElasticForCausalLM, seed: int, steps: int, **options: Any) -> int:
        """Distil a family in place, as the lab does; returns the tokens trained on."""
        options = {"per_device_train_batch_size": self.runs.rows, **options}
        with tempfile.TemporaryDirectory(prefix="hf-elastic-lab-") as scratch, warnings.catch_warnings():
            # Of runs of one size: nobody uses their parent afterwards.
            warnings.filterwarnings("ignore", ".* is never drawn")
            history = train_family(
                family,
                self.tokenizer,
                Path(scratch),
                task=self.task,
                steps=steps,
                seed=seed,
                progress=False,
                **options,
            )
        return int(max(entry.get("num_tokens", 0) for entry in history))

    def measure(self, family: ElasticForCausalLM, budgets: Mapping[str, Any]) -> list[Entry]:
        """Costs, rates on held-out problems by generation, and `kl`, the divergence from the parent in nats per token of held-out solutions."""
        entries = measure_family(
            family, self.tokenizer, budgets, task=self.task, count=self.runs.problems, size=self.length
        )
        for entry, budget in zip(entries, budgets.values(), strict=True):
            with family.at(budget):
                entry["kl"] = self._divergence(family)
        return entries

    @torch.no_grad()
    def _divergence(self, model: Any) -> float:
        source = self.task.problems("heldout", self.length, 1)
        texts = [self.task.solved(next(source)) + EOS for _ in range(min(self.runs.problems, 64))]
        batch = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        ids, target = batch["input_ids"], batch["attention_mask"].bool()
        opening = ids == self.tokenizer.convert_tokens_to_ids(THINK_START)
        # Logits at `<think>` and after it predict the solution; the last one predicts nothing.
        target = (target & (opening.cumsum(-1) > 0))[:, 1:] & (opening.cumsum(-1) > 0)[:, :-1]
        student, teacher = (
            m(ids, attention_mask=batch["attention_mask"]).logits[:, :-1] for m in (model, self.parent)
        )
        return float(divergence(student[target], teacher[target]).mean())


@dataclass(frozen=True)
class Way:
    """A way to get sizes.

    Args:
        label (`str`): Of its row in the table.
        action (`Callable`): Of a bench and a seed.
        applies (`Callable`, *optional*): Whether a task has what it needs.
    """

    label: str
    action: Callable[[Bench, int], Outcome]
    applies: Callable[[LabTask], bool] = lambda task: True


def one_run(
    bench: Bench,
    seed: int,
    budgets: Any = None,
    family: ElasticForCausalLM | None = None,
    between: bool = True,
    **options: Any,
) -> Outcome:
    """All sizes in one run, with the recipe of the lab unless `options` of `train_family` say otherwise.

    Args:
        between (`bool`, *optional*, defaults to `True`): Measure the task's size between two others as well; it is only drawn if it is a budget.
    """
    budgets = bench.task.sizes if budgets is None else budgets
    family = bench.cut(bench.parent, budgets, seed) if family is None else family
    measured = {"full": None, **{name: name for name in family.budgets}}
    if bench.extras.between and between and "between" not in measured:
        measured |= {"between": bench.extras.between}
    tokens = bench.train(family, seed, bench.steps, **options)
    return {"trained": bench.measure(family, measured), "tokens": tokens}


def alone(bench: Bench, seed: int) -> Outcome:
    """Every size in a run of its own, cut from the sorted parent; the parent itself needs none."""
    share, trained, tokens = max(1, bench.steps // len(bench.task.sizes)), [], 0
    for name, sizes in bench.task.sizes.items():
        family = bench.cut(bench.parent, {name: sizes}, seed)
        tokens += bench.train(family, seed, share, budget_probabilities={name: 1.0})
        trained += bench.measure(family, {name: name})
    return {"trained": trained, "tokens": tokens}


def sequential(bench: Bench, seed: int) -> Outcome:
    """Prune and distil, size after size (arXiv 2504.11409): each is cut from the one before, scored anew, and learns from the parent."""
    share, trained, tokens = max(1, bench.steps // len(bench.task.sizes)), [], 0
    model, left = bench.parent, dict(bench.task.sizes)
    teacher = copy.deepcopy(bench.parent)  # the trainer freezes it
    while left:
        name = next(iter(left))
        family = bench.cut(model, left, seed)
        tokens += bench.train(family, seed, share, budget_probabilities={name: 1.0}, teacher=teacher)
        trained += bench.measure(family, {name: name})
        submodel = family.elastic_config.resolve(name)
        inside = family.elastic_config.restrict(submodel).budgets
        left = {other: inside[other]["sizes"] for other in list(left)[1:]}
        with tempfile.TemporaryDirectory(prefix="hf-elastic-lab-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", PortabilityWarning)  # nothing but this script reads it
            family.export(Path(folder) / name, name, heterogeneous=True)
            model = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / name, dtype=torch.float32)
    return {"trained": trained, "tokens": tokens}


def depth(bench: Bench, seed: int) -> Outcome:
    """Whole layers instead of widths: per size as many of the most important layers as come nearest to its active parameters, in one run.

    Sizes that no number of layers comes near (a third off, or more) have none.
    """
    layers = get_architecture(bench.parent.config.model_type).depth(bench.parent.config)
    config = bench.cut(bench.parent, {"shallow": {"layers": layers - 1}}, seed).elastic_config
    ranking, active, cuts = config.axes["layers"]["ranking"], {}, {}
    for number in range(1, layers):
        try:
            active[number] = bench.count(config.resolve({"layers": sorted(ranking[:number])})).active_params
        except ValueError:  # cannot be built: a model needs its attention layer
            continue
    for name, sizes in bench.task.sizes.items():
        target = bench.count(config.resolve(sizes)).active_params
        number = min(active, key=lambda n: abs(active[n] / target - 1))
        kept = {"layers": sorted(ranking[:number])}
        if abs(active[number] / target - 1) < 1 / 3 and kept not in cuts.values():
            cuts[name] = kept
    return one_run(bench, seed, family=elastify(bench.parent, budgets=cuts, sort=False), between=False)


def in_random_order(bench: Bench, seed: int, budgets: Any) -> ElasticForCausalLM:
    """The parent sorted by random scores instead of importance."""
    scores = bench.cut(bench.parent, budgets, seed).importance_scores
    draw = torch.Generator().manual_seed(seed)
    values = {
        axis: {layer: torch.rand(old.shape, generator=draw, dtype=old.dtype) for layer, old in layers.items()}
        for axis, layers in scores.values.items()
    }
    return elastify(bench.parent, budgets=budgets, scores=replace(scores, values=values))


def fewer_experts(task: LabTask) -> dict[str, Any]:
    """Budgets that keep three quarters, half and a quarter of the experts, but as many as a token goes to; none of a dense parent."""
    config = load_parent(task)[0].config
    architecture = get_architecture(config.model_type)
    if "experts" not in {axis.name for axis in architecture.available_axes(config)}:
        return {}
    whole, least = max(architecture.full(config).values("experts")), config.num_experts_per_tok
    return {f"{n} of {whole} experts": {"experts": n} for n in (whole * 3 // 4, whole // 2, whole // 4) if n >= least}


def experts(bench: Bench, seed: int) -> Outcome:
    """Fewer experts, all numbers in one run; the best by REAP (arXiv 2510.13999) are kept."""
    return one_run(bench, seed, fewer_experts(bench.task), between=False)


def one_shot(bench: Bench, seed: int) -> Outcome:
    """Nothing is trained: sizes and fewer experts of the parent sorted by importance (experts by REAP), at random, and as it is."""
    outcome: Outcome = {"trained": [], "importance": [], "random": [], "unsorted": [], "tokens": 0}
    for what, budgets in {"sizes": bench.task.sizes, "experts": fewer_experts(bench.task)}.items():
        orders: dict[str, Callable[[Any], ElasticForCausalLM]] = {
            "importance": lambda budgets: bench.cut(bench.parent, budgets, seed),
            "random": lambda budgets: in_random_order(bench, seed, budgets),
            "unsorted": lambda budgets: elastify(bench.parent, budgets=budgets, sort=False),
        }
        for order, cut in orders.items() if budgets else ():
            part = bench.name(f"one-shot-{what}-{order}", seed)
            outcome[order] += bench.runs.run(
                part, lambda cut=cut, budgets=budgets: bench.measure(cut(budgets), {name: name for name in budgets})
            )
    return outcome


def with_between(bench: Bench, seed: int) -> Outcome:
    """The size between two others drawn as often as every other, instead of never."""
    return one_run(bench, seed, {**bench.task.sizes, "between": bench.extras.between})


def routed(bench: Bench, seed: int, **options: Any) -> Outcome:
    """Sizes that a router decides in the first 30 % of the run. `offered` are sizes between them, which were never drawn."""
    rows = bench.task.calibration_dataset(bench.tokenizer, bench.rows_to_score, seed)
    family = elastify(bench.parent, rows, axes=bench.extras.router_choices, batch_size=32, progress=False)
    options |= {"router_targets": dict(bench.extras.router_targets), "router_steps": router_steps(bench.steps)}
    tokens = bench.train(family, seed, bench.steps, **options)
    offered = between_pairs(family)
    trained = bench.measure(family, {"full": None, **{name: name for name in family.budgets}})
    return {"trained": trained, "offered": bench.measure(family, offered), "tokens": tokens}


def between_pairs(family: ElasticForCausalLM) -> dict[str, Any]:
    """Per two neighbouring budgets, the submodel without a name that lies nearest to the middle between them."""
    count, found = family.elastic_config.cost_model(), {}
    chain = family.elastic_config.chain()
    named = [i for i, (name, _) in enumerate(chain) if name is not None]
    for first, last in zip(named, named[1:], strict=False):
        middle = (count(chain[first][1]).total_params + count(chain[last][1]).total_params) / 2
        inner = [submodel for _, submodel in chain[first + 1 : last]]
        if inner:
            best = min(inner, key=lambda submodel: abs(count(submodel).total_params - middle))
            found[f"{chain[first][0]} to {chain[last][0]}"] = best
    return found


def offered_trained(bench: Bench, seed: int) -> Outcome:
    """The sizes of the `router` run and those that it offers between them, all drawn alike in one run from the parent."""
    run = bench.run("router", seed)
    named = {entry["name"]: entry["sizes"] for entry in run["trained"] if entry["name"] != "full"}
    between = {entry["name"].replace(" ", "-"): entry["sizes"] for entry in run["offered"]}
    budgets = {**named, **between}
    axes = list(bench.extras.router_choices)
    budgets = {name: {axis: sizes[axis] for axis in axes} for name, sizes in budgets.items()}
    outcome = one_run(bench, seed, budgets, between=False)
    offered = [{**e, "name": e["name"].replace("-", " ")} for e in outcome["trained"] if e["name"] in between]
    trained = [entry for entry in outcome["trained"] if entry["name"] not in between]
    return {**outcome, "trained": trained, "offered": offered}


def skewed(bench: Bench) -> dict[str, float]:
    """Probabilities that draw larger sizes more often: 0.4 / 0.3 / 0.2 / 0.1 of four."""
    names = ["full", *bench.task.sizes]
    weights = range(len(names), 0, -1)
    return {name: weight / sum(weights) for name, weight in zip(names, weights, strict=True)}


def two_stages(bench: Bench, seed: int) -> Outcome:
    """Rows of at most 60 % of the longest with all sizes alike for 60 % of the steps, then whole ones with the one run, larger sizes drawn more often."""
    first = max(1, bench.steps * 6 // 10)
    rows = bench.task.calibration_dataset(bench.tokenizer, bench.rows_to_score, seed)["input_ids"]
    short = max(map(len, rows)) * 6 // 10
    rest = {"steps": bench.steps - first, "budget_probabilities": skewed(bench)}
    return one_run(bench, seed, stages=[{"steps": first, "max_length": short}, rest])


def progressive(bench: Bench, seed: int) -> Outcome:
    """Sizes added one after another, from large to small (progressive shrinking, arXiv 1908.09791): the newest is drawn in 70 % of the
    steps, those before it and the parent alike in the rest."""
    names = ["full", *bench.task.sizes]
    stages: list[dict[str, Any]] = []
    for i, newest in enumerate(names[1:], 1):
        drawn = {newest: 0.7, **dict.fromkeys(names[:i], 0.3 / i)}
        stages.append({"steps": bench.steps * i // len(names[1:]) - bench.steps * (i - 1) // len(names[1:])})
        stages[-1]["budget_probabilities"] = drawn
    return one_run(bench, seed, stages=stages)


def _extras(task: LabTask) -> Extras:
    return EXTRAS.get(task.name, Extras())


def _has_router(task: LabTask) -> bool:
    return bool(_extras(task).router_choices)


WAYS: dict[str, Way] = {
    "one-run": Way("one run for all sizes", one_run),
    "sequential": Way("prune and distil size after size", sequential),
    "alone": Way("each size alone", alone),
    "depth": Way("one run, layers dropped", depth),
    "random": Way(
        "one run, random order",
        lambda bench, seed: one_run(bench, seed, family=in_random_order(bench, seed, bench.task.sizes)),
    ),
    "unsorted": Way(
        "one run, the parent's order",
        lambda bench, seed: one_run(bench, seed, family=elastify(bench.parent, budgets=bench.task.sizes, sort=False)),
    ),
    "one-shot": Way("not trained", one_shot),
    "experts": Way("one run, experts cut", experts, lambda task: bool(fewer_experts(task))),
    "between": Way("one run, `between` drawn as well", with_between, lambda task: bool(_extras(task).between)),
    "router": Way("one run, sizes learned", routed, _has_router),
    "offered": Way("one run, learned sizes and those between", offered_trained, _has_router),
    "skewed": Way(
        "one run, larger sizes drawn more often",
        lambda bench, seed: one_run(bench, seed, budget_probabilities=skewed(bench)),
    ),
    "progressive": Way("one run, sizes added one after another", progressive),
    "stages": Way("one run, short rows first (two stages)", two_stages),
    "router-hard": Way(
        "one run, sizes learned on hard samples",
        lambda bench, seed: routed(bench, seed, router_hard_share=1.0),
        _has_router,
    ),
}
"""All ways, in the order of the table."""
