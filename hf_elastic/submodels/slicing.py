"""Cutting a submodel out of its parent: pieces from memory into a slice, or as views into a live size, and the check of the table."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..architectures import Architecture
from ..architectures.axes import TensorRule
from ..architectures.pieces import Piece, pieces
from ..architectures.portability import misaligned_experts
from ..architectures.submodel import Submodel
from ..errors import ElasticConfigError, HFElasticError
from .bound import Bound, view_parameter
from .buffers import share_constant_buffers
from .masking import is_layer_norm
from .offloading import Offloaded, follow_hooks, is_fetched
from .packed import PackedModule, bind_packed

logger = logging.getLogger(__name__)


def check_table(architecture: Architecture, model: PreTrainedModel) -> None:
    """Check the table against a live causal model: every tensor has exactly one rule of its shape, every rule a tensor.

    Raises:
        `HFElasticError`: names what differs.
    """
    full = architecture.full(model.config)
    expected: dict[str, tuple[int, ...]] = {}
    copies: dict[str, str] = {}
    problems: list[str] = []
    for rule in architecture.rules(model.config):
        if rule.name in expected:
            raise HFElasticError(f"two rules of {architecture.model_type} claim {rule.name}")
        sizes = full.at(rule.layer)
        unknown = sorted(set(rule.axes) - sizes.keys())
        if unknown:
            raise HFElasticError(f"the rule of {rule.name} is cut by {unknown}, which its layer does not have")
        expected[rule.name] = rule.shape(sizes)
        if rule.copy_of:
            copies[rule.name] = rule.copy_of
        problems += _norm_problems(rule, model)
    _check_experts(architecture, model.config)
    state = model.state_dict()
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems += [f"{name} {shape} has no rule" for name, shape in found.items() if name not in expected]
    problems += [f"{name} {shape} is not in the model" for name, shape in expected.items() if name not in found]
    problems += [
        f"{name} is {shape} in the model and {expected[name]} in the table"
        for name, shape in found.items()
        if expected.get(name, shape) != shape
    ]
    for name, source in copies.items():
        if not problems and state[name].data_ptr() != state[source].data_ptr():
            problems.append(f"{name} and {source} are two tensors in the model and one in the table")
    if problems:
        raise HFElasticError(
            f"the {architecture.model_type} table does not fit this model ({len(problems)} differences): "
            + "; ".join(problems[:5])
            + (" ..." if len(problems) > 5 else "")
        )


def _check_experts(architecture: Architecture, config: PreTrainedConfig) -> None:
    """Raise `HFElasticError` where experts have no router to keep from dropped ones, or nothing says how many a token uses."""
    rules = architecture.rules(config)
    routers = {(rule.layer, rule.experts) for rule in rules if rule.routes}
    for rule in rules:
        along = {cut.axis for cut in rule.dims[0].cuts} & architecture.per_token.keys()
        if along and len(rule.dims) > 1 and not (rule.routed or rule.routes):
            raise HFElasticError(
                f"{rule.name} runs along {', '.join(along)} and is neither routed=True nor routes=True: is it of experts, or of their router?"
            )
    for rule in (rule for rule in rules if rule.routed):
        if rule.experts not in architecture.per_token:
            raise HFElasticError(
                f"no axis of {architecture.model_type} is among={rule.experts!r}: how many of {rule.name} does a token use?"
            )
        if (rule.layer, rule.experts) not in routers:
            raise HFElasticError(
                f"no rule of layer {rule.layer} has routes=True: which tensor chooses among {rule.name}?"
            )


def _norm_problems(rule: TensorRule, model: PreTrainedModel) -> Iterator[str]:
    """What a table does not say, or says wrongly, of the weight of a norm: a masked model and a router would compute something else."""
    module = dict(model.named_modules()).get(rule.module)
    if module is None or not rule.axes or len(rule.dims) != 1 or "norm" not in type(module).__name__.lower():
        return
    if is_layer_norm(module):
        yield f"{rule.name} is cut, and a {type(module).__name__} subtracts a mean, which no mask corrects"
    elif not rule.norm and rule.name.endswith("weight"):
        yield f"{rule.name} of a {type(module).__name__} is cut, and its rule does not say norm="


def slice_state_dict(
    architecture: Architecture,
    config: PreTrainedConfig,
    state_dict: Mapping[str, torch.Tensor],
    submodel: Submodel,
) -> dict[str, torch.Tensor]:
    """Cut a submodel out of the parent's live state dict; contiguous tensors that share nothing with the parent."""
    sliced: dict[str, torch.Tensor] = {}
    for piece in pieces(architecture, config, submodel):
        source = piece.rule.copy_of or piece.rule.name
        sliced[piece.target.name] = piece.narrow(state_dict[source]).clone(memory_format=torch.contiguous_format)
    return sliced


