"""Saved LoRA and DoRA adapters of a parent, cut to any of its sizes: the adapter of a slice is the slice of the adapter.

Factors are cut by the rules of their tensors ([`hf_elastic.adapters`]). DoRA scales every row of `W + s B A` to a trained length; a slice has
shorter rows, so its lengths are those of the parent times the share of the row that is kept, which makes `slice(merge) = merge(slice)`
for DoRA, too. What comes out is an ordinary adapter that plain peft loads on an exported slice.
"""

from __future__ import annotations

import copy
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from .adapters import FactorRule, factor_rules, is_tuner, passed_by, refuse_changed_weights, rules_by_name
from .axes import TensorRule, dim, take
from .budgets import Budget
from .configuration_elastic import ElasticConfig, read_config
from .errors import CheckpointError, ElasticConfigError
from .modeling_elastic import ElasticForCausalLM, ElasticPreTrainedModel, concrete_class
from .saving import replacing
from .slicing import Piece, build_meta, pieces
from .submodel import Submodel

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

WEIGHTS_FILE = "adapter_model.safetensors"
FAMILY_FILE = "elastic_config.json"
"""Beside an adapter: the description of the family that it was trained on. A `config.json` there would say that the model is, too."""
_PREFIX = "base_model.model."  # of every key in a saved adapter
_NAME = "default"

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a saved adapter: what runs along it, and the module of the model that it belongs to."""

    rule: TensorRule
    owner: TensorRule
    layer: Any

    @property
    def scale(self) -> float | None:
        return self.layer.scaling[_NAME] if hasattr(self.layer, "scaling") else None

    def key_at(self, key: str, owner: TensorRule) -> str:
        """The key in an adapter of a model where the module is called as that of `owner`."""
        old, new = self.owner.module, owner.module
        if not key.startswith(f"{_PREFIX}{old}."):  # a base model, whose names lack the prefix
            old, new = (module.partition(".")[2] for module in (old, new))
        return f"{_PREFIX}{new}{key.removeprefix(_PREFIX + old)}"


def slice_adapter(
    source: PeftModel | str | os.PathLike[str],
    budget: Budget | Submodel,
    output: str | os.PathLike[str] | None = None,
    *,
    family: ElasticPreTrainedModel | ElasticConfig | str | os.PathLike[str] | None = None,
    adapter_name: str = _NAME,
) -> tuple[LoraConfig, Weights]:
    """Cut an adapter that was trained on a parent to one of its sizes.

    Args:
        source (`PeftModel` or `str` or `os.PathLike`): A family with adapters attached, or the folder or repository of a saved adapter.
        budget: The size, see [`hf_elastic.budgets`].
        output (`str` or `os.PathLike`, *optional*): Folder to write the adapter to, for `PeftModel.from_pretrained(slice, output)`.
        family (*optional*):
            The family that a saved adapter was trained on: the live model, its config, or where it is saved. Not needed if the adapter
            was saved by the trainer, which leaves the config beside it. DoRA needs the live model, whose weights its lengths are of.
        adapter_name (`str`, *optional*, defaults to `"default"`): Which of the adapters attached.

    Returns:
        `tuple[LoraConfig, dict[str, torch.Tensor]]`: Config and weights, named as peft saves them.

    Raises:
        `ElasticConfigError`: an adapter of another size (the message says of which), or one that cannot be cut. Nothing is written.
        `CheckpointError`: there are no `adapter_model.safetensors`, or they do not hold what the config says.
    """
    lora, state, elastic, cls, weights = _read(source, family, adapter_name)
    table = adapter_table(elastic, cls, lora)
    submodel = elastic.resolve(budget)
    _check_fit(table, state, elastic, cls, lora, "slice_adapter() needs an adapter of the whole family")
    kept = {piece.rule.name: piece for piece in pieces(elastic.architecture, elastic.parent_config, submodel)}
    made: Weights = {}
    wanted = {}
    for key, entry in table.items():
        piece = kept.get(entry.owner.name)
        if piece is None:  # of a layer that is dropped
            continue
        cut = Piece(entry.rule, entry.rule, piece.full, piece.kept).narrow(state[key])
        if key.endswith("lora_magnitude_vector"):
            cut = cut * _share_of_rows(key, entry, piece, state, weights)
        new = entry.key_at(key, piece.target)
        made[new] = cut.detach().clone(memory_format=torch.contiguous_format)
        wanted[new] = (tuple(cut.shape), entry.scale)
    if not made:
        raise ElasticConfigError(f"budget={budget!r} drops every layer that the adapter is in; nothing of it is left.")
    sliced = _sliced_config(lora, table, kept, wanted, elastic.restrict(submodel), cls)
    if output is not None:
        _write(sliced, made, output)
    return sliced, made


def load_adapter(model: ElasticPreTrainedModel, source: str | os.PathLike[str], **kwargs: Any) -> PeftModel:
    """As `PeftModel.from_pretrained`, for an adapter of exactly the size that is loaded; the model stays as it is if it is another.

    Args:
        model ([`ElasticPreTrainedModel`]): A family or a slice.
        source (`str` or `os.PathLike`): Folder or repository of a saved adapter.
        kwargs: As in `PeftModel.from_pretrained` (`is_trainable`, `adapter_name`, ...).

    Raises:
        `ElasticConfigError`: an adapter of another size, or one that cannot be cut; says which size it is of.
    """
    from peft import PeftModel

    model._require_full("attaching an adapter")
    lora, state = _saved(source)
    elastic, cls = model.elastic_config, type(model)
    _check_fit(adapter_table(elastic, cls, lora), state, elastic, cls, lora, "it does not fit this model")
    return PeftModel.from_pretrained(model, source, **kwargs)


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
            plain = {leaf: rules[f"{name}.{leaf}"] for leaf, _ in layer.original_module.named_parameters()}
            table |= {f"{_PREFIX}{path}.{leaf}": Tensor(rule, rule, layer) for leaf, rule in plain.items()}
            continue
        owner = rules.get(f"{name}.{getattr(layer, 'parameter_name', 'weight')}")
        problem = _problem(name, layer, owner)
        if problem or owner is None:
            raise ElasticConfigError(f"the adapter of {name or 'the model'} cannot be cut: {problem}.")
        for leaf, rule in _rules_of(layer, owner).items():
            table[f"{_PREFIX}{path}.{leaf}"] = Tensor(rule, owner, layer)
    return table


def _attached_to_meta(elastic: ElasticConfig, cls: type[PreTrainedModel], lora: LoraConfig) -> PreTrainedModel:
    from peft import inject_adapter_in_model

    tree = build_meta(elastic.architecture, copy.deepcopy(elastic.parent_config), cls)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says it again where the adapter is loaded
        inject_adapter_in_model(copy.deepcopy(lora), tree, adapter_name=_NAME, low_cpu_mem_usage=True)
    return tree


def _problem(name: str, layer: Any, rule: TensorRule | None) -> str | None:
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
    if rule is None:
        return "no tensor of the axis tables is adapted by it"
    return passed_by(name)


def _rules_of(layer: Any, owner: TensorRule) -> dict[str, TensorRule]:
    """What runs along the tensors of one adapter layer, by their endings."""

    def rule(*dims: Any) -> FactorRule:
        return FactorRule(f"{owner.template}.lora", dims, owner.layer)

    rank = layer.r[_NAME]
    if _NAME in getattr(layer, "lora_embedding_A", {}):
        vocabulary, hidden = owner.dims
        return {"lora_embedding_A": rule(dim(rank), vocabulary), "lora_embedding_B": rule(hidden, dim(rank))}
    first, second = factor_rules(owner, rank)
    rules: dict[str, TensorRule] = {"lora_A.weight": first, "lora_B.weight": second}
    if layer.lora_bias[_NAME]:
        rules["lora_B.bias"] = rule(owner.dims[0])
    if _NAME in layer.lora_variant:
        rules["lora_magnitude_vector"] = rule(owner.dims[0])
    return rules


def _share_of_rows(key: str, entry: Tensor, piece: Piece, state: Weights, weights: Weights | None) -> torch.Tensor:
    """How long the kept part of every kept row of `W + s B A` is, as a share of the whole row."""
    if weights is None:
        raise ElasticConfigError(
            f"{key} is the length of rows of weights (DoRA); cut to fewer columns they are shorter, by how much only the weights say. Pass the "
            "live model, family=ElasticForCausalLM.from_pretrained(...), or a PeftModel."
        )
    stem = key.removesuffix("lora_magnitude_vector")
    a, b = state[f"{stem}lora_A.weight"].float(), state[f"{stem}lora_B.weight"].float()
    whole = weights[entry.owner.name].to(b.device).float() + entry.layer.scaling[_NAME] * (b @ a)
    lengths, kept = torch.linalg.norm(whole, dim=1), torch.linalg.norm(piece.narrow(whole), dim=1)
    return kept / take(lengths, piece.runs[:1])


# -- the config of what comes out --------------------------------------------------------------------------------------


def _sliced_config(
    lora: LoraConfig,
    table: Mapping[str, Tensor],
    kept: Mapping[str, Piece],
    wanted: Mapping[str, Any],
    restricted: ElasticConfig,
    cls: type[PreTrainedModel],
) -> LoraConfig:
    """The config under which peft makes just these tensors in a model of the slice: the one that was given, if it does, or all names."""
    for candidate in (_plain_copy(lora), _with_all_names(lora, table, kept)):
        try:
            found = adapter_table(restricted, cls, candidate)
        except ValueError:  # peft's, for names that no module of the slice has
            continue
        if {key: (_shape(entry, restricted), entry.scale) for key, entry in found.items()} == wanted:
            return candidate
    raise AssertionError("a slice of an adapter has no config")


def _plain_copy(lora: LoraConfig) -> LoraConfig:
    made = copy.deepcopy(lora)
    made.base_model_name_or_path, made.revision, made.inference_mode = None, None, True
    return made


def _with_all_names(lora: LoraConfig, table: Mapping[str, Tensor], kept: Mapping[str, Piece]) -> LoraConfig:
    made = _plain_copy(lora)
    modules: set[str] = set()
    parameters: set[str] = set()
    saved: set[str] = set()
    made.rank_pattern, made.alpha_pattern = {}, {}
    for key, entry in table.items():
        piece = kept.get(entry.owner.name)
        if piece is None:
            continue
        path = re.sub(r"(\.base_layer)*\.lora_.*$", "", entry.key_at(key, piece.target).removeprefix(_PREFIX))
        if hasattr(entry.layer, "modules_to_save"):
            saved.add(path.rpartition(".")[0])
            continue
        leaf = getattr(entry.layer, "parameter_name", None)
        name = path if leaf is None else f"{path}.{leaf}"
        (modules if leaf is None else parameters).add(name)
        made.rank_pattern[re.escape(name)] = entry.layer.r[_NAME]
        made.alpha_pattern[re.escape(name)] = entry.layer.lora_alpha[_NAME]
    made.rank_pattern = {name: rank for name, rank in made.rank_pattern.items() if rank != made.r}
    made.alpha_pattern = {name: alpha for name, alpha in made.alpha_pattern.items() if alpha != made.lora_alpha}
    made.target_modules, made.target_parameters = modules or [], sorted(parameters) or None  # type: ignore[assignment]
    made.modules_to_save = sorted(saved) or None
    made.layers_to_transform = made.layers_pattern = made.exclude_modules = None
    return made


# -- reading, checking, writing ----------------------------------------------------------------------------------------


def _read(
    source: Any, family: Any, adapter_name: str
) -> tuple[LoraConfig, Weights, ElasticConfig, type[PreTrainedModel], Weights | None]:
    """Config and weights of the adapter, the family's config and class, and its weights if it is there."""
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict

    if isinstance(source, PeftModel):
        if family is not None:
            raise ElasticConfigError("family= is for a saved adapter; a PeftModel has its own.")
        model: Any = source.get_base_model()
        if not isinstance(model, ElasticPreTrainedModel):
            raise ElasticConfigError(
                f"the adapters are attached to {type(model).__name__}, which is no elastic model."
            )
        lora = source.peft_config.get(adapter_name)
        if not isinstance(lora, LoraConfig):
            raise ElasticConfigError(
                f"adapter {adapter_name!r} is no LoRA adapter of the model; it has {', '.join(source.peft_config)}."
            )
        if any(getattr(module, "merged", False) for module in model.modules() if is_tuner(module)):
            raise ElasticConfigError("the adapter is merged into the weights; call unmerge_adapter() first.")
        refuse_changed_weights(lora)
        state = get_peft_model_state_dict(source, adapter_name=adapter_name, save_embedding_layers=False)
        return lora, dict(state), model.elastic_config, type(model), _weights_of(model)
    lora, state = _saved(source)
    weights = None
    if isinstance(family, ElasticPreTrainedModel):
        family._require_full("slicing an adapter")
        elastic, cls, weights = family.elastic_config, type(family), _weights_of(family)
    else:
        elastic = family if isinstance(family, ElasticConfig) else _family_beside(source, family)
        cls = concrete_class(ElasticForCausalLM, elastic.parent_config)
    return lora, state, elastic, cls, weights


