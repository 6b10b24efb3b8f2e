"""What a saved adapter of a model consists of: every tensor by its key, what runs along it, and how long it is at a size.

It is read off a model without storage that peft attaches the adapter to, so names, ranks and nesting are peft's.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..architectures.axes import TensorRule, dim
from ..architectures.submodel import Submodel
from ..configuration_elastic import ElasticConfig
from ..errors import ElasticConfigError
from ..submodels.adapters import (
    FactorRule,
    factor_rules,
    is_tuner,
    problem_of,
    rules_by_name,
)
from ..submodels.slicing import build_meta

if TYPE_CHECKING:
    from peft import LoraConfig

PREFIX = "base_model.model."  # of every key in a saved adapter
NAME = "default"

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a saved adapter: what runs along it, and the module of the model that it belongs to."""

    rule: TensorRule
    owner: TensorRule
    layer: Any

    @property
    def scale(self) -> float | None:
        return self.layer.scaling[NAME] if hasattr(self.layer, "scaling") else None

    def key_at(self, key: str, owner: TensorRule) -> str:
        """The key in an adapter of a model where the module is called as that of `owner`."""
        old, new = self.owner.module, owner.module
        if not key.startswith(f"{PREFIX}{old}."):  # a base model, whose names lack the prefix
            old, new = (module.partition(".")[2] for module in (old, new))
        return f"{PREFIX}{new}{key.removeprefix(PREFIX + old)}"


def adapter_table(elastic: ElasticConfig, cls: type[PreTrainedModel], lora: LoraConfig) -> dict[str, Tensor]:
    """Every tensor that peft saves for an adapter of a parent, by its key, as a model without storage that it is attached to has them.

    Raises:
        `ElasticConfigError`: names the module whose adapter cannot be cut.
        `ValueError`: from peft, targets that the model does not have, or must not have.
    """
    rules = rules_by_name(elastic.architecture, elastic.parent_config)
    table: dict[str, Tensor] = {}
    for path, layer in _attached_to_meta(elastic, cls, lora).named_modules():
        if not is_tuner(layer):
            continue
        name = path.replace(".base_layer", "")
        if hasattr(layer, "modules_to_save"):  # trained whole: cut as the module is
            for leaf, _ in layer.original_module.named_parameters():
                whole = rules.get(f"{name}.{leaf}")
                if whole is None:
                    raise ElasticConfigError(
                        f"{name}.{leaf}, trained beside the adapter, cannot be cut: {problem_of(None)}."
                    )
                table[f"{PREFIX}{path}.{leaf}"] = Tensor(whole, whole, layer)
            continue
        owner = rules.get(f"{name}.{getattr(layer, 'parameter_name', 'weight')}")
        problem = _problem(layer, owner)
        if problem or owner is None:
            raise ElasticConfigError(f"the adapter of {name or 'the model'} cannot be cut: {problem}.")
        for leaf, rule in _rules_of(layer, owner).items():
            table[f"{PREFIX}{path}.{leaf}"] = Tensor(rule, owner, layer)
    return table


def _attached_to_meta(elastic: ElasticConfig, cls: type[PreTrainedModel], lora: LoraConfig) -> PreTrainedModel:
    from peft import inject_adapter_in_model

    tree = build_meta(elastic.architecture, copy.deepcopy(elastic.parent_config), cls)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says it again where the adapter is loaded
        inject_adapter_in_model(copy.deepcopy(lora), tree, adapter_name=NAME, low_cpu_mem_usage=True)
    return tree


def _problem(layer: Any, rule: TensorRule | None) -> str | None:
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    variants = (
        {type(variant).__name__ for variant in layer.lora_variant.values()}
        if hasattr(layer, "lora_variant")
        else set()
    )
    if not kind.startswith("peft.tuners.lora.layer."):
        return f"{kind} is no adapter whose slice is known"
    if variants - {"DoraLinearVariant"}:
        return f"{', '.join(sorted(variants))} has no slice"
    return problem_of(rule)


def _rules_of(layer: Any, owner: TensorRule) -> dict[str, TensorRule]:
    """What runs along the tensors of one adapter layer, by their endings."""

    def rule(*dims: Any) -> FactorRule:
        return FactorRule(f"{owner.template}.lora", dims, owner.layer)

    rank = layer.r[NAME]
    if NAME in getattr(layer, "lora_embedding_A", {}):
        vocabulary, hidden = owner.dims
        return {"lora_embedding_A": rule(dim(rank), vocabulary), "lora_embedding_B": rule(hidden, dim(rank))}
    first, second = factor_rules(owner, rank)
    rules: dict[str, TensorRule] = {"lora_A.weight": first, "lora_B.weight": second}
    if layer.lora_bias[NAME]:
        rules["lora_B.bias"] = rule(owner.dims[0])
    if NAME in layer.lora_variant:
        rules["lora_magnitude_vector"] = rule(owner.dims[0])
    return rules


def shape_of(entry: Tensor, elastic: ElasticConfig) -> tuple[int, ...]:
    """Shape of a tensor in an adapter of the whole parent."""
    return entry.rule.shape(elastic.architecture.full(elastic.parent_config).at(entry.rule.layer))


def check_fit(
    table: Mapping[str, Tensor],
    state: Weights,
    elastic: ElasticConfig,
    cls: type[PreTrainedModel],
    lora: LoraConfig,
    where: str,
) -> None:
    """Refuse an adapter of another size, or an incomplete one."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    expected = {key: shape_of(entry, elastic) for key, entry in table.items()}
    if shapes == expected:
        return
    wrong = sorted(key for key in expected.keys() & shapes.keys() if expected[key] != shapes[key])
    wrong += sorted(expected.keys() ^ shapes.keys())
    first = wrong[0]
    there, here = (str(known.get(first, "not there")) for known in (shapes, expected))
    sizes = [name for name, size in elastic.family().items() if _shapes_at(elastic, size, cls, lora) == shapes]
    hint = (
        f"It was trained at {sizes[0]!r}: load that size, from_pretrained(..., budget={sizes[0]!r}), and attach it there."
        if sizes
        else "It was trained on another model or size; cut it to this one with slice_adapter(), from the family that it was trained on."
    )
    raise ElasticConfigError(
        f"{where}, but {len(wrong)} of its tensors are of another size; the first is {first}: {there} in the adapter, {here} here. {hint}"
    )


def _shapes_at(
    elastic: ElasticConfig, submodel: Submodel, cls: type[PreTrainedModel], lora: LoraConfig
) -> dict[str, tuple[int, ...]]:
    restricted = elastic.restrict(submodel)
    try:
        return {key: shape_of(entry, restricted) for key, entry in adapter_table(restricted, cls, lora).items()}
    except ValueError:  # peft's, for names that no module of that size has
        return {}
