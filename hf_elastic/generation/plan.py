"""Phase plans: which submodel writes which part of a text, and how each part ends.

A plan is a sequence of phases. By default there are two, thinking and answering: thinking ends where the model writes `</think>`, or, if
its cap is near, at the next end of a sentence or line, or at the cap itself, where a closing text is inserted that the answering
submodel reads like everything else (the Nemotron family's rule; arXiv 2605.07182, and arXiv 2505.05315 for a cap on each part).

Who answers may also be decided per prompt, as in a model cascade: a small submodel answers, and where its confidence is below a threshold a
larger one does (arXiv 2305.05176; confidence of the least likely token, as in arXiv 2404.10136).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from transformers import GenerationConfig

from ..configuration.budgets import Budget
from ..errors import PhasePlanError, did_you_mean, shown
from .markers import END, START, find_markers

Handover = Literal["auto", "cache", "reprefill"]
HANDOVERS: tuple[Handover, ...] = ("auto", "cache", "reprefill")
Signal = Literal["answer_min", "answer_first", "thinking_mean", "thinking_min"]
SIGNALS: tuple[Signal, ...] = ("answer_min", "answer_first", "thinking_mean", "thinking_min")
AUTO = "auto"
"""Markers that are found when the plan is used."""
_USUAL = {"start": START, "end": END}

_OWNED = [
    "max_new_tokens",
    "max_length",
    "min_length",
    "num_beams",
    "num_return_sequences",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "stop_strings",
    "max_time",
    "use_cache",
    "cache_implementation",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "prefill_chunk_size",
]


@dataclass(frozen=True)
class Phase:
    """One part of a generated text.

    Args:
        budget (*optional*): The submodel that writes it, as `model.set_budget` takes it; `None` is everything that is loaded.
        name (`str`, *optional*): What events and results call it.
        max_new_tokens (`int`, *optional*):
            Most tokens the submodel writes in it, `end` included; no cap if not given. With 0 it is skipped: the text gets the markers of a part
            with nothing in it, as the chat template says it for no thinking or else `start` and `end`. If a later submodel writes `start` again,
            what it writes up to `end` counts against this cap, too; at the cap `closing` is inserted and that submodel goes on.
        start (`str`, *optional*):
            Marker that opens it. It is inserted unless the newest turn of the text has it open: system prompts and turns before may hold markers.
            A prompt whose newest turn ends with both markers and nothing between them asks for no thinking: the first phase is skipped.
        end (`str`, *optional*): Marker that ends it when the submodel writes it. Without one it ends with its cap or with the text.
        grace_tokens (`int`, *optional*):
            The last so many tokens before the cap, in which it ends with the next sentence or line. Defaults to a tenth of the cap, at most 500,
            where there is an `end`.
        closing (`str`, *optional*):
            Inserted if the submodel did not write `end` by the cap; has to hold `end`. Defaults to the end of a sentence, `end` and an empty
            line as far as the tokenizer has them. After a sentence or line that ended in the grace window its part from `end` on is inserted.
        handover (`str`, *optional*, defaults to `"auto"`):
            How it takes over from the phase before: `"cache"` goes on with the other submodel's cache, converted and scaled
            ([`hf_elastic.generation.caches.hand_over`]), `"reprefill"` reads everything again, and `"auto"` takes the cache where that is exact
            (the same submodel) or what the family was trained for, and reads again otherwise.
        generation (`dict[str, Any]`, *optional*): Settings of `GenerationConfig` for this phase (`temperature`, `top_p`, ...).
        escalate_to (*optional*):
            Budget that writes the phase instead where the confidence is below `confidence`. The last phase only. Every sequence of a batch
            decides for itself, and gets what a plan without a choice gives.
        confidence (`float`, *optional*): That threshold, from 0 (nobody escalates) to 1. It has to be given with `escalate_to`.
        signal (`str`, *optional*, defaults to `"answer_min"`):
            What the confidence is. Probabilities are those that a submodel gave to the tokens that it took, before temperature and other processing:

            - `"answer_min"`: the least of the tokens of the answer. It is drafted by `budget`, and thrown away at the first token that is below the
              threshold.
            - `"answer_first"`: that of the first token of the answer.
            - `"thinking_mean"`, `"thinking_min"`: the geometric mean or the least of those of the phase before. A sequence without a token in it has
              no confidence and escalates.
    """

    budget: Budget = None
    name: str = "phase"
    max_new_tokens: int | None = None
    start: str | None = None
    end: str | None = None
    grace_tokens: int | None = None
    closing: str | None = None
    handover: Handover = "auto"
    generation: Mapping[str, Any] = field(default_factory=dict)
    escalate_to: Budget = None
    confidence: float | None = None
    signal: Signal = SIGNALS[0]

    def __post_init__(self) -> None:
        where = f"phase {self.name!r}"
        if not isinstance(self.name, str) or not self.name:
            raise PhasePlanError(f"a phase's name must be a text, not {shown(self.name)}.")
        _check_count(self.max_new_tokens, 0, f"{where}: max_new_tokens")
        _check_count(self.grace_tokens, 0, f"{where}: grace_tokens")
        if self.max_new_tokens == 0 and self.start is not None and self.end is None:
            raise PhasePlanError(
                f"{where}: max_new_tokens=0 needs an end marker, or start={self.start!r} would stay open."
            )
        if not isinstance(self.handover, str) or self.handover not in HANDOVERS:
            raise PhasePlanError(f"{where}: handover={shown(self.handover)} must be one of {', '.join(HANDOVERS)}.")
        for key in ("start", "end", "closing"):
            text = getattr(self, key)
            if text is not None and (not isinstance(text, str) or not text):
                raise PhasePlanError(f"{where}: {key}={shown(text)} must be a text, or None for none.")
            if text == AUTO:
                raise PhasePlanError(
                    f"{where}: {key}={AUTO!r} is no marker. Markers are found for PhasePlan(start=, end=) only, the thinking of two phases."
                )
        if self.closing is not None and (self.end is None or self.end not in self.closing):
            raise PhasePlanError(f"{where}: closing={self.closing!r} must hold the end marker, end={self.end!r}.")
        if self.grace_tokens and (self.max_new_tokens is None or self.end is None):
            raise PhasePlanError(f"{where}: grace_tokens needs max_new_tokens and end: it is the end of a cap.")
        if self.grace_tokens and self.max_new_tokens is not None and self.grace_tokens >= self.max_new_tokens:
            raise PhasePlanError(
                f"{where}: grace_tokens={self.grace_tokens} must be less than max_new_tokens={self.max_new_tokens}."
            )
        self._check_choice(where)
        known = [key for key in GenerationConfig().to_dict() if key not in _OWNED]
        for key in self.generation:
            if key not in known:
                why = "is not set per phase" if key in _OWNED else "is no setting of GenerationConfig"
                raise PhasePlanError(f"{where}: generation setting {key!r} {why}.{did_you_mean(key, known)}")

    def _check_choice(self, where: str) -> None:
        value = self.confidence
        if not isinstance(self.signal, str) or self.signal not in SIGNALS:
            raise PhasePlanError(f"{where}: signal={shown(self.signal)} must be one of {', '.join(SIGNALS)}.")
        if self.escalate_to is None:
            if value is not None or self.signal != SIGNALS[0]:
                given = f"confidence={shown(value)}" if value is not None else f"signal={shown(self.signal)}"
                raise PhasePlanError(
                    f"{where}: {given} decides nothing without escalate_to, the budget that writes where the confidence is lower."
                )
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise PhasePlanError(
                f"{where}: confidence={shown(value)} must be a number from 0 (never) to 1: escalate_to writes where the signal is below it."
            )

    @property
    def grace(self) -> int:
        """Tokens of the grace window."""
        if self.grace_tokens is not None or self.max_new_tokens is None or self.end is None:
            return self.grace_tokens or 0
        return min(500, self.max_new_tokens // 10)


class PhasePlan:
    """Who thinks and who answers.

    Args:
        thinking (*optional*): Budget of the thinking phase; `None` is everything that is loaded.
        answering (*optional*): Budget of the answering phase.
        max_thinking_tokens (`int`, *optional*):
            Cap on thinking tokens, `</think>` included, also on those of a thinking that is opened again in the answer. 0 is no thinking.
        max_answer_tokens (`int`, *optional*): Cap on the tokens of the answer.
        escalate_to (*optional*): Budget that answers where the confidence is below `confidence`: a plan that is chosen per prompt; see [`Phase`].
        confidence (`float`, *optional*): Threshold of `escalate_to`, from 0 to 1.
        signal (`str`, *optional*, defaults to `"answer_min"`): What the confidence is; see [`Phase`].
        handover (`str`, *optional*, defaults to `"auto"`): How the answering submodel takes over; see [`Phase`].
        start, end (`str`, *optional*, defaults to `"auto"`):
            Markers around the thinking, each one token. `"auto"` is what the chat template of the model has around it when the plan is used,
            and else `<think>` and `</think>`; `start=None` is none.
        thinking_options, answering_options (`dict[str, Any]`, *optional*): Further fields of [`Phase`], such as `generation`.
        phases (`list[Phase]`, *optional*): The phases themselves, one or more, instead of everything else.

    Raises:
        `PhasePlanError`: says which field of which phase cannot be, and what can. Budgets, markers and caps are checked against a model and its
            tokenizer when the plan is used.

    Example:

    ```python
    >>> plan = PhasePlan(thinking="23b", answering="30b", max_thinking_tokens=2048, handover="cache")
    >>> model.generate(**inputs, phase_plan=plan, tokenizer=tokenizer)
    >>> cascade = PhasePlan(thinking="12b", answering="12b", escalate_to="30b", confidence=0.9)
    ```
    """

    phases: tuple[Phase, ...]

    def __init__(
        self,
        thinking: Budget = None,
        answering: Budget = None,
        *,
        max_thinking_tokens: int | None = None,
        max_answer_tokens: int | None = None,
        escalate_to: Budget = None,
        confidence: float | None = None,
        signal: Signal = SIGNALS[0],
        handover: Handover = "auto",
        start: str | None = AUTO,
        end: str = AUTO,
        thinking_options: Mapping[str, Any] | None = None,
        answering_options: Mapping[str, Any] | None = None,
        phases: list[Phase] | tuple[Phase, ...] | None = None,
    ):
        self._auto: tuple[str, ...] = ()
        if phases is None:
            _check_count(max_thinking_tokens, 0, "max_thinking_tokens")
            _check_count(max_answer_tokens, 1, "max_answer_tokens")
            markers: dict[str, Any] = {"start": start, "end": end}
            own = thinking_options if isinstance(thinking_options, Mapping) else {}
            self._auto = tuple(key for key in markers if markers[key] == AUTO and key not in own)
            markers |= {key: usual for key, usual in _USUAL.items() if markers[key] == AUTO}
            first = {"name": "thinking", "max_new_tokens": max_thinking_tokens, **markers}
            choice = {"escalate_to": escalate_to, "confidence": confidence, "signal": signal}
            last = {"name": "answering", "max_new_tokens": max_answer_tokens, "handover": handover, **choice}
            phases = [
                _phase(thinking, first, thinking_options, "thinking_options"),
                _phase(answering, last, answering_options, "answering_options"),
            ]
        elif any(
            given is not None
            for given in (thinking, answering, max_thinking_tokens, max_answer_tokens, escalate_to, confidence)
        ):
            raise PhasePlanError(
                "give either phases= or thinking= and answering= with their caps and escalate_to=, not both."
            )
        if (
            not isinstance(phases, (list, tuple))
            or not phases
            or not all(isinstance(phase, Phase) for phase in phases)
        ):
            raise PhasePlanError(f"phases={shown(phases)} must be a list of one or more Phase objects.")
        names = [phase.name for phase in phases]
        if len(set(names)) < len(names):
            raise PhasePlanError(f"the names of phases must differ, not {names}.")
        if phases[-1].max_new_tokens == 0:
            raise PhasePlanError(f"phase {phases[-1].name!r} is the last one and has max_new_tokens=0: leave it out.")
        for phase in phases[:-1]:
            if phase.end is None and phase.max_new_tokens is None:
                raise PhasePlanError(
                    f"phase {phase.name!r} would never end: give it max_new_tokens or end, as another phase follows."
                )
            if phase.escalate_to is not None:
                raise PhasePlanError(f"phase {phase.name!r}: escalate_to is for the last phase, {phases[-1].name!r}.")
        last_phase = phases[-1]
        nothing_before = len(phases) == 1 or phases[-2].max_new_tokens == 0
        if last_phase.escalate_to is not None and last_phase.signal.startswith("thinking") and nothing_before:
            raise PhasePlanError(
                f"phase {last_phase.name!r}: signal={last_phase.signal!r} is about what the phase before wrote, and nothing is written before. "
                "Take answer_min or answer_first."
            )
        self.phases = tuple(phases)

    @property
    def budgets(self) -> list[Budget]:
        """Who may write, in the order of [`PhaseOutput`]`.phases`: one per phase, and `escalate_to` after that of its phase."""
        last = self.phases[-1].escalate_to
        return [*(phase.budget for phase in self.phases), *([] if last is None else [last])]

    def with_markers(self, tokenizer: Any) -> PhasePlan:
        """The plan with the markers of this tokenizer where none were given; see [`~hf_elastic.generation.markers.find_markers`].

        Raises:
            `PhasePlanError`: several may be meant.
        """
        if not self._auto or tokenizer is None:
            return self
        first, *others = self.phases
        known = {key: getattr(first, key) for key in ("start", "end") if key not in self._auto}
        found = dict(zip(("start", "end"), find_markers(tokenizer, **known), strict=True))
        markers: dict[str, Any] = {key: found[key] for key in self._auto}
        return PhasePlan(phases=[replace(first, **markers), *others])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PhasePlan) and (self.phases, self._auto) == (other.phases, other._auto)

    def __repr__(self) -> str:
        return f"PhasePlan.from_dict({self.to_dict()!r})" if self._auto else f"PhasePlan(phases={list(self.phases)!r})"

    def to_dict(self) -> dict[str, Any]:
        """JSON form; what differs from the defaults of [`Phase`], and `"auto"` for a marker that is still to be found."""
        defaults = asdict(Phase())
        phases = [{k: v for k, v in asdict(phase).items() if k == "name" or v != defaults[k]} for phase in self.phases]
        phases[0] |= dict.fromkeys(self._auto, AUTO)
        return {"phases": phases}

    @classmethod
    def from_dict(cls, plan: Mapping[str, Any]) -> PhasePlan:
        """The plan that `to_dict` wrote."""
        if not isinstance(plan, Mapping) or set(plan) != {"phases"} or not isinstance(plan["phases"], list):
            raise PhasePlanError(f"{shown(plan)} is no phase plan; it must be {{'phases': [...]}}.")
        phases = list(plan["phases"])
        auto: tuple[str, ...] = ()
        if phases and isinstance(phases[0], Mapping):
            auto = tuple(key for key in _USUAL if phases[0].get(key) == AUTO)
            phases[0] = {**phases[0], **{key: _USUAL[key] for key in auto}}
        read = cls(phases=[_phase(None, phase, None, "phase") for phase in phases])
        read._auto = auto
        return read


def _phase(budget: Budget, values: Any, options: Mapping[str, Any] | None, where: str) -> Phase:
    options = {} if options is None else options
    if not isinstance(values, Mapping) or not isinstance(options, Mapping):
        raise PhasePlanError(
            f"{where}={shown(values if isinstance(options, Mapping) else options)} must be a dict of fields of Phase."
        )
    given = {"budget": budget, **values, **options}
    known = [f.name for f in fields(Phase)]
    for key in given:
        if key not in known:
            raise PhasePlanError(
                f"{where}: unknown field {key!r} of a phase; known are {', '.join(known)}.{did_you_mean(key, known)}"
            )
    return Phase(**given)


def who_answers(point: Mapping[str, Any]) -> str:
    """Of a measured plan, in words: `half`, or `half; full below 0.9 (answer_min)` for a plan that is chosen per prompt."""
    if point.get("escalate_to") is None:
        return str(point["answering"])
    return f"{point['answering']}; {point['escalate_to']} below {point['confidence']:g} ({point['signal']})"


def _check_count(value: Any, least: int, where: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise PhasePlanError(
            f"{where}={shown(value)} must be a whole number of at least {least}, or None for no limit."
        )
