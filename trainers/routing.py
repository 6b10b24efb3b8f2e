"""The first part of a run in which sizes are learned: a budget router decides them while the model trains at its mixtures."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hf_elastic import ElasticForCausalLM
from hf_elastic.checkpoints.replacing import replacing_file
from hf_elastic.configuration.section import checked_section
from hf_elastic.errors import CheckpointError, ElasticConfigError
from hf_elastic.routing.decisions import render
from hf_elastic.routing.router import ROUTER_FILE, BudgetRouter, Schedule
from hf_elastic.submodels.soft import SoftUnits

from .elastic_distillation_config import ElasticDistillationConfig

logger = logging.getLogger(__name__)

REPORT_FILE = "router_report.json"
"""In the output folder and in checkpoints: what the router chose for every target, and why."""


class Routing:
    """A budget router in training, and what it decided.

    For the first `router_steps` steps every micro-batch runs at a Gumbel-Softmax mixture of the drawn budget and the resource loss is
    added to the divergence. Then the choices become the model's budgets, and the run goes on with these. A frozen router
    (`freeze_router`) decides at once: it is that of the model, or of the checkpoint that the run resumes from.

    Args:
        model ([`ElasticForCausalLM`]): Its axes and choices are what is chosen among; it has no budgets yet. It keeps the router.
        args ([`ElasticDistillationConfig`]): `router_targets`, `freeze_router` and the other `router_*` fields.
    """

    def __init__(self, model: ElasticForCausalLM, args: ElasticDistillationConfig):
        self.model, self.args = model, args
        self.schedule = Schedule(hard_share=args.router_hard_share)
        self.report: list[dict[str, Any]] | None = None
        self._soft: SoftUnits | None = None
        self._sample: dict[Any, torch.Tensor] = {}
        saved = model.router if args.freeze_router else None
        self.router = self._new_router() if saved is None else saved
        self._untrained = args.freeze_router and saved is None
        self.router.to(model.device)
        model.attach_router(self.router)
        if saved is not None:
            self.decide()

    def _new_router(self) -> BudgetRouter:
        model, args = self.model, self.args
        if not args.router_targets:
            raise ElasticConfigError(
                "freeze_router=True, but the model has no router: load one that was saved with its router, or give router_targets and resume "
                "from a checkpoint."
            )
        if not isinstance(args.router_targets, dict):
            raise ElasticConfigError(f"router_targets={args.router_targets!r} must be a dict from budget to target.")
        if model.budgets:
            raise ElasticConfigError(
                f"the model has budgets already ({', '.join(model.budgets)}); the router makes its own from the axes' choices. Start from "
                "elastify(parent, calibration, axes=...) without budgets, or leave out router_targets."
            )
        devices = {model.device.index} if model.device.type == "cuda" else set()
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(args.seed)
            return BudgetRouter(model.elastic_config, args.router_targets, per_layer=args.router_per_layer or ())

    @property
    def decided(self) -> bool:
        return self.report is not None

    @contextmanager
    def at(self, budget: str, step: int, micro_batch: int) -> Iterator[None]:
        """Run the model at a mixture for `budget`; the same noise on every rank and in a resumed run."""
        if self._soft is None:
            self._soft = SoftUnits(self.model, self.model.architecture)
        rng = random.Random(f"{self.args.seed}:{step}:{micro_batch}:router")
        temperature, scale = self.schedule.at(step / max(1, self.args.router_steps - 1))
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        hard = rng.random() < self.schedule.hard_share
        self._sample = self.router.sample(budget, temperature, scale, hard=hard, generator=generator)
        self._soft.install(self.router.mixture(self._sample))
        try:
            yield
        finally:
            self._soft.uninstall()

    def loss(self, budget: str) -> torch.Tensor:
        """The weighted resource loss of the mixture that runs."""
        return self.args.router_loss_weight * self.router.resource_loss(budget, self._sample)

    def decide(self) -> list[dict[str, Any]]:
        """Turn the router's choices into the model's budgets, freeze it, and report.

        The report is logged, and written to `output_dir` as `router_report.json`.

        Returns:
            `list[dict]`: Per target what was chosen, what it costs by the exact count, how far that is from the target, and why.
        """
        if self._untrained:
            raise ElasticConfigError(
                "freeze_router=True, but the router was never trained: load a model that was saved with its router, or resume from a "
                "checkpoint of a run with router_targets."
            )
        decided = self.router.decide()
        config = self.model.elastic_config
        section = checked_section(config.parent_config, decided.section(config.axes, self.router.describe()))
        if config.budgets and config.budgets != section["budgets"]:
            raise ElasticConfigError(
                f"the model has budgets that its router does not choose ({', '.join(config.budgets)}); train at these without freeze_router, "
                "or remove them from the config so that the router decides."
            )
        config.elastic = section
        self.report = decided.report
        self.router.freeze()
        self._soft = None
        if self.args.should_save:
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            self._write_report(Path(self.args.output_dir))
        logger.info("the router decided:\n%s", render(self.report))
        for row in self.report:
            if not row["met"]:
                logger.warning(
                    "budget %s misses its target by %+.1f %%: %s", row["budget"], 100 * row["miss"], row["why"]
                )
        return self.report

    def save(self, folder: Path) -> None:
        """Write the router beside a checkpoint, and what it decided if it has."""
        self.router.save(folder)
        (folder / REPORT_FILE).unlink(missing_ok=True)
        if self.decided:
            self._write_report(folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; if it had decided, so does this one."""
        if not (folder / ROUTER_FILE).exists():
            raise CheckpointError(f"{folder} has no {ROUTER_FILE}; it was not made by a run with router_targets.")
        self.router.load(folder / ROUTER_FILE)
        self._untrained = False
        if not self.decided and (folder / REPORT_FILE).exists():
            self.decide()

    def _write_report(self, folder: Path) -> None:
        text = json.dumps(self.report, indent=2, allow_nan=False) + "\n"
        with replacing_file(folder / REPORT_FILE) as file:
            file.write_text(text, encoding="utf-8")
