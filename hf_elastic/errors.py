"""Errors of the library: one base class, and specific ones that are also the builtin a caller would expect."""

from __future__ import annotations

import difflib
import re
import reprlib
import sys
from collections.abc import Iterable
from typing import Any

_LONGEST = 300  # characters of a value in a message


class HFElasticError(Exception):
    """Base class of every error raised on purpose by `hf_elastic`."""


class ElasticConfigError(HFElasticError, ValueError):
    """A configuration, a size or a budget is not allowed; nothing was read, written or changed."""


class UnknownBudgetError(ElasticConfigError):
    """A budget was asked for that the checkpoint does not have or cannot meet."""


class UnsupportedArchitectureError(HFElasticError, ValueError):
    """The parent's `model_type` has no table in `hf_elastic.architectures`."""


class CheckpointError(HFElasticError, OSError):
    """Files on disk are missing, damaged, or disagree with their configuration; no weight was placed."""


class UnreachableError(CheckpointError):
    """The Hub could not be asked, or a connection to it failed for good, which says nothing about what it has."""


class ExportError(HFElasticError, ValueError):
    """The submodel cannot be written in the requested form."""


class PortabilityWarning(UserWarning):
    """A size was written that some other program does not run, or runs wrongly without a word."""


class BudgetWarning(UserWarning):
    """A budget was met by a size that is far from what was asked for."""


class PhasePlanError(HFElasticError, ValueError):
    """A phase plan, or a prompt for it, is not allowed; nothing was generated."""


class TokenizerError(HFElasticError, ValueError):
    """A tokenizer has no tokens for a text, or the model has not all of the tokens."""


class SpeculationError(HFElasticError, ValueError):
    """Drafting with a smaller submodel is not possible with these arguments; nothing was generated."""


class HandoverError(HFElasticError, ValueError):
    """A cache cannot be handed from one submodel to another."""


class BusyError(HFElasticError, RuntimeError):
    """Another thread is using the family, and this would change what it runs at; nothing was changed."""


class _Shown(reprlib.Repr):
    """`repr`, cut where it is long, of what says something in a line; of anything else what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring = 4, 160
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 12

    def repr1(self, x: Any, level: int) -> str:
        shape = getattr(x, "shape", None)
        if shape is not None and hasattr(x, "dtype"):
            return f"<{type(x).__name__} of shape {tuple(shape)}, {str(x.dtype).removeprefix('torch.')}>"
        if hasattr(x, "named_parameters"):
            return f"<{x.__name__ if isinstance(x, type) else type(x).__name__}>"
        return super().repr1(x, level)

    def repr_instance(self, x: Any, level: int) -> str:
        try:
            text = repr(x)
        except Exception:
            return f"<{type(x).__name__}>"
        return text if len(text) <= 200 and "\n" not in text else f"<{type(x).__name__}>"


_SHOWN = _Shown()


def shown(value: Any) -> str:
    """A value for an error: as Python writes it if that is short; a tensor by its shape, a model by its class, much else by its type."""
    return _cut(_SHOWN.repr(value))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the nearest of `known`, or an empty string."""
    written = {str(k).lower(): k for k in known}
    near = difflib.get_close_matches(str(name).lower(), written, n=1, cutoff=0.6)
    return f" Did you mean {written[near[0]]!r}?" if near else ""


def refuse_misspelt(arguments: Iterable[str], *known: str) -> None:
    """Raise `TypeError` for an argument that is nearly one of `known`; upstream's methods take others without a word."""
    for name in arguments:
        if hint := did_you_mean(name, known):
            raise TypeError(f"unexpected argument {name!r}.{hint}")


_BUDGET_WORDS = ("family", "model_size", "size", "sizes", "slice", "submodel", "subnet")


def meant_budget(name: str) -> str:
    """Return a hint at `budget=` for an argument that is nearly that, or another word for it; otherwise an empty string."""
    if name not in _BUDGET_WORDS and not did_you_mean(name, ["budget"]):
        return ""
    return " Did you mean 'budget'? It says which size is loaded: budget='half', 0.5, '12B', '24GB'."


def users_level() -> int:
    """The `stacklevel` of a warning of the function that asks, so that it points at the user's line and not into this package or the AutoClasses."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    return level


_INSIDE = ("hf_elastic", "transformers")


_FIELD = re.compile(
    r"Validation error for field '(?P<name>\w+)': TypeError: Field '(?P=name)' expected (?P<kind>\w+), got \w+ \(value: (?P<value>.*)\)"
)
"""How the config classes of transformers say that a field has a value of another type."""


def reason(error: BaseException) -> str:
    """What an error of another library says, on one line and not too long, with its type where the text alone says nothing."""
    text = " ".join(str(error).split())
    if field := _FIELD.fullmatch(text):
        text = (
            f"{field['name']}={field['value']} must be {'an' if field['kind'][0] in 'aeiou' else 'a'} {field['kind']}"
        )
        return _cut(text)
    return _cut(text if text.count(" ") > 3 else f"{type(error).__name__}: {text}")


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
