"""Training of cache hand-over: micro-batches whose rows begin in another submodel, and go on in the budget's own from its cache.

What happens in such a batch is what happens in generation between two phases: the same conversion, the same scale
([`hf_elastic.generation.caches.hand_over`]). Both submodels are trained, each on what it reads, so that a hand-over teaches as many tokens as an
ordinary micro-batch; the gradient of the second goes through the cache into the first.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache

from hf_elastic import ElasticConfig, ElasticForCausalLM
from hf_elastic.architectures.submodel import Submodel
from hf_elastic.errors import ElasticConfigError, HandoverError
from hf_elastic.generation.caches import check_hand_over, hand_over, read_cache, write_cache

from .curriculum import Curriculum

CUT = "handover_cut"
"""Entry of a micro-batch that is a hand-over: per row the first token that the batch's own budget reads, `(B,)`. That token is a target of the
budget before it."""

_LEAST = 2
"""Tokens that go on from a cache: for a single one, upstream takes the path of decoding, which has no gradient."""

Tokens = dict[str, torch.Tensor]


class Handovers:
    """Which micro-batches are hand-overs, from which budget, and where their rows are cut.

    As for budgets, all that is drawn depends on the seed, the step and the micro-batch alone.

    Args:
        curriculum (`Curriculum`): Of the run.
        config (`ElasticConfig`): Of the model.
        names (`Iterable[str]`): Budgets of the model.
        token (`int`, *optional*): Id of the token before whose last occurrence rows are cut.

    Raises:
        `ElasticConfigError`: a stage wants hand-overs and draws no two budgets between which a cache can be handed over.
    """

    def __init__(self, curriculum: Curriculum, config: ElasticConfig, names: Iterable[str], token: int | None = None):
        self.curriculum, self.token = curriculum, token
        family = config.family()
        self._sources = {target: [name for name in family if _possible(config, name, target)] for target in names}
        for i, stage in enumerate(curriculum.stages):
            drawn = stage.budget_probabilities
            if stage.handover_probability > 0 and not any(self._drawn(target, drawn) for target in drawn):
                raise ElasticConfigError(
                    f"stages[{i}] has handover_probability={stage.handover_probability}, but among the budgets it draws "
                    f"({', '.join(drawn)}) no cache can be handed over to another one: it needs two that keep the same layers with a cache, "
                    "or where the first keeps more of them."
                )

    @property
    def enabled(self) -> bool:
        """Whether the run has hand-overs."""
        return any(stage.handover_probability > 0 for stage in self.curriculum.stages)

    def _drawn(self, target: str, probabilities: Mapping[str, float]) -> dict[str, float]:
        return {name: probabilities[name] for name in self._sources[target] if name in probabilities}

    def draw(self, step: int, micro_batch: int) -> tuple[str, float] | None:
        """The budget that begins the rows of a micro-batch, and after which share of them the other goes on; `None` for an ordinary one."""
        stage = self.curriculum.stage(step)
        rng = random.Random(f"{self.curriculum.seed}:handover:{step}:{micro_batch}")
        if rng.random() >= stage.handover_probability:
            return None
        sources = self._drawn(self.curriculum.budget(step, micro_batch), stage.budget_probabilities)
        if not sources:
            return None
        source = rng.choices(list(sources), list(sources.values()))[0]
        return source, rng.random()

    def cut(self, batch: Tokens, step: int, micro_batch: int) -> Tokens:
        """The micro-batch of a step, with its cut if it is a hand-over."""
        drawn = self.draw(step, micro_batch)
        if drawn is None:
            return batch
        return {**batch, CUT: cut_rows(batch["input_ids"], batch.get("attention_mask"), drawn[1], self.token)}


@dataclass(frozen=True)
class Part:
    """What one submodel is compared with the teacher at in a micro-batch; a hand-over has two.

    Args:
        name (`str`): To report it by: a budget, or `a>b` for what `b` reads after `a`.
        submodel (`Submodel`): That runs.
        target (`torch.Tensor`): Boolean `(B, T - 1)`.
    """

    name: str
    submodel: Submodel
    target: torch.Tensor


def parts_of(model: ElasticForCausalLM, name: str, target: torch.Tensor, cut: torch.Tensor | None) -> list[Part]:
    """The parts of a micro-batch of the active budget.

    Args:
        name (`str`): To report it by: of the budget, or `a>b` if the micro-batch is a hand-over.
        target (`torch.Tensor`): Boolean `(B, T - 1)`.
        cut (`torch.Tensor`, *optional*): `(B,)`, of a hand-over.
    """
    if cut is None:
        return [Part(name, model.submodel, target)]
    source = name.partition(">")[0]
    before = torch.arange(target.shape[1], device=target.device) < cut[:, None]
    return [
        Part(source, model.elastic_config.submodel(source), target & before),
        Part(name, model.submodel, target & ~before),
    ]


def token_id(token: str | None, tokenizer: Any) -> int | None:
    """The id of `handover_token`.

    Raises:
        `ElasticConfigError`: the tokenizer does not have it as one token.
    """
    if token is None:
        return None
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ElasticConfigError(
            f"handover_token={token!r} must be one token of the tokenizer, which makes {ids} of it; leave it out to cut rows at random."
        )
    return int(ids[0])


def refuse_checkpointing(model: ElasticForCausalLM, accelerator: Accelerator) -> None:
    """Raise for layers that are computed again in backward by other means than the run's own option, which its config refuses."""
    if model.is_activation_checkpointing:
        raise ElasticConfigError(
            "handover_probability above 0 does not work with the model's activation checkpointing; call "
            "model.activation_checkpointing_disable() first."
        )
    if getattr(getattr(accelerator.state, "fsdp_plugin", None), "activation_checkpointing", False):
        raise ElasticConfigError(
            "handover_probability above 0 does not work with FSDP's activation checkpointing, which would write the cache twice; set "
            "activation_checkpointing to false in fsdp_config."
        )


