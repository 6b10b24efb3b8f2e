"""Nested self-speculation: a small submodel drafts, a larger one of the same weights verifies several drafted tokens in one pass.

The text is what the larger one alone would write: token for token if it takes the most likely one, in distribution if it samples
(Leviathan et al., arXiv 2211.17192). Stock assisted generation refuses models with SSM states, as those cannot be cropped; here they are
put back from copies ([`hf_elastic.generation.snapshots`]).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationMode,
    LogitsProcessorList,
)

from ..architectures.submodel import Submodel
from ..configuration.budgets import Budget
from ..errors import SpeculationError, shown
from .arguments import by_name, telling, with_stop_strings
from .snapshots import Reader

DRAFT_TOKENS = 4
MOST_REREAD = 16
"""So many tokens that were accepted, but are not in the verifier's states, are read again along with the next drafts; more get a pass of
their own. A pass over so few tokens takes about as long as over one, as long as it is reading the weights that takes the time."""

_NOT_TOGETHER = (
    "phase_plan",
    "assistant_model",
    "assistant_tokenizer",
    "custom_generate",
    "synced_gpus",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)
_GENERATE_ARGUMENTS = (
    "inputs",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "streamer",
    "tokenizer",
)
_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "num_return_sequences": (1, None),
    "use_cache": (True, None),
    "cache_implementation": (None, "dynamic"),
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
    "token_healing": (False, None),
}


@dataclass
class SpeculationOutput(GenerateDecoderOnlyOutput):
    """As `GenerateDecoderOnlyOutput`, with what speculation did. `past_key_values` is not given, as it may hold drafts.

    Args:
        sequences (`torch.LongTensor` of shape `(1, prompt + new tokens)`): Prompt and what was generated.
        scores, logits (`tuple[torch.FloatTensor]`, *optional*): Per new token `(1, vocabulary)`, the verifier's, after and before processing.
        drafted (`int`): Tokens that the drafter proposed.
        accepted (`int`): Those of them that are in the text.
        passes (`int`): Of the verifier over drafts, after the prompt.
        rereads (`int`): Passes of the verifier besides, which only read again what had been accepted.
    """

    drafted: int | None = None
    accepted: int | None = None
    passes: int | None = None
    rereads: int | None = None

    @property
    def acceptance(self) -> float:
        """`float`: Share of the drafted tokens that are in the text; 0 if none was drafted."""
        return (self.accepted or 0) / self.drafted if self.drafted else 0.0


class SpeculationMixin:
    """`generate(..., draft_budget=)` for a stock model class that switches budgets."""

    def generate(
        self,
        *args: Any,
        draft_budget: Budget | Submodel = None,
        num_draft_tokens: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `GenerationMixin.generate`; with `draft_budget` a smaller submodel drafts, and the active one verifies.

        The text is the one the active budget alone gives: the same tokens in greedy decoding (up to ties that differ in rounding between
        passes over one and over several tokens), the same distribution in sampling. Logits processors are also called for drafted tokens, so
        they have to depend on their arguments alone.

        Args:
            draft_budget (*optional*): Who drafts, as `set_budget` takes it; has to nest in the active budget. `None` drafts nothing.
            num_draft_tokens (`int`, *optional*, defaults to 4): Drafted tokens per pass of the active budget.
            args, kwargs: As upstream; one sequence, greedy or sampling, with the dynamic cache.

        Returns:
            `torch.LongTensor`, or [`SpeculationOutput`] with `return_dict_in_generate=True`.

        Raises:
            `SpeculationError`: what cannot be combined with speculation; nothing was generated.
            `UnknownBudgetError`: there is no such budget.
        """
        if draft_budget is None:
            if num_draft_tokens is not None:
                raise SpeculationError(
                    f"num_draft_tokens={shown(num_draft_tokens)} needs draft_budget=..., which drafts."
                )
            if kwargs.get("phase_plan") is not None:
                return super().generate(*args, **kwargs)  # type: ignore[misc]
            with telling(kwargs.get("streamer")), self._in_use() as model:  # type: ignore[attr-defined]
                given = kwargs | model._training_cache(True, kwargs)
                return super(SpeculationMixin, model).generate(*args, **given)  # type: ignore[misc]
        kwargs = by_name(self, args, kwargs)
        count = DRAFT_TOKENS if num_draft_tokens is None else num_draft_tokens
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise SpeculationError(f"num_draft_tokens={shown(count)} must be a whole number of at least 1.")
        model, drafter = _drafter(self, draft_budget)
        settings = _checked(model, kwargs)
        if settings.stop_strings is not None and kwargs.get("tokenizer") is not None:
            criteria = with_stop_strings(
                kwargs.get("stopping_criteria"), settings.stop_strings, kwargs.pop("tokenizer")
            )
            kwargs |= {"stopping_criteria": criteria, "stop_strings": None}
        loop = functools.partial(speculate, drafter=drafter, count=count, streamer=kwargs.get("streamer"))
        return super(SpeculationMixin, model).generate(**{**kwargs, "custom_generate": loop})  # type: ignore[misc]


