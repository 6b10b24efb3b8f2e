"""What runs along every tensor of a model, and what follows from it: one table per stock `model_type`, with the registry of them."""

from __future__ import annotations

from ..errors import UnsupportedArchitectureError, did_you_mean
from .bamba import Bamba
from .base import Architecture, Axis, StateRule, uniform
from .falcon_h1 import FalconH1
from .granitemoehybrid import GraniteMoeHybrid
from .nemotron_h import NemotronH

__all__ = ["ARCHITECTURES", "Architecture", "Axis", "StateRule", "get_architecture", "uniform"]

ARCHITECTURES: dict[str, Architecture] = {
    a.model_type: a for a in (NemotronH(), GraniteMoeHybrid(), Bamba(), FalconH1())
}


def get_architecture(model_type: str) -> Architecture:
    """The table of a stock `model_type`.

    Raises:
        `UnsupportedArchitectureError`: no table for it; the message lists the supported ones.
    """
    if model_type not in ARCHITECTURES:
        raise UnsupportedArchitectureError(
            f"no elastic axes are known for model_type {model_type!r}; supported: {', '.join(ARCHITECTURES)}."
            f"{did_you_mean(model_type, ARCHITECTURES)} CONTRIBUTING.md says how to add an architecture."
        )
    return ARCHITECTURES[model_type]
