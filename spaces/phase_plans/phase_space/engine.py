"""What answers visitors: the engine that runs an elastic checkpoint. No gradio in here."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any, Protocol

import torch
from transformers import AutoTokenizer

from hf_elastic import ElasticForCausalLM, PhasePlan
from hf_elastic.generation import PhaseEvent
from hf_elastic.generation.texts import check_text

from .asking import Ask, RequestError, Size, TextEvent
from .tasks import STORIES_TASK, Task

BUSY_SECONDS = 30.0


class Engine(Protocol):
    """What the user interface needs.

    Args:
        name, device, dtype (`str`): Of the model, for the header.
        sizes (`list[Size]`): From the smallest to the largest, which is everything that is held.
        task (`Task`, *optional*): If the model solves one kind of problem only; otherwise it is a chat model.
        limit (`int`): Highest cap of a phase.
        fake (`bool`): No model at all.
    """

    name: str
    device: str
    dtype: str
    sizes: list[Size]
    task: Task | None
    limit: int
    fake: bool

    def check(self, ask: Ask) -> None:
        """Refuse a request without running anything, before a GPU is borrowed for it.

        Raises:
            `HFElasticError`: The request cannot be run; the message is for the visitor.
        """
        ...

    def stream(self, ask: Ask) -> Generator[TextEvent, None, None]:
        """Events of a request, in the order of [`PhaseEvent`], after the same checks and more. Closing the generator frees the engine."""
        ...


class ElasticEngine:
    """Runs phase plans on an elastic checkpoint, one request at a time.

    Args:
        model ([`ElasticForCausalLM`]): The whole family.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer; the chat template is used if it has one.
        name (`str`): What to call it.
        task (`Task`, *optional*): See [`Engine`].
    """

    fake = False

    def __init__(self, model: Any, tokenizer: Any, name: str, task: Task | None = None):
        self.model, self.tokenizer, self.name, self.task = model, tokenizer, name, task
        self.device, self.dtype = str(model.device), str(model.dtype).removeprefix("torch.")
        costs = sorted(model.elastic_config.costs().items(), key=lambda item: item[1].total_params)
        self.sizes = [Size.of(budget, cost, model.dtype) for budget, cost in costs]
        context = getattr(model.config, "max_position_embeddings", None) or 4096
        self.limit = min(context, int(os.environ.get("PHASE_MAX_TOKENS", "4096")))
        self._lock = threading.Lock()

    @classmethod
    def lab(cls) -> ElasticEngine:
        """The trained family that ships with the package; needs no network and no GPU."""
        from hf_elastic.lab.family import load_family

        torch.set_num_threads(1)  # the model is so small that a second thread waits more than it works
        model, tokenizer = load_family("stories")
        return cls(model, tokenizer, "stories family (embedded lab)", STORIES_TASK)

    @classmethod
    def from_repo(cls, repo: str) -> ElasticEngine:
        """Any elastic repository or folder, on the GPU if there is one."""
        model = ElasticForCausalLM.from_pretrained(repo, dtype="auto")
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(repo), repo)

    def check(self, ask: Ask) -> None:
        """As [`Engine.check`]."""
        self._checked(ask)

    def _checked(self, ask: Ask) -> PhasePlan:
        """The plan with the markers of the model, which is checked, run and read."""
        plan = ask.check(self.limit, self.tokenizer)
        if self.task is not None:
            self.task.solve(ask.messages[-1][1])
        check_text(self.tokenizer, ask.messages[-1][1], "The prompt")
        for phase in plan.phases:
            self.model.elastic_config.resolve(phase.budget, self.model.dtype)
        return plan

    def stream(self, ask: Ask) -> Generator[TextEvent, None, None]:
        """As [`Engine.stream`]. Before and after it the model is at everything it has."""
        plan = self._checked(ask)
        inputs = self._encode(ask)
        sampling = {"do_sample": True, "temperature": ask.temperature} if ask.temperature else {"do_sample": False}
        if not self._lock.acquire(
            timeout=BUSY_SECONDS
        ):  # gradio's queue lets one in at a time; this is for its mistakes
            raise RequestError("The model is busy with another request. Try again in a moment.")
        try:
            torch.manual_seed(ask.seed)
            events = self.model.stream_phases(**inputs, phase_plan=plan, tokenizer=self.tokenizer, **sampling)
            with closing(events):
                yield from self._with_text(events, plan, inputs["input_ids"].shape[1])
        finally:
            self._lock.release()

    def _encode(self, ask: Ask) -> dict[str, torch.Tensor]:
        messages = ask.messages
        if self.task is not None:  # problems do not build on each other
            messages = (("user", self.task.solve(messages[-1][1]).prompt),)
        if self.tokenizer.chat_template:
            said = [{"role": role, "content": text} for role, text in messages]
            kwargs = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
            inputs = self.tokenizer.apply_chat_template(said, **kwargs)
        else:
            inputs = self.tokenizer(messages[-1][1], return_tensors="pt")
        return {key: inputs[key].to(self.model.device) for key in ("input_ids", "attention_mask")}

    def _with_text(self, events: Iterator[PhaseEvent], plan: PhasePlan, context: int) -> Iterator[TextEvent]:
        markers = {self.tokenizer.convert_tokens_to_ids(m) for p in plan.phases for m in (p.start, p.end) if m}
        decoder = Decoder(self.tokenizer)
        for event in events:
            text = ""
            if event.kind == "token":
                context += 1
                text = "" if event.token_id in markers else decoder.push(event.token_id)
            elif event.kind == "end":
                text = decoder.flush()
            yield TextEvent(**event.to_dict(), text=text, context=context)


class Decoder:
    """Tokens to text, as they come: what is yielded never changes any more."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._ids: list[int] = []
        self._done = 0

    def push(self, token_id: int | None) -> str:
        """One more token; returns the text that became certain."""
        assert token_id is not None
        self._ids.append(token_id)
        text = self._text()
        if text.endswith("\ufffd"):  # the rest of a character is in a token to come
            return ""
        new, self._done = text[self._done :], len(text)
        if text.endswith("\n"):  # so that long texts are not decoded again from their beginning
            self._ids, self._done = [], 0
        return new

    def flush(self) -> str:
        """The rest, at the end of a phase."""
        new = self._text()[self._done :]
        self._ids, self._done = [], 0
        return new

    def _text(self) -> str:
        return str(self.tokenizer.decode(self._ids, skip_special_tokens=True))


def load_engine() -> Engine:
    """The engine that the environment asks for: `PHASE_ENGINE=fake`, `PHASE_REPO=org/elastic`, or else the embedded lab."""
    if (kind := os.environ.get("PHASE_ENGINE", "elastic")) not in ("fake", "elastic"):
        raise ValueError(f"PHASE_ENGINE={kind!r} must be 'fake' or 'elastic'.")
    if kind == "fake":
        from .fake import FakeEngine

        return FakeEngine()
    repo = os.environ.get("PHASE_REPO")
    return ElasticEngine.from_repo(repo) if repo else ElasticEngine.lab()


def seconds_needed(ask: Ask) -> int:
    """Upper bound on a request's time, which is what a ZeroGPU Space asks a GPU for. `PHASE_TOKENS_PER_SECOND` says how fast the model is."""
    speed = float(os.environ.get("PHASE_TOKENS_PER_SECOND", "20"))
    return min(300, 10 + int((ask.max_thinking_tokens + ask.max_answer_tokens) / speed))