def _weights_of(model: nn.Module) -> Weights:
    """The model's own weights under the names of the causal model."""
    own: Any = model
    rules = rules_by_name(own.architecture, own.elastic_config.parent_config)
    named = {
        name.replace(".base_layer", ""): p.detach() for name, p in model.named_parameters() if ".lora_" not in name
    }
    return {rules[name].name: tensor for name, tensor in named.items() if name in rules}


def _family_beside(source: Any, family: Any) -> ElasticConfig:
    if family is not None:
        return read_config(family)
    path = cached_file(source, FAMILY_FILE, _raise_exceptions_for_missing_entries=False)
    if path is None:
        raise ElasticConfigError(
            f"{source} does not say which family it was trained on; pass family=, the elastic checkpoint, its config or the live model."
        )
    return ElasticConfig.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _saved(source: str | os.PathLike[str]) -> tuple[LoraConfig, Weights]:
    from peft import LoraConfig, PeftConfig

    lora = PeftConfig.from_pretrained(str(source))
    if not isinstance(lora, LoraConfig):
        raise ElasticConfigError(f"{source} holds a {type(lora).__name__}; only LoRA and DoRA adapters can be cut.")
    refuse_changed_weights(lora)
    path = cached_file(source, WEIGHTS_FILE, _raise_exceptions_for_missing_entries=False)
    if path is None:
        raise CheckpointError(f"{source} holds no {WEIGHTS_FILE}; pickled adapters (.bin) are not loaded.")
    # Where embeddings or the head are adapted, peft saves them along, frozen as they are; the slice has its own.
    return lora, {key: tensor for key, tensor in load_file(path).items() if not key.endswith(".base_layer.weight")}


def _shape(entry: Tensor, elastic: ElasticConfig) -> tuple[int, ...]:
    return entry.rule.shape(elastic.architecture.full(elastic.parent_config).at(entry.rule.layer))


def _check_fit(
    table: Mapping[str, Tensor],
    state: Weights,
    elastic: ElasticConfig,
    cls: type[PreTrainedModel],
    lora: LoraConfig,
    where: str,
) -> None:
    """Refuse an adapter of another size, or an incomplete one."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    expected = {key: _shape(entry, elastic) for key, entry in table.items()}
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
        return {key: _shape(entry, restricted) for key, entry in adapter_table(restricted, cls, lora).items()}
    except ValueError:  # peft's, for names that no module of that size has
        return {}


def _write(lora: LoraConfig, state: Weights, output: str | os.PathLike[str]) -> None:
    with replacing(output) as scratch:
        lora.save_pretrained(str(scratch))
        save_file({key: tensor.cpu() for key, tensor in state.items()}, scratch / WEIGHTS_FILE, {"format": "pt"})
