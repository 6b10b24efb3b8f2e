"""Saved LoRA and DoRA adapters of a parent, cut to any of its sizes: the adapter of a slice is the slice of the adapter.

Factors are cut by the rules of their tensors ([`hf_elastic.submodels.adapters`]). DoRA scales every row of `W + s B A` to a trained length; a slice has
shorter rows, so its lengths are those of the parent times the share of the row that is kept, which makes `slice(merge) = merge(slice)`
for DoRA, too. What comes out is an ordinary adapter that plain peft loads on an exported slice.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..architectures.axes import take
from ..architectures.pieces import Piece, pieces
from ..architectures.submodel import Submodel
from ..checkpoints.replacing import replacing
from ..configuration.budgets import Budget
from ..configuration_elastic import ElasticConfig, read_config
from ..errors import CheckpointError, ElasticConfigError, reason, shown
from ..modeling_elastic import ElasticForCausalLM, ElasticPreTrainedModel, concrete_class
from ..storage.exchanging import refuse_interrupted
from ..storage.files import find_file
from ..storage.sources import pinned
from ..storage.tensor_file import TensorFile
from ..submodels.adapters import is_tuner, refuse_changed_weights, rules_by_name
from .table import NAME, PREFIX, Tensor, Weights, adapter_table, check_fit, shape_of

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

WEIGHTS_FILE = "adapter_model.safetensors"
_NO_CONFIG = (AttributeError, LookupError, RecursionError, TypeError, UnicodeDecodeError, json.JSONDecodeError)
"""What peft's reader ends in where `adapter_config.json` is damaged; a missing one has an error of its own."""
FAMILY_FILE = "elastic_config.json"
"""Beside an adapter: the description of the family that it was trained on. A `config.json` there would say that the model is, too."""


def slice_adapter(
    source: PeftModel | str | os.PathLike[str],
    budget: Budget | Submodel,
    output: str | os.PathLike[str] | None = None,
    *,
    family: ElasticPreTrainedModel | ElasticConfig | str | os.PathLike[str] | None = None,
    adapter_name: str = NAME,
) -> tuple[LoraConfig, Weights]:
    """Cut an adapter that was trained on a parent to one of its sizes.

    Args:
        source (`PeftModel` or `str` or `os.PathLike`): A family with adapters attached, or the folder or repository of a saved adapter.
        budget: The size, see [`hf_elastic.configuration.budgets`].
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
    check_fit(table, state, elastic, cls, lora, "slice_adapter() needs an adapter of the whole family")
    kept = {piece.rule.name: piece for piece in pieces(elastic.architecture, elastic.parent_config, submodel)}
    made: Weights = {}
    wanted = {}
    for key, entry in table.items():
        piece = kept.get(entry.owner.name)
        if piece is None:  # of a layer that is dropped
            continue
        cut = Piece(entry.rule, entry.rule, piece.full, piece.kept).narrow(state[key])
        if key.endswith("lora_magnitude_vector"):
            cut = (cut * _share_of_rows(key, entry, piece, state, weights)).to(cut.dtype)
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
    check_fit(adapter_table(elastic, cls, lora), state, elastic, cls, lora, "it does not fit this model")
    return PeftModel.from_pretrained(model, source, **kwargs)


def _share_of_rows(key: str, entry: Tensor, piece: Piece, state: Weights, weights: Weights | None) -> torch.Tensor:
    """How long the kept part of every kept row of `W + s B A` is, as a share of the whole row."""
    if piece.shape[1:] == piece.rule.shape(piece.full)[1:]:
        return torch.ones(())  # rows stay whole
    if weights is None:
        raise ElasticConfigError(
            f"{key} is the length of rows of weights (DoRA); cut to fewer columns they are shorter, by how much only the weights say. Pass the "
            "live model, family=ElasticForCausalLM.from_pretrained(...), or a PeftModel."
        )
    stem = key.removesuffix("lora_magnitude_vector")
    a, b = state[f"{stem}lora_A.weight"].float(), state[f"{stem}lora_B.weight"].float()
    whole = weights[entry.owner.name].to(b.device).float() + entry.layer.scaling[NAME] * (b @ a)
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
        if {key: (shape_of(entry, restricted), entry.scale) for key, entry in found.items()} == wanted:
            return candidate
    raise AssertionError("a slice of an adapter has no config")


def _plain_copy(lora: LoraConfig) -> LoraConfig:
    made = copy.deepcopy(lora)
    made.base_model_name_or_path, made.revision, made.auto_mapping, made.inference_mode = None, None, None, True
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
        path = re.sub(r"(\.base_layer)*\.lora_.*$", "", entry.key_at(key, piece.target).removeprefix(PREFIX))
        if hasattr(entry.layer, "modules_to_save"):
            saved.add(path.rpartition(".")[0])
            continue
        leaf = getattr(entry.layer, "parameter_name", None)
        name = path if leaf is None else f"{path}.{leaf}"
        (modules if leaf is None else parameters).add(name)
        made.rank_pattern[re.escape(name)] = entry.layer.r[NAME]
        made.alpha_pattern[re.escape(name)] = entry.layer.lora_alpha[NAME]
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
    path = find_file(source, FAMILY_FILE, {})
    if path is None:
        raise ElasticConfigError(
            f"{source} does not say which family it was trained on; pass family=, the elastic checkpoint, its config or the live model."
        )
    return ElasticConfig.from_json_file(path)


def _saved(source: str | os.PathLike[str]) -> tuple[LoraConfig, Weights]:
    from peft import LoraConfig, PeftConfig

    pinned(source, {})
    refuse_interrupted(source, start="adapter_config.json")
    try:
        lora = PeftConfig.from_pretrained(str(source))
    except _NO_CONFIG as error:
        raise CheckpointError(f"the adapter_config.json of {source} describes no adapter: {reason(error)}.") from error
    if not isinstance(lora, LoraConfig):
        raise ElasticConfigError(f"{source} holds a {type(lora).__name__}; only LoRA and DoRA adapters can be cut.")
    for key, kinds in {
        "r": (int,),
        "lora_alpha": (int, float),
        "target_modules": (str, set, list, type(None)),
    }.items():
        if not isinstance(value := getattr(lora, key), kinds):
            raise CheckpointError(f"the adapter_config.json of {source} was edited or damaged: {key}={shown(value)}.")
    refuse_changed_weights(lora)
    path = find_file(source, WEIGHTS_FILE, {})
    if path is None:
        raise CheckpointError(f"{source} holds no {WEIGHTS_FILE}; pickled adapters (.bin) are not loaded.")
    # Where embeddings or the head are adapted, peft saves them along, frozen as they are; the slice has its own.
    TensorFile.opened(Path(path))  # refuses what is damaged
    return lora, {key: tensor for key, tensor in load_file(path).items() if not key.endswith(".base_layer.weight")}


def _write(lora: LoraConfig, state: Weights, output: str | os.PathLike[str]) -> None:
    with replacing(output) as scratch:
        lora.save_pretrained(str(scratch))
        save_file({key: tensor.cpu() for key, tensor in state.items()}, scratch / WEIGHTS_FILE, {"format": "pt"})
