"""Safetensors files of an elastic checkpoint, opened: check them against the table, read only what a submodel keeps.

Files are checked by their headers before a byte of weights is read; pickle files are never opened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ..architectures import Architecture
from ..architectures.axes import Run, TensorRule, indices_of, places_of, shape_of
from ..architectures.encodings import ENCODINGS, Encoding
from ..architectures.pieces import Piece, companions, pieces, stored_pieces
from ..architectures.submodel import Submodel
from ..configuration.leaving_out import ignored_names
from ..errors import CheckpointError, ElasticConfigError
from ..storage.reading import Block, Joined, Places, Readable
from ..storage.tensor_file import TensorFile
from .decoding import Decoded, decoded, wrong_scales
from .names import Names, is_base, stored_names

Shapes = list[tuple[str, tuple[int, ...]]]
"""Tensors that one of the parent is stored as: their names and shapes."""

ROTARY = r"rotary_emb\.inv_freq$"  # computed, but saved by old versions
OF_ACTIVATIONS = r"\.(input_scale|input_global_scale|output_scale|[qkv]_scale)$"
"""Scales of activations and of the KV cache in quantised checkpoints. Weights are all that is read: they are multiplied in the type of the model."""
_SLACK = 100_000  # numbers; of so few every tensor is compared, and named


class Checkpoint:
    """The safetensors files of one repository or folder, opened.

    Args:
        files (`list[Path]`): The files; every tensor name must occur in one of them.
        encodings (`dict[str, Encoding]`, *optional*): Of the weights that are stored in few bits, by their names in the live parent.

    Raises:
        `CheckpointError`: a file is missing, truncated or no safetensors file, or two files hold one name.
    """

    def __init__(self, files: list[Path], encodings: Mapping[str, Encoding] | None = None):
        self.encodings = dict(encodings or {})
        self._where: dict[str, TensorFile] = {}
        self.ignored: list[str] = []  # what is there and ignored on purpose, as `check` finds it
        for file in files:
            opened = TensorFile.opened(file)
            for key in opened.shapes:
                if key in self._where:
                    raise CheckpointError(f"{key} occurs in two files of the checkpoint, one of them {file}.")
                self._where[key] = opened

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def whole(self, names: Iterable[str]) -> dict[str, Block]:
        """Stored tensors by name, not read yet.

        Raises:
            `CheckpointError`: one is not floating point.
        """
        found = {}
        for name in names:
            if self._stored_dtype(name) not in _DTYPES:
                raise CheckpointError(f"{name} is stored as {self._stored_dtype(name)}, not as {', '.join(_DTYPES)}.")
            shape = self._stored_shape(name)
            found[name] = self._stored_block(name, [[(0, size)] for size in shape], [None for _ in shape])
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        types = _DTYPES | _CODES
        return sum(math.prod(file.shapes[key]) * types[file.dtypes[key]].itemsize for key, file in self._where.items())

    def _stored_shape(self, key: str) -> tuple[int, ...]:
        return self._where[key].shapes[key] or (1,)

    def dtype(self) -> torch.dtype:
        """Type of the first floating-point tensor that is no scale."""
        for key in self._where:
            if (dtype := self._stored_dtype(key)) in _DTYPES and "_scale" not in key.rpartition(".")[2]:
                return _DTYPES[dtype]
        raise CheckpointError("the checkpoint holds no floating-point tensor.")

    def _stored_dtype(self, key: str) -> str:
        return self._where[key].dtypes[key]

    def check(
        self,
        architecture: Architecture,
        config: PreTrainedConfig,
        *,
        head: bool = True,
        ignored: Iterable[str] = (),
    ) -> None:
        """Compare the headers of the files with what the config says: every tensor there, of its shape, and no other.

        Args:
            architecture (`Architecture`): Table of the parent.
            config (`PreTrainedConfig`): The parent's stock config.
            head (`bool`, *optional*, defaults to `True`): `False` if what only the causal model has may be missing.
            ignored (`Iterable[str]`, *optional*):
                Patterns of further names that may be there, as the stock class's `_keys_to_ignore_on_load_unexpected`.

        Raises:
            `CheckpointError`: names the first tensors that are missing, unknown, of another shape or not floating point.
        """
        self._refuse_far_off(architecture, config, self._held(architecture, config))
        problems: list[str] = []
        known: set[str] = set()
        for rule, stored, required in self._expected(architecture, config, head):
            known.update(key for key, _ in stored)
            if required:
                problems += self._problems(rule, stored)
        strange = self._where.keys() - known
        self.ignored = ignored_names(strange, ignored)
        silently = (ROTARY, OF_ACTIVATIONS) if self.encodings else (ROTARY,)
        unknown = sorted(strange - set(self.ignored) - set(ignored_names(strange, silently)))
        problems += [f"{key} belongs to no part of this {architecture.model_type}" for key in unknown]
        if problems:
            raise CheckpointError(
                f"the weights do not fit the config ({len(problems)} of the tensors): {'; '.join(problems[:5])}"
                + (" ..." if len(problems) > 5 else "")
                + ". Nothing was loaded; the checkpoint is incomplete or its config.json belongs to other weights."
            )

    def _problems(self, rule: TensorRule, stored: Shapes) -> Iterator[str]:
        for key, shape in stored:
            if key not in self._where:
                yield f"{key} is missing"
            elif self._stored_shape(key) != shape:
                yield f"{key} is {self._stored_shape(key)} in the file, the config says {shape}"
            elif self._stored_dtype(key) not in (rule.dtypes or _DTYPES):
                yield f"{key} is stored as {self._stored_dtype(key)}, not as {', '.join(rule.dtypes or _DTYPES)}"
        types = {self._stored_dtype(key) for key, _ in stored if key in self._where}
        if len(types) > 1:
            yield f"the parts of {rule.name} are stored as {' and '.join(sorted(types))}"

    def encoding_of(self, piece: Piece, architecture: Architecture) -> Encoding | None:
        """What a weight of the parent is stored in, by the names and types of what is there; `None` if it is stored whole, or not at all."""
        for encoding in ENCODINGS.values():
            codes, scale, *_ = companions(self._as_stored(piece, encoding, architecture), encoding)
            try:
                code_name, scale_name = (self._sources(part, architecture)[0][0] for part in (codes, scale))
            except ElasticConfigError:  # it is no whole number of blocks
                continue
            if code_name not in self or self._stored_dtype(code_name) not in codes.rule.dtypes:
                continue
            shapes = [self._where[name].shapes[name] for name in (code_name, scale_name) if name in self]
            # One scale for a matrix has no dimension for its rows.
            per_row = len({len(shape) for shape in shapes}) == 1
            if encoding.format != "fp8" or per_row == (encoding.name == "fp8"):
                return encoding
        return None

    def check_scales(
        self, architecture: Architecture, config: PreTrainedConfig, submodel: Submodel, *, head: bool = True
    ) -> None:
        """Read the scales of all weights of a submodel that are stored in few bits, and compare them with what scales can be.

        Raises:
            `CheckpointError`: one is 0, negative, NaN or infinite. Of the scales of blocks single ones may be 0, with codes that are, too.
        """
        for piece in pieces(architecture, config, submodel):
            encoding = self.encodings.get(piece.rule.stored.name)
            if encoding is None or piece.copy_of or not (head or is_base(piece.rule.name, architecture)):
                continue
            for part in list(companions(self._as_stored(piece, encoding, architecture), encoding))[1:]:
                if wrong := wrong_scales(self._part(part, architecture)[...]):
                    raise CheckpointError(
                        f"{part.rule.name} holds scales that are {wrong}; no weight was decoded. The file is damaged, or was written by a program "
                        "that failed: fetch or quantise it again."
                    )

    def refuse_unequal(self, architecture: Architecture, config: PreTrainedConfig, submodel: Submodel) -> None:
        """Refuse experts whose matrices are stored in parts with scales of their own, where codes are kept: the live matrix has one for all of it.

        Raises:
            `CheckpointError`: names the first.
        """
        for piece in pieces(architecture, config, submodel):
            encoding = self.encodings.get(piece.rule.stored.name)
            if encoding is None or piece.rule.coded is None:
                continue
            *_, last = companions(self._as_stored(piece, encoding, architecture), encoding)
            if not last.rule.parted or encoding.companions[-1].rows:
                continue
            scales = self._part(last, architecture)[...]
            if not (scales == scales[:, :1]).all():
                raise CheckpointError(
                    f"the parts of {piece.rule.name} ({', '.join(map(str, last.rule.segments))}) are stored with scales of their own, and here it is one "
                    "matrix, with one. Load the checkpoint decoded (packed=False), and quantise that."
                )

    def _held(self, architecture: Architecture, config: PreTrainedConfig) -> Submodel:
        """The submodel that the files should hold."""
        return architecture.full(config)

    def _refuse_far_off(self, architecture: Architecture, config: PreTrainedConfig, submodel: Submodel) -> None:
        """Refuse files that hold less than half of the numbers that a config says, before its tensors are gone through one by one.

        A damaged config can have a hundred thousand experts.

        Raises:
            `CheckpointError`: says both.
        """
        stored = stored_pieces(architecture, config, submodel, self.encodings)
        said = sum(math.prod(piece.shape) for piece in stored if not piece.copy_of)
        held = sum(math.prod(file.shapes[key]) for key, file in self._where.items())
        if said > 2 * held + _SLACK:
            raise CheckpointError(
                f"the weights do not fit the config: it says {said:,} numbers, the files hold {held:,}. Nothing was loaded; the checkpoint is "
                "incomplete or its config.json belongs to other weights."
            )

    def _expected(
        self, architecture: Architecture, config: PreTrainedConfig, head: bool
    ) -> Iterator[tuple[TensorRule, Shapes, bool]]:
        """Every tensor that may be in the files: what it is stored as, and whether it has to be there."""
        for piece in self._stored_pieces(architecture, config):
            required = not piece.copy_of and (head or is_base(piece.rule.name, architecture))
            sources, rule = self._sources(piece, architecture), self._under(piece.rule, architecture)
            whole = len(sources) == len(sources[0]) == 1 and sources[0][0] in stored_names(rule, architecture)
            shapes = [piece.shape] if whole else piece.rule.stored_shapes(piece.full)
            if piece.copy_of:  # some files have a tensor that layers share under the name of each
                yield piece.rule, [(name, piece.shape) for name in stored_names(piece.rule, architecture)], False
            yield piece.rule, [pair for names in sources for pair in self._shaped(names, shapes)], required

    def _stored_pieces(self, architecture: Architecture, config: PreTrainedConfig) -> Iterator[Piece]:
        """Everything of the parent, as what it is in the files."""
        for piece in pieces(architecture, config, architecture.full(config)):
            encoding = self.encodings.get(piece.rule.stored.name)
            yield from companions(self._as_stored(piece, encoding, architecture), encoding)

    def _as_stored(self, piece: Piece, encoding: Encoding | None, architecture: Architecture) -> Piece:
        """A weight under the names that the files have: those that other programs want where it is quantised (`TensorRule.coded`), if these are there."""
        if piece.rule.coded is None:
            return piece
        other = replace(piece, rule=replace(piece.rule, disk=piece.rule.coded))
        return other if self._sources(next(companions(other, encoding)), architecture)[0][0] in self else piece

    def _shaped(self, names: Names, shapes: list[tuple[int, ...]]) -> Shapes:
        """Names with their shapes: segments may be cut into equal parts, which stock classes save, whatever they were loaded as."""
        if len(names) > 1:
            even = _even([shape[0] for shape in shapes])
            if [self._stored_shape(name)[:1] for name in names if name in self] == [(length,) for length in even]:
                shapes = [(length, *shape[1:]) for length, shape in zip(even, shapes, strict=True)]
        return list(zip(names, shapes, strict=True))

    def lazy_slice(
        self,
        architecture: Architecture,
        config: PreTrainedConfig,
        submodel: Submodel,
        *,
        head: bool = True,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Readable]:
        """The submodel as a state dict of unread tensors under the live model's names; encoded weights are decoded when they are read. Call `check` first.

        Whole tensors are read as well, where the stock loader maps the file: there they start at any multiple of 8 bytes, and rows that
        start off a cache line take up to 15 % longer to multiply by, with every token. Nor does a model depend on files after loading.

        Args:
            architecture (`Architecture`): Table of the parent.
            config (`PreTrainedConfig`): The parent's stock config.
            submodel (`Submodel`): What to keep.
            head (`bool`, *optional*, defaults to `True`): `False` leaves out what only the causal model has.
            dtype (`torch.dtype`, *optional*): What encoded weights are decoded into, with one rounding; defaults to the type of other weights.
        """
        return dict(self._parts(architecture, config, submodel, head, dtype))

    def extents(
        self, architecture: Architecture, config: PreTrainedConfig, submodel: Submodel, *, head: bool = True
    ) -> dict[Path, list[Run]]:
        """Per file the ranges of bytes that `lazy_slice` of the same arguments reads."""
        ranges: dict[Path, list[Run]] = {}
        for _, part in self._parts(architecture, config, submodel, head, None):
            for block in part.leaves():
                ranges.setdefault(block.file.path, []).extend(block.extent)
        return ranges

    def _parts(
        self,
        architecture: Architecture,
        config: PreTrainedConfig,
        submodel: Submodel,
        head: bool,
        dtype: torch.dtype | None,
    ) -> Iterator[tuple[str, Readable]]:
        for piece in pieces(architecture, config, submodel):
            if piece.copy_of or not (head or is_base(piece.rule.name, architecture)):
                continue
            encoding = self.encodings.get(piece.rule.stored.name)
            if encoding is None:
                yield piece.target.name, self._part(piece, architecture)
            else:
                yield piece.target.name, self._decoded(piece, architecture, encoding, dtype or self.dtype())

    def stored_parts(
        self, architecture: Architecture, config: PreTrainedConfig, submodel: Submodel
    ) -> Iterator[Readable]:
        """Everything that a submodel is in the files."""
        for piece in pieces(architecture, config, submodel):
            if not piece.copy_of:
                encoding = self.encodings.get(piece.rule.stored.name)
                for part in companions(self._as_stored(piece, encoding, architecture), encoding):
                    yield self._part(part, architecture)

    def coded_slice(
        self, architecture: Architecture, config: PreTrainedConfig, submodel: Submodel, *, head: bool = True
    ) -> dict[str, Readable]:
        """As `lazy_slice`, but with the companions of encoded weights as they are stored, under their live names. Call `refuse_unequal` first."""
        return {
            piece.target.name: self._part(piece, architecture)
            for piece in stored_pieces(architecture, config, submodel, self.encodings)
            if not piece.copy_of and (head or is_base(piece.rule.name, architecture))
        }

    def matrices(self, piece: Piece, architecture: Architecture) -> Callable[..., Block | Joined]:
        """What gives a part of what is kept of a tensor, not read yet: of one expert, by its number in the parent, if that is given, and of some of
        its rows (ranges in the parent) if those are."""
        sources, runs = self._sources(piece, architecture), piece.runs

        def at(expert: int | None = None, rows: list[Run] | None = None) -> Block | Joined:
            outer, inner = ([], runs) if expert is None else ([[(expert, expert + 1)]], runs[1:])
            return self.block(sources, [*outer, inner[0] if rows is None else rows, *inner[1:]])

        return at

    def _part(self, piece: Piece, architecture: Architecture) -> Block | Joined:
        return self.block(self._sources(piece, architecture), piece.runs)

    def _decoded(self, piece: Piece, architecture: Architecture, encoding: Encoding, dtype: torch.dtype) -> Decoded:
        piece = self._as_stored(piece, encoding, architecture)
        stored = [(self._sources(part, architecture), part.runs) for part in companions(piece, encoding)]

        def at(index: int | None) -> list[Readable]:
            """The companions, or those of one expert."""
            first = [] if index is None else [[(index, index + 1)]]
            return [self.block(sources, [*first, *runs[len(first) :]]) for sources, runs in stored]

        return decoded(piece, encoding, at, dtype)

    def block(self, sources: Sequence[Names], runs: list[list[Run]], places: Places | None = None) -> Block | Joined:
        """A part of a tensor of the parent, not read yet.

        Args:
            sources (`list[tuple[str, ...]]`): Names under which it is stored: one entry, or one per index of its first dimension, each with
                one name, or those of tensors that follow each other along the next dimension.
            runs (`list[list[tuple[int, int]]]`): What to keep along each dimension.
            places (`list[list[tuple[int, int]]]`, *optional*): Where that belongs, as [`Block`] takes it.
        """
        shape, into = shape_of(runs), places or [None for _ in runs]
        if len(runs) == len(self._stored_shape(sources[0][0])):
            blocks = [self._stored_block(*part) for part in self._segments(sources[0], runs, into)]
            return blocks[0] if len(sources[0]) == 1 else Joined(shape, blocks)
        (experts, *inner), (rows, *others) = runs, into
        blocks = [
            self._stored_block(name, [[(0, 1)], *here], [[(new, new + 1)], *there])
            for expert, new in zip(indices_of(experts), indices_of(rows or [(0, shape[0])]), strict=True)
            for name, here, there in self._segments(sources[expert], inner, others)
        ]
        return Joined(shape, blocks)

    def _segments(
        self, names: Names, runs: list[list[Run]], places: Places
    ) -> Iterator[tuple[str, list[list[Run]], Places]]:
        """Tensors that follow each other along the first dimension: what is kept of each, and where that belongs."""
        if len(names) == 1:
            yield names[0], runs, places
            return
        start = 0
        for name in names:
            stop = start + self._stored_shape(name)[0]
            if pairs := list(clipped(runs[0], places[0], start, stop)):
                here, there = ([pair[i] for pair in pairs] for i in range(2))
                yield name, [here, *runs[1:]], [there, *places[1:]]
            start = stop

    def _stored_block(self, key: str, runs: list[list[Run]], places: Places) -> Block:
        """Part of one stored tensor, which may lack the first of the dimensions: one expert of a stack."""
        file, shape = self._where[key], self._stored_shape(key)
        full = (1,) * (len(runs) - len(shape)) + shape
        return Block(file, key, full, (_DTYPES | _CODES)[file.dtypes[key]], runs, places)

    def _sources(self, piece: Piece, architecture: Architecture) -> list[Names]:
        """Names under which a tensor of the parent is stored, whatever is kept of it: one entry, or one per expert, each with a name per segment."""
        rule = self._under(piece.rule, architecture)
        whole = self._present(stored_names(rule, architecture))
        if whole not in self and rule.coded is not None and not rule.apart:
            one_by_one = self._sources(replace(piece, rule=replace(rule, disk=rule.coded)), architecture)
            return one_by_one if one_by_one[0][0] in self else [(whole,)]
        if whole in self or not rule.apart:  # all are stored as in the live model after save_original_format=False
            return [(whole,)]
        return [
            tuple(self._present(stored_names(rule, architecture, expert, segment)) for segment in rule.segments)
            for expert in (range(rule.shape(piece.full)[0]) if rule.stacked else (None,))
        ]

    def _under(self, rule: TensorRule, architecture: Architecture) -> TensorRule:
        """Of a tensor that layers share, the rule whose name the files have; stock classes write the first."""
        each = (replace(rule, layer=layer) for layer in rule.shared_by)
        return next((one for one in each if self._present(stored_names(one, architecture)) in self), rule.stored)

    def _present(self, names: Names) -> str:
        return next((name for name in names if name in self), names[0])


def clipped(runs: Sequence[Run], places: Sequence[Run] | None, start: int, stop: int) -> Iterator[tuple[Run, Run]]:
    """What lies between two indices, counted from the first of them, and where it belongs."""
    into = places or [(place.start, place.stop) for _, place in places_of(runs)]
    for (first, last), (target, _) in zip(runs, into, strict=True):
        low, high = max(first, start), min(last, stop)
        if low < high:
            yield (low - start, high - start), (target + low - first, target + high - first)


def _even(lengths: Sequence[int]) -> list[int]:
    """As many lengths with the same sum, as `torch.chunk` makes them."""
    part = -(-sum(lengths) // len(lengths))
    return [max(0, min(part, sum(lengths) - i * part)) for i in range(len(lengths))]


_CODES = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
