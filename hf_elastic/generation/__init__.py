"""Generation in phases: plans, the loop, hand-over between submodels."""

from __future__ import annotations

from .events import PhaseEvent, PhaseOutput, PhaseRecord, PhaseStreamer, PhaseTextStreamer
from .plan import Phase, PhasePlan
from .speculation import SpeculationOutput

__all__ = [
    "Phase",
    "PhaseEvent",
    "PhaseOutput",
    "PhasePlan",
    "PhaseRecord",
    "PhaseStreamer",
    "PhaseTextStreamer",
    "SpeculationOutput",
]
