"""The `elastic` section of `config.json`: how it is made from submodels, and everything that is checked when it is read."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from ..architectures import ARCHITECTURES, Architecture, get_architecture
from ..architectures.cost import CostModel
from ..architectures.remembered import Remembered
from ..architectures.submodel import LAYERS, Submodel
from ..errors import ElasticConfigError, did_you_mean, shown
from ..storage.files import is_inner_path
from .budgets import FULL, Sizes
from .quantized import QUANTIZATION, checked_quantization

FORMAT_VERSION = 4
"""Version of the section on disk. A reader refuses newer ones; a writer writes the oldest that holds what it has to say."""

CUT_FROM = "cut_from"
"""Beside the section: what a slice was cut from, see [`hf_elastic.checkpoints.origin`]. Stock classes keep it and do not use it."""

_MOST_TARGETS = 64
_MOST_SUBMODELS = 256  # those between two budgets are a hundredth of the parent apart

_SECTION_KEYS = {1: {"version", "axes", "budgets"}}
_SECTION_KEYS[2] = _SECTION_KEYS[1] | {"interpolated", "router"}
_SECTION_KEYS[3] = _SECTION_KEYS[2] | {"files", "handover"}
_SECTION_KEYS[4] = _SECTION_KEYS[3] | {QUANTIZATION}
_ROUTER_KEYS = {"targets", "per_layer", "width"}
_AXIS_KEYS = {"choices", "policy", "ranking"}
_BUDGET_KEYS = {"sizes", "total_params", "active_params"}
_HANDOVER_KEYS = {"trained"}
_CHECKED = Remembered(64)
"""Sections that were found sound, by what they and their parents say."""


def describe_axes(
    architecture: Architecture,
    config: PreTrainedConfig,
    submodels: list[Submodel],
    choices: Mapping[str, list[int]],
    ranking: list[int] | None,
) -> dict[str, dict[str, Any]]:
    """The `axes` section: every axis that a budget cuts or that choices were given for."""
    full = architecture.full(config)
    axes: dict[str, dict[str, Any]] = {}
    for name, sizes in choices.items():
        if name != LAYERS:
            architecture.axis(name)
        _check_list(sizes, f"choices[{name!r}]")
    for axis in architecture.available_axes(config):
        used = {size for submodel in submodels for size in submodel.values(axis.name)} | set(
            choices.get(axis.name, [])
        )
        cut = any(axis.name in submodel.cuts(full) for submodel in submodels)
        if cut or used - set(full.values(axis.name)) or axis.name in choices:
            within = used | set(full.values(axis.name))
            axes[axis.name] = {"choices": sorted(within, reverse=True), "policy": axis.policy}
    depths = {len(submodel.layers) for submodel in submodels} | set(choices.get(LAYERS, []))
    if depths - {full.depth}:
        kept = [set(submodel.layers) for submodel in submodels]
        ranking = ranking or sorted(range(full.depth), key=lambda i: (-sum(i in layers for layers in kept), i))
        _check_depths(architecture, config, choices.get(LAYERS, []), ranking)
        axes[LAYERS] = {
            "choices": sorted(depths | {full.depth}, reverse=True),
            "policy": "ranking",
            "ranking": ranking,
        }
    return axes


def _check_depths(
    architecture: Architecture, config: PreTrainedConfig, choices: Iterable[int], ranking: list[int]
) -> None:
    """Raise [`ElasticConfigError`] for numbers of layers that the first layers of a ranking cannot be a model of."""
    possible = architecture.depths(config, ranking)
    if odd := [count for count in choices if count in range(1, max(possible)) and count not in possible]:
        raise ElasticConfigError(
            f"choices of layers={odd}: a stock {architecture.model_type} config cannot say that any layers are left out; of this parent {possible} "
            "can be kept."
        )


def checked_section(parent: PreTrainedConfig, section: Any) -> dict[str, Any]:
    """Validate the `elastic` section, complete its counts, and order the submodels from large to small.

    One load asks for the same section several times, and counting takes most of reading a config, so what was found sound is remembered.
    """
    facts = (type(ARCHITECTURES.get(parent.model_type)), type(parent), parent.__dict__, section)
    return copy.deepcopy(_CHECKED(facts, lambda: _checked_section(parent, section)))


def _checked_section(parent: PreTrainedConfig, section: Any) -> dict[str, Any]:
    if not isinstance(section, Mapping):
        raise ElasticConfigError(
            "config.json has no `elastic` section; elastify() or ElasticConfig.from_parent() writes one."
        )
    needed = next((n for n, keys in _SECTION_KEYS.items() if section.keys() <= keys), FORMAT_VERSION)
    version = section.get("version", needed)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ElasticConfigError(f"elastic.version={shown(version)} must be a whole number of at least 1.")
    if version > FORMAT_VERSION:
        raise ElasticConfigError(
            f"this checkpoint has elastic format {version}, this hf_elastic reads up to {FORMAT_VERSION}; "
            "pip install --upgrade hf-elastic."
        )
    _refuse_unknown(section, _SECTION_KEYS[version], f"elastic (format {version})")
    architecture = get_architecture(parent.model_type)
    axes, budgets = section.get("axes", {}), section.get("budgets", {})
    if not isinstance(budgets, Mapping):
        raise ElasticConfigError(f"elastic.budgets={shown(budgets)} must be a dict.")
    _check_axes(architecture, parent, axes)
    interpolated = section.get("interpolated", [])
    if not isinstance(interpolated, list):
        raise ElasticConfigError(f"elastic.interpolated={shown(interpolated)} must be a list.")
    if (listed := len(budgets) + len(interpolated)) > _MOST_SUBMODELS:
        raise ElasticConfigError(
            f"elastic.budgets and elastic.interpolated list {listed:,} submodels; at most {_MOST_SUBMODELS} are read."
        )
    submodels: dict[str, Submodel] = {}
    for name, entry in budgets.items():
        submodels[name] = _check_budget(architecture, parent, name, entry, axes)
    between = [
        _check_entry(architecture, parent, f"elastic.interpolated[{i}]", entry, axes)
        for i, entry in enumerate(interpolated)
    ]
    count = CostModel(parent)
    entries = [(name, submodels[name], entry) for name, entry in budgets.items()]
    entries += [(None, submodel, entry) for submodel, entry in zip(between, interpolated, strict=True)]
    entries = [(name, submodel, _counted(count, name, submodel, entry)) for name, submodel, entry in entries]
    entries.sort(key=lambda made: (-made[2]["total_params"], -made[2]["active_params"]))
    _check_nesting([(name, submodel) for name, submodel, _ in entries])
    checked: dict[str, Any] = {
        "version": version,
        "axes": copy.deepcopy(dict(axes)),
        "budgets": Sizes({name: entry for name, _, entry in entries if name is not None}),
    }
    if between:
        checked["interpolated"] = [entry for name, _, entry in entries if name is None]
    if "router" in section:
        checked["router"] = _checked_router(section["router"])
    if "files" in section:
        full = architecture.full(parent)
        whole = next((name for name, submodel in submodels.items() if submodel == full), FULL)
        checked["files"] = _checked_files(section["files"], whole, {*budgets, whole})
    if "handover" in section:
        checked["handover"] = _checked_handover(section["handover"])
    if QUANTIZATION in section:
        sizes = {f"budget {name!r}": submodel for name, submodel in submodels.items()}
        sizes |= {f"elastic.interpolated[{i}]": submodel for i, submodel in enumerate(between)}
        checked[QUANTIZATION] = checked_quantization(architecture, parent, section[QUANTIZATION], sizes)
    return checked


def _counted(count: CostModel, name: str | None, submodel: Submodel, entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `budgets` or `interpolated` with its counts, which have to be the ones it gives."""
    cost, checked = count(submodel), {"sizes": submodel.to_dict()}
    for key in ("total_params", "active_params"):
        checked[key] = getattr(cost, key)
        given = entry.get(key, checked[key])
        if given != checked[key]:
            where = "an interpolated submodel" if name is None else f"budget {name!r}"
            raise ElasticConfigError(
                f"{where} says {key}={shown(given)}, its sizes have {checked[key]}; config.json was edited or damaged."
            )
    return checked


