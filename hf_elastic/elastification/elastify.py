"""`elastify`: make a stock model elastic - score it, sort it, and describe the budgets it nests."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..architectures import Architecture, Axis, get_architecture
from ..architectures.cost import CostModel
from ..architectures.portability import check_portable, portable_choices
from ..architectures.submodel import LAYERS, Submodel
from ..checkpoints.devices import scoring_device
from ..checkpoints.loading import checked_parent, load_stock, refuse_quantized
from ..checkpoints.passengers import not_passengers, parent_inside, passengers_beside
from ..configuration.budgets import Limit, is_limit, parse_limit, warn_if_far
from ..configuration.leaving_out import ignored_beside, note_left_out
from ..configuration.section import check_name
from ..configuration_elastic import ElasticConfig, read_fields
from ..errors import ElasticConfigError, did_you_mean, shown
from ..modeling_elastic import ElasticForCausalLM, concrete_class
from ..submodels.buffers import check_buffers, share_constant_buffers
from ..submodels.slicing import build_meta, check_table
from .importance import Scores, score
from .multiples import Multiples
from .search import BudgetSearch, default_choices, round_depth, sizes_from_spec
from .sorting import Orders, orders_from_scores, sort_state_dict

logger = logging.getLogger(__name__)

Axes = Sequence[str] | Mapping[str, Sequence[int | float] | None]


def elastify(
    parent: PreTrainedModel | str | os.PathLike[str],
    calibration: Iterable[Mapping[str, Any]] | None = None,
    axes: Axes | None = None,
    budgets: Mapping[str, Mapping[str, Any] | str | float] | None = None,
    *,
    scores: Scores | str | os.PathLike[str] | None = None,
    sort: bool = True,
    multiple_of: int | Mapping[str, int] = 8,
    formats: str | Sequence[str] | None = None,
    portable: bool = False,
    save_scores: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = "auto",
    **score_options: Any,
) -> ElasticForCausalLM:
    r"""
    Make a stock hybrid model elastic. The result computes exactly what the parent computes, and every budget of it is a prefix of the
    most important entries.

    Args:
        parent (`PreTrainedModel` or `str`):
            Stock causal model, or where to load it from, which has to hold every tensor of it. It is not changed. Of a larger model around one, such
            as a vision-language model, the text model becomes elastic, and the rest is kept.
        calibration (`datasets.Dataset` or iterable of dicts, *optional*):
            Text to score on, see [`hf_elastic.elastification.importance.score`]. Not needed with `scores`, or with `sort=False`.
        axes (`list[str]` or `dict[str, list]`, *optional*):
            Elastic axes, or per axis its choices: sizes (`int`) or shares of the parent's (`float`); `None` for default choices. Defaults to
            the axes that the budgets cut.
        budgets (`dict`, *optional*): May be left out if `axes` are given: then a router can learn the sizes
            (`router_targets` of [`hf_elastic.trainers.ElasticDistillationConfig`]). Per name one of

            - sizes: `{"hidden": 1920, "ffn": [...], "layers": 40}`; an `int` is a size, a `float` a share of the parent's, a list or dict
              one per layer; `layers` takes a number (the most important ones stay) or a list of layers;
            - a target: a share of the parent's parameters (`0.5`, `"50%"`, `"50% active"`), `"12B"`, `"2.1B active"`, `"24GB"` (weights at the
              parent's dtype), or with caches as in [`hf_elastic.configuration.budgets`]. Sizes are searched over the axes' choices: the ones that keep
              most importance within the target, by the exact count; a `BudgetWarning` says so if they stay far below it. Needs `axes`.

            Budgets are nested. Targets are searched from large to small, each inside the budget before it.
        scores ([`Scores`] or path, *optional*): Reuse these instead of scoring.
        sort (`bool`, *optional*, defaults to `True`): `False` for a parent whose weights are sorted already.
        multiple_of (`int` or `dict[str, int]`, *optional*, defaults to 8): Widths given as shares are rounded to this; or per axis to a number of its own.
        formats (`str` or `list[str]`, *optional*):
            Formats in which every size shall be held once the family is quantised: `"nvfp4"`, `"nvfp4-gguf"` (llama.cpp, Marlin kernels) or `"fp8"`. Sizes
            that are searched or given as shares keep to their blocks, see [`hf_elastic.architectures.alignment`]; others are refused.
        portable (`bool`, *optional*, defaults to `False`):
            Keep to sizes that every program that runs the parent can run as well (see [`hf_elastic.architectures.portability`]): others are not searched, and
            refused where they are given. Granite's `hidden`, `attention_heads` and `mamba_heads` are then cut by one share.
        save_scores (`str` or `os.PathLike`, *optional*):
            File for the scores, written as soon as they are there. If it cannot be, they go to a temporary file, which a warning names.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): Of a parent that is loaded here; `"auto"` is the checkpoint's own.
        device (`str` or `torch.device`, *optional*, defaults to `"auto"`):
            Where to score: `"auto"` is the accelerator (`cuda`, `mps`, `xpu`, ...) if there is one and the parent fits, else where the parent is. A copy
            is scored there and then gone; sorting and the result stay where the parent is, so move the result to use it there.
        score_options: Passed to [`hf_elastic.elastification.importance.score`] (`samples`, `batch_size`, `max_length`, `tokenizer`, `progress`, ...).

    Returns:
        [`ElasticForCausalLM`]: With all budgets live, on the parent's device and dtype; in main memory if the parent was loaded here.
            `model.importance_scores` holds the scores.

    Raises:
        `ElasticConfigError`: axes, budgets or scores that do not fit the parent, a target that no choice meets, or the parent is quantised.
        `UnsupportedArchitectureError`: no table for the parent.
        `CheckpointError`: the parent's files lack tensors, or hold others than its config says.
    """
    known = {**inspect.signature(elastify).parameters, **inspect.signature(score).parameters}
    if unknown := [name for name in score_options if name not in known]:
        raise TypeError(f"unexpected argument {unknown[0]!r} of elastify.{did_you_mean(unknown[0], known)}")
    loaded = isinstance(parent, (str, os.PathLike))
    if not loaded and dtype != "auto":
        raise ElasticConfigError(
            f"dtype={shown(dtype)} is for a parent that is loaded here; this one is there, cast it before."
        )
    model = checked_parent(_load_parent(parent, dtype) if loaded else parent)  # type: ignore[arg-type]
    refuse_quantized(model)
    inside = parent_inside(model)
    model = model if inside is None else inside[0]
    scoring_device(model, device)
    _refuse_elastic(model)
    architecture = get_architecture(model.config.model_type)
    check_table(architecture, model)
    check_buffers(model, "the parent")
    if not budgets and not axes:
        raise ElasticConfigError(
            "there are neither budgets nor axes; give at least one budget, such as {'half': {'hidden': 0.5}} or {'half': '6B'} (--budget half=6B), or the "
            "axes whose sizes are to be learned."
        )
    budgets = {} if budgets is None else budgets
    if not isinstance(budgets, Mapping):
        raise ElasticConfigError(f"budgets={shown(budgets)} must be a dict from name to sizes or target.")
    multiples = Multiples.of(architecture, model.config, multiple_of, formats)
    if not (scores is None or isinstance(scores, (Scores, str, os.PathLike))):
        raise ElasticConfigError(
            f"scores={shown(scores)} must be Scores, or the path of a file that Scores.save wrote."
        )
    if scores is not None and (calibration is not None or score_options):
        raise ElasticConfigError("scores= are given, so nothing is scored: leave out calibration and its options.")
    if portable and not budgets:
        raise ElasticConfigError("portable=True needs budgets: a router learns the size of every axis by itself.")
    if save_scores is not None and (scores is not None or calibration is None):
        raise ElasticConfigError("save_scores= needs calibration=, and no scores=: it keeps what is scored here.")
    choices = _choices(architecture, model.config, axes, multiples)
    if portable:
        named = {axis for axis, sizes in axes.items() if sizes is not None} if isinstance(axes, Mapping) else set()
        choices = portable_choices(architecture, model.config, choices, named)
        choices = multiples.only(choices, architecture.one_share)
    only = model.dtype if portable else None
    wanted = sorted(_axes_used(architecture, architecture.available_axes(model.config), budgets, choices))
    _check_before_scoring(architecture, model, budgets, choices, multiples, only)
    if scores is None and calibration is not None:
        scores = score(
            model,
            calibration,
            axes=[a for a in wanted if a not in architecture.per_token.values()],
            device=device,
            **score_options,
        )
        if save_scores is not None:
            _keep(scores, save_scores)
    elif isinstance(scores, (str, os.PathLike)):
        scores = Scores.load(scores)
    if scores is None and sort:
        raise ElasticConfigError(
            "give calibration= or scores= to sort by (--calibration FILE, --scores FILE), or sort=False (--no-sort) for a parent that is sorted already."
        )
    ranking = architecture.keepable_ranking(model.config, scores.layer_ranking) if scores and scores.layers else None
    submodels = _resolve(architecture, model, budgets, choices, scores, ranking, multiples, only)
    config = _elastic_config(model.config, submodels, choices, ranking)
    orders: Orders = {}
    if sort and scores is not None:
        smallest = _smallest_channels(architecture, submodels)
        orders = orders_from_scores(architecture, model.config, scores, wanted, smallest)
    elastic = _sorted_model(model, architecture, config, orders, release=loaded)
    elastic.importance_scores = scores
    if (found := passengers_beside(model) if inside is None else inside[1:]) is not None:
        elastic.elastic_config.host_config, passengers = found
        elastic._passengers = passengers.sorted_by(orders.get(None, {}))
    left = not_passengers(elastic.elastic_config.host, ignored_beside(model))
    note_left_out(elastic.elastic_config, left, model.name_or_path)
    return elastic


def _keep(scores: Scores, path: str | os.PathLike[str]) -> None:
    """Save scores, if not where they should be then in a temporary file: scoring takes long, and is not done again for a full disk."""
    try:
        scores.save(path)
    except OSError as error:
        descriptor, other = tempfile.mkstemp(prefix="hf-elastic-scores-", suffix=".safetensors")
        os.close(descriptor)
        try:
            scores.save(other)
        except OSError as second:
            os.unlink(other)
            logger.warning("the scores could not be saved: %s Nor in %s: %s", error, other, second)
        else:
            logger.warning("%s The scores are in %s instead; scores= (--scores) uses them again.", error, other)


def _load_parent(repo: Any, dtype: str | torch.dtype) -> PreTrainedModel:
    """A stock model; where sizes differ from layer to layer, which stock classes do not build, one of this package."""
    if read_fields(repo).get("per_layer_config"):
        return ElasticForCausalLM.from_pretrained(repo, dtype=dtype)  # type: ignore[no-any-return]
    return load_stock(repo, dtype=dtype)


def _refuse_elastic(model: PreTrainedModel) -> None:
    elastic = getattr(model, "elastic_config", None)
    if isinstance(elastic, ElasticConfig) and elastic.elastic["axes"]:
        raise ElasticConfigError(
            "this model is elastic already; add budgets to its sorted weights with ElasticConfig.from_parent(), or elastify the parent."
        )


def _choices(
    architecture: Architecture, config: PreTrainedConfig, axes: Axes | None, multiples: Multiples
) -> dict[str, list[int]]:
    """Sizes to choose from per axis the user named, the parent's own included."""
    if axes is None:
        return {}
    if isinstance(axes, str):
        raise ElasticConfigError(f"axes={shown(axes)} must be a list of axes, or a dict from axis to choices.")
    given = axes if isinstance(axes, Mapping) else dict.fromkeys(axes)
    full = architecture.full(config)
    choices: dict[str, list[int]] = {}
    for axis, sizes in given.items():
        if axis != LAYERS:
            architecture.axis(axis)
            if axis not in full:
                raise ElasticConfigError(f"axes: no layer of this {config.model_type} parent has axis {axis!r}.")
        if sizes is None:
            choices[axis] = default_choices(architecture, config, axis, multiples)
            continue
        numbers = isinstance(sizes, Sequence) and all(
            isinstance(s, (int, float)) and not isinstance(s, bool) for s in sizes
        )
        if not numbers or not sizes:
            raise ElasticConfigError(
                f"axes[{axis!r}]={shown(sizes)} must be a list of sizes (960) or shares of the parent's (0.5), or None for default choices."
            )
        largest = full.depth if axis == LAYERS else max(full.values(axis))
        resolved = {largest}
        for size in sizes:
            if axis == LAYERS:
                resolved.add(round_depth(architecture, config, size) if isinstance(size, float) else size)
            else:
                resolved |= set(sizes_from_spec(architecture, config, {axis: size}, None, multiples).values())
        multiples.check_choices(axis, sorted(resolved), largest)
        choices[axis] = sorted(resolved, reverse=True)
    return choices


