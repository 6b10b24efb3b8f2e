"""The first part of a run in which sizes are learned: a budget router decides them while the model trains at its mixtures."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_elastic import ElasticConfig, ElasticForCausalLM
from hf_elastic.errors import CheckpointError, ElasticConfigError
from hf_elastic.router import BudgetRouter, Schedule
from hf_elastic.soft import SoftUnits
from hf_elastic.submodel import LAYERS

from .elastic_distillation_config import ElasticDistillationConfig

ROUTER_FILE = "router.safetensors"


class Routing:
    """A budget router in training, and what it decided.

    For the first `router_steps` steps every micro-batch runs at a Gumbel-Softmax mixture of the drawn budget and the resource loss is
    added to the divergence. Then the choices become the model's budgets, and the run goes on with these.

    Args:
        model ([`ElasticForCausalLM`]): Its axes and choices are what is chosen among; it has no budgets yet.
        args ([`ElasticDistillationConfig`]): `router_targets` and the other `router_*` fields.
    """

    def __init__(self, model: ElasticForCausalLM, args: ElasticDistillationConfig):
        if not isinstance(args.router_targets, dict):
            raise ElasticConfigError(f"router_targets={args.router_targets!r} must be a dict from budget to target.")
        if model.budgets:
            raise ElasticConfigError(
                f"the model has budgets already ({', '.join(model.budgets)}); the router makes its own from the axes' choices. Start from "
                "ElasticConfig.from_parent(parent, {}, choices=...), or leave out router_targets."
            )
        self.model, self.args = model, args
        devices = {model.device.index} if model.device.type == "cuda" else set()
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(args.seed)
            self.router = BudgetRouter(
                model.elastic_config, args.router_targets, per_layer=args.router_per_layer or ()
            )
        self.router.to(model.device)
        self.schedule = Schedule(hard_share=args.router_hard_share)
        self.report: list[dict[str, Any]] | None = None
        self._soft: SoftUnits | None = None
        self._sample: dict[Any, torch.Tensor] = {}

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
        """Turn the router's choices into the model's budgets.

        Returns:
            `list[dict]`: Per target what was chosen, what it costs by the exact count, and how far that is from the target.
        """
        decided = self.router.decide()
        config = self.model.elastic_config
        choices = {axis: entry["choices"] for axis, entry in config.axes.items()}
        ranking = config.axes.get(LAYERS, {}).get("ranking")
        sizes = {name: submodel.to_dict() for name, submodel in decided.items()}
        made = ElasticConfig.from_parent(config.parent_config, sizes, choices=choices, layer_ranking=ranking)
        config.elastic = made.elastic
        self.report = self.router.report(decided)
        self.router.requires_grad_(False)
        self._soft = None
        return self.report

    def save(self, folder: Path) -> None:
        """Write the router beside a checkpoint."""
        metadata = {"names": json.dumps(self.router.names), "report": json.dumps(self.report)}
        save_file(
            {key: tensor.contiguous().cpu() for key, tensor in self.router.state_dict().items()},
            folder / ROUTER_FILE,
            metadata,
        )

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; if it had decided, so has this one."""
        path = folder / ROUTER_FILE
        if not path.exists():
            raise CheckpointError(f"{folder} has no {ROUTER_FILE}; it was not made by a run with router_targets.")
        self.router.load_state_dict(load_file(path))
        if not self.decided and _was_decided(path):
            self.decide()


def _was_decided(path: Path) -> bool:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["report"]) is not None