def _refuse_unknown(mapping: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in mapping:
        if key not in known:
            raise ElasticConfigError(
                f"unknown key {shown(key)} in {where}; it takes {', '.join(sorted(known))}.{did_you_mean(key, known)}"
            )


def _check_axes(architecture: Architecture, parent: PreTrainedConfig, axes: Any) -> None:
    if not isinstance(axes, Mapping):
        raise ElasticConfigError(f"elastic.axes={shown(axes)} must be a dict.")
    full = architecture.full(parent)
    for name, entry in axes.items():
        where = f"elastic.axes[{name!r}]"
        if name != LAYERS:
            axis = architecture.axis(name)
            if name not in full:
                raise ElasticConfigError(f"{where}: no layer of this parent has that axis.")
            policy, largest = axis.policy, max(full.values(name))
            groups = int(getattr(parent, axis.groups)) if axis.groups else 1
        else:
            policy, largest, groups = "ranking", full.depth, 1
        if not isinstance(entry, Mapping):
            raise ElasticConfigError(f"{where}={shown(entry)} must be a dict.")
        _refuse_unknown(entry, _AXIS_KEYS if name == LAYERS else _AXIS_KEYS - {"ranking"}, where)
        if entry.get("policy") != policy:
            raise ElasticConfigError(
                f"{where}.policy={shown(entry.get('policy'))} is not how {parent.model_type} weights are cut; it must be {policy!r}."
            )
        choices = entry.get("choices")
        _check_list(choices, f"{where}.choices")
        if not choices or any(not 1 <= c <= largest for c in choices) or choices != sorted(set(choices), reverse=True):
            raise ElasticConfigError(
                f"{where}.choices={shown(choices)} must go down, without repeats, within 1..{largest}."
            )
        if groups > 1 and (odd := [c for c in choices if c % groups]):
            raise ElasticConfigError(
                f"{where}.choices={shown(choices)}: {odd} cannot be shared among the {groups} groups; give multiples of {groups}."
            )
    if LAYERS in axes:
        check_ranking(axes[LAYERS].get("ranking"), full.depth, "elastic.axes['layers'].ranking")


def check_ranking(ranking: Any, depth: int, where: str) -> None:
    """Raise [`ElasticConfigError`] for what does not rank all layers."""
    whole = isinstance(ranking, list) and all(type(layer) is int for layer in ranking)
    if not whole or sorted(ranking) != list(range(depth)):
        raise ElasticConfigError(f"{where}={shown(ranking)} must list every layer 0..{depth - 1} once.")


def _check_list(sizes: Any, where: str) -> None:
    if not isinstance(sizes, list) or any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
        raise ElasticConfigError(f"{where}={shown(sizes)} must be a list of whole numbers.")


def check_name(name: Any, where: str) -> None:
    """Raise [`ElasticConfigError`] for what cannot be the name of a budget."""
    if not isinstance(name, str) or not name.strip() or name != name.strip():
        raise ElasticConfigError(f"{where}: a name must be a text without spaces around it.")


def _check_budget(
    architecture: Architecture, parent: PreTrainedConfig, name: Any, entry: Any, axes: Mapping[str, Any]
) -> Submodel:
    where = f"budget {name!r}"
    check_name(name, where)
    submodel = _check_entry(architecture, parent, where, entry, axes)
    if name.lower() == FULL and submodel != architecture.full(parent):
        raise ElasticConfigError(
            f"{where}: that name stands for the whole parent, choose another for a smaller submodel."
        )
    return submodel


def _check_entry(
    architecture: Architecture, parent: PreTrainedConfig, where: str, entry: Any, axes: Mapping[str, Any]
) -> Submodel:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("sizes"), Mapping):
        raise ElasticConfigError(f"{where}={shown(entry)} must be a dict with `sizes`, a dict from axis to size.")
    _refuse_unknown(entry, _BUDGET_KEYS, where)
    submodel = architecture.submodel(parent, entry["sizes"], where)
    for axis in submodel.cuts(architecture.full(parent)):
        if axis not in axes:
            raise ElasticConfigError(
                f"{where} cuts {axis!r}, which elastic.axes does not list ({', '.join(axes) or 'none'})."
            )
        sizes = {len(submodel.layers)} if axis == LAYERS else set(submodel.values(axis))
        stray = sorted(sizes - set(axes[axis]["choices"]))
        if stray:
            raise ElasticConfigError(
                f"{where}: {axis}={stray} is not among the axis's choices {axes[axis]['choices']}."
            )
    return submodel