def _axes_used(
    architecture: Architecture,
    available: Sequence[Axis],
    budgets: Mapping[str, Any],
    choices: Mapping[str, Sequence[int]],
) -> set[str]:
    used = set(choices)
    for name, spec in budgets.items():
        if not is_limit(spec):
            for axis in spec:
                if axis != LAYERS:
                    architecture.axis(axis)
            # Layers listed one by one need no ranking.
            used |= {axis for axis in spec if axis != LAYERS or isinstance(spec[axis], (int, float))}
        elif not choices:
            names = [axis.name for axis in available]
            raise ElasticConfigError(
                f"budget {name!r}={shown(spec)} is a target: say with axes= which axes may be cut to meet it (--axis {' --axis '.join(names[:2])}); "
                f"the parent has {', '.join([*names, LAYERS])}."
            )
    return used


def _check_before_scoring(
    architecture: Architecture,
    model: PreTrainedModel,
    budgets: Mapping[str, Any],
    choices: dict[str, list[int]],
    multiples: Multiples,
    portable: torch.dtype | None,
) -> None:
    """Refuse what needs no scores to be refused; scoring a large parent takes long."""
    for name in budgets:
        check_name(name, f"budget {name!r}")
    ranking = architecture.keepable_ranking(model.config, range(architecture.depth(model.config)))
    submodels = _given(architecture, model, budgets, ranking, multiples)
    limits = _targets(architecture, model, budgets)
    # Which layers a number of them keeps is not known yet, and so not what nests.
    unknown = any(not is_limit(spec) and isinstance(spec.get(LAYERS), (int, float)) for spec in budgets.values())
    for members in [{name: member} for name, member in submodels.items()] if unknown else [submodels]:
        _elastic_config(model.config, members, choices, ranking)
    for name, member in submodels.items() if portable is not None else ():
        check_portable(architecture, model.config, member, portable, f"budget {name!r}")
    if limits:
        search = BudgetSearch(architecture, model.config, choices, portable=portable)
        for name, limit in limits.items() if LAYERS not in choices else ():
            search.check(limit, model.dtype, f"budget {name!r}")


