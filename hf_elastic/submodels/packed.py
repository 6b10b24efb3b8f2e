"""Models that keep codes in memory and decode weights in use: less memory, more arithmetic, for inference.

A module with an encoded weight becomes one of a subclass of its stock class: buffers hold the companions, and the weight is a property that decodes
them whenever stock code reads it; a stack of experts decodes the expert that is asked for. So stock code runs as it is. Codes and scales are held as
integers of the same bits, since `.to(dtype)` casts what is floating-point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architectures import Architecture
from ..architectures.encodings import Encoding
from ..architectures.pieces import Piece, companions, pieces
from ..errors import ElasticConfigError
from ..quantization.codec import decode
from .bound import Bound

_INTEGERS = {torch.float8_e4m3fn: torch.uint8, torch.float32: torch.int32, torch.bfloat16: torch.int16}


@dataclass(frozen=True)
class Held:
    """What a packed module knows of a weight.

    Args:
        encoding (`Encoding`): What it is stored in.
        size (`tuple[int, ...]`): Shape of the weight.
        segments (`tuple[int, ...]`): Rows (of an expert) that have a global scale each.
        dtypes (`tuple[torch.dtype, ...]`): Types of the companions, which the buffers hold as integers.
    """

    encoding: Encoding
    size: tuple[int, ...]
    segments: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    def buffers(self, leaf: str) -> list[str]:
        """Names of the companions' buffers of the weight of that name."""
        return [f"{leaf}_{part}" for part in ("codes", "scale", "global_scale")[: len(self.encoding.companions)]]


class PackedModule(nn.Module):
    """What packed modules of all stock classes have in common."""

    held: dict[str, Held]
    like: torch.Tensor
    """Nothing, in the type and on the device in which weights are decoded."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made while the program runs, so copies and pickles make it again.
        return _empty_module, (type(self).__mro__[2], tuple(self.held)), self.__dict__

    def extra_repr(self) -> str:
        said = (f"{leaf}: {held.encoding.name}" for leaf, held in self.held.items())
        return ", ".join(filter(None, (super().extra_repr(), *said)))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self.__dict__["like"] = fn(self.like)
        return super()._apply(fn, recurse)

    def companions_of(self, leaf: str) -> list[torch.Tensor]:
        """Codes and scales of a weight, in their own types."""
        held = self.held[leaf]
        buffers: Any = self._buffers
        return [buffers[name].view(dtype) for name, dtype in zip(held.buffers(leaf), held.dtypes, strict=True)]


@dataclass(frozen=True)
class PackedStack:
    """Weights of experts, each decoded when it is asked for.

    Args:
        module (`PackedModule`): Holds the companions.
        leaf (`str`): Name of the stack in it.
    """

    module: PackedModule
    leaf: str

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.module.held[self.leaf].size)

    @property
    def dtype(self) -> torch.dtype:
        return self.module.like.dtype

    @property
    def device(self) -> torch.device:
        return self.module.like.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, expert: Any) -> torch.Tensor:
        held, index = self.module.held[self.leaf], int(expert)
        parts = [part[index] for part in self.module.companions_of(self.leaf)]
        return decode(parts, held.encoding.name, self.dtype, segments=held.segments)


def _decoded(module: PackedModule, leaf: str) -> Any:
    held = module.held[leaf]
    if len(held.size) == 3:
        return PackedStack(module, leaf)
    return decode(module.companions_of(leaf), held.encoding.name, module.like.dtype, segments=held.segments)


@cache
def _packed_class(stock: type[nn.Module], leaves: tuple[str, ...]) -> type[PackedModule]:
    def weight(leaf: str) -> property:
        return property(lambda module: _decoded(module, leaf))

    return type(f"Packed{stock.__name__}", (PackedModule, stock), {leaf: weight(leaf) for leaf in leaves})


def _empty_module(stock: type[nn.Module], leaves: tuple[str, ...]) -> PackedModule:
    made = _packed_class(stock, leaves)  # type: ignore[arg-type]
    return made.__new__(made)


def is_packed(model: nn.Module) -> bool:
    """Whether weights of a model are codes."""
    known = model.__dict__.get("_packed")  # by elastic models, which are asked with every budget
    return any(isinstance(module, PackedModule) for module in model.modules()) if known is None else known


def refuse_packed(model: nn.Module, what: str) -> None:
    """Raise [`ElasticConfigError`] for what a packed model cannot do."""
    if is_packed(model):
        raise ElasticConfigError(
            f"{what} needs weights, and this model keeps codes: it is packed, for inference. Load it without packed=True."
        )


def pack_module(
    owner: nn.Module, leaf: str, held: Held, parts: Iterable[torch.Tensor] | None, dtype: torch.dtype, device: Any
) -> None:
    """Turn a module into one that decodes a weight, in place.

    Args:
        leaf (`str`): Name of the weight.
        parts (`list[torch.Tensor]`, *optional*): The companions; they can be set later as buffers of the names that `held` says.
        dtype, device: In which it is decoded.
    """
    before = getattr(owner, "held", {}) if isinstance(owner, PackedModule) else {}
    leaves, stock = (*before, leaf), type(owner).__mro__[2] if before else type(owner)
    del owner._parameters[leaf]
    owner.__class__ = _packed_class(stock, leaves)
    owner.__dict__["held"] = {**before, leaf: held}
    if not before:
        owner.__dict__["like"] = torch.empty(0, dtype=dtype, device=device)
    empty = [torch.empty(0, device="meta") for _ in held.dtypes]
    for name, part in zip(held.buffers(leaf), empty if parts is None else parts, strict=True):
        owner.register_buffer(name, as_integers(part))


def as_integers(part: torch.Tensor) -> torch.Tensor:
    """The same bits, in a type that no cast of a model touches."""
    return part.contiguous().view(_INTEGERS[part.dtype]) if part.dtype in _INTEGERS and part.numel() else part


def held_of(piece: Piece, encoding: Encoding, dtypes: Iterable[torch.dtype]) -> Held:
    """What is known of the weight of a piece at the piece's size."""
    rule = piece.target
    rows = [shape[0] for shape in rule.stored_shapes(piece.kept)] if rule.parted else [piece.shape[-2]]
    return Held(encoding, piece.shape, tuple(rows), tuple(dtypes))