def speculate(
    model: Any,
    input_ids: torch.Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    drafter: Any,
    count: int,
    streamer: Any = None,
    **inputs: Any,
) -> torch.Tensor | SpeculationOutput:
    """The loop, called by upstream's `generate` when everything is prepared.

    Args:
        model (`ElasticForCausalLM`): Verifies.
        drafter (`ElasticForCausalLM`): A smaller size of it.
        count (`int`): Tokens to draft per pass.
        inputs (`dict[str, Any]`): Arguments of the model for the prompt.
    """
    inputs.pop("past_key_values", None)
    sample, length = bool(generation_config.do_sample), generation_config.max_length
    whole = bool(generation_config.return_dict_in_generate)
    scores: tuple[torch.Tensor, ...] | None = () if whole and generation_config.output_scores else None
    logits: tuple[torch.Tensor, ...] | None = () if whole and generation_config.output_logits else None
    done = {"drafted": 0, "accepted": 0, "passes": 0, "rereads": 0}
    verifier, draft = (Reader(reader, input_ids, generation_config, inputs) for reader in (model, drafter))

    proposed: list[torch.Tensor] = []  # nothing yet: the prompt alone gives the first token
    text, found = input_ids, verifier.logits.to(device=input_ids.device, dtype=torch.float32)
    while True:
        known, drafted = input_ids.shape[1], len(proposed)
        processed = [logits_processor(text[:, : known + i], found[i : i + 1].clone()) for i in range(drafted + 1)]
        wanted = torch.cat([distribution(row, sample) for row in processed])
        accepted, rest = accept(text[0, known:], proposed, wanted, sample)
        text = torch.cat([text[:, : known + accepted], pick(rest, sample)], dim=1)
        verifier.keep(known + accepted)
        draft.keep(known + accepted)
        stopped = False
        for i in range(accepted + 1):
            input_ids = text[:, : known + i + 1]
            if scores is not None:
                scores += (processed[i],)
            if logits is not None:
                logits += (found[i : i + 1],)
            stopped = bool(stopping_criteria(input_ids, scores).all())
            if streamer is not None:
                streamer.put(input_ids[:, -1].cpu())
            if stopped:
                break
        done["drafted"] += drafted
        done["accepted"] += min(accepted, input_ids.shape[1] - known)
        if stopped:
            break

        ahead = max(0, min(count, length - input_ids.shape[1] - 1))  # one more token comes from the pass itself
        text, proposed = _draft(draft, input_ids, ahead, logits_processor, sample)
        if input_ids.shape[1] - verifier.tokens > MOST_REREAD:
            verifier.read(input_ids[:, :-1])
            done["rereads"] += 1
        verifier.mark()
        found = verifier.read(text, ahead + 1)
        done["passes"] += 1

    if streamer is not None:
        streamer.end()
    if not whole:
        return input_ids
    return SpeculationOutput(sequences=input_ids, scores=scores, logits=logits, **done)  # type: ignore[arg-type]


