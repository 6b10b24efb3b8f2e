"""Checks of the conformance kit on quantised families: whatever way a size is reached, it has the codes and scales that the whole has, cut.

What a size has to hold is made without the library's codec, from the sliced weights in float32 and the global scales of the parent: the scales of
blocks and rows anew, by the definitions in [`hf_elastic.testing.formats`].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from ..architectures.axes import TensorRule, take
from ..architectures.encodings import ENCODINGS
from ..architectures.pieces import Piece, pieces, stored_pieces
from ..architectures.submodel import Submodel
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.opening import open_checkpoint
from ..checkpoints.quantizing import quantize_checkpoint, slice_checkpoint
from ..checkpoints.saving import Layout
from ..configuration_elastic import ElasticConfig
from ..errors import ElasticConfigError
from ..storage.reading import Readable
from ..submodels.slicing import slice_state_dict
from . import formats
from .blocks import Blocks
from .cases import Case, smaller_sizes
from .deviations import Deviation, NotApplicable, same_weights
from .subject import Subject

MERGED = (
    {"q_proj", "k_proj", "v_proj", "g_proj"},
    {"q_proj", "k_proj", "v_proj"},
    {"q_a_proj", "kv_a_proj_with_mqa"},
    {"in_proj_qkv", "in_proj_z"},
    {"gate_proj", "up_proj"},
    {"w1", "w3"},
)
"""Layers of one module that vLLM makes one matrix of (its `packed_modules_mapping`), which has one global scale; the first that is there whole."""

SUFFIXES = {"nvfp4": ("weight_packed", "weight_scale", "weight_global_scale"), "fp8": ("weight", "weight_scale")}
"""What compressed-tensors calls codes and scales."""

MODELOPT = {"nvfp4": "nvfp4-modelopt", "fp8": "fp8-tensor"}
"""The encodings in which modelopt writes a format."""


def kinds(subject: Subject) -> Iterator[Deviation]:
    """Only weights of linear layers and of experts can be quantised, and those that others make one matrix of have one global scale."""
    modules = dict(subject.parent.named_modules())
    rules = subject.architecture.rules(subject.parent.config)
    weights = [rule for rule in rules if rule.kind is not None]
    if not weights:
        raise NotApplicable("the table says of no weight what kind it is, so none can be quantised")
    for rule in weights:
        module = modules.get(rule.module)
        linear = isinstance(module, nn.Linear) and rule.name.endswith(".weight")
        stack = len(rule.dims) == 3 and rule.routed
        yield Deviation(
            rule.name, wrong="" if linear or stack else f"has kind={rule.kind!r} and is no linear layer and no experts"
        )
        if "embed" in rule.module or rule.module == "lm_head" or rule.routes:
            yield Deviation(rule.name, wrong=f"has kind={rule.kind!r}; embeddings, heads and routers are kept")
    matrices = [rule for rule in rules if isinstance(modules.get(rule.module), nn.Linear) and len(rule.dims) == 2]
    for group in merged(matrices):
        kept = [rule.name for rule in group if rule.kind is None]
        if 0 < len(kept) < len(group):
            yield Deviation(
                kept[0], wrong=f"has no kind=, others of one matrix with it have: {[r.name for r in group]}"
            )
        elif len(group) > 1 and not kept and (len({r.fused for r in group}) > 1 or group[0].fused is None):
            yield Deviation(group[0].name, wrong=f"is one matrix with {[r.name for r in group[1:]]} elsewhere: fused=")


def merged(rules: list[TensorRule]) -> list[list[TensorRule]]:
    """Weights by the matrix that they are part of in vLLM."""
    owners: dict[str, dict[str, TensorRule]] = {}
    for rule in rules:
        owner, _, name = (rule.module if rule.name.endswith(".weight") else rule.name).rpartition(".")
        owners.setdefault(owner, {})[name] = rule
    found = []
    for members in owners.values():
        together = next((names for names in MERGED if names <= members.keys()), set())
        found += [[members[name] for name in sorted(together)]] if together else []
        found += [[rule] for name, rule in members.items() if name not in together]
    return found


class Quantised:
    """A family of a subject in which all that can be is in one format, and what its sizes have to hold.

    Args:
        subject (`Subject`): Its cases leave whole blocks.
        format (`str`): `"nvfp4"` or `"fp8"`.
    """

    def __init__(self, subject: Subject, format: str):
        self.subject, self.format = subject, format
        self.architecture, self.config = subject.architecture, subject.parent.config
        self.encodings = Blocks(self.config, format).encodings
        if not self.encodings:
            raise NotApplicable(f"no weight of this config has rows of whole blocks of {format}")
        rules = [rule for rule in self.architecture.rules(self.config) if rule.name in self.encodings]
        state = subject.parent.state_dict()
        self.scales: dict[str, torch.Tensor] = {}
        """Of the parent: one of every row, or the global ones."""
        for group in merged(rules):
            weights = [state[rule.name] for rule in group]
            divisor = formats.global_scale(*weights)
            for rule, weight in zip(group, weights, strict=True):
                self.scales[rule.name] = divisor if format == "nvfp4" else formats.fp8_scale(weight)

    @cached_property
    def checkpoint(self) -> Path:
        """The family, quantised from its files."""
        return self.written("stock")

    def written(self, layout: Layout) -> Path:
        recipe = dict.fromkeys(self.encodings, self.format)
        folder = self.subject.folder / f"{self.format}-{layout}"
        quantize_checkpoint(self.subject.checkpoint, folder, recipe, layout=layout, progress=False)
        return folder

    @cached_property
    def files(self) -> Checkpoint:
        """The files of the family."""
        elastic = ElasticConfig.from_pretrained(self.checkpoint)
        return open_checkpoint(self.checkpoint, elastic, self.architecture.full(self.config))

    @cached_property
    def live(self) -> Any:
        """The family, loaded."""
        return AutoModelForCausalLM.from_pretrained(self.checkpoint)

    def pieces(self, submodel: Submodel) -> Iterator[tuple[Piece, str | None]]:
        """Tensors of a size, and for those that are quantised the name of the parent's."""
        for piece in pieces(self.architecture, self.config, submodel):
            name = piece.rule.stored.name
            yield piece, name if name in self.encodings else None

    def expected(self, case: Case) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What a size holds: weights by their live names, and what they are stored as."""
        state = self.subject.parent.state_dict()
        weights = slice_state_dict(self.architecture, self.config, state, case.submodel)
        stored: dict[str, torch.Tensor] = {}
        for piece, name in self.pieces(case.submodel):
            target = piece.target.name
            parts = [weights[target]] if name is None else self.coded(piece, weights[target], self.scales[name])
            if name is not None:
                weights[target] = parts.pop()
            base = target if name is None else f"{target.removesuffix('.weight')}."
            if not piece.copy_of:
                suffixes = ("",) if name is None else SUFFIXES[self.format]
                stored |= {f"{base}{suffix}": part for suffix, part in zip(suffixes, parts, strict=True)}
        return weights, stored

    def coded(self, piece: Piece, weight: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
        """Codes, scales and values of a sliced weight, with the parent's scales of rows or global ones."""
        if self.format == "fp8":
            scale = take(scale, [*piece.runs[:-1], [(0, 1)]])
            codes, values = formats.fp8(weight, scale)
            return [codes, scale, values]
        divisor = scale if weight.dim() == 2 else take(scale, [piece.runs[0], [(0, 1)]])
        codes, scale, values = formats.nvfp4(weight, divisor)
        return [codes, scale, divisor.expand(*divisor.shape[:-1], len(piece.rule.segments)), values]

    def bytes(self, submodel: Submodel, stored: Mapping[str, torch.Tensor]) -> tuple[int, int]:
        """Of what a size is stored as, and of the whole rows of that in the parent's files."""
        least = most = 0
        for piece in stored_pieces(self.architecture, self.config, submodel, self.encodings):
            if piece.copy_of:
                continue
            tensor, full = stored[piece.target.name], piece.rule.shape(piece.full)
            least += tensor.nbytes
            rows = 1 + int(piece.rule.stacked)  # what is not cut in files
            most += tensor.nbytes * math.prod(full[rows:]) // math.prod(tensor.shape[rows:])
        return least, most


