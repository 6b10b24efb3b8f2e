"""Errors of the library: one base class, and specific ones that are also the builtin a caller would expect."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


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


class PortabilityWarning(UserWarning):
    """A size was written that some other program does not run, or runs wrongly without a word."""


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


def users_level() -> int:
    """The `stacklevel` of a warning of the function that asks, so that it points at the user's line and not into this package or the AutoClasses."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    return level


_INSIDE = ("hf_elastic", "transformers")