def _possible(config: ElasticConfig, source: str, target: str) -> bool:
    if source == target:
        return False
    try:
        check_hand_over(config.architecture, config.parent_config, config.submodel(source), config.submodel(target))
    except HandoverError:
        return False
    return True


def cut_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, share: float, token: int | None = None
) -> torch.Tensor:
    """Where to cut rows: before the last occurrence of a token, where there is one, or else after a share of the row.

    At least one token comes before the cut, and two after it if the row has them: one to read, and one to predict.

    Args:
        input_ids (`torch.Tensor`): `(B, T)`.
        attention_mask (`torch.Tensor`, *optional*): `(B, T)`, 0 for padding, which may be on either side.
        share (`float`): In [0, 1).

    Returns:
        `torch.Tensor`: Columns `(B,)`.
    """
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    length, start = real.sum(1), real.int().argmax(1)
    cut = (share * length).long()
    if token is not None:
        found = (input_ids == token) & real.bool()
        last = found.shape[1] - 1 - found.flip(1).int().argmax(1)
        cut = torch.where(found.any(1), last - start, cut)
    return start + torch.minimum(cut, length - _LEAST).clamp(min=1)


def split_rows(
    tokens: Tokens, target: torch.Tensor, cut: torch.Tensor
) -> tuple[Tokens, Tokens, torch.Tensor, torch.Tensor]:
    """Rows that are cut at different columns as two batches: the first is padded on the left, so that all rows go on at the same column.

    (A left-padded row is what it is alone, except where Mamba's projection has a bias: it then reaches the first tokens through the convolution.)

    Args:
        tokens (`dict[str, torch.Tensor]`): `input_ids`, and optionally `attention_mask` and `position_ids`, `(B, T)`.
        target (`torch.Tensor`): Boolean `(B, T - 1)`; positions that are compared.
        cut (`torch.Tensor`): `(B,)`.

    Returns:
        `tuple[dict, dict, torch.Tensor, torch.Tensor]`: What comes before the cut, `(B, P)`; what comes after it, `(B, R)`, with an attention
        mask over both, `(B, P + R)`; and `target` of both, `(B, P)`, whose last column predicts the first token of the rest, and `(B, R - 1)`.
    """
    ids = tokens["input_ids"]
    width, before = ids.shape[1], int(cut.max())
    after = max(width - int(cut.min()), _LEAST)
    place = cut[:, None] + torch.arange(-before, after, device=ids.device)
    inside = (place >= 0) & (place < width)
    place = place.clamp(0, width - 1)
    mask = tokens.get("attention_mask", torch.ones_like(ids)).gather(1, place) * inside
    positions = tokens["position_ids"].expand_as(ids).gather(1, place) if "position_ids" in tokens else place
    first = {"input_ids": ids.gather(1, place)[:, :before], "position_ids": positions[:, :before]}
    rest = {"input_ids": ids.gather(1, place)[:, before:], "position_ids": positions[:, before:]}
    compared = F.pad(target, (0, 1)).gather(1, place) & inside
    first, rest = {**first, "attention_mask": mask[:, :before]}, {**rest, "attention_mask": mask}
    return first, rest, compared[:, :before], compared[:, before:-1]


@contextmanager
def beginning(model: ElasticForCausalLM, source: str) -> Iterator[DynamicCache]:
    """Run another budget than the active one inside a `with` block and inside a call of whatever wraps the model; gives the cache that it
    is to write."""
    with model.computing(source):
        yield DynamicCache(config=model.elastic_config.stock_config(model.submodel))


def go_on(model: ElasticForCausalLM, given: Submodel, cache: DynamicCache, tokens: Tokens) -> DynamicCache:
    """The cache that the active budget goes on with after another one has read `tokens`; inside a call of whatever wraps the model.

    Args:
        given (`Submodel`): That read them.
        cache (`DynamicCache`): What it wrote.
        tokens (`dict[str, torch.Tensor]`): As `split_rows` gives them.
    """
    config, target = model.elastic_config, model.submodel
    kept = read_cache(cache)
    layers = model.architecture.layers_of(model)
    for i, found in zip(given.layers, kept, strict=True):
        _gather_in_backward(layers[i], found)
    states = hand_over(kept, model.architecture, config.parent_config, given, target)
    made: Any = write_cache(states, config.stock_config(target), tokens["input_ids"].shape[1])
    # Nobody reads where the rest ends, and upstream would write it over a state that backward may need.
    made.update_recurrent_state = lambda recurrent_states, *args, **kwargs: recurrent_states
    return made


def handed_over(model: ElasticForCausalLM, source: str, tokens: Tokens) -> DynamicCache:
    """The cache that the active budget goes on with after another one has read `tokens`, whose output nobody needs.

    Args:
        source (`str`): Budget that reads.
        tokens (`dict[str, torch.Tensor]`): As `split_rows` gives them.
    """
    with beginning(model, source) as cache:
        given = model.submodel
        model.base_model(**tokens, past_key_values=cache, use_cache=True)
    return go_on(model, given, cache, tokens)


def _gather_in_backward(layer: nn.Module, found: Mapping[str, torch.Tensor]) -> None:
    """Have a sharded layer gathered before the gradient of what it keeps goes into it. FSDP does that for the gradient of its output, which
    comes later, or never."""
    sharded: list[Any] = [module for module in layer.modules() if hasattr(module, "unshard")]
    for tensor in found.values():
        if sharded and tensor.requires_grad:
            tensor.register_hook(lambda _: [module.unshard() for module in sharded] and None)