def quantised(subject: Subject) -> Iterator[Deviation]:
    """A size of a quantised family is the parent's codes, cut: read from files, in no more bytes than its rows have, and live."""
    for made in _families(subject):
        for case in made.subject.cases.said:
            named = Case(f"{case.name}, {made.format}", case.sizes, case.submodel)
            weights, stored = made.expected(case)
            arguments = (made.architecture, made.config, case.submodel)
            yield same_weights(named, _read(made.files.lazy_slice(*arguments)), _own(made, case, weights))
            yield same_weights(named, _read(made.files.coded_slice(*arguments)), stored)
            read = sum(stop - start for runs in made.files.extents(*arguments).values() for start, stop in runs)
            least, most = made.bytes(case.submodel, stored)
            right = least <= read <= most
            yield Deviation(
                named.name, wrong="" if right else f"{read} bytes are read, its rows have {least} to {most}"
            )
            with made.live.at(case.submodel) as view:
                yield same_weights(named, view.state_dict(), weights)


def quantised_elsewhere(subject: Subject) -> Iterator[Deviation]:
    """So it is in the nested layout, in that of modelopt, in bfloat16, packed in memory, and cut from file to file."""
    for made in _families(subject):
        small, whole = made.subject.small, made.subject.cases.said[0]
        nested, theirs = made.written("nested"), Modelopt(made)
        for case in (small, whole):
            weights, _ = made.expected(case)
            own = _own(made, case, weights)
            yield same_weights(_in(case, made.format, "nested"), _opened(nested, case.submodel), own)
            expected = _own(made, case, theirs.expected(case))
            yield same_weights(_in(case, made.format, "modelopt"), _opened(theirs.folder, case.submodel), expected)
        weights, stored = made.expected(small)
        eager = {"dtype": torch.bfloat16, "experts_implementation": "eager"}
        loaded = AutoModelForCausalLM.from_pretrained(made.checkpoint, budget="small", **eager)
        half = {name: weights[name].to(tensor.dtype) for name, tensor in loaded.state_dict().items()}
        yield same_weights(_in(small, made.format, "bfloat16"), loaded.state_dict(), half)
        yield from _cut_on_disk(made, small, stored)
        yield from _packed(made, small, stored, made.subject.logits(loaded))


