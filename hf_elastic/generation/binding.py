"""A phase plan for one model and one tokenizer: submodels instead of budgets, token ids instead of texts. Everything is checked here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..architectures.submodel import Submodel
from ..errors import PhasePlanError, shown
from ..storage.files import find_file
from ..storage.sources import pinned
from .caches import check_hand_over
from .plan import Phase, PhasePlan

_SENTENCE_END = re.compile(r"[^\d\s][.!?。！？][\"'”’)\]]*\s*$")
"""The end of a sentence; a point after a digit may be one inside a number."""

Standing = Literal["outside", "inside", "no part", "past"]
"""Of a text in a phase: not opened, opened, opened and closed with nothing in between, or closed just now with something in between."""


@dataclass(frozen=True)
class BoundPhase:
    """A phase as the loop needs it.

    Args:
        submodel (`Submodel`): Who writes.
        label (`str`): What events call the submodel.
        start_id, end_id (`int`, *optional*): The markers.
        closing_ids (`tuple[int, ...]`): Inserted at the cap.
        soft_closing_ids (`tuple[int, ...]`): Inserted after a sentence or line that ended in the grace window.
        empty_ids (`tuple[int, ...]`): Stand for a part with nothing in it, for a cap of 0.
        handover (`str`, *optional*): `"cache"` or `"reprefill"`, decided; `None` for the first phase.
        turn_ids (`frozenset[int]`): Special tokens, which part the turns of a conversation.
        is_blank (`Callable`): Whether a token is white space.
        index (`int`): Of the phase in the plan.
        escalated (`bool`): Whether this is the second submodel of a phase, which writes where the first is not confident.
    """

    phase: Phase
    submodel: Submodel
    label: str
    start_id: int | None
    end_id: int | None
    closing_ids: tuple[int, ...]
    soft_closing_ids: tuple[int, ...]
    empty_ids: tuple[int, ...]
    handover: str | None
    turn_ids: frozenset[int]
    is_blank: Callable[[int], bool]
    index: int = 0
    escalated: bool = False

    @property
    def drafts(self) -> bool:
        """Whether what it writes may be taken back."""
        return self.phase.escalate_to is not None and not self.escalated and self.phase.signal.startswith("answer")


def bind(model: Any, plan: PhasePlan, tokenizer: PreTrainedTokenizerBase | None) -> list[BoundPhase]:
    """Check a plan against a model and its tokenizer.

    Returns:
        `list[BoundPhase]`: One per phase; two for the last one if it has `escalate_to`.

    Raises:
        `UnknownBudgetError`, `ElasticConfigError`: a budget that the model does not have.
        `HandoverError`: `handover="cache"` between submodels of which the second has layers with a cache that the first does not have.
        `PhasePlanError`: a marker that is not one token, a closing text that the tokenizer cannot express, or no tokenizer for either.
    """
    if not isinstance(plan, PhasePlan):
        raise PhasePlanError(f"phase_plan={shown(plan)} must be a PhasePlan.")
    plan = plan.with_markers(tokenizer)
    bound: list[BoundPhase] = []
    turns, is_blank = _turn_ids(tokenizer, plan), Blanks(tokenizer)
    for index, phase in enumerate(plan.phases):
        submodel = model._resolved(phase.budget)
        start, end = (_marker_id(tokenizer, text, phase) if text else None for text in (phase.start, phase.end))
        closing: tuple[int, ...] = ()
        soft: tuple[int, ...] = ()
        if phase.end is not None and end is not None and tokenizer is not None:
            closing = _closing_ids(tokenizer, phase, end)
            soft = closing[closing.index(end) :]
        for text, ids in ((phase.start, (start,)), (phase.end, closing)):
            if text and max(i for i in ids if i is not None) >= model.config.vocab_size:
                raise PhasePlanError(
                    f"phase {phase.name!r}: the tokenizer's token for {text!r}, or for what closes the phase, is none of the model's "
                    f"{model.config.vocab_size}; give the tokenizer and the markers that the model was trained with."
                )
        empty = _empty_ids(tokenizer, phase, start, end, closing, is_blank) if phase.max_new_tokens == 0 else ()
        handover = _decide(model, phase, bound[-1].submodel, submodel) if bound else None
        label = _label(model, submodel)
        bound.append(
            BoundPhase(phase, submodel, label, start, end, closing, soft, empty, handover, turns, is_blank, index)
        )
    if phase.escalate_to is not None:
        bound.append(_escalated(model, bound[-1], bound[-2].submodel if len(bound) > 1 else None))
    return bound


def _escalated(model: Any, first: BoundPhase, before: Submodel | None) -> BoundPhase:
    """The same phase by the submodel that it escalates to."""
    phase, submodel = first.phase, model._resolved(first.phase.escalate_to)
    if submodel == first.submodel:
        raise PhasePlanError(
            f"phase {phase.name!r}: escalate_to={shown(phase.escalate_to)} is {first.label}, which writes it anyway; give a larger budget."
        )
    handover = None if before is None else _decide(model, phase, before, submodel)
    return replace(first, submodel=submodel, label=_label(model, submodel), handover=handover, escalated=True)


def needs_tokenizer(plan: PhasePlan) -> bool:
    """Whether the plan has texts that have to become tokens."""
    return any(phase.start or phase.end for phase in plan.phases)


def find_tokenizer(model: Any) -> PreTrainedTokenizerBase:
    """The tokenizer beside the checkpoint that a model was loaded from.

    Raises:
        `PhasePlanError`: there is none.
    """
    where = getattr(model, "name_or_path", "")
    try:
        if not where:
            raise OSError("the model was not loaded from a checkpoint")
        hub = pinned(where, getattr(model, "_hub_kwargs", {}))
        for name in (
            "tokenizer_config.json",
            "tokenizer.json",
        ):  # upstream takes a connection that failed for none of them
            find_file(where, name, hub)
        return AutoTokenizer.from_pretrained(where, **hub)
    except Exception as error:  # of many kinds, for what is missing or damaged
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PhasePlanError(
            f"the plan's markers need a tokenizer, and none was found beside the model ({why}); give tokenizer=."
        ) from error


def _label(model: Any, submodel: Submodel) -> str:
    return model.elastic_config.name_of(submodel) or _sizes(model, submodel)


def _sizes(model: Any, submodel: Submodel) -> str:
    full = model.architecture.full(model.elastic_config.parent_config)
    return " ".join(f"{axis}={size}" for axis, size in submodel.differs(full).items()) or "full"


def _decide(model: Any, phase: Phase, source: Submodel, target: Submodel) -> str:
    """How a phase takes over; see `Phase.handover`."""
    if phase.handover == "reprefill" or (phase.handover == "auto" and source != target and not _is_trained(model)):
        return "reprefill"
    try:
        check_hand_over(model.architecture, model.elastic_config.parent_config, source, target)
    except ValueError:
        if phase.handover == "cache":
            raise
        return "reprefill"
    return "cache"


def _is_trained(model: Any) -> bool:
    return bool(getattr(model.elastic_config, "handover_trained", False))


def _marker_id(tokenizer: PreTrainedTokenizerBase | None, text: str, phase: Phase) -> int:
    ids = _encode(tokenizer, text)
    if ids is None or len(ids) != 1:
        what = "cannot express" if ids is None else f"splits into {tokenizer.convert_ids_to_tokens(ids)}"  # type: ignore[union-attr]
        raise PhasePlanError(
            f"phase {phase.name!r}: marker {text!r}, which the tokenizer {what}, has to be one token; give the markers that the model was "
            "trained with (start=, end=), or None for none."
        )
    return ids[0]


def _closing_ids(tokenizer: PreTrainedTokenizerBase, phase: Phase, end_id: int) -> tuple[int, ...]:
    """The closing text as tokens; the default is as much of `.`, line break, end, empty line as the tokenizer has."""
    forms = (".\n{}\n\n", "\n{}\n\n", "{}\n\n", "{}") if phase.closing is None else (phase.closing,)
    for form in forms:
        text = form.format(phase.end) if phase.closing is None else form
        ids = _encode(tokenizer, text)
        if ids is not None and ids.count(end_id) == 1:
            return tuple(ids)
    raise PhasePlanError(
        f"phase {phase.name!r}: the tokenizer cannot express closing={phase.closing!r} with its end marker once in it; the model could not "
        "read it."
    )


def _empty_ids(
    tokenizer: Any, phase: Phase, start: int | None, end: int | None, closing: tuple[int, ...], is_blank: Blanks
) -> tuple[int, ...]:
    """A part with nothing in it: as the chat template says that no thinking is wanted, if it does; else the markers one after the other."""
    if end is None:
        return ()
    opening = () if start is None else (start,)
    if phase.closing is not None:
        return (*opening, *closing)
    try:
        asked = [{"role": "user", "content": "?"}]
        options = {"add_generation_prompt": True, "enable_thinking": False, "thinking": False}
        ids = list(tokenizer.apply_chat_template(asked, tokenize=True, return_dict=False, **options))
    except Exception:  # no template, or whatever a template raises
        ids = []
    tail = ids[max((i for i, token in enumerate(ids) if token == start), default=len(ids)) :]
    if tail.count(end) == 1 and all(token == end or is_blank(token) for token in tail[1:]):
        return tuple(tail)
    return (*opening, end)


def _turn_ids(tokenizer: Any, plan: PhasePlan) -> frozenset[int]:
    """The tokenizer's special tokens but for the plan's markers and what stands for unknown text."""
    if tokenizer is None:
        return frozenset()
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {
        *tokenizer.all_special_ids
    }
    texts = [text for phase in plan.phases for text in (phase.start, phase.end) if text]
    return frozenset(special - {tokenizer.unk_token_id, *tokenizer.convert_tokens_to_ids(texts)})


def _encode(tokenizer: PreTrainedTokenizerBase | None, text: str) -> list[int] | None:
    """Token ids that decode to this text again, or `None` if there are none."""
    if tokenizer is None:
        return None
    try:
        ids = list(tokenizer.encode(text, add_special_tokens=False))
    except Exception:  # a fast tokenizer without an unknown token raises plain `Exception`
        return None
    known = tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids
    return ids if ids and known and tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text else None


class Blanks:
    """Tells whether a token is nothing but white space."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None):
        self._tokenizer = tokenizer
        self._known: dict[int, bool] = {}

    def __call__(self, token: int) -> bool:
        if token not in self._known:
            text = None if self._tokenizer is None else str(self._tokenizer.decode([token]))
            self._known[token] = text is not None and not text.strip()
        return self._known[token]