def _draft(
    draft: Reader,
    text: torch.Tensor,
    count: int,
    logits_processor: LogitsProcessorList,
    sample: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The text with `count` tokens more, and the distributions that these were drawn from."""
    proposed: list[torch.Tensor] = []
    for i in range(count):
        if i:
            draft.mark()
        proposed.append(distribution(logits_processor(text, draft.read(text)), sample))
        text = torch.cat([text, pick(proposed[-1], sample)], dim=1)
    return text, proposed


# -- the rule ----------------------------------------------------------------------------------------------------------


def distribution(scores: torch.Tensor, sample: bool) -> torch.Tensor:
    """What a token is drawn from: the softmax of processed scores `(rows, vocabulary)`, or all on the most likely one."""
    if sample:
        return scores.softmax(dim=-1)
    return torch.zeros_like(scores).scatter_(-1, scores.argmax(dim=-1, keepdim=True), 1.0)


def pick(probabilities: torch.Tensor, sample: bool) -> torch.Tensor:
    """One token `(1, 1)` from a distribution `(1, vocabulary)`."""
    return torch.multinomial(probabilities, 1) if sample else probabilities.argmax(dim=-1, keepdim=True)


def accept(
    drafted: torch.Tensor, proposed: list[torch.Tensor], wanted: torch.Tensor, sample: bool
) -> tuple[int, torch.Tensor]:
    """Keep drafted tokens so that what comes out is distributed as `wanted`.

    A token that was drawn with probability q and is wanted with probability p is kept with probability min(1, p / q); the first one that
    is not kept is replaced by one from max(0, p - q), normalised. With all probability on one token this is to compare tokens.

    Args:
        drafted (`torch.LongTensor` of shape `(k,)`): The drafted tokens.
        proposed (`list[torch.FloatTensor]`): Per drafted token the distribution `(1, vocabulary)` that it was drawn from.
        wanted (`torch.FloatTensor` of shape `(k + 1, vocabulary)`): The verifier's distribution for each of them and for one more.
        sample (`bool`): Whether to draw; without, the distributions have all on one token.

    Returns:
        `tuple[int, torch.FloatTensor]`: How many are kept, and the distribution `(1, vocabulary)` of the token after them.
    """
    if not proposed:
        return 0, wanted
    offered, k = torch.cat(proposed), len(proposed)
    p, q = (table[:k].gather(1, drafted[:, None]).squeeze(1) for table in (wanted, offered))
    chance = torch.rand_like(p) if sample else torch.zeros_like(p)
    kept = int((chance * q < p).long().cumprod(0).sum())
    if kept == k:
        return kept, wanted[k:]
    rest = (wanted[kept : kept + 1] - offered[kept : kept + 1]).clamp(min=0)
    total = rest.sum()
    # Nothing is left only if both are equal up to rounding.
    return kept, rest / total if total > 0 else wanted[kept : kept + 1]


# -- what is refused ---------------------------------------------------------------------------------------------------


def _drafter(model: Any, budget: Any) -> tuple[Any, Any]:
    """Who verifies and who drafts: shadows of the model at the active budget and at another one, as drafting changes settings of modules.

    Raises:
        `SpeculationError`: it is not smaller than the active one, or the model is in training mode.
    """
    drafter: Submodel = model._resolved(budget)
    active: Submodel = model.submodel
    if drafter == active or not drafter.nests_in(active):
        verifier = model.budget or active.to_dict()
        nested = [n for n in model.budgets if (s := model.elastic_config.submodel(n)) != active and s.nests_in(active)]
        raise SpeculationError(
            f"draft_budget={shown(budget)} must be smaller than the active budget, {verifier!r}, and nest in it. Named budgets that do: "
            f"{', '.join(nested) or 'none'}."
        )
    if model.training or model._computing:
        raise SpeculationError("draft_budget= needs evaluation mode; call model.eval() first.")
    with model._in_use():  # refused now, if it is not known what is active here
        verifies, drafts = model._shadow(active), model._shadow(drafter)
    return verifies, drafts


def _checked(model: Any, kwargs: dict[str, Any]) -> GenerationConfig:
    """Refuse what the loop does not do; gives the settings of the call."""
    if not model.architecture.reads_on:
        raise SpeculationError(
            f"draft_budget= verifies several tokens in one pass on top of a cache, and the stock {model.architecture.model_type} forgets its cache "
            "when it reads more than one; generate without it."
        )
    for name in _NOT_TOGETHER:
        if kwargs.get(name) not in (None, False):
            raise SpeculationError(f"{name}= cannot be used together with draft_budget=.")
    rest = {key: value for key, value in kwargs.items() if key not in (*_NOT_TOGETHER, *_GENERATE_ARGUMENTS)}
    settings, model_kwargs = model._prepare_generation_config(**{"generation_config": None, **rest})
    mode = settings.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise SpeculationError(f"draft_budget= works with greedy decoding and sampling, not with {mode.value}.")
    for name, allowed in _SETTINGS.items():
        if (value := getattr(settings, name, None)) not in allowed:
            raise SpeculationError(
                f"{name}={shown(value)} cannot be used with draft_budget=; it must be {allowed[0]!r}."
            )
    for name, value in model_kwargs.items():
        if name not in _MODEL_INPUTS and value is not None and value is not False:
            raise SpeculationError(
                f"{name}= cannot be used with draft_budget=; of the model's arguments it takes {', '.join(_MODEL_INPUTS)}."
            )
    ids = kwargs["inputs"] if kwargs.get("inputs") is not None else kwargs.get("input_ids")
    if ids is not None and ids.shape[0] != 1:
        raise SpeculationError(f"draft_budget= takes one sequence at a time, not a batch of {ids.shape[0]}.")
    return settings
