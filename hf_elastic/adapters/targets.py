"""What a LoRA adapter can be put on, by name: the preset of every architecture, read off its table, and targets that match nothing."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..architectures import Architecture, get_architecture
from ..configuration_elastic import ElasticConfig
from ..errors import ElasticConfigError, did_you_mean
from ..submodels.adapters import adaptable

if TYPE_CHECKING:
    from peft import LoraConfig

AUTO = "auto"
"""As `target_modules`: everything that [`lora_targets`] names."""


def lora_targets(model: PreTrainedModel | PreTrainedConfig) -> dict[str, list[str]]:
    """Names of everything in a model that an adapter can be trained on and cut with: all linear layers of its blocks, and its experts.

    Left out are embeddings, head and routers, and what the stock code hands to kernels beside its module, such as convolutions and Mamba-2's
    `out_proj`.

    Args:
        model (`PreTrainedModel` or `PreTrainedConfig`): An elastic model, a slice, an exported one, or the config of either.

    Returns:
        `dict[str, list[str]]`: Arguments of `peft.LoraConfig`: `target_modules` and, if the model has experts, `target_parameters`.

    Raises:
        `UnsupportedArchitectureError`: there is no table for this model.

    Example:

    ```python
    >>> config = LoraConfig(r=8, task_type="CAUSAL_LM", **lora_targets(model))
    >>> config = LoraConfig(r=8, task_type="CAUSAL_LM", target_modules="auto")  # the same, for ElasticDistillationTrainer
    ```
    """
    config: Any = getattr(model, "config", model)
    stock = config.parent_config if isinstance(config, ElasticConfig) else config
    return targets_of(get_architecture(stock.model_type), stock)


def targets_of(architecture: Architecture, config: PreTrainedConfig) -> dict[str, list[str]]:
    """As [`lora_targets`], from the table."""
    rules = architecture.rules(config)
    names = [rule.name if rule.routed else rule.module for rule in rules if adaptable(rule)]
    others = [rule.module for rule in rules if not adaptable(rule) and rule.module not in names]
    modules = [rule.module for rule in rules if adaptable(rule) and not rule.routed]
    parameters = [rule.name for rule in rules if adaptable(rule) and rule.routed]
    modules = list(dict.fromkeys(_ending(name, others) for name in modules))
    parameters = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in parameters))
    found = {"target_modules": modules, "target_parameters": parameters}
    return {field: names for field, names in found.items() if names}


def _ending(name: str, others: Iterable[str]) -> str:
    """The shortest ending of a module's name that none of the others has, as peft compares endings."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        ending = ".".join(parts[-count:])
        if not any(f".{other}".endswith(f".{ending}") for other in others):
            return ending
    return name


def resolve_auto(lora: LoraConfig, architecture: Architecture, config: PreTrainedConfig) -> None:
    """Put the names into a config that says `target_modules="auto"`, in place; `target_parameters` that it has stay."""
    if lora.target_modules == AUTO:
        found = targets_of(architecture, config)
        lora.target_modules = found["target_modules"]
        lora.target_parameters = lora.target_parameters or found.get("target_parameters")


def check_targets(lora: LoraConfig, model: nn.Module, architecture: Architecture, config: PreTrainedConfig) -> None:
    """Refuse names that match nothing in a model, which peft passes over if another one does.

    Args:
        lora (`LoraConfig`): What is asked for.
        model (`nn.Module`): With or without the adapter.

    Raises:
        `ElasticConfigError`: says which, and which names this model has.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = [name.replace(".base_layer", "") for name, _ in model.named_modules()]
    parameters = [name.replace(".base_layer", "") for name, _ in model.named_parameters()]

    def reached(target: str | list[str]) -> bool:
        one = copy.copy(lora)
        one.target_modules = target
        return any(check_target_module_exists(one, name) for name in modules)

    known = targets_of(architecture, config)
    targets = lora.target_modules
    if isinstance(targets, str) and targets != "all-linear" and not reached(targets):
        _refuse("target_modules", [targets], "module", architecture, known)
    if targets is not None and not isinstance(targets, str):
        _refuse("target_modules", [t for t in sorted(targets) if not reached([t])], "module", architecture, known)
    lost = [t for t in lora.target_parameters or () if not any(f".{name}".endswith(f".{t}") for name in parameters)]
    _refuse("target_parameters", lost, "parameter", architecture, known)
    for field in ("rank_pattern", "alpha_pattern"):
        keys = getattr(lora, field) or {}
        lost = [key for key in keys if not any(re.match(rf"(.*\.)?({key})$", name) for name in modules + parameters)]
        _refuse(field, lost, "module", architecture, known)


def _refuse(
    field: str, lost: Iterable[str], kind: str, architecture: Architecture, known: dict[str, list[str]]
) -> None:
    if not (lost := list(lost)):
        return
    experts = known.get("target_parameters", [])
    hints = "".join(did_you_mean(name, [n for names in known.values() for n in names]) for name in lost[:1])
    if field == "target_modules" and any(name == expert.rpartition(".")[2] for name in lost for expert in experts):
        hints = " Experts are no modules: name them in target_parameters."
    has = "; ".join(f"{name} {', '.join(names)}" for name, names in known.items())
    raise ElasticConfigError(
        f"{field}: {', '.join(map(repr, lost))} {'matches' if len(lost) == 1 else 'match'} no {kind} of this {architecture.model_type} "
        f"model.{hints} It has {has}. target_modules={AUTO!r} (lora_targets: {AUTO} in a recipe) takes them all."
    )