def pack(
    model: PreTrainedModel,
    architecture: Architecture,
    coded: Iterable[tuple[str, Mapping[str, torch.Tensor]]],
    encodings: Mapping[str, Encoding],
) -> None:
    """Let a model keep codes instead of weights, in place, one weight at a time.

    Args:
        model (`PreTrainedModel`): A causal stock or elastic model, with everything that is loaded active.
        architecture (`Architecture`): Its table.
        coded (`Iterable[tuple[str, dict[str, torch.Tensor]]]`): Per live name of a weight its companions by their live names.
        encodings (`dict[str, Encoding]`): By live names.
    """
    whole = {p.rule.name: p for p in pieces(architecture, model.config, architecture.full(model.config))}
    if shared := [name for name, piece in whole.items() if name in encodings and len(piece.rule.shared_by) > 1]:
        raise ElasticConfigError(
            f"a packed {architecture.model_type} cannot be made: layers share blocks, such as {shared[0]}. Load it decoded; to quantise it, give quantize_checkpoint() its files."
        )
    for name, parts in coded:
        piece, encoding = whole[name], encodings[name]
        tensors = [parts[companion.rule.name] for companion in companions(piece, encoding)]
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        weight: torch.Tensor = getattr(owner, leaf)
        moved = [part.to(weight.device) for part in tensors]
        pack_module(
            owner, leaf, held_of(piece, encoding, [p.dtype for p in tensors]), moved, weight.dtype, weight.device
        )
    for config in (model.config, *{id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()):
        config._experts_implementation = "eager"  # others multiply by whole stacks
    model.__dict__["_packed"] = True


def bind_packed(piece: Piece, holder: PackedModule, leaf: str, module: nn.Module, owner: str) -> list[Bound]:
    """Give a module of a live size the companions that the parent's module holds, as views of them or, where no view can be, as copies.

    Args:
        piece (`Piece`): The weight.
        holder (`PackedModule`): Module of the parent that holds it, as `leaf`.
        module (`nn.Module`): Module of the submodel, without storage.
        owner (`str`): Name of the parent's module.
    """
    theirs, like = holder.held[leaf], holder.like
    mine = held_of(piece, theirs.encoding, theirs.dtypes)
    pack_module(module, leaf, mine, None, like.dtype, like.device)
    bound = []
    for part, name in zip(companions(piece, theirs.encoding), theirs.buffers(leaf), strict=True):
        tensor: Any = holder._buffers[name]
        if tensor.is_meta:
            raise ElasticConfigError(
                f"{owner}.{name} has no storage: codes were offloaded, and sizes of a packed family share them. Keep them in memory (accelerate does "
                "without offload_buffers=True), or load the size that you need with budget=...."
            )
        module._buffers[name] = view = part.narrow(tensor)
        bound.append(Bound(f"{owner}.{name}", part.runs, holder, name, tensor, module, view, not part.is_view))
    return bound
