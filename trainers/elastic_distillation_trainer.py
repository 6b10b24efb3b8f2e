"""Distil all budgets of an elastic model from its frozen parent, one budget per micro-batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel
from trl import SFTTrainer

from hf_elastic import ElasticForCausalLM
from hf_elastic.checkpoints.origin import refuse_loss
from hf_elastic.errors import ElasticConfigError, HFElasticError
from hf_elastic.generation.texts import readable

from .checkpoints import CheckpointsMixin
from .checks import (
    CheckedCollator,
    check_columns,
    check_layers,
    check_model,
    check_rows,
    known_budgets,
    refuse_handover,
    refuse_ignored,
    refuse_sharded_blocks,
    without_auxiliary_loss,
)
from .curriculum import make_curriculum
from .elastic_distillation_config import ElasticDistillationConfig
from .forward import forward_as, head_now, head_of, last_hidden, last_hidden_through, states_after
from .handover import CUT, Handovers, Part, beginning, go_on, parts_of, refuse_checkpointing, split_rows, token_id
from .lora import as_teacher, base_of, check_adapters, whole_head_of
from .losses import chunked_divergence, summed_entropy, summed_hidden_distance
from .optimizing import OptimizingMixin
from .quantizing import Quantizing
from .reporting import EvaluateAtTheEnd, ReportingMixin
from .routing import Routing
from .stopping import Plateau
from .teacher import check_same_channels, load_teacher, prepare_teacher

_PAPER = {
    "title": "Nemotron Elastic: Towards Efficient Many-in-One Reasoning LLMs",
    "id": "2511.16664",
    "citation": """@article{nemotron_elastic,
    title = {{Nemotron Elastic: Towards Efficient Many-in-One Reasoning LLMs}},
    year = 2025,
    eprint = {arXiv:2511.16664},
}""",
}


class ElasticDistillationTrainer(OptimizingMixin, ReportingMixin, CheckpointsMixin, SFTTrainer):
    r"""
    Trainer that learns all sizes of an elastic model in one run: every micro-batch runs at one budget, drawn from the curriculum, and is
    trained towards the frozen parent by the divergence of their distributions over the target tokens (arXiv 2511.16664, eq. 14). Only
    what the budget keeps is computed; the logits of student and teacher are only ever there for a chunk of tokens.

    Everything else is `trl.SFTTrainer`: conversational, prompt-completion, text and pre-tokenised datasets, completion-only loss,
    gradient checkpointing and accumulation, mixed precision, callbacks, evaluation (of every budget, logged as `eval_<budget>/kl`),
    `push_to_hub`.

    Args:
        model ([`ElasticForCausalLM`], `PeftModel` around one, or `str`):
            With everything loaded (no `budget=`), or where to load it from; then in float32, as in `SFTTrainer`, unless
            `args.model_init_kwargs` says otherwise.
        teacher_model (`PreTrainedModel` or `str`, *optional*):
            Defaults to a frozen copy of the model as it is at the start: the sorted parent. A model given here is frozen. With adapters
            the default is the model itself without them, so that its weights are in memory once.
        peft_config (`peft.LoraConfig`, *optional*):
            Train only these adapters, on linear layers (`target_modules`) and on experts and routers (`target_parameters`), or on everything
            that [`hf_elastic.lora_targets`] names (`target_modules="auto"`); they follow the budget ([`hf_elastic.submodels.adapters`]). Checkpoints then hold the adapter, and `trainer.model.merge_and_unload()` is the elastic
            model with what was learned.
        args ([`ElasticDistillationConfig`], *optional*): Configuration.
        kwargs: As for `SFTTrainer` (`train_dataset`, `eval_dataset`, `processing_class`, `callbacks`, ...).

    Raises:
        `ElasticConfigError`: not an elastic model, a teacher of another vocabulary, unknown budgets, probabilities that do not sum to 1,
            a dataset without the columns, an option that distillation would ignore, a teacher whose hidden states cannot be compared.
        `TokenizerError`: texts that the tokenizer cannot read, or tokens that the model does not have.
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
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        args = args if args is not None else ElasticDistillationConfig()
        if not isinstance(args, ElasticDistillationConfig):
            raise ElasticConfigError(f"args must be an ElasticDistillationConfig, got {type(args).__name__}.")
        refuse_ignored(args, kwargs)
        if isinstance(model, str):
            model = ElasticForCausalLM.from_pretrained(model, **{"dtype": "float32", **(args.model_init_kwargs or {})})
            args.model_init_kwargs = None
        given, model = model, check_model(model)
        if given is model and peft_config is None:
            refuse_loss(getattr(model, "_loaded_from", None), args.output_dir or ".", model.elastic_config)
        for name in ("train_dataset", "eval_dataset"):
            check_columns(kwargs.get(name), name, args, kwargs.get("formatting_func"))
        refuse_handover(model, args.trains_handover)
        model.set_budget(None)
        if peft_config is not None:
            peft_config = check_adapters(model, peft_config)
        self.routing = Routing(model, args) if args.router_targets or args.freeze_router else None
        names = self.routing.router.names if self.routing else list(model.elastic_config.family())
        self.curriculum = make_curriculum(
            names,
            args.budget_probabilities,
            args.stages,
            args.max_steps,
            args.max_length,
            args.seed,
            context=getattr(model.config, "max_position_embeddings", None),
            rows=args.rows_per_step,
            routed=self.routing is not None and not args.freeze_router,
            handover=args.handover_probability,
        )
        if args.handover_start:
            self.curriculum = self.curriculum.with_handovers_from(args.handover_start)
        self.handovers = Handovers(self.curriculum, model.elastic_config, names) if args.trains_handover else None
        drawn = {name for stage in self.curriculum.stages for name in stage.budget_probabilities}
        if names[0] not in drawn:
            warnings.warn(f"the whole parent ({names[0]!r}) is never drawn: nothing keeps it as it is.", stacklevel=2)
        self._init_reporting(known_budgets(args.eval_budgets, names) if args.eval_budgets else names)
        self._own_teacher = teacher_model is None
        self.plateau = Plateau(self.progress, [n for n in names if n in drawn]) if args.stop_on_plateau else None
        self._adapted = peft_config is not None or given is not model
        if self._adapted and args.freeze_model:
            raise ElasticConfigError("freeze_model=True trains the router alone: leave out the adapters.")
        self.quantizing = Quantizing(model, args, self._adapted) if args.quantization is not None else None
        if self.quantizing is not None:
            self._name = f"{self._name}, quantisation-aware ({self.quantizing})"
        teacher = load_teacher(teacher_model, model, args.teacher_model_init_kwargs, adapters=self._adapted)
        if args.hidden_loss_weight > 0:
            check_layers(args.hidden_loss_layers, model.submodel.depth)
            if teacher is not None:
                check_same_channels(teacher, model)
        if args.freeze_model:
            model.requires_grad_(False)
        if args.ddp_find_unused_parameters is None:
            # A budget that drops a layer uses none of its parameters. Upstream looks for them only without gradient checkpointing, and
            # DDP then stops in the second step; non-reentrant checkpointing, the default here, gets along with looking.
            args.ddp_find_unused_parameters = True
        self._vocabulary = model.config.vocab_size
        with without_auxiliary_loss(model, args):
            super().__init__(model=given, args=args, peft_config=peft_config, **kwargs)
        if self.handovers is not None:
            self.handovers.token = token_id(args.handover_token, self.processing_class)
            refuse_checkpointing(self._elastic, self.accelerator)
        self.data_collator: Any = CheckedCollator(self.data_collator, self._vocabulary)  # type: ignore[has-type]
        check_model(self.model)  # upstream adapts embeddings and head on its own for a chat template with new tokens
        # The loss is divided by the number of target tokens of the whole step already.
        self.loss_is_scaled_for_ga = True
        if self.plateau is not None:
            self.add_callback(self.plateau)
        if self.eval_dataset is not None and args.eval_strategy == "no":
            self.add_callback(EvaluateAtTheEnd())
        refuse_sharded_blocks(self._elastic, self.is_fsdp_enabled)
        self.teacher_model = prepare_teacher(teacher, self.accelerator, self.is_fsdp_enabled)
        self._micro_batch = 0

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of one step, cut to the stage's length before their target tokens are counted."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        length = self.curriculum.stage(self.state.global_step).max_length
        if length is not None:
            batches = [{key: t[:, :length] if t.dim() > 1 else t for key, t in batch.items()} for batch in batches]
        self._micro_batch = 0
        if self.handovers is not None:
            step = self.state.global_step
            batches = [self.handovers.cut(batch, step, i) for i, batch in enumerate(batches)]
        if self.routing is not None:
            self.routing.router.zero_grad()  # upstream clears the gradients of the model, not those of the optimizer
        return batches, self._get_num_items_in_batch(batches, device)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, *args: Any, **kwargs: Any) -> Any:
        name = kwargs.get("dataset_name", args[-1] if args else "train")
        with readable(f"the {name} dataset"):
            prepared = super()._prepare_dataset(dataset, processing_class, *args, **kwargs)
        check_rows(prepared, name, processing_class, self._vocabulary)
        return prepared

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
        drawn = self.handovers.draw(self.state.global_step, self._micro_batch) if self.handovers is not None else None
        self._micro_batch += 1
        # Backward runs inside: checkpointed layers compute again what they computed.
        with self._at(budget), self._named(budget if drawn is None else f"{drawn[0]}>{budget}"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if drawn is not None and not self._elastic.elastic_config.handover_trained:
            self._elastic.elastic_config.handover_trained = True
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
        cut = inputs.get(CUT)
        parts = parts_of(self._elastic, self._budget_name, target, cut)
        with self.accelerator.autocast():
            taught = self._taught(model, tokens, target, parts)
            divergences, distances = self._through_wrapper(model, tokens, target, parts, taught, cut)
        loss = (divergences + self.args.hidden_loss_weight * distances).sum()
        count = target.sum()
        self._record(parts, divergences, distances, inputs)
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

    def _taught(
        self, model: nn.Module, tokens: dict[str, torch.Tensor], target: torch.Tensor, parts: list[Part]
    ) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        """Per part the last and the compared hidden states of the teacher at its target tokens; without a teacher, of the model without
        adapters."""
        teacher = model if self.teacher_model is None else self.teacher_model
        alone = as_teacher(self._elastic) if teacher is model else nullcontext()
        compared = sorted({layer for part in parts for layer in self._compared(part)})
        layers = self._layers(teacher, compared)
        with torch.no_grad(), alone, states_after(layers, target) as states:
            hidden = last_hidden_through(teacher, tokens)[:, :-1][target]
        by_layer = dict(zip(compared, states, strict=True))
        taught = []
        for part in parts:
            # All of them, unless the micro-batch is a hand-over.
            inside = ... if part.target is target else part.target[target]
            taught.append((hidden[inside], [by_layer[layer][inside] for layer in self._compared(part)]))
        return taught

    def _compared(self, part: Part) -> list[int]:
        """Layers of the parent after which hidden states are compared in a part; none if that is off."""
        chosen = self.args.hidden_loss_layers
        if self.args.hidden_loss_weight == 0:
            return []
        return [layer for layer in part.submodel.layers if chosen is None or layer in chosen]

    def _layers(self, model: nn.Module, compared: list[int]) -> list[nn.Module]:
        """Layers of the student or of the teacher."""
        layers = self._elastic.architecture.layers_of(base_of(self.accelerator.unwrap_model(model)))
        return [layers[i] for i in compared]

    def _through_wrapper(
        self,
        model: nn.Module,
        tokens: dict[str, torch.Tensor],
        target: torch.Tensor,
        parts: list[Part],
        taught: list[tuple[torch.Tensor, list[torch.Tensor]]],
        cut: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole student loss as one call of the wrapped model: DDP and FSDP only see parameters used inside their forward, and
        calling the backbone beside them lets ranks drift apart without an error.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Per part, sums over its target tokens of the divergence, and of the distance of hidden states.
        """
        student, teacher = self._elastic, self.teacher_model
        teacher_head = whole_head_of(student) if teacher is None else head_of(self.accelerator.unwrap_model(teacher))

        def compare(i: int, compared: torch.Tensor, read: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
            # The first size of a hand-over is no longer active in backward, where logits are made again.
            head = head_now(student) if i + 1 < len(parts) else head_of(student)
            hidden_taught, states_taught = taught[i]
            with states_after(self._layers(model, self._compared(parts[i])), compared) as states:
                hidden = read()[:, : compared.shape[1]][compared]
            if self._counts_entropy:
                entropy = summed_entropy(hidden_taught, teacher_head, chunk_size=self.args.loss_chunk_size)
                self._entropy = entropy if self._entropy is None else self._entropy + entropy
            divergence = chunked_divergence(
                hidden,
                hidden_taught,
                head,
                teacher_head,
                beta=self.args.beta,
                temperature=self.args.temperature,
                chunk_size=self.args.loss_chunk_size,
            )
            if not states:
                return [divergence, hidden.new_zeros((), dtype=torch.float32)]
            return [divergence, summed_hidden_distance(states, states_taught, kind=self.args.hidden_loss)]

        def student_loss(**kwargs: Any) -> tuple[torch.Tensor, ...]:
            if cut is None:
                losses = [compare(0, target, lambda: last_hidden(student, kwargs))]
            else:
                before, after, *compared = split_rows(kwargs, target, cut)
                with beginning(student, parts[0].name) as cache:
                    read = {**before, "past_key_values": cache, "use_cache": True}
                    losses = [compare(0, compared[0], lambda: last_hidden(student, read))]
                given = go_on(student, parts[0].submodel, cache, before)
                rest = {**after, "past_key_values": given, "use_cache": True}
                losses.append(compare(1, compared[1], lambda: last_hidden(student, rest)))
            return tuple(torch.stack(kind) for kind in zip(*losses, strict=True))

        with forward_as(self.accelerator.unwrap_model(self.model), student_loss):
            return model(**tokens)

    @property
    def _undecided(self) -> Routing | None:
        """The router, as long as it has not decided."""
        return self.routing if self.routing is not None and not self.routing.decided else None

    @contextmanager
    def _at(self, budget: str) -> Iterator[None]:
        """Run at a budget of the model, or at a mixture that the router draws for it."""
        if self._undecided and self.state.global_step >= self.args.router_steps:
            self._undecided.decide()
        routing, step = self._undecided, self.state.global_step
        quantizing = nullcontext() if self.quantizing is None else self.quantizing.training(step, self.state.max_steps)
        computing = self._elastic.computing(budget) if routing is None else routing.at(budget, step, self._micro_batch)
        with quantizing, computing:
            yield

    @property
    def _elastic(self) -> ElasticForCausalLM:
        """The model without what is around it: DDP, adapters."""
        return base_of(self.accelerator.unwrap_model(self.model))
