"""What a run reports: the divergence per target token of every budget, in training and in evaluation."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from hf_elastic.configuration.budgets import FULL
from hf_elastic.errors import HFElasticError

from .handover import Part
from .progress import FIRST_BATCHES, Progress
from .quantizing import Quantizing
from .verdict import Verdict, judge, render, save

logger = logging.getLogger(__name__)


_SHOWN = (ProgressCallback, PrinterCallback)
"""Callbacks that show a run; where there is none, it is meant to be quiet, and its verdict goes into the log."""


class EvaluateAtTheEnd(TrainerCallback):
    """Evaluates once, after the last step: for an evaluation dataset without `eval_strategy`, which upstream would not look at."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step >= state.max_steps or control.should_training_stop:
            control.should_evaluate = True
        return control


class ReportingMixin(SFTTrainer):
    """Metrics and evaluation of [`ElasticDistillationTrainer`]."""

    quantizing: Quantizing | None
    _own_teacher: bool

    def _init_reporting(self, eval_budgets: list[str]) -> None:
        self._eval_budgets = eval_budgets
        self._budget_name = FULL
        self._sums: dict[str, dict[str, list[float]]] = {"train": _sums(), "eval": _sums()}
        self.progress = Progress()
        self.verdict: list[Verdict] | None = None
        self._entropy: torch.Tensor | None = None
        self._evaluated: dict[str, tuple[int, dict[str, float]]] = {}

    @contextmanager
    def _named(self, budget: str) -> Iterator[None]:
        self._budget_name = budget
        yield

    def _record(
        self,
        parts: Sequence[Part],
        divergences: torch.Tensor,
        distances: torch.Tensor,
        inputs: dict[str, torch.Tensor],
    ) -> None:
        """Add up both losses, target tokens and tokens of all ranks, and stop on all of them if one has a loss that is not finite."""
        mode = "train" if self.model.training else "eval"
        seen = (
            inputs["attention_mask"].sum()
            if "attention_mask" in inputs
            else inputs["input_ids"].new_tensor(inputs["input_ids"].numel())
        )
        entropy, self._entropy = self._entropy, None
        counts = torch.stack([part.target.sum() for part in parts])
        spread = torch.ones_like(divergences, dtype=torch.float64)  # of what the micro-batch has once
        once = [spread * (0.0 if entropy is None else entropy), spread * seen]
        rows = [row.detach().double() for row in (divergences, distances, counts, *once)]
        numbers = self.accelerator.reduce(torch.stack(rows, dim=1), "sum").tolist()
        loss = sum(row[0] + self.args.hidden_loss_weight * row[1] for row in numbers)
        if not math.isfinite(loss):
            where = (
                f"step {self.state.global_step}, micro-batch {max(self._micro_batch - 1, 0)}"
                if mode == "train"
                else "evaluation"
            )
            raise HFElasticError(
                f"the loss is {loss} at {where}, budget {self._budget_name!r}, in the batch of shape {tuple(inputs['input_ids'].shape)} "
                f"whose first row begins with tokens {inputs['input_ids'][0, :8].tolist()} (rank {self.accelerator.process_index}). This step "
                "changed no weight, and the last checkpoint is kept; lower the learning rate, or look at this batch."
            )
        for part, row in zip(parts, numbers, strict=True):
            total = self._sums[mode][part.name]
            for i in range(3):
                total[i] += row[i]
        if mode == "train":
            self._total_train_tokens += int(numbers[0][4])
            self._follow(parts, numbers, counted=entropy is not None)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    @property
    def _counts_entropy(self) -> bool:
        return bool(self.model.training) and self.progress.batches < FIRST_BATCHES

    def _follow(self, parts: Sequence[Part], numbers: Sequence[Sequence[float]], counted: bool) -> None:
        """Remember how a micro-batch went, for the verdict. Mixtures of sizes are no budget yet; what a size says after another one has
        read is remembered as that.

        Args:
            numbers (`list`): Per part the divergence, the distance, the target tokens, and the entropy of all parts.
            counted (`bool`): Whether the entropy was.
        """
        if counted:
            self.progress.add_entropy(numbers[0][3], sum(row[2] for row in numbers))
        if self._undecided:
            return
        step = self.state.global_step
        for part, row in zip(parts, numbers, strict=True):
            self.progress.add(step, part.name, row[0], row[2])
        if self.optimizer is not None:
            self.progress.add_rate(step, self.optimizer.param_groups[0]["lr"])

    def _conclude(self) -> None:
        """Say what the run made of every budget: into the log, into `verdict`, and into a file of the output folder."""
        steps, found = self.state.global_step, defaultdict(list)
        for at, means in self._evaluated.values():
            for budget, mean in means.items() if at == steps else ():
                found[budget].append(mean)
        evaluated = {budget: sum(means) / len(means) for budget, means in found.items()}
        budgets = [name for name in self.progress.spans if ">" not in name]
        budgets = [name for name in self._elastic.elastic_config.family() if name in budgets]
        self.verdict = judge(self.progress, budgets, steps, evaluated, FULL if self._own_teacher else None)
        if self.verdict and self.args.should_save:
            save(self.verdict, steps, Path(self.args.output_dir or "."))
        if self.verdict and any(isinstance(shown, _SHOWN) for shown in self.callback_handler.callbacks):
            if self.is_world_process_zero():
                tqdm.write(f"after {steps} steps:\n{render(self.verdict)}")
        elif self.verdict:
            logger.info("after %d steps:\n%s", steps, render(self.verdict))

    def _means(self, mode: str) -> dict[str, dict[str, float]]:
        """Per budget the losses per target token since the last call: `kl`, and `hidden` (without its weight) if it is on."""
        sums, self._sums[mode] = self._sums[mode], _sums()
        names = ("kl", "hidden") if self.args.hidden_loss_weight > 0 else ("kl",)
        return {
            budget: {name: total / max(count, 1.0) for name, total in zip(names, totals, strict=False)}
            for budget, (*totals, count) in sums.items()
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            for budget, means in self._means("train").items():
                self._metrics["train"].update({f"{budget}/{name}": [mean] for name, mean in means.items()})
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Report the divergence per target token, which no batch size changes, of every budget (`eval_<budget>/kl`) and their mean."""
        self._sums["eval"] = _sums()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._means("eval")
        if means:
            kls = {budget: mean["kl"] for budget, mean in means.items()}
            self._evaluated[metric_key_prefix] = (self.state.global_step, kls)
        if output.metrics is not None and means:
            output.metrics[f"{metric_key_prefix}_loss"] = sum(mean["kl"] for mean in means.values()) / len(means)
            output.metrics.update(
                {f"{metric_key_prefix}_{budget}/{key}": x for budget, mean in means.items() for key, x in mean.items()}
            )
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Evaluate every budget on the batch; the loss is their mean, see `evaluation_loop`."""
        inputs = self._prepare_inputs(inputs)
        losses = []
        with torch.no_grad(), nullcontext() if self.quantizing is None else self.quantizing.rounding():
            for budget in [n for n in self._eval_budgets if not self._undecided or n == FULL]:
                with self._elastic.computing(budget), self._named(budget):
                    losses.append(self.compute_loss(model, inputs))
        return torch.stack(losses).mean().detach(), None, None


def _sums() -> dict[str, list[float]]:
    """Per budget: divergence, distance of hidden states, and number of target tokens."""
    return defaultdict(lambda: [0.0, 0.0, 0.0])