def build_meta(architecture: Architecture, config: PreTrainedConfig, cls: type[PreTrainedModel]) -> PreTrainedModel:
    """A stock model without storage, its layers rebuilt where the config differs per layer."""
    with torch.device("meta"), no_init_weights():
        return cls(config)


def use_eager_experts_if_misaligned(config: PreTrainedConfig, architecture: Architecture, dtype: torch.dtype) -> None:
    """`grouped_mm` needs rows of a multiple of 16 bytes; choose the eager experts for widths that are not, and say so."""
    if config._experts_implementation not in (None, "grouped_mm"):
        return
    if misaligned := misaligned_experts(architecture, config, architecture.full(config), dtype):
        logger.warning(
            "expert widths %s are not multiples of %d, which grouped_mm needs in %s; using experts_implementation='eager', which is "
            "slower.",
            misaligned,
            16 // dtype.itemsize,
            dtype,
        )
        config._experts_implementation = "eager"


def bind_views(
    tree: PreTrainedModel, parent: nn.Module, architecture: Architecture, config: PreTrainedConfig, submodel: Submodel
) -> list[Bound | Offloaded]:
    """Give a model on `meta` the weights of a submodel, as views of the parent's storage.

    Args:
        tree (`PreTrainedModel`): Stock model of the submodel's config, without storage.
        parent (`nn.Module`): The whole parent (causal or base model), with storage.
        config (`PreTrainedConfig`): The parent's stock config.

    Returns:
        `list[Bound | Offloaded]`: Every tensor of the submodel. Those of which more than one run is kept along a dimension had to be copied
            (heads cut per group, fused gate and up). What accelerate fetches for every forward pass stays without storage, here, too.

    Raises:
        `ElasticConfigError`: weights of the parent have no storage, and nothing fetches them.
    """
    bound: list[Bound | Offloaded] = []
    fetched: set[int] = set()
    named: dict[str, Piece] = {}
    homes: dict[str, str] = {}
    available = dict(tree.named_parameters()) | dict(tree.named_buffers())
    for piece in pieces(architecture, config, submodel):
        name, source = local_names(piece, architecture, available)
        named[name or piece.target.name] = piece
        homes[(name or piece.target.name).rpartition(".")[0]] = source.rpartition(".")[0]
        if name is None or piece.copy_of:
            continue
        owner, _, leaf = source.rpartition(".")
        holder = parent.get_submodule(owner)
        if isinstance(holder, PackedModule) and leaf in holder.held:
            bound += bind_packed(piece, holder, leaf, tree.get_submodule(name.rpartition(".")[0]), owner)
            continue
        tensor: torch.Tensor = getattr(holder, leaf)
        if hasattr(tensor, "full_tensor"):
            raise ElasticConfigError(
                f"{source} is sharded (FSDP), and a size of it would need the whole; budgets of a sharded family compute in training mode only."
            )
        view = piece.narrow(tensor.detach())
        if tensor.is_meta and not any(map(is_fetched, _around(parent, owner))):
            raise ElasticConfigError(
                f"{source} has no storage and no hook of accelerate that fetches it, so its submodels have none either; load the whole parent "
                "to switch budgets, or one budget with from_pretrained(..., budget=...)."
            )
        module = tree.get_submodule(name.rpartition(".")[0])
        if piece.rule.buffer:
            module._buffers[leaf] = view
        else:
            asks = tensor.requires_grad and not tensor.is_meta
            module._parameters[leaf] = view_parameter(view, asks, name, "call model.train() before the forward pass")
        placed = getattr(module, leaf)
        if tensor.is_meta:
            fetched.add(id(placed))
            bound.append(Offloaded(holder, leaf))
        else:
            bound.append(Bound(source, piece.runs, holder, leaf, tensor, module, placed, not piece.is_view))
    follow_hooks(tree, parent, architecture, submodel, named, homes)
    share_constant_buffers(tree, parent)
    tree.tie_weights()
    left = [
        name
        for name, tensor in [*tree.named_parameters(), *tree.named_buffers()]
        if tensor.is_meta and id(tensor) not in fetched
    ]
    if left:
        raise HFElasticError(f"the {architecture.model_type} table gives no weights for {left[:5]}")
    return bound


def _around(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """A module and those that it lies in."""
    while name:
        yield model.get_submodule(name)
        name = name.rpartition(".")[0]


def local_names(piece: Piece, architecture: Architecture, available: Mapping[str, object]) -> tuple[str | None, str]:
    """Names in a model of the submodel and in one of the parent, both causal or both base models.

    Args:
        available: Names of the tensors of the submodel's model. A base model has neither the prefix nor the head: the first name is `None`
            for a tensor that it does not have.
    """
    target, source = piece.target.name, piece.rule.name
    if target in available:
        return target, source
    prefix = architecture.layers_path.partition(".")[0] + "."
    short = target.removeprefix(prefix)
    return (short, source.removeprefix(prefix)) if short in available else (None, source)