class SentenceEnds:
    """Tells whether a text ends with the end of a sentence or line; looks at its last two tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None):
        self._tokenizer = tokenizer
        self._known: dict[tuple[int, ...], bool] = {}

    def __call__(self, ids: Sequence[int]) -> bool:
        last = tuple(ids[-2:])
        if last not in self._known:
            self._known[last] = self._ends(last)
        return self._known[last]

    def _ends(self, last: tuple[int, ...]) -> bool:
        if self._tokenizer is None:
            return False
        newest = str(self._tokenizer.decode([last[-1]]))
        before = str(self._tokenizer.decode(list(last[:-1])))
        return "\n" in newest or bool(_SENTENCE_END.search(before[-1:] + newest))


def check_prompts(prompts: Sequence[Sequence[int]], phases: Sequence[BoundPhase], context: int | None) -> None:
    """Refuse prompts that leave nothing to do.

    Raises:
        `PhasePlanError`: an empty prompt, one that fills the context, or one that ends with the end of the first phase, which holds something.
    """
    first = phases[0]
    for i, ids in enumerate(prompts):
        if not ids:
            raise PhasePlanError(f"prompt {i} is empty; there is nothing to go on from.")
        if context is not None and len(ids) >= context:
            raise PhasePlanError(
                f"prompt {i} has {len(ids)} tokens, and the context of the model ends at {context}; shorten it."
            )
        if standing(ids, first) == "past":
            raise PhasePlanError(
                f"prompt {i} is past phase {first.phase.name!r} already: {first.phase.end!r} was written at its end. Give a plan that starts with the "
                "phase after it, or take the marker out of the prompt."
            )


def standing(ids: Sequence[int], phase: BoundPhase) -> Standing:
    """Where a text stands in a phase with its last token.

    Only its newest turn counts, which is what follows the last special token of the tokenizer: a system prompt may speak of the markers, and
    turns before may hold thoughts. Where no special token tells turns apart, an end marker that text follows is taken for one of these.
    """
    start = max((i for i, token in enumerate(ids) if token in phase.turn_ids), default=-1) + 1
    turn = ids[start:]
    markers = [-1, *(i for i, token in enumerate(turn) if token in (phase.start_id, phase.end_id))]
    last = markers[-1]
    if last == -1:
        return "outside"
    if turn[last] == phase.start_id:
        return "inside"
    if not all(map(phase.is_blank, turn[last + 1 :])):
        return "outside"
    opened = markers[-2] + 1
    return "no part" if all(map(phase.is_blank, turn[opened:last])) else "past"
