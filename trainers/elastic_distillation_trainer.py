"""Distil all budgets of an elastic model from its frozen parent, one budget per micro-batch."""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from hf_elastic import ElasticForCausalLM
from hf_elastic.budgets import FULL
from hf_elastic.errors import ElasticConfigError, HFElasticError

from .curriculum import make_curriculum
from .elastic_distillation_config import ElasticDistillationConfig
from .losses import chunked_divergence
from .resuming import STATE_FILE, check_family, check_training, last_complete, training_state
from .routing import Routing

logger = logging.getLogger(__name__)

_PAPER = {
    "title": "Nemotron Elastic: Towards Efficient Many-in-One Reasoning LLMs",
    "id": "2511.16664",
    "citation": """@article{nemotron_elastic,
    title = {{Nemotron Elastic: Towards Efficient Many-in-One Reasoning LLMs}},
    year = 2025,
    eprint = {arXiv:2511.16664},
}""",
}


class ElasticDistillationTrainer(SFTTrainer):
    r"""
    Trainer that learns all sizes of an elastic model in one run: every micro-batch runs at one budget, drawn from the curriculum, and is
    trained towards the frozen parent by the divergence of their distributions over the target tokens (arXiv 2511.16664, eq. 14). Only
    what the budget keeps is computed; the logits of student and teacher are only ever there for a chunk of tokens.

    Everything else is `trl.SFTTrainer`: conversational, prompt-completion, text and pre-tokenised datasets, completion-only loss,
    gradient checkpointing and accumulation, mixed precision, callbacks, evaluation (of every budget, logged as `eval_<budget>/kl`),
    `push_to_hub`.

    Args:
        model ([`ElasticForCausalLM`] or `str`):
            With everything loaded (no `budget=`), or where to load it from; then in float32, as in `SFTTrainer`, unless
            `args.model_init_kwargs` says otherwise.
        teacher_model (`PreTrainedModel` or `str`, *optional*):
            Defaults to a frozen copy of the model as it is at the start: the sorted parent. A model given here is frozen.
        args ([`ElasticDistillationConfig`], *optional*): Configuration.
        kwargs: As for `SFTTrainer` (`train_dataset`, `eval_dataset`, `processing_class`, `callbacks`, ...).

    Raises:
        `ElasticConfigError`: not an elastic model, a teacher of another vocabulary, unknown budgets, probabilities that do not sum to 1,
            a dataset without the columns, an option that distillation would ignore.
        `HFElasticError`: while training, a loss that is not finite.
    """

    _tag_names = ["trl", "elastic", "distillation"]
    _name = "Elastic distillation"
    _paper = _PAPER

    def __init__(
        self,
        model: ElasticForCausalLM | str,
        teacher_model: PreTrainedModel | str | None = None,
        args: ElasticDistillationConfig | None = None,
        **kwargs: Any,
    ):
        args = args if args is not None else ElasticDistillationConfig()
        if not isinstance(args, ElasticDistillationConfig):
            raise ElasticConfigError(f"args must be an ElasticDistillationConfig, got {type(args).__name__}.")
        _refuse_ignored(args, kwargs)
        if isinstance(model, str):
            model = ElasticForCausalLM.from_pretrained(model, **{"dtype": "float32", **(args.model_init_kwargs or {})})
            args.model_init_kwargs = None
        if getattr(model, "peft_config", None):
            raise ElasticConfigError(
                "adapters are attached to the model: they do not follow a budget in training. Merge or unload them first."
            )
        if not isinstance(model, ElasticForCausalLM):
            raise ElasticConfigError(
                f"model must be an ElasticForCausalLM, got {type(model).__name__}; make one with elastify()."
            )
        for name in ("train_dataset", "eval_dataset"):
            _check_columns(kwargs.get(name), name, args, kwargs.get("formatting_func"))
        model.set_budget(None)
        self.routing = Routing(model, args) if args.router_targets else None
        names = self.routing.router.names if self.routing else list(model.elastic_config.family())
        self.curriculum = make_curriculum(
            names,
            args.budget_probabilities,
            args.stages,
            args.max_steps,
            args.max_length,
            args.seed,
            getattr(model.config, "max_position_embeddings", None),
        )
        if names[0] not in {name for stage in self.curriculum.stages for name in stage.budget_probabilities}:
            warnings.warn(f"the whole parent ({names[0]!r}) is never drawn: nothing keeps it as it is.", stacklevel=2)
        self._eval_budgets = _known(args.eval_budgets, names) if args.eval_budgets else names
        teacher = _load_teacher(teacher_model, model, args.teacher_model_init_kwargs)
        if args.ddp_find_unused_parameters is None:
            # A budget that drops a layer uses none of its parameters. Upstream looks for them only without gradient checkpointing, and
            # DDP then stops in the second step; non-reentrant checkpointing, the default here, gets along with looking.
            args.ddp_find_unused_parameters = True
        with _without_auxiliary_loss(model, args):
            super().__init__(model=model, args=args, **kwargs)
        # The loss is divided by the number of target tokens of the whole step already.
        self.loss_is_scaled_for_ga = True
        self.teacher_model = self._prepare_teacher(teacher)
        self._micro_batch = 0
        self._divergence: dict[str, dict[str, list[float]]] = {"train": _sums(), "eval": _sums()}

    def _prepare_teacher(self, teacher: PreTrainedModel) -> nn.Module:
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if getattr(plugin, "fsdp_version", 1) != 2:
                raise ElasticConfigError(
                    "FSDP 1 flattens parameters, so budgets cannot take parts of them; set fsdp_version to 2."
                )
            policy = {"mp_policy": plugin.mixed_precision_policy} if plugin.mixed_precision_policy is not None else {}
            return shard_teacher(teacher.to(self.accelerator.device), **policy)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    # -- one step ------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of one step, cut to the stage's length before their target tokens are counted."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        length = self.curriculum.stage(self.state.global_step).max_length
        if length is not None:
            batches = [{key: t[:, :length] if t.dim() > 1 else t for key, t in batch.items()} for batch in batches]
        self._micro_batch = 0
        if self.routing is not None:
            self.routing.router.zero_grad()  # upstream clears the gradients of the model, not those of the optimizer
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        """Target tokens of all micro-batches (and ranks) of a step; at least 1, so that a step without any has a loss of zero."""
        if not batch_samples:
            return None
        targets = [(batch["labels"][:, 1:] != -100).sum() for batch in batch_samples]
        count = torch.stack(targets).sum().to(device)
        if self.args.average_tokens_across_devices:
            count = self.accelerator.reduce(count, "sum")
        return count.clamp(min=1)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        budget = self.curriculum.budget(self.state.global_step, self._micro_batch)
        self._micro_batch += 1
        # Backward runs inside: checkpointed layers compute again what they computed.
        with self._at(budget), self._named(budget):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and self._undecided:
            for parameter in self._undecided.router.parameters():  # DDP does not know them
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        if self.accelerator.sync_gradients:
            # A dropped layer has a gradient of zero, as a dropped channel has: decay and momentum treat both alike, and DDP and one
            # process do the same.
            for parameter in self._elastic.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm that upstream logs; the last moment to stop before the weights change."""
        norm = super()._get_grad_norm(model, grad_norm)
        if (
            self.accelerator.scaler is None and norm is not None and not math.isfinite(norm)
        ):  # a scaler skips such steps itself
            raise HFElasticError(
                f"the gradient norm is {float(norm)} at step {self.state.global_step}, though the loss is finite. This step changed no weight, "
                "and the last checkpoint is kept; lower the learning rate, or train in float32 or bfloat16."
            )
        return norm

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Divergence from the teacher over the target tokens, at the active budget."""
        if return_outputs:
            raise HFElasticError("the distillation loss builds no outputs; set prediction_loss_only=True.")
        labels = inputs["labels"]
        tokens: dict[str, torch.Tensor] = {
            key: inputs[key] for key in ("input_ids", "attention_mask", "position_ids") if key in inputs
        }
        target = labels[:, 1:] != -100  # position t predicts token t + 1
        with self.accelerator.autocast():
            with torch.no_grad():
                teacher_hidden = _through(self.teacher_model, tokens)[:, :-1][target]
            loss = self._through_wrapper(model, tokens, target, teacher_hidden)
        count = target.sum()
        self._record(loss.detach(), count, inputs)
        if num_items_in_batch is None:
            return loss / count.clamp(min=1)
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        loss = loss * scale / num_items_in_batch
        routing = self._undecided
        if self.model.training and routing is not None:
            resource = routing.loss(self._budget_name)
            self._metrics["train"][f"{self._budget_name}/resource"].append(float(resource.detach()))
            loss = loss + resource / self.current_gradient_accumulation_steps
        return loss

    def _through_wrapper(
        self, model: nn.Module, tokens: dict[str, torch.Tensor], target: torch.Tensor, teacher_hidden: torch.Tensor
    ) -> torch.Tensor:
        """The whole student loss as one call of the wrapped model: DDP and FSDP only see parameters used inside their forward, and
        calling the backbone beside them lets ranks drift apart without an error."""
        student, teacher = self._elastic, self.accelerator.unwrap_model(self.teacher_model)

        def student_loss(**kwargs: Any) -> torch.Tensor:
            hidden = _hidden(student, kwargs)[:, :-1][target]
            return chunked_divergence(
                hidden,
                teacher_hidden,
                _head(student),
                _head(teacher),
                beta=self.args.beta,
                temperature=self.args.temperature,
                chunk_size=self.args.loss_chunk_size,
            )

        with _forward_as(student, student_loss):
            return model(**tokens)

    @property
    def _undecided(self) -> Routing | None:
        """The router, as long as it has not decided."""
        return self.routing if self.routing is not None and not self.routing.decided else None

    @contextmanager
    def _at(self, budget: str) -> Iterator[None]:
        """Run at a budget of the model, or at a mixture that the router draws for it."""
        if self._undecided and self.state.global_step >= self.args.router_steps:
            self._decide(self._undecided)
        routing = self._undecided
        if routing is not None:
            with routing.at(budget, self.state.global_step, self._micro_batch):
                yield
        else:
            with self._elastic.computing(budget):
                yield

    def _decide(self, routing: Routing) -> None:
        for row in routing.decide():
            sizes = ", ".join(f"{axis}={size}" for axis, size in row["sizes"].items())
            logger.info(
                "budget %s: %s, %+.1f %% of its target of %s", row["budget"], sizes, 100 * row["miss"], row["target"]
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The configured optimizer; the router is a group of its own, with its own learning rate and without decay."""
        made = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if self.routing is not None and not made:
            group = {"params": list(self.routing.router.parameters()), "lr": self.args.router_learning_rate}
            optimizer.add_param_group({**group, "weight_decay": 0.0})
        return optimizer

    @property
    def _elastic(self) -> ElasticForCausalLM:
        return self.accelerator.unwrap_model(self.model)

    # -- metrics and evaluation ----------------------------------------------------------------------------------------

    @contextmanager
    def _named(self, budget: str) -> Iterator[None]:
        self._budget_name = budget
        yield

    def _record(self, loss: torch.Tensor, count: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
        """Add up divergence, target tokens and tokens of all ranks, and stop on all of them if one has a loss that is not finite."""
        mode = "train" if self.model.training else "eval"
        seen = (
            inputs["attention_mask"].sum()
            if "attention_mask" in inputs
            else inputs["input_ids"].new_tensor(inputs["input_ids"].numel())
        )
        numbers = self.accelerator.reduce(torch.stack([loss.double(), count.double(), seen.double()]), "sum").tolist()
        if not math.isfinite(numbers[0]):
            where = (
                f"step {self.state.global_step}, micro-batch {max(self._micro_batch - 1, 0)}"
                if mode == "train"
                else "evaluation"
            )
            raise HFElasticError(
                f"the loss is {numbers[0]} at {where}, budget {self._budget_name!r}, in the batch of shape {tuple(inputs['input_ids'].shape)} "
                f"whose first row begins with tokens {inputs['input_ids'][0, :8].tolist()} (rank {self.accelerator.process_index}). This step "
                "changed no weight, and the last checkpoint is kept; lower the learning rate, or look at this batch."
            )
        total = self._divergence[mode][self._budget_name]
        total[0] += numbers[0]
        total[1] += numbers[1]
        if mode == "train":
            self._total_train_tokens += int(numbers[2])
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _mean_divergence(self, mode: str) -> dict[str, float]:
        """Divergence per target token of each budget since the last call."""
        sums, self._divergence[mode] = self._divergence[mode], _sums()
        return {budget: total / max(count, 1.0) for budget, (total, count) in sums.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            for budget, mean in self._mean_divergence("train").items():
                self._metrics["train"][f"{budget}/kl"] = [mean]
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Report the divergence per target token, which no batch size changes, of every budget (`eval_<budget>/kl`) and their mean."""
        self._divergence["eval"] = _sums()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._mean_divergence("eval")
        if output.metrics is not None and means:
            output.metrics[f"{metric_key_prefix}_loss"] = sum(means.values()) / len(means)
            output.metrics.update({f"{metric_key_prefix}_{budget}/kl": mean for budget, mean in means.items()})
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
        with torch.no_grad():
            for budget in [n for n in self._eval_budgets if not self._undecided or n == FULL]:
                with self._elastic.computing(budget), self._named(budget):
                    losses.append(self.compute_loss(model, inputs))
        return torch.stack(losses).mean().detach(), None, None

    # -- schedule and checkpoints --------------------------------------------------------------------------------------

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The configured schedule, multiplied by the stages' `learning_rate_scale`."""
        given = self.lr_scheduler is not None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if all(stage.learning_rate_scale == 1.0 for stage in self.curriculum.stages):
            return scheduler
        if given or not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            what = "a scheduler of your own" if given else f"lr_scheduler_type={self.args.lr_scheduler_type!r}"
            raise ElasticConfigError(
                f"learning_rate_scale does not work with {what}; use linear, cosine, constant_with_warmup or another schedule that is a "
                "function of the step."
            )
        scale = self.curriculum.learning_rate_scale
        scheduler.lr_lambdas = [_scaled(schedule, scale) for schedule in scheduler.lr_lambdas]
        groups = scheduler.optimizer.param_groups
        for group, base, schedule in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * schedule(0)
        scheduler._last_lr = [group["lr"] for group in groups]
        return scheduler

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`. `resume_from_checkpoint=True` takes the last checkpoint that was saved completely."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete(self.args.output_dir)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._undecided and self.state.global_step >= self.args.router_steps:
            self._decide(self._undecided)
        return result

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint, or leave none: a part of one, after a full disk, would be in the way of resuming."""
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        existed = folder.exists()
        if self.args.should_save:
            (folder / "trainer_state.json").unlink(
                missing_ok=True
            )  # written last; until then the folder is not complete
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(training_state(self.curriculum, self.args, self._total_train_tokens), indent=2)
            (folder / STATE_FILE).write_text(text + "\n", encoding="utf-8")
            if self.routing is not None:
                self.routing.save(folder)
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            if self.args.should_save and not existed:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights of a checkpoint, refusing one of another family or of another run.

        Upstream reads the file's names as they are, without an error; on disk they are the Hub's, so nothing would be loaded.
        """
        if self.routing is not None:
            self.routing.load(Path(resume_from_checkpoint))
        check_family(resume_from_checkpoint, self._elastic.elastic_config)
        self._total_train_tokens = check_training(resume_from_checkpoint, training_state(self.curriculum, self.args))
        if (
            self.is_fsdp_enabled or self.is_deepspeed_enabled
        ):  # they save in layouts of their own, which upstream reads
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_weights(self.state.best_model_checkpoint)

    def _load_weights(self, folder: Any) -> None:
        saved = ElasticForCausalLM.from_pretrained(folder, dtype=self._elastic.dtype)
        self._elastic.load_state_dict(saved.state_dict())


def shard_teacher(teacher: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Shard a frozen model over all ranks, a layer at a time, with `torch.distributed.fsdp.fully_shard`.

    What is outside the layers (embeddings, head) stays gathered after the first forward: chunks of logits are made long after it, and
    again in backward.

    Args:
        options: Passed to `fully_shard` (`mesh`, `mp_policy`, ...).
    """
    from torch.distributed.fsdp import fully_shard

    kinds = set(getattr(teacher, "_no_split_modules", None) or ())
    for module in [module for module in teacher.modules() if type(module).__name__ in kinds]:
        fully_shard(module, **options)
    return fully_shard(teacher, reshard_after_forward=False, **options)


def _through(model: nn.Module, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """Last hidden states `(B, T, width)`, computed inside a call of the model, which is what gathers sharded parameters."""
    inner = getattr(model, "module", model)
    with _forward_as(inner, lambda **kwargs: _hidden(inner, kwargs)):
        return model(**tokens)


def _hidden(model: Any, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """Last hidden states `(B, T, width)` of a causal model, wrapped or not."""
    model = getattr(model, "module", model)
    return model.base_model(**tokens, use_cache=False).last_hidden_state


def _head(model: PreTrainedModel) -> Any:
    scaling = getattr(model.config, "logits_scaling", 1.0)
    return lambda hidden: model.get_output_embeddings()(hidden) / scaling


def _scaled(schedule: Callable[[int], float], scale: Callable[[int], float]) -> Callable[[int], float]:
    return lambda step: schedule(step) * scale(step)


@contextmanager
def _forward_as(model: nn.Module, forward: Any) -> Iterator[None]:
    """Let calling the model, through whatever wraps it, run another function."""
    had = model.__dict__.get("forward")
    model.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if had is None:
            del model.__dict__["forward"]
        else:
            model.forward = had  # type: ignore[method-assign]


def _sums() -> dict[str, list[float]]:
    """Per budget: divergence and number of target tokens."""
    return defaultdict(lambda: [0.0, 0.0])


@contextmanager
def _without_auxiliary_loss(model: PreTrainedModel, args: ElasticDistillationConfig) -> Iterator[None]:
    """Have upstream set up no balancing loss, and leave the coefficient that the model's config has for others."""
    field = "router_aux_loss_coef"
    before = {key: getattr(model.config, key) for key in (field, "output_router_logits") if hasattr(model.config, key)}
    if field in before:
        setattr(args, field, 0.0)
    try:
        yield
    finally:
        for key, value in before.items():
            setattr(model.config, key, value)


def _refuse_ignored(args: ElasticDistillationConfig, kwargs: Mapping[str, Any]) -> None:
    """Raise for what `SFTTrainer` takes and a distillation loss would ignore."""
    if kwargs.get("peft_config") is not None:
        raise ElasticConfigError(
            "peft_config is not supported yet: adapters do not follow a budget in training. Train all weights, or train an adapter on one "
            "size with SFTTrainer: ElasticForCausalLM.from_pretrained(..., budget=...) is a stock model of that size."
        )
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        if kwargs.get(name) is not None:
            raise ElasticConfigError(f"{name} needs full logits, which are never built here; use a callback instead.")
    for name, neutral in (("loss_type", "nll"), ("label_smoothing_factor", 0.0), ("router_aux_loss_coef", None)):
        value = getattr(args, name)
        if value != neutral and value != 0.0:
            raise ElasticConfigError(
                f"{name}={value!r} would be ignored: the loss is the divergence from the teacher. Leave it at {neutral!r}."
            )


def _check_columns(dataset: Any, name: str, args: ElasticDistillationConfig, formatting_func: Any) -> None:
    skipped = (args.dataset_kwargs or {}).get("skip_prepare_dataset", False)
    if dataset is None or formatting_func is not None or skipped:
        return
    for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
        columns = set(getattr(part, "column_names", None) or next(iter(part)))
        known = [{"input_ids"}, {args.dataset_text_field}, {"messages"}, {"conversations"}, {"prompt", "completion"}]
        if not any(needed <= columns for needed in known):
            raise ElasticConfigError(
                f"{name} has the columns {', '.join(sorted(columns))}; it needs input_ids, {args.dataset_text_field}, messages, or "
                "prompt and completion (or give formatting_func)."
            )


def _known(given: list[str], names: list[str]) -> list[str]:
    for name in given:
        if name not in names:
            raise ElasticConfigError(f"eval_budgets: unknown budget {name!r}; the model has {', '.join(names)}.")
    return given


def _load_teacher(teacher: Any, model: ElasticForCausalLM, options: Any) -> PreTrainedModel:
    if isinstance(teacher, str):
        teacher = AutoModelForCausalLM.from_pretrained(teacher, **{"dtype": model.dtype, **(options or {})})
    elif options:
        raise ElasticConfigError("teacher_model_init_kwargs need a teacher_model to load, a folder or Hub repository.")
    if teacher is None or teacher is model:
        teacher = copy.deepcopy(model)
    theirs, ours = teacher.get_output_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0]
    if theirs != ours:
        raise ElasticConfigError(
            f"the teacher's vocabulary has {theirs} tokens, the model's {ours}; their distributions cannot be compared. Use the parent, or "
            "resize one of them with resize_token_embeddings()."
        )
    return teacher.eval().requires_grad_(False)