def _cut_on_disk(made: Quantised, case: Case, stored: Mapping[str, torch.Tensor]) -> Iterator[Deviation]:
    folder = made.subject.folder / f"{made.format}-cut"
    slice_checkpoint(made.checkpoint, folder, "small", progress=False)
    elastic = ElasticConfig.from_pretrained(folder)
    full = elastic.architecture.full(elastic.parent_config)
    found = open_checkpoint(folder, elastic, full).coded_slice(elastic.architecture, elastic.parent_config, full)
    yield same_weights(_in(case, made.format, "cut on disk"), _read(found), dict(stored))


def _packed(
    made: Quantised, case: Case, stored: Mapping[str, torch.Tensor], logits: torch.Tensor
) -> Iterator[Deviation]:
    if any(len(piece.rule.shared_by) > 1 for piece, name in made.pieces(case.submodel) if name is not None):
        return  # refused, see `hf_elastic.submodels.packed`
    packed = AutoModelForCausalLM.from_pretrained(made.checkpoint, packed=True, dtype=torch.bfloat16)
    with packed.at(case.submodel) as view:
        computed = made.subject.logits(view)
        modules, found = dict(view.named_modules()), dict[str, torch.Tensor]()
        for piece, name in made.pieces(case.submodel):
            if name is not None:
                owner, leaf = modules[piece.target.module], piece.target.name.rpartition(".")[2]
                base = f"{piece.target.name.removesuffix('.weight')}."
                parts = owner.companions_of(leaf)  # type: ignore[operator]
                found |= {f"{base}{suffix}": part for suffix, part in zip(SUFFIXES[made.format], parts, strict=True)}
    yield same_weights(_in(case, made.format, "packed"), found, {name: stored[name] for name in found})
    yield same_weights(_in(case, made.format, "packed"), {"logits": computed}, {"logits": logits})


def _families(subject: Subject) -> Iterator[Quantised]:
    """Of each format, made once for all checks."""
    for format, suited in (("fp8", subject), ("nvfp4", subject.in_blocks)):
        if format not in suited.made:
            suited.made[format] = Quantised(suited, format)
        yield suited.made[format]


def _in(case: Case, format: str, form: str) -> Case:
    return Case(f"{case.name}, {format}, {form}", case.sizes, case.submodel)


def _read(lazy: Mapping[str, Readable]) -> dict[str, torch.Tensor]:
    return {name: part[...] for name, part in lazy.items()}


def _opened(folder: Path, submodel: Submodel) -> dict[str, torch.Tensor]:
    """A size, read as loading it does."""
    elastic = ElasticConfig.from_pretrained(folder)
    found = open_checkpoint(folder, elastic, submodel)
    return _read(found.lazy_slice(elastic.architecture, elastic.parent_config, submodel))