def _given(
    architecture: Architecture,
    model: PreTrainedModel,
    budgets: Mapping[str, Any],
    ranking: list[int] | None,
    multiples: Multiples,
) -> dict[str, Submodel]:
    """Submodels of the budgets that are given by sizes."""
    full = architecture.full(model.config)
    submodels: dict[str, Submodel] = {}
    for name, spec in budgets.items():
        if is_limit(spec):
            continue
        sizes = sizes_from_spec(architecture, model.config, spec, ranking, multiples)
        submodels[name] = architecture.submodel(model.config, sizes, f"budget {name!r}")
        multiples.check(architecture, model.config, submodels[name], f"budget {name!r}")
        if submodels[name] == full and any(isinstance(size, float) and size < 1 for size in spec.values()):
            raise ElasticConfigError(
                f"budget {name!r}={dict(spec)!r} cuts nothing, as widths are rounded to multiples of {multiples.widths}; give sizes "
                "(whole numbers), or a smaller multiple_of."
            )
    return submodels


def _targets(architecture: Architecture, model: PreTrainedModel, budgets: Mapping[str, Any]) -> dict[str, Limit]:
    """Limits of the budgets that are given by a target."""
    targets = {}
    full = CostModel(model.config, architecture).full
    for name, spec in budgets.items():
        if not is_limit(spec):
            continue
        known = isinstance(spec, (str, int, float, Mapping)) and not isinstance(spec, bool)
        limit = parse_limit(spec, full) if known else None
        if limit is None:
            raise ElasticConfigError(
                f"budget {name!r}={shown(spec)} must be a dict of sizes, or a target such as '50%', '12B', '2.1B active' or '24GB'."
            )
        if limit.value >= (whole := limit.measure(full, model.dtype)):
            raise ElasticConfigError(
                f"budget {name!r}={shown(spec)} cuts nothing: the parent has {limit.of(whole)}. Give a target below that, such as '50%'; a name for "
                "the whole parent is a budget of no sizes, {}."
            )
        targets[name] = limit
    return targets


