"""Configuration of [`ElasticDistillationTrainer`]."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import SchedulerType
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available
from trl import SFTConfig

from hf_elastic.errors import ElasticConfigError
from hf_elastic.quantization.recipes import Recipe

from .curriculum import first_step, steps_of
from .losses import HIDDEN_LOSSES


@dataclass
class ElasticDistillationConfig(SFTConfig):
    r"""
    What [`ElasticDistillationTrainer`] adds to `trl.SFTConfig`. `bf16` is on by default where there is a device for it, and off on CPUs.

    Args:
        budget_probabilities (`dict[str, float]`, *optional*):
            How often each budget is drawn, one per micro-batch; sums to 1. Defaults to all budgets of the model alike, the whole parent
            included (stage 1 of the papers; stage 2 draws the larger ones more often, 0.5 / 0.3 / 0.2).
        stages (`list[dict]`, *optional*):
            Stages of the run, each with `steps` or `tokens`, and optionally `budget_probabilities`, `max_length`, and
            `learning_rate_scale` or `learning_rate` and `router_learning_rate` of its own; see [`Stage`]. `tokens` become steps at the
            start, by the tokens of a full step: `per_device_train_batch_size` x `gradient_accumulation_steps` x processes x the length
            of the stage. They set `max_steps`.
        stop_on_plateau (`bool`, *optional*, defaults to `False`):
            End the run when it has learned what it can, at `max_steps` (or after `num_train_epochs`) at the latest: the learning rate is constant after
            its warm-up until no budget comes much nearer to the teacher any more, then falls to zero over half as many steps; see [`Plateau`]. It
            takes the place of a schedule, so leave `lr_scheduler_type` as it is; with at most one stage. (`max_steps` itself is a number upstream.)
        temperature (`float`, *optional*, defaults to 1.0): Of both distributions; above 0.
        beta (`float`, *optional*, defaults to 0.0): 0 is forward KL, 1 reverse KL, in between the generalised Jensen-Shannon divergence.
        loss_chunk_size (`int`, *optional*, defaults to 1024): Tokens that have logits at the same time.
        hidden_loss_weight (`float`, *optional*, defaults to 0.0):
            Of the distance between hidden states of student and teacher after their layers, added to the divergence; 0 is off. Needs a
            teacher with the parent's sizes and order of channels, which the default one is.
        hidden_loss (`str`, *optional*, defaults to `"cosine"`): `"cosine"` or `"mse"`, see [`hidden_distance`].
        hidden_loss_layers (`list[int]`, *optional*):
            Layers of the parent, counted from 0, after which to compare; those that a budget drops are passed over. Defaults to all.
        eval_budgets (`list[str]`, *optional*): Budgets to evaluate, defaults to all. With an evaluation dataset and without `eval_strategy` they are
            evaluated once, after the last step.
        handover_probability (`float`, *optional*, defaults to 0.0):
            How often a micro-batch trains cache hand-over: its rows begin in another budget, drawn from the same probabilities, and the batch's
            own goes on with the cache, converted as generation converts it. Each is compared with the teacher on what it reads, and the gradient
            of the second goes through the cache into the first. 0.5 makes every second batch one. The saved config then says so (`handover_trained`). Stages can have their own.
            Needs `activation_checkpointing=False`, since upstream leaves caches out where it recomputes.
        handover_token (`str`, *optional*):
            Where rows are cut: before the last such token, `"</think>"` for example, which the second budget then reads, as in generation. Rows
            without it, and all rows by default, are cut at the same random share of their length.
        handover_start (`float`, *optional*, defaults to 0.0):
            After how many steps training of hand-over begins: a share of all steps below 1, from 1 on a number of steps.
        quantization (`str` or `dict`, *optional*):
            Train the weights that a quantised checkpoint will hold: `"nvfp4"`, `"fp8"`, a recipe or a file with one, as [`hf_elastic.quantize`] takes
            them. Every forward pass of the model rounds the parent's weights with their current scales, before a budget cuts them; gradients pass as
            if nothing was rounded (arXiv 2511.16664). Evaluation is always of the rounded weights, so that its numbers are those of the checkpoint
            that will be written. What is saved is not rounded: quantise it after the run with the same recipe. The teacher is never rounded.
        quantization_start (`float`, *optional*, defaults to 0.0):
            After how many steps training begins to round: a share of all steps below 1, from 1 on a number of steps.
        router_targets (`dict[str, str | float | dict]`, *optional*):
            Learn the sizes: per budget what it may cost, a share of the parent's parameters (`0.5`, `"50%"`, `"50% active"`) or `"12B"`,
            `"2.1B active"`, `"24GB"`, or a memory with caches, `{"memory": "24GB", "context_length": 32768, "batch_size": 4, "dtype": "bfloat16"}`. The model then
            has axes with choices and no budgets; a router decides them in the first `router_steps` steps (arXiv 2511.16664, eq. 6-12), and
            the run goes on with what it decided.
        router_steps (`int`, *optional*): Steps until the router decides; required with `router_targets`.
        router_learning_rate (`float`, *optional*, defaults to 1e-3): Of the router (the papers use 1e-2 over far longer runs).
        router_loss_weight (`float`, *optional*, defaults to 5.0): Of the resource loss against the divergence.
        router_hard_share (`float`, *optional*, defaults to 0.004):
            Share of micro-batches that run at a hard sample with straight-through gradients instead of a mixture, in [0, 1].
        router_per_layer (`list[str]`, *optional*): Axes with a size of their own in every layer.
        freeze_router (`bool`, *optional*, defaults to `False`):
            Take the router that the model was saved with, or that of the checkpoint to resume from (then with the run's
            `router_targets`), train it no further, and run at what it chooses from the first step. `router_steps` stays 0.
        freeze_model (`bool`, *optional*, defaults to `False`):
            Train the router alone: no weight of the model changes, and the run ends when the router decides (`max_steps` =
            `router_steps`). The model stays frozen afterwards, as `requires_grad_(False)` leaves it.
        teacher_model_init_kwargs (`dict`, *optional*): For `from_pretrained` of a teacher given by name; its `dtype` defaults to the model's.
    """

    _VALID_DICT_FIELDS = [
        *SFTConfig._VALID_DICT_FIELDS,
        "budget_probabilities",
        "quantization",
        "router_targets",
        "teacher_model_init_kwargs",
        "stages",
    ]

    budget_probabilities: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "How often each budget is drawn (name: probability); all alike by default."}
    )
    stages: list[Any] | str | None = field(
        default=None,
        metadata={"help": "Stages: dicts with steps or tokens, budget_probabilities, max_length, learning rates."},
    )
    stop_on_plateau: bool = field(
        default=False, metadata={"help": "End when no budget comes nearer to the teacher, at max_steps at the latest."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of both distributions, above 0."})
    beta: float = field(default=0.0, metadata={"help": "0 forward KL, 1 reverse KL, between: generalised JSD."})
    loss_chunk_size: int = field(default=1024, metadata={"help": "Tokens that have logits at the same time."})
    hidden_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of the distance of hidden states, 0: off."}
    )
    hidden_loss: str = field(default="cosine", metadata={"help": "Distance of hidden states: cosine or mse."})
    hidden_loss_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers of the parent whose outputs are compared, all by default."}
    )
    eval_budgets: list[str] | None = field(default=None, metadata={"help": "Budgets to evaluate, all by default."})
    handover_probability: float = field(
        default=0.0, metadata={"help": "Share of micro-batches that begin in another budget and go on from its cache."}
    )
    handover_token: str | None = field(
        default=None, metadata={"help": "Token before which rows of such batches are cut, at random by default."}
    )
    handover_start: float = field(
        default=0.0, metadata={"help": "Steps before hand-over batches begin: a share below 1, from 1 on a number."}
    )
    quantization: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Train for quantised weights: nvfp4, fp8, or a recipe."}
    )
    quantization_start: float = field(
        default=0.0, metadata={"help": "Steps before rounding begins: a share below 1, from 1 on a number."}
    )

    router_targets: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Learn the sizes: what each budget may cost ('50%', '12B', '2.1B active')."}
    )
    router_steps: int = field(default=0, metadata={"help": "Steps until the router decides the sizes."})
    router_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the router."})
    router_loss_weight: float = field(default=5.0, metadata={"help": "Weight of the router's resource loss."})
    router_hard_share: float = field(
        default=0.004, metadata={"help": "Share of micro-batches at a hard sample instead of a mixture, in [0, 1]."}
    )
    router_per_layer: list[str] | None = field(
        default=None, metadata={"help": "Axes with a size of their own in every layer."}
    )
    freeze_router: bool = field(
        default=False, metadata={"help": "Run at what the saved router chooses, and train it no further."}
    )
    freeze_model: bool = field(default=False, metadata={"help": "Train the router alone, until it decides."})
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained for a teacher given by name."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.stages, str):  # from the command line; upstream reads JSON objects, not lists
            try:
                self.stages = json.loads(self.stages)
            except json.JSONDecodeError as error:
                raise ElasticConfigError(f"stages={self.stages!r} is not JSON: {error}.") from error
        if self.bf16 is None and (self.use_cpu or not (is_torch_bf16_gpu_available() or is_torch_xla_available())):
            self.bf16: bool | None = False  # upstream takes it where nothing is said, and refuses machines without it
        upstream: Any = self
        if upstream.activation_checkpointing is None and upstream.gradient_checkpointing is True:
            upstream.activation_checkpointing = True  # trl's default, by the name that upstream does not warn of
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin it for, and torch would warn of the default
        if not 0 < self.temperature < math.inf:
            raise ElasticConfigError(f"temperature={self.temperature} must be a finite number above 0.")
        if not 0 <= self.beta <= 1:
            raise ElasticConfigError(f"beta={self.beta} must be in [0, 1].")
        if self.loss_chunk_size < 1:
            raise ElasticConfigError(f"loss_chunk_size={self.loss_chunk_size} must be at least 1.")
        self._check_hidden_loss()
        self._check_handover()
        self._check_quantization()
        self._check_plateau()
        if self.freeze_router:
            if self.router_steps or self.freeze_model:
                what = f"router_steps={self.router_steps}" if self.router_steps else "freeze_model=True"
                raise ElasticConfigError(
                    f"{what} does not work with freeze_router=True: nothing trains a frozen router."
                )
        elif bool(self.router_targets) != (self.router_steps > 0) or self.router_steps < 0:
            raise ElasticConfigError(
                f"router_steps={self.router_steps} with router_targets={self.router_targets!r}: give both, or neither."
            )
        if not (self.router_learning_rate > 0 and self.router_loss_weight > 0):
            raise ElasticConfigError("router_learning_rate and router_loss_weight must be above 0.")
        if not 0 <= self.router_hard_share <= 1:
            raise ElasticConfigError(f"router_hard_share={self.router_hard_share} must be in [0, 1].")
        if self.packing or self.eval_packing or self.padding_free:
            raise ElasticConfigError(
                "packing, eval_packing and padding_free join documents, whose Mamba states then leak into each other without the CUDA "
                "kernels; set them to False."
            )
        if isinstance(self.stages, list) and self.max_steps < 0:
            entries = [stage for stage in self.stages if isinstance(stage, dict)]
            steps = [steps_of(stage, self.rows_per_step, self.max_length) for stage in entries]
            counts = [count for count in steps if count is not None]
            if len(counts) == len(self.stages):  # what is wrong, the trainer says
                self.max_steps: int = sum(counts)
        self._check_handover_start()
        if self.freeze_model and not self.router_targets:
            raise ElasticConfigError(
                "freeze_model=True leaves nothing to train without a router; give router_targets and router_steps."
            )
        if self.freeze_model and self.max_steps != self.router_steps:
            raise ElasticConfigError(
                f"freeze_model=True trains the router alone, and the run ends when it decides: set max_steps (here {self.max_steps}) to "
                f"router_steps ({self.router_steps}), and train the model in a second run."
            )

    def _check_hidden_loss(self) -> None:
        if not 0 <= self.hidden_loss_weight < math.inf:
            raise ElasticConfigError(
                f"hidden_loss_weight={self.hidden_loss_weight} must be a finite number of at least 0."
            )
        if self.hidden_loss not in HIDDEN_LOSSES:
            raise ElasticConfigError(f"hidden_loss={self.hidden_loss!r} must be one of {', '.join(HIDDEN_LOSSES)}.")
        if self.hidden_loss_weight == 0 and self.hidden_loss_layers is not None:
            raise ElasticConfigError(
                f"hidden_loss_layers={self.hidden_loss_layers} would be ignored: hidden_loss_weight is 0. Set it, or leave the layers out."
            )
        if self.hidden_loss_weight > 0 and self.router_targets:
            raise ElasticConfigError(
                f"hidden_loss_weight={self.hidden_loss_weight} does not work with router_targets: while sizes are mixed, there is no hidden "
                "state of one size. Learn the sizes first, and train the model with the decided budgets in a second run."
            )

    def _check_quantization(self) -> None:
        _check_start("quantization_start", self.quantization_start)
        if self.quantization is None:
            if self.quantization_start:
                raise ElasticConfigError(
                    f"quantization_start={self.quantization_start} would be ignored: there is no quantization. Set it, or leave the start out."
                )
            return
        self.quantization = Recipe.of(self.quantization).to_dict()
        if self.freeze_model:
            raise ElasticConfigError(
                "quantization needs weights that are trained; freeze_model=True trains the router alone."
            )

    def _check_plateau(self) -> None:
        if not self.stop_on_plateau:
            return
        upstream: Any = self
        chosen = str(getattr(upstream.lr_scheduler_type, "value", upstream.lr_scheduler_type))
        if chosen not in ("linear", "constant_with_warmup") or self.lr_scheduler_kwargs:
            raise ElasticConfigError(
                f"stop_on_plateau has a schedule of its own (warm-up, constant, falling), which lr_scheduler_type={chosen!r} with "
                f"lr_scheduler_kwargs={self.lr_scheduler_kwargs!r} would contradict; leave both out."
            )
        if isinstance(self.stages, list) and len(self.stages) > 1:
            raise ElasticConfigError(
                f"stop_on_plateau does not know which of {len(self.stages)} stages to make shorter; give one stage, or make each a run."
            )
        if self.quantization_start or self.freeze_model:
            what = f"quantization_start={self.quantization_start}" if self.quantization_start else "freeze_model=True"
            raise ElasticConfigError(f"{what} does not work with stop_on_plateau, which may end the run at any step.")
        upstream.lr_scheduler_type = SchedulerType.CONSTANT_WITH_WARMUP

    @property
    def trains_handover(self) -> bool:
        """Whether the run or one of its stages has hand-overs."""
        entries = self.stages if isinstance(self.stages, list) else []
        probabilities = [stage.get("handover_probability") for stage in entries if isinstance(stage, dict)]
        return self.handover_probability > 0 or any(probabilities)

    def _check_handover(self) -> None:
        if not 0 <= self.handover_probability <= 1:
            raise ElasticConfigError(f"handover_probability={self.handover_probability} must be in [0, 1].")
        _check_start("handover_start", self.handover_start)
        if not self.trains_handover:
            if self.handover_start:
                raise ElasticConfigError(
                    f"handover_start={self.handover_start} would be ignored: handover_probability is 0. Set it, or leave the start out."
                )
            if self.handover_token is not None:
                raise ElasticConfigError(
                    f"handover_token={self.handover_token!r} would be ignored: handover_probability is 0. Set it, or leave the token out."
                )
            return
        if self.gradient_checkpointing:
            raise ElasticConfigError(
                "handover_probability above 0 does not work with activation checkpointing, where upstream leaves the cache out that is handed "
                "over; set activation_checkpointing=False."
            )
        if self.router_targets or self.freeze_router:
            raise ElasticConfigError(
                "handover_probability above 0 does not work with a router: a mixture of sizes has no cache of one size. Learn the sizes first, and "
                "train hand-over between the decided budgets in a second run."
            )

    def _check_handover_start(self) -> None:
        if self.max_steps > 0 and first_step(self.handover_start, self.max_steps) >= self.max_steps:
            raise ElasticConfigError(
                f"handover_start={self.handover_start:g}, but the run has {self.max_steps} steps, none of which would be a hand-over; begin earlier."
            )
        if self.max_steps <= 0 and not self.stages and 0 < self.handover_start < 1:
            raise ElasticConfigError(
                f"handover_start={self.handover_start} is a share of the steps, and how many the run has is not known before it begins: give "
                "max_steps, or a number of steps."
            )

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, of all micro-batches and processes together."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size


def _check_start(name: str, start: float) -> None:
    """Raise for what is no number of steps before something begins."""
    if not (0 <= start < 1 or (start < math.inf and start == int(start) >= 1)):
        raise ElasticConfigError(f"{name}={start} must be a share of the steps in [0, 1), or a whole number of steps.")
