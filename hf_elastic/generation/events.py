"""What phased generation tells while it runs and when it is done."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TextIO

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

EndReason = Literal["marker", "soft cap", "cap", "eos", "length", "stopping criteria", "skipped"]


@dataclass(frozen=True)
class PhaseEvent:
    """One thing that happened. Strings and numbers only, so that it can be sent to another process.

    Args:
        kind (`str`):
            `"start"`: a phase has read what came before and writes from now on. `"token"`: one more token of one sequence. `"end"`: the phase
            of one sequence is over. Every phase starts once for all sequences; those that skip it end it at once. `"choice"`, where a plan is chosen
            per prompt: this submodel writes the last phase of one sequence. What it drafted before that is told after it, or never.
        phase (`int`): Index of the phase in the plan; one more where the last phase is written by `escalate_to`.
        name (`str`): Name of the phase.
        budget (`str`): Name of the submodel that writes, or its sizes if it has none.
        row (`int`): Index of the sequence; -1 for `"start"`.
        token_id (`int`, *optional*): Of a `"token"`.
        inserted (`bool`): Whether the plan put the token there and not the submodel.
        reason (`str`, *optional*):
            Why a phase ended: `"marker"`, `"soft cap"` (a sentence or line ended in the grace window), `"cap"`, `"skipped"` (nothing was to be
            written in it: the prompt asks for no thinking, or the cap is 0); or why the text ended: `"eos"`, `"length"` (of the call or of the
            context), `"stopping criteria"`.
        handover (`str`, *optional*): Of a `"start"` after the first: `"cache"` or `"reprefill"`, as it was done.
        seconds (`float`): Since generation began.
        signal, confidence (`str`, `float`, *optional*): Of a `"choice"`: what was asked, and its value; `None` if there was nothing to ask.
    """

    kind: Literal["start", "token", "end", "choice"]
    phase: int
    name: str
    budget: str
    row: int = -1
    token_id: int | None = None
    inserted: bool = False
    reason: EndReason | None = None
    handover: str | None = None
    seconds: float = 0.0
    signal: str | None = None
    confidence: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@dataclass
class PhaseRecord:
    """What one phase did, or one of two submodels in a last phase with `escalate_to`.

    Args:
        name, budget (`str`): As in [`PhaseEvent`].
        handover (`str`, *optional*):
            How the phase took over, `"cache"` or `"reprefill"`; `None` for the first. A sequence that skipped what came before is always read.
        generated (`list[int]`): Per sequence the tokens that the submodel wrote in this phase.
        reopened (`list[int]`):
            How many of them belong to an earlier phase whose start marker the submodel wrote again, its end marker included. They count against
            that phase's cap, too.
        inserted (`list[int]`): Per sequence the tokens that the plan put there: `start` in front, and what closes a phase that is at its cap.
        spans (`list[tuple[int, int]]`): Per sequence where both lie in its row of `sequences`.
        reasons (`list[str | None]`): Per sequence why it ended; `None` if it did not get here, or another submodel wrote this phase of it.
        confidence (`list[float | None]`): Per sequence the value of the signal, where this submodel was asked and `escalate_to` stood by.
        drafted (`list[int]`): Per sequence the tokens that were written here and thrown away, as the confidence was too low.
        prefill_seconds (`float`): Switching, hand-over and reading until the first token could be chosen.
        decode_seconds (`float`): From there to the end of the phase of the last sequence.
    """

    name: str
    budget: str
    handover: str | None = None
    generated: list[int] = field(default_factory=list)
    reopened: list[int] = field(default_factory=list)
    inserted: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    reasons: list[EndReason | None] = field(default_factory=list)
    confidence: list[float | None] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@dataclass
class PhaseOutput(GenerateDecoderOnlyOutput):
    """As `GenerateDecoderOnlyOutput`, with what every phase did.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, prompt + new tokens)`): Prompts and what was generated, padded on the right.
        scores, logits (`tuple[torch.FloatTensor]`, *optional*):
            Per new token `(batch, vocabulary)`, after and before processing; zeros where a token was inserted or the sequence had ended.
        phases (`list[PhaseRecord]`): One per phase of the plan. Where the last one has `escalate_to` there is one more, of what that wrote.
    """

    phases: list[PhaseRecord] | None = None


class PhaseStreamer(BaseStreamer):
    """Base class of streamers that are told who writes which token. Unlike others they may follow several sequences at once."""

    def put_event(self, event: PhaseEvent) -> None:
        """Called for every event, in order."""
        raise NotImplementedError

    def put(self, value: torch.Tensor) -> None:
        """The prompt; ignored by default."""

    def end(self) -> None:
        """Called once when everything is done."""


class PhaseTextStreamer(PhaseStreamer):
    """Prints one sequence as it is written, each phase under a line that names it and its submodel.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Decodes the tokens.
        file (`TextIO`, *optional*): Defaults to standard output.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, file: TextIO | None = None):
        self.tokenizer, self.file = tokenizer, file or sys.stdout
        self._ids: list[int] = []
        self._printed = 0

    def put_event(self, event: PhaseEvent) -> None:
        if event.kind == "start":
            self._flush()
            head = "\n" if event.phase else ""
            print(f"{head}[{event.name} - {event.budget}]", file=self.file, flush=True)
        elif event.kind == "choice" and event.row == 0:
            self._flush()
            value = "nothing" if event.confidence is None else f"{event.confidence:.3f}"
            print(f"({event.signal} {value}: {event.budget})", file=self.file, flush=True)
        elif event.kind == "end" and event.row == 0 and event.reason == "skipped":
            self._flush()
            print("(skipped)", end="", file=self.file, flush=True)
        elif event.kind == "token" and event.row == 0 and event.token_id is not None:
            self._ids.append(event.token_id)
            text = self._text()
            if not text.endswith("\ufffd"):  # the rest of a character is in a token to come
                print(text[self._printed :], end="", file=self.file, flush=True)
                self._printed = len(text)

    def end(self) -> None:
        self._flush()
        print(file=self.file, flush=True)

    def _text(self) -> str:
        return str(self.tokenizer.decode(self._ids, skip_special_tokens=True))

    def _flush(self) -> None:
        print(self._text()[self._printed :], end="", file=self.file, flush=True)
        self._ids, self._printed = [], 0