def _resolve(
    architecture: Architecture,
    model: PreTrainedModel,
    budgets: Mapping[str, Any],
    choices: dict[str, list[int]],
    scores: Scores | None,
    ranking: list[int] | None,
    multiples: Multiples,
    portable: torch.dtype | None,
) -> dict[str, Submodel]:
    """Submodels of all budgets; targets from large to small, so that each nests in the one before."""
    given = _given(architecture, model, budgets, ranking, multiples)
    targets = _targets(architecture, model, budgets)
    submodels = dict(given)
    for name, member in given.items() if portable is not None else ():  # again: which layers stay is known only now
        check_portable(architecture, model.config, member, portable, f"budget {name!r}")
    if targets:
        search = BudgetSearch(architecture, model.config, choices, scores, ranking, portable)
        count = CostModel(model.config, architecture)
        searched: list[Submodel] = []
        for name, limit in sorted(targets.items(), key=lambda t: -t[1].value / t[1].measure(count.full, model.dtype)):
            larger = searched + [s for s in given.values() if limit.measure(count(s), model.dtype) > limit.value]
            within = min(larger, key=lambda s: count(s).total_params, default=None)
            found = search.find(limit, model.dtype, within, f"budget {name!r}")
            submodels[name] = found
            searched.append(found)
            measured, whole = (limit.measure(cost, model.dtype) for cost in (count(found), count.full))
            advice = "More choices of the axes, or more axes, come nearer."
            warn_if_far(f"budget {name!r}={shown(budgets[name])}", limit, measured, whole, advice)
    return submodels