def _check_nesting(members: list[tuple[str | None, Submodel]]) -> None:
    """Refuse submodels, largest first, that do not nest; those without a name lie between budgets."""
    for (larger, outer), (smaller, inner) in zip(members, members[1:], strict=False):
        if outer == inner:
            raise ElasticConfigError(f"budgets {_called(larger)} and {_called(smaller)} are the same submodel.")
        if not inner.nests_in(outer):
            raise ElasticConfigError(
                f"budget {_called(smaller)} does not nest in {_called(larger)}: {_why_not_nested(inner, outer)}. Every size of a smaller "
                "budget must be at most the larger one's, in every layer."
            )
    if members and members[-1][0] is None:
        raise ElasticConfigError(
            "elastic.interpolated lists a size that is smaller than every budget; such sizes lie between two budgets."
        )


def _called(name: str | None) -> str:
    return "(interpolated)" if name is None else repr(name)


def _checked_router(router: Any) -> dict[str, Any]:
    """What a router is rebuilt from; [`hf_elastic.routing.router.BudgetRouter`] checks the values against the axes and the parent."""
    if not isinstance(router, Mapping):
        raise ElasticConfigError(f"elastic.router={shown(router)} must be a dict.")
    _refuse_unknown(router, _ROUTER_KEYS, "elastic.router")
    if missing := sorted(_ROUTER_KEYS - router.keys()):
        raise ElasticConfigError(f"elastic.router does not say {missing[0]}; config.json was edited or damaged.")
    per_layer = router["per_layer"]
    if not isinstance(per_layer, list) or not all(isinstance(axis, str) for axis in per_layer):
        raise ElasticConfigError(f"elastic.router.per_layer={shown(per_layer)} must be a list of axes.")
    targets = router["targets"]
    if not isinstance(targets, Mapping) or len(targets) > _MOST_TARGETS:
        raise ElasticConfigError(
            f"elastic.router.targets={shown(targets)} must be a dict from budget to target, of at most {_MOST_TARGETS}."
        )
    return copy.deepcopy(dict(router))


