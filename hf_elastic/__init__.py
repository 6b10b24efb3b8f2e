"""One LLM checkpoint in many sizes: nested submodels for hybrid (Mamba, DeltaNet, convolution), MoE and dense models.

Importing this package registers `model_type: "elastic"` with the transformers AutoClasses.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ._version import __version__
from .adapters.slices import load_adapter, slice_adapter
from .adapters.targets import lora_targets
from .architectures.registration import register_architecture
from .checkpoints.exporting import export_checkpoint
from .checkpoints.quantizing import quantize_checkpoint
from .configuration_elastic import ElasticConfig
from .elastification.elastify import elastify
from .elastification.importance import Scores, score
from .errors import (
    BudgetWarning,
    BusyError,
    CheckpointError,
    ElasticConfigError,
    ExportError,
    HandoverError,
    HFElasticError,
    PhasePlanError,
    PortabilityWarning,
    SpeculationError,
    TokenizerError,
    UnknownBudgetError,
    UnreachableError,
    UnsupportedArchitectureError,
    did_you_mean,
)
from .generation import Phase, PhaseEvent, PhaseOutput, PhasePlan, PhaseStreamer, PhaseTextStreamer
from .hub.cards import render_card
from .modeling_elastic import ElasticForCausalLM, ElasticModel
from .storage.exchanging import recover
from .submodels.masking import masked_model
from .submodels.quantizing import quantize

__all__ = [
    "BudgetWarning",
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
    "SpeculationError",
    "TokenizerError",
    "UnknownBudgetError",
    "UnreachableError",
    "UnsupportedArchitectureError",
    "__version__",
    "elastify",
    "export_checkpoint",
    "load_adapter",
    "lora_targets",
    "masked_model",
    "quantize",
    "quantize_checkpoint",
    "recover",
    "register_architecture",
    "render_card",
    "score",
    "slice_adapter",
]

_ELSEWHERE = {
    "BookTask": "lab.book_task",
    "StoriesTask": "lab.book_task",
    "Verdict": "trainers",
    "BudgetRouter": "routing.router",
    "Curriculum": "trainers",
    "ElasticDistillationConfig": "trainers",
    "ElasticDistillationTrainer": "trainers",
    "LmEvalTask": "evaluation.lm_eval",
    "Stage": "trainers",
    "chunked_divergence": "trainers",
    "divergence": "trainers",
    "draw_pareto": "evaluation.pareto_chart",
    "evaluate_with_lm_eval": "evaluation.lm_eval",
    "hidden_distance": "trainers",
    "load_family": "lab.family",
    "load_parent": "lab.parent",
    "measure_plan": "evaluation.plans",
    "pareto_front": "evaluation.plans",
    "plan_matrix": "evaluation.plans",
}
"""Names of modules that are loaded when somebody asks for one: importing this package needs and loads no trl, and stays quick."""
_ROOMS = ("evaluation", "lab", "testing", "trainers")
"""Subpackages that are loaded when somebody asks for one."""
_EXTRAS = {"lm_eval": "eval", "matplotlib": "lab", "peft": "train", "trl": "train"}
"""What brings the modules that these need."""


def __getattr__(name: str) -> Any:
    place = name if name in _ROOMS else _ELSEWHERE.get(name)
    if place is None:
        known = [*__all__, *_ELSEWHERE, *_ROOMS]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{did_you_mean(name, known)}", name=name)
    try:
        module = importlib.import_module(f".{place}", __name__)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS or name in _ROOMS:
            raise
        what = f"{name} is in {__name__}.{place}, which needs {error.name}"
        raise ModuleNotFoundError(
            f"{what}: pip install 'hf-elastic[{_EXTRAS[error.name]}]'", name=error.name
        ) from error
    return module if name in _ROOMS else getattr(module, name)


def __dir__() -> list[str]:
    names = {**_ELSEWHERE, **{room: room for room in _ROOMS}}
    if importlib.util.find_spec("trl") is None:  # `help` and `inspect` ask for every name that is listed
        names = {name: place for name, place in names.items() if place != "trainers"}
    return sorted({*globals(), *names})