def _elastic_config(
    parent: PreTrainedConfig,
    submodels: Mapping[str, Submodel],
    choices: Mapping[str, list[int]],
    ranking: list[int] | None,
) -> ElasticConfig:
    architecture = get_architecture(parent.model_type)
    # Written as a submodel's config, so that nothing the stock class does not load (MTP) is promised on disk.
    stock = architecture.config_for(parent, architecture.full(parent))
    sizes = {name: submodel.to_dict() for name, submodel in submodels.items()}
    return ElasticConfig.from_parent(stock, sizes, choices=choices, layer_ranking=ranking)


def _smallest_channels(architecture: Architecture, submodels: Mapping[str, Submodel]) -> dict[tuple[str, int], int]:
    """Per axis of channels of heads, and layer, the smallest size of a budget."""
    smallest: dict[tuple[str, int], int] = {}
    for axis in {axis.channels for axis in architecture.axes if axis.channels}:
        for submodel in submodels.values():
            for layer in submodel.layers:
                if (size := submodel.at(layer).get(axis)) is not None:
                    smallest[axis, layer] = min(size, smallest.get((axis, layer), size))
    return smallest


def _sorted_model(
    parent: PreTrainedModel, architecture: Architecture, config: ElasticConfig, orders: Orders, release: bool
) -> ElasticForCausalLM:
    """The elastic model with sorted copies of the parent's tensors.

    Args:
        release (`bool`): Nobody else has the parent: let go of each of its tensors once it is sorted, so that the model is not there twice.
    """
    stock = config.parent_config
    stock._attn_implementation = parent.config._attn_implementation
    stock._experts_implementation = parent.config._experts_implementation
    model = build_meta(architecture, stock, concrete_class(ElasticForCausalLM, stock))
    share_constant_buffers(model, parent)
    state, trained = dict(parent.state_dict()), [parameter.requires_grad for parameter in parent.parameters()]
    if release:
        parent.to("meta")
    state = sort_state_dict(architecture, parent.config, state, orders, release)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.generation_config = copy.deepcopy(parent.generation_config)
    model.name_or_path = parent.name_or_path
    for parameter, requires_grad in zip(model.parameters(), trained, strict=True):
        parameter.requires_grad_(requires_grad)
    config.dtype = parent.dtype
    model._init_switching(config)
    return model.train(parent.training)
