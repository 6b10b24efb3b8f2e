"""Errors of the library: one base class, and specific ones that are also the builtin a caller would expect."""

from __future__ import annotations

import difflib
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


class ExportError(HFElasticError, ValueError):
    """The submodel cannot be written in the requested form."""


class PhasePlanError(HFElasticError, ValueError):
    """A phase plan, or a prompt for it, is not allowed; nothing was generated."""


class SpeculationError(HFElasticError, ValueError):
    """Drafting with a smaller submodel is not possible with these arguments; nothing was generated."""


class HandoverError(HFElasticError, ValueError):
    """A cache cannot be handed from one submodel to another."""


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


def shown(value: Any) -> str:
    """`repr` for an error message: what is long is cut, as a value from a damaged file can have any length."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} of many levels"
    return _cut(text)


def reason(error: BaseException) -> str:
    """What an error of another library says, on one line and not too long, with its type where the text alone says nothing."""
    text = " ".join(str(error).split())
    return _cut(text if text.count(" ") > 3 else f"{type(error).__name__}: {text}")


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
