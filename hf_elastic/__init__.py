"""One LLM checkpoint in many sizes: nested submodels for hybrid Mamba / attention / MoE models.

Importing this package registers `model_type: "elastic"` with the transformers AutoClasses.
"""

from __future__ import annotations

from ._version import __version__
from .adapters.slices import load_adapter, slice_adapter
from .adapters.targets import lora_targets
from .configuration_elastic import ElasticConfig
from .elastification.elastify import elastify
from .elastification.importance import Scores, score
from .errors import (
    BusyError,
    CheckpointError,
    ElasticConfigError,
    ExportError,
    HandoverError,
    HFElasticError,
    PhasePlanError,
    PortabilityWarning,
    TokenizerError,
    UnknownBudgetError,
    UnreachableError,
    UnsupportedArchitectureError,
)
from .generation import Phase, PhaseEvent, PhaseOutput, PhasePlan, PhaseStreamer, PhaseTextStreamer
from .hub.cards import render_card
from .modeling_elastic import ElasticForCausalLM, ElasticModel
from .storage.exchanging import recover
from .submodels.masking import masked_model

__all__ = [
    "BusyError",
    "CheckpointError",
    "ElasticConfig",
    "ElasticConfigError",
    "ElasticForCausalLM",
    "ElasticModel",
    "ExportError",
    "HFElasticError",
    "HandoverError",
    "Phase",
    "PhaseEvent",
    "PhaseOutput",
    "PhasePlan",
    "PhasePlanError",
    "PhaseStreamer",
    "PhaseTextStreamer",
    "PortabilityWarning",
    "Scores",
    "TokenizerError",
    "UnknownBudgetError",
    "UnreachableError",
    "UnsupportedArchitectureError",
    "__version__",
    "elastify",
    "load_adapter",
    "lora_targets",
    "masked_model",
    "recover",
    "render_card",
    "score",
    "slice_adapter",
]
