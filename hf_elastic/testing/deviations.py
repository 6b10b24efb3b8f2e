"""What a check of the conformance kit finds: how far off a case is, within which tolerance it is allowed to be, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .cases import Case

LOGITS = 2e-5
"""Relative to the largest logit or 1: float32 sums over other memory, with `x * 0` terms left out, in another order. The largest difference seen is
5e-6; a wrong row, scale or epsilon gives more than 1e-2."""
GRADIENTS = 1e-4
"""Relative to the largest gradient of a tensor: products of more factors, in another order."""


@dataclass(frozen=True)
class Deviation:
    """What one case of a check found: how far off, or what is wrong."""

    case: str
    by: float = 0.0
    limit: float = 0.0
    wrong: str = ""


class NotApplicable(Exception):
    """A check has nothing to look at in this model."""


def same_weights(case: Case, left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> Deviation:
    if left.keys() != right.keys():
        return Deviation(case.name, wrong=f"only one of the two has {sorted(left.keys() ^ right.keys())[:3]}")
    other = [n for n in left if left[n].dtype != right[n].dtype or not torch.equal(left[n], right[n])]
    return Deviation(case.name, wrong=f"other weights in {other[:3]}" if other else "")


def same_logits(case: Case, left: torch.Tensor, right: torch.Tensor, limit: float = LOGITS) -> Iterator[Deviation]:
    yield Deviation(case.name, off(left, right), limit)


def off(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference, relative to the largest value or 1."""
    if left.shape != right.shape or not (left.isfinite().all() and right.isfinite().all()):
        return math.inf
    left, right = left.detach(), right.detach()
    return float((left - right).abs().max()) / max(float(right.abs().max()), 1.0)


def same_gradients(
    case: Case, ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], limit: float = GRADIENTS
) -> Iterator[Deviation]:
    """Gradients by name, each relative to its largest, or to a hundredth of the largest of all; zero where none is expected."""
    largest = max((float(gradient.abs().max()) for gradient in expected.values()), default=0.0)
    if largest < 1e-4:
        yield Deviation(case.name, wrong="all gradients are zero, so nothing is checked")
    for name, gradient in ours.items():
        theirs = expected.get(name, torch.zeros_like(gradient))
        by = float((gradient - theirs).abs().max()) / max(float(theirs.abs().max()), 0.01 * largest)
        yield Deviation(f"{case.name}, {name}", by, limit)
