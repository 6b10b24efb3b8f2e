"""Optimizer and learning rates: the configured ones, with a group for the router and the stages' rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from trl import SFTTrainer

from hf_elastic.errors import ElasticConfigError

from .stopping import Plateau


class OptimizingMixin(SFTTrainer):
    """Optimizer and schedule of [`ElasticDistillationTrainer`]."""

    plateau: Plateau | None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The configured optimizer; the router is a group of its own, with its own learning rate and without decay."""
        made = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if self.routing is not None and not made:
            group = {"params": list(self.routing.router.parameters()), "lr": self.args.router_learning_rate}
            optimizer.add_param_group({**group, "weight_decay": 0.0})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The configured schedule, multiplied by the stages' `learning_rate_scale`, or by what makes their own rates of it; falling when [`Plateau`] says so."""
        given = self.lr_scheduler is not None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.plateau is not None:
            self.plateau.begin(num_training_steps, self.args.get_warmup_steps(num_training_steps))
        if not self.curriculum.rates and self.plateau is None:
            return scheduler
        option = "stop_on_plateau" if self.plateau is not None else self.curriculum.rates[0]
        if given or not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            what = "a scheduler of your own" if given else f"lr_scheduler_type={self.args.lr_scheduler_type!r}"
            raise ElasticConfigError(
                f"{option} does not work with {what}; use linear, cosine, constant_with_warmup or another schedule that is a "
                "function of the step."
            )
        if self.curriculum.rates and 0.0 in scheduler.base_lrs:
            raise ElasticConfigError(f"{option} of a stage needs a learning_rate of the run above 0.")
        groups = scheduler.optimizer.param_groups
        scheduler.lr_lambdas = [
            self._staged(schedule, scheduler, i, self._is_routers(groups[i]))
            for i, schedule in enumerate(scheduler.lr_lambdas)
        ]
        for group, base, schedule in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * schedule(0)
        scheduler._last_lr = [group["lr"] for group in groups]
        return scheduler

    def _staged(self, schedule: Callable[[int], float], scheduler: Any, group: int, router: bool) -> Any:
        factor, plateau = self.curriculum.learning_rate_factor, self.plateau

        def staged(step: int) -> float:
            # A resumed scheduler has the base rates of its checkpoint, so they are read when they are used.
            rate = schedule(step) * factor(step, scheduler.base_lrs[group], router)
            return rate if plateau is None else rate * plateau.factor(step)

        return staged

    def _is_routers(self, group: dict[str, Any]) -> bool:
        routers = set() if self.routing is None else {id(p) for p in self.routing.router.parameters()}
        return any(id(p) in routers for p in group["params"])