def _own(made: Quantised, case: Case, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without those that are stored under another name."""
    return {
        piece.target.name: weights[piece.target.name] for piece, _ in made.pieces(case.submodel) if not piece.copy_of
    }


class Modelopt:
    """The same family in files as modelopt writes them: other names, the global scale as a factor and without dimensions, one scale for a matrix in FP8."""

    def __init__(self, made: Quantised):
        self.made, self.folder = made, made.subject.folder / MODELOPT[made.format]
        encoding, stored = ENCODINGS[MODELOPT[made.format]], dict[str, torch.Tensor]()
        self.state = dict(made.subject.parent.state_dict())
        for rule in made.architecture.rules(made.config):
            if rule.copy_of:
                self.state[rule.name] = self.state[rule.copy_of]
            elif rule.name not in made.encodings:
                stored |= self._on_disk(rule, self.state[rule.name])
            else:
                *parts, self.state[rule.name] = self._coded(rule, self.state[rule.name])
                for companion, part in zip(encoding.rules(rule), parts, strict=True):
                    stored |= self._on_disk(companion, part)
        elastic = ElasticConfig.from_pretrained(made.subject.checkpoint)
        elastic.quantized(dict.fromkeys(made.encodings, encoding)).save_pretrained(self.folder)
        save_file(stored, self.folder / "model.safetensors", metadata={"format": "pt"})

    def expected(self, case: Case) -> dict[str, torch.Tensor]:
        return slice_state_dict(self.made.architecture, self.made.config, self.state, case.submodel)

    def _coded(self, rule: TensorRule, weight: torch.Tensor) -> list[torch.Tensor]:
        """Codes and scales, and the values that they stand for."""
        if self.made.format == "nvfp4":
            divisor = self.made.scales[rule.name]
            codes, scale, _ = formats.nvfp4(weight, divisor)
            factor = divisor.reciprocal()
            step = (scale.float() * factor[..., None]).repeat_interleave(formats.BLOCK, -1)
            return [
                codes,
                scale,
                factor.expand(*factor.shape[:-1], len(rule.segments)),
                formats.unpacked(codes) * step,
            ]
        full = self.made.architecture.full(self.made.config).at(rule.layer)
        rows = [shape[0] for shape in rule.stored_shapes(full)] if rule.parted else [weight.shape[-2]]
        largest = torch.stack([part.abs().amax((-2, -1)) for part in weight.split(rows, -2)], -1)
        step = (largest / 448.0).repeat_interleave(torch.tensor(rows), -1)[..., None]
        codes = (weight / step).to(torch.float8_e4m3fn)
        return [codes, largest / 448.0, codes.float() * step]

    def _on_disk(self, rule: TensorRule, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """A tensor by its names in files, those of experts and segments by themselves."""
        full = self.made.architecture.full(self.made.config).at(rule.layer)
        found: dict[str, torch.Tensor] = {}
        for expert, whole in enumerate(tensor) if rule.stacked else [(None, tensor)]:
            lengths = [shape[0] for shape in rule.stored_shapes(full)] if rule.parted else [len(whole)]
            for segment, part in zip(rule.segments, whole.split(lengths), strict=True):
                scalar = part.numel() == 1 and rule.dtypes and not (rule.apart and part.dim() > 1)
                found[rule.disk_name(expert, segment)] = (
                    part.clone().reshape(()) if scalar else part.clone(memory_format=torch.contiguous_format)
                )
        return found


def refused(subject: Subject) -> Iterator[Deviation]:
    """A size that would keep a part of a block is refused, with its axis named, and no other."""
    suited = subject.in_blocks
    blocks, config = Blocks(suited.parent.config, "nvfp4"), suited.parent.config
    full = suited.architecture.full(config)
    for axis, _ in full.items:
        for size in _either(blocks, axis, list(smaller_sizes(suited.architecture, config, full, axis))):
            submodel = Submodel(
                tuple((n, _cut(v, size) if n == axis else v) for n, v in full.items), full.layers, full.depth
            )
            broken, said = list(blocks.broken(submodel)), ""
            try:
                blocks.refuse(submodel)
            except ElasticConfigError as error:
                said = str(error)
            right = bool(said) == bool(broken) and (not said or axis in said)
            yield Deviation(
                f"{axis}={size}", wrong="" if right else f"parts of blocks of {broken[:2]}; it was said: {said!r}"
            )


def _either(blocks: Blocks, axis: str, sizes: list[int]) -> Iterator[int]:
    """One that leaves whole blocks, and two that do not."""
    for whole, most in ((True, 1), (False, 2)):
        yield from [size for size in sizes if blocks.leaves_whole(axis, size) is whole][:most]


def _cut(whole: int | tuple[int | None, ...], size: int) -> int | tuple[int | None, ...]:
    return size if isinstance(whole, int) else tuple(None if i is None else min(i, size) for i in whole)