def _checked_files(files: Any, whole: str, budgets: set[str]) -> dict[str, dict[str, int]]:
    """The files that every budget adds in the nested layout, and their bytes.

    Args:
        whole (`str`): Name of the budget that is the whole parent.
        budgets (`set[str]`): Names of all budgets.
    """
    if not isinstance(files, Mapping):
        raise ElasticConfigError(f"elastic.files={shown(files)} must be a dict from budget to files.")
    if stray := sorted(map(str, files.keys() - budgets)):
        raise ElasticConfigError(
            f"elastic.files has files for {stray[0]!r}, which is no budget; there are {sorted(budgets)}."
        )
    if whole not in files:
        raise ElasticConfigError(
            f"elastic.files has no files for {whole!r}, the whole parent; the checkpoint is incomplete."
        )
    seen: set[str] = set()
    for name, entry in files.items():
        where = f"elastic.files[{name!r}]"
        if not isinstance(entry, Mapping):
            raise ElasticConfigError(f"{where}={shown(entry)} must be a dict from file to bytes.")
        for path, size in entry.items():
            if not is_inner_path(path):
                raise ElasticConfigError(
                    f"{where} names {shown(path)}, which is not a safetensors file in the checkpoint's folder; it is not opened."
                )
            if path.lower() in seen:
                raise ElasticConfigError(f"elastic.files names {shown(path)} twice, or in two spellings.")
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ElasticConfigError(f"{where}[{shown(path)}]={shown(size)} must be a number of bytes.")
            seen.add(path.lower())
    return {name: dict(entry) for name, entry in files.items()}


def check_origin(origin: Any) -> None:
    """Raise [`ElasticConfigError`] for a `cut_from` that is none, see [`hf_elastic.checkpoints.origin`]; `None` says nothing of an origin."""
    if origin is None:
        return
    kinds: dict[str, type] = {"family": str, "commit": str, "budget": str, "sizes": Mapping}
    if not isinstance(origin, Mapping):
        raise ElasticConfigError(f"{CUT_FROM}={shown(origin)} must be a dict.")
    for key, value in origin.items():  # keys of a newer version say something to people, and are kept
        kind = kinds.get(key, str)
        if not isinstance(value, kind):
            raise ElasticConfigError(
                f"{CUT_FROM}.{key}={shown(value)} must be {'a dict from axis to size' if kind is Mapping else 'a text'}."
            )


def check_left_out(names: Any) -> None:
    """Raise [`ElasticConfigError`] for a `left_out` that is no list of names, see [`hf_elastic.leaving_out`]."""
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ElasticConfigError(f"left_out={shown(names)} must be a list of names of tensors.")


def _checked_handover(handover: Any) -> dict[str, bool]:
    """What training did for the hand-over of caches between submodels."""
    if not isinstance(handover, Mapping):
        raise ElasticConfigError(f"elastic.handover={shown(handover)} must be a dict.")
    _refuse_unknown(handover, _HANDOVER_KEYS, "elastic.handover")
    if not isinstance(handover.get("trained"), bool):
        raise ElasticConfigError(f"elastic.handover.trained={shown(handover.get('trained'))} must be true or false.")
    return dict(handover)


def _why_not_nested(inner: Submodel, outer: Submodel) -> str:
    stray = sorted(set(inner.layers) - set(outer.layers))
    if stray:
        return f"it keeps layers {stray} that the larger one drops"
    for layer in (None, *inner.layers):
        mine, theirs = inner.at(layer), outer.at(layer)
        for axis in mine:
            if mine[axis] > theirs[axis]:
                where = "" if layer is None else f" in layer {layer}"
                return f"its {axis} is larger{where}, {mine[axis]} against {theirs[axis]}"
    raise AssertionError("the submodels nest")
