"""`generate(..., phase_plan=)` and `stream_phases`."""

from __future__ import annotations

import copy
from collections.abc import Generator
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMode, MaxTimeCriteria

from ..configuration_elastic import ElasticConfig
from ..errors import PhasePlanError, shown
from .arguments import by_name, with_stop_strings
from .binding import SentenceEnds, bind, check_prompts, find_tokenizer, needs_tokenizer
from .engine import Settings, run_phases
from .events import PhaseEvent, PhaseOutput, PhaseStreamer
from .plan import PhasePlan
from .texts import check_tokens

_REFUSED = {  # arguments of `generate` that have no meaning in phases, and what to do instead
    "assistant_model": "a plan runs submodels of this model only",
    "custom_generate": "phases are a way of decoding of their own",
    "inputs_embeds": "give input_ids",
    "past_key_values": "generation in phases starts from the prompt",
    "negative_prompt_ids": "guidance is not supported in phases",
    "synced_gpus": "generation in phases runs on one process",
    "min_length": "set min_new_tokens in the `generation` of a phase",
    "min_new_tokens": "set min_new_tokens in the `generation` of a phase",
    "output_attentions": "they are not collected in phases",
    "output_hidden_states": "they are not collected in phases",
    "token_healing": "it would change prompts",
}


