"""Arguments of the stock `generate`, as both ways of decoding here need them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerationMixin

from ..errors import BusyError


def by_name(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call of `model.generate` by their names."""
    named = {**inspect.signature(GenerationMixin.generate).bind_partial(model, *args).arguments, **kwargs}
    del named["self"]
    return named


def with_stop_strings(criteria: Iterable[Any] | None, strings: Any, tokenizer: Any) -> StoppingCriteriaList:
    """Stopping criteria and one for these strings: upstream does not give the tokenizer on where the loop is not its own."""
    return StoppingCriteriaList([*(criteria or ()), StopStringCriteria(tokenizer, strings)])


@contextmanager
def telling(streamer: Any) -> Iterator[None]:
    """End a streamer when generation is refused: who reads it in another thread would wait for ever."""
    try:
        yield
    except BusyError:
        if streamer is not None:
            streamer.end()
        raise
