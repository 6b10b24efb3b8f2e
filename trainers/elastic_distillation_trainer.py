"""Distil all budgets of an elastic model from its frozen parent, one budget per micro-batch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import SFTTrainer

from hf_elastic import ElasticForCausalLM
from hf_elastic.errors import ElasticConfigError, HFElasticError

from .curriculum import make_curriculum
from .elastic_distillation_config import ElasticDistillationConfig
from .losses import chunked_divergence

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
        model ([`ElasticForCausalLM`] or `str`): With everything loaded (no `budget=`), or where to load it from.
        teacher_model (`PreTrainedModel` or `str`, *optional*):
            Defaults to a frozen copy of the model as it is at the start: the sorted parent.
        args ([`ElasticDistillationConfig`], *optional*): Configuration.
        kwargs: As for `SFTTrainer` (`train_dataset`, `eval_dataset`, `processing_class`, `callbacks`, ...).

    Raises:
        `ElasticConfigError`: not an elastic model, a teacher of another vocabulary, unknown budgets, probabilities that do not sum to 1.
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
        if kwargs.get("peft_config") is not None:
            raise ElasticConfigError("peft_config is not supported yet: adapters do not follow a budget in training.")
        if isinstance(model, str):
            model = ElasticForCausalLM.from_pretrained(model, **(args.model_init_kwargs or {}))
            args.model_init_kwargs = None
        if not isinstance(model, ElasticForCausalLM):
            raise ElasticConfigError(
                f"model must be an ElasticForCausalLM, got {type(model).__name__}; make one with elastify()."
            )
        model.set_budget(None)
        names = list(model.elastic_config.family())
        self.curriculum = make_curriculum(
            names, args.budget_probabilities, args.stages, args.max_steps, args.max_length, args.seed
        )
        if names[0] not in {name for stage in self.curriculum.stages for name in stage.budget_probabilities}:
            warnings.warn(f"the whole parent ({names[0]!r}) is never drawn: nothing keeps it as it is.", stacklevel=2)
        self._eval_budgets = _known(args.eval_budgets, names) if args.eval_budgets else names
        teacher = _load_teacher(teacher_model, model)
        super().__init__(model=model, args=args, **kwargs)
        # The loss is divided by the number of target tokens of the whole step already.
        self.loss_is_scaled_for_ga = True
        self.teacher_model = self.accelerator.prepare_model(teacher, evaluation_mode=True)
        self._micro_batch = 0

    # -- one step ------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of one step, cut to the stage's length before their target tokens are counted."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        length = self.curriculum.stage(self.state.global_step).max_length
        if length is not None:
            batches = [{key: t[:, :length] if t.dim() > 1 else t for key, t in batch.items()} for batch in batches]
        self._micro_batch = 0
        return batches, self._get_num_items_in_batch(batches, device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        budget = self.curriculum.budget(self.state.global_step, self._micro_batch)
        self._micro_batch += 1
        # Backward runs inside: checkpointed layers compute again what they computed.
        with self._elastic.computing(budget), self._named(budget):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise HFElasticError(
                f"the loss is {loss.item()} at step {self.state.global_step}, micro-batch {self._micro_batch - 1}, budget {budget!r}. "
                "Nothing was updated or saved since the last checkpoint; lower the learning rate, or look at this batch."
            )
        return loss

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
                teacher_hidden = _hidden(self.teacher_model, tokens)[:, :-1][target]
            loss = self._through_wrapper(model, tokens, target, teacher_hidden)
        count = target.sum()
        self._record(loss.detach(), count, tokens)
        if num_items_in_batch is None:
            return loss / count.clamp(min=1)
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss * scale / num_items_in_batch

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
    def _elastic(self) -> ElasticForCausalLM:
        return self.accelerator.unwrap_model(self.model)

    # -- metrics and evaluation ----------------------------------------------------------------------------------------

    @contextmanager
    def _named(self, budget: str) -> Iterator[None]:
        self._budget_name = budget
        yield

    def _record(self, loss: torch.Tensor, count: torch.Tensor, tokens: dict[str, torch.Tensor]) -> None:
        mode = "train" if self.model.training else "eval"
        total, number = (
            self.accelerator.gather_for_metrics(torch.stack([loss.float(), count.float()])[None]).sum(0).tolist()
        )
        self._metrics[mode][f"{self._budget_name}/kl"].append(total / max(number, 1.0))
        if mode == "train":
            seen = tokens.get("attention_mask", torch.ones_like(tokens["input_ids"])).sum()
            self._total_train_tokens += int(self.accelerator.gather_for_metrics(seen).sum())
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Evaluate every budget on the batch; the loss is their mean, `eval_<budget>/kl` has each."""
        inputs = self._prepare_inputs(inputs)
        losses = []
        with torch.no_grad():
            for budget in self._eval_budgets:
                with self._elastic.computing(budget), self._named(budget):
                    losses.append(self.compute_loss(model, inputs))
        return torch.stack(losses).mean().detach(), None, None

    # -- schedule and checkpoints --------------------------------------------------------------------------------------

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The configured schedule, multiplied by the stages' `learning_rate_scale`."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if any(stage.learning_rate_scale != 1.0 for stage in self.curriculum.stages):
            if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
                raise ElasticConfigError(
                    f"learning_rate_scale does not work with lr_scheduler_type={self.args.lr_scheduler_type!r}; use linear, cosine, "
                    "constant_with_warmup or another schedule that is a function of the step."
                )
            scale = self.curriculum.learning_rate_scale
            scheduler.lr_lambdas = [_scaled(schedule, scale) for schedule in scheduler.lr_lambdas]
            for group, base, f in zip(
                scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = base * f(0)
        return scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights of a checkpoint, refusing one of another family.

        Upstream reads the file's names as they are, without an error; on disk they are the Hub's, so nothing would be loaded.
        """
        ours = self._elastic
        saved = ElasticForCausalLM.from_pretrained(resume_from_checkpoint, dtype=ours.dtype)
        if saved.elastic_config.elastic != ours.elastic_config.elastic:
            different = [
                key for key, value in saved.elastic_config.elastic.items() if value != ours.elastic_config.elastic[key]
            ]
            raise ElasticConfigError(
                f"{resume_from_checkpoint} was made for another family: {', '.join(different)} differ. Resume with the model it started from."
            )
        ours.load_state_dict(saved.state_dict())


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


def _known(given: list[str], names: list[str]) -> list[str]:
    for name in given:
        if name not in names:
            raise ElasticConfigError(f"eval_budgets: unknown budget {name!r}; the model has {', '.join(names)}.")
    return given


def _load_teacher(teacher: Any, model: ElasticForCausalLM) -> PreTrainedModel:
    if isinstance(teacher, str):
        teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype=model.dtype)
    teacher = copy.deepcopy(model) if teacher is None else teacher
    theirs, ours = teacher.get_output_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0]
    if theirs != ours:
        raise ElasticConfigError(
            f"the teacher's vocabulary has {theirs} tokens, the model's {ours}; their distributions cannot be compared. Use the parent, or "
            "resize one of them with resize_token_embeddings()."
        )
    return teacher.eval().requires_grad_(False)