class PhasedGenerationMixin:
    """Adds phase plans to the stock `generate` that comes after it among a class's bases."""

    config: PreTrainedConfig
    elastic_config: ElasticConfig
    generation_config: GenerationConfig
    device: torch.device

    def generate(
        self,
        *args: Any,
        phase_plan: PhasePlan | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As `GenerationMixin.generate`; with a plan, one submodel writes the thinking and another the answer.

        Args:
            phase_plan ([`PhasePlan`], *optional*):
                Who writes what, and how much. `max_new_tokens` is then a cap on all phases together. Every sequence of a batch goes through
                the phases at its own pace, and leaves the batch while it waits for the others.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): Of the plan's markers. Defaults to the one beside the checkpoint.
            streamer (`BaseStreamer`, *optional*):
                A [`PhaseStreamer`] is told every event, of any number of sequences; another one gets the tokens of one sequence.
            args, kwargs:
                As in `GenerationMixin.generate`: inputs, `generation_config` and its fields, `logits_processor`, `stopping_criteria` (they end the
                whole text of a sequence), `num_return_sequences`, ...

        Returns:
            `torch.LongTensor` of shape `(batch, prompt + new tokens)`; with `return_dict_in_generate` a [`PhaseOutput`].

        Raises:
            `PhasePlanError`: the plan or a prompt does not fit this model, its tokenizer or its context, or an argument has no meaning here.
            `TokenizerError`: the prompt has tokens that this model does not have.
            `UnknownBudgetError`: a phase names a budget that this model does not have.
            `HandoverError`: a cache cannot be handed over as the plan wants it.
        """
        if "budget" in kwargs:
            raise TypeError(
                "unexpected argument 'budget': generate runs at the size that the model is at. Write `with model.at('half'): model.generate(...)`, or give phase_plan= or "
                "draft_budget=."
            )
        if phase_plan is None:
            given = {"tokenizer": tokenizer, "streamer": streamer}
            kwargs.update({key: value for key, value in given.items() if value is not None})
            ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
            check_tokens(ids, self.config.vocab_size, "the prompt")
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        events, settings, prompt = self._prepare_phases(args, phase_plan, tokenizer, kwargs)
        if streamer is not None:
            if len(prompt) > 1 and not isinstance(streamer, PhaseStreamer):
                raise PhasePlanError(
                    f"{type(streamer).__name__} cannot follow {len(prompt)} sequences at once; use a PhaseStreamer."
                )
            streamer.put(prompt.cpu())
        output = drain(events, streamer)
        return output if settings.config.return_dict_in_generate else output.sequences

    def stream_phases(
        self,
        *args: Any,
        phase_plan: PhasePlan,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> Generator[PhaseEvent, None, PhaseOutput]:
        """As `generate(phase_plan=...)`, as a generator of [`PhaseEvent`]s whose value is a [`PhaseOutput`].

        Everything is checked at the call. The model itself stays at its budget, and can be used between two events; in training mode only it
        is at the budget of the phase until the generator ends or is closed.
        """
        return self._prepare_phases(args, phase_plan, tokenizer, kwargs)[0]

    def _prepare_phases(
        self, args: tuple[Any, ...], plan: PhasePlan, tokenizer: PreTrainedTokenizerBase | None, kwargs: dict[str, Any]
    ) -> tuple[Generator[PhaseEvent, None, PhaseOutput], Settings, torch.Tensor]:
        kwargs = by_name(self, args, kwargs)
        for key, instead in _REFUSED.items():
            if kwargs.get(key) is not None and kwargs[key] is not False:
                raise PhasePlanError(f"{key}={shown(kwargs[key])} cannot be used with phase_plan: {instead}.")
        if tokenizer is None and isinstance(plan, PhasePlan) and needs_tokenizer(plan):
            tokenizer = self.__dict__.get("_phase_tokenizer") or find_tokenizer(self)
            self.__dict__["_phase_tokenizer"] = tokenizer
        phases = bind(self, plan, tokenizer)
        criteria = _own_criteria(kwargs, tokenizer)
        inputs = kwargs.pop("inputs", None)
        prompt = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if not isinstance(prompt, torch.Tensor) or prompt.dim() != 2 or not prompt.numel():
            raise PhasePlanError(
                "generation in phases needs input_ids of shape (batch, tokens), with at least one token."
            )
        check_tokens(prompt, self.config.vocab_size, "the prompt")
        context = getattr(self.elastic_config.parent_config, "max_position_embeddings", None)
        mask = kwargs.get("attention_mask")
        if mask is not None and getattr(mask, "shape", None) != prompt.shape:
            raise PhasePlanError(
                f"attention_mask={shown(mask)} must have the shape of input_ids, {tuple(prompt.shape)}: one entry per token."
            )
        seen = torch.ones_like(prompt) if mask is None else mask
        check_prompts([ids[m.bool()].tolist() for ids, m in zip(prompt, seen, strict=True)], phases, context)
        unlimited = self._limit_length(kwargs, prompt.shape[1], context)
        taken: dict[str, Any] = {}

        def take(model: Any, input_ids: torch.Tensor, generation_config: GenerationConfig, **prepared: Any) -> None:
            """What the stock `generate` prepared for its own loop."""
            taken.update(prompt=input_ids, config=generation_config, mask=prepared.get("attention_mask"))

        processors = kwargs.pop("logits_processor", None) or LogitsProcessorList()
        prefix = kwargs.pop("prefix_allowed_tokens_fn", None)
        super().generate(prompt, custom_generate=take, **kwargs)  # type: ignore[misc]
        prompt, config = taken["prompt"].to(self.device), taken["config"]
        self._check_mode(config, len(prompt), prefix)
        config.num_return_sequences = None  # the prompts were repeated
        mask = torch.ones_like(prompt) if taken["mask"] is None else taken["mask"].to(prompt.device)
        if config.max_time is not None:
            criteria.append(MaxTimeCriteria(config.max_time))
        limit = (context or 1 << 60) if unlimited else config.max_length - prompt.shape[1]
        settings = Settings(config, processors, criteria, limit, context, SentenceEnds(tokenizer), prefix)
        return run_phases(self, phases, prompt, mask, settings), settings, prompt

    def _limit_length(self, kwargs: dict[str, Any], prompt: int, context: int | None) -> bool:
        """Whether neither the call nor a config caps the whole text. The stock `generate` would then cap it at 20 tokens, so it gets a cap."""
        given = kwargs.get("generation_config")
        for where in (kwargs, *(vars(config) for config in (given, self.generation_config) if config is not None)):
            if where.get("max_length") is not None or where.get("max_new_tokens") is not None:
                return False
        room = context - prompt if context is not None else 1 << 20
        if given is None:
            kwargs["max_new_tokens"] = room
        else:
            kwargs["generation_config"] = copy.deepcopy(given)
            kwargs["generation_config"].max_new_tokens = room
        return True

    def _check_mode(self, config: GenerationConfig, batch: int, prefix: Any) -> None:
        mode = config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise PhasePlanError(
                f"phases are decoded greedily or by sampling, not by {mode.value}; take out its settings."
            )
        if config.use_cache is False or config.cache_implementation not in (None, "dynamic"):
            raise PhasePlanError(
                f"use_cache={config.use_cache}, cache_implementation={shown(config.cache_implementation)}: phases run with the default cache."
            )
        if prefix is not None and batch > 1:
            raise PhasePlanError(
                "prefix_allowed_tokens_fn tells sequences apart by their place in the batch, which changes between phases; generate one at a time."
            )


def _own_criteria(kwargs: dict[str, Any], tokenizer: Any) -> StoppingCriteriaList:
    """The caller's stopping criteria; those for lengths and end-of-sequence tokens are the loop's own."""
    criteria = kwargs.pop("stopping_criteria", None)
    if (strings := kwargs.pop("stop_strings", None)) is None:
        return StoppingCriteriaList(criteria or [])
    if tokenizer is None:
        raise PhasePlanError("stop_strings needs tokenizer=.")
    return with_stop_strings(criteria, strings, tokenizer)


def drain(events: Generator[PhaseEvent, None, PhaseOutput], streamer: Any = None) -> PhaseOutput:
    """Run a stream to its end, telling a streamer; returns its value."""
    try:
        while True:
            event = next(events)
            if isinstance(streamer, PhaseStreamer):
                streamer.put_event(event)
            elif streamer is not None and event.kind == "token":
                streamer.put(torch.tensor([event.token_id]))
    except StopIteration as stop:
        if streamer is not None:
            streamer.end()
        return stop.value
    finally:
        events.close()
