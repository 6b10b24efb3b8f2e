"""Parts of tensors read from files equal parts of tensors cut in memory, whatever is kept."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_elastic.architectures.axes import take
from hf_elastic.errors import CheckpointError
from hf_elastic.storage import reading, rows, tensor_file
from hf_elastic.storage.tensor_file import TensorFile

CASES = {
    "whole vector": ((7,), [[(0, 7)]]),
    "vector in two runs": ((7,), [[(0, 2), (4, 7)]]),
    "rows": ((9, 5), [[(0, 4)], [(0, 5)]]),
    "columns": ((9, 5), [[(0, 9)], [(0, 3)]]),
    "segments both ways": ((9, 8), [[(0, 4), (6, 8)], [(0, 2), (4, 6)]]),
    "convolution": ((9, 1, 4), [[(0, 2), (5, 6)], [(0, 1)], [(0, 4)]]),
    "fused gate and up": ((6, 8, 5), [[(0, 4)], [(0, 2), (4, 6)], [(0, 3)]]),
    "three dimensions in runs": ((6, 8, 6), [[(1, 2), (4, 5)], [(0, 2), (4, 6)], [(0, 1), (3, 5)]]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_block_is_the_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, dtype: torch.dtype, chunk: int
) -> None:
    for size in ("_BAND_BYTES", "_ROW_BYTES"):
        monkeypatch.setattr(rows, size, chunk)
    shape, runs = CASES[case]
    tensors = {name: torch.randn(shape).to(dtype) for name in ("a", "b")}
    save_file({"before": torch.ones(3), **tensors}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    blocks = [reading.Block(file, name, shape, dtype, runs) for name in tensors]
    expected = [take(tensor, runs) for tensor in tensors.values()]
    for block, part in zip(blocks, expected, strict=True):
        assert torch.equal(block[...], part)
    one = [[(0, 1)], *runs]
    stack = [
        reading.Block(file, name, (1, *shape), dtype, one, [[(i, i + 1)], *(None for _ in runs)])
        for i, name in enumerate(tensors)
    ]
    assert torch.equal(reading.Joined((2, *expected[0].shape), stack)[...], torch.stack(expected))
    if len(shape) > 1:
        assert stack[0].extent == blocks[0].extent, "of an expert, too, only the rows that are kept"


PARTS = {
    "columns": ((9, 8), [((9, 3), [(0, 9)], [(0, 3)]), ((9, 5), [(0, 9)], [(3, 8)])]),
    "corner, strip and rows": (
        (9, 8),
        [((6, 3), [(0, 6)], [(0, 3)]), ((6, 5), [(0, 6)], [(3, 8)]), ((3, 8), [(6, 9)], [(0, 8)])],
    ),
    "of experts": ((1, 4, 6), [((4, 2), [(0, 4)], [(4, 6)]), ((4, 4), [(0, 4)], [(0, 4)])]),
    "experts in parts": (
        (5, 4, 6),
        [
            ((5, 4, 2), None, [(0, 4)], [(4, 6)]),
            ((5, 3, 4), None, [(0, 3)], [(0, 4)]),
            ((5, 1, 4), None, [(3, 4)], [(0, 4)]),
        ],
    ),
    "inside a stack": ((5, 4, 6), [((5, 1, 6), None, [(3, 4)], [(0, 6)]), ((5, 3, 6), None, [(0, 3)], [(0, 6)])]),
}


@pytest.mark.parametrize("band", [1, 80, 1 << 20])
@pytest.mark.parametrize("how", ["scattered", "in bits", "cut short", "missing", "copied"])
@pytest.mark.parametrize("case", PARTS)
def test_rows_are_put_together_from_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, how: str, band: int
) -> None:
    """Whole rows that lie apart in memory are read there at once, in as many segments as the system takes; if that fails, copied."""
    for size in ("_BAND_BYTES", "_ROW_BYTES", "_AHEAD_BYTES"):
        monkeypatch.setattr(rows, size, band)
    monkeypatch.setattr(tensor_file, "_SCATTERED_BYTES", 1 << 20 if how == "copied" else 1)
    monkeypatch.setattr(tensor_file, "_MOST_SEGMENTS", 2 if how == "in bits" else 1024)
    copied, cut = [], rows._Filling._cut
    monkeypatch.setattr(rows._Filling, "_cut", lambda *args: (copied.append(1), cut(*args)))
    if how == "cut short":  # as by a signal
        monkeypatch.setattr(tensor_file, "_preadv", lambda descriptor, segments, count, offset: 5)
    if how == "missing":
        monkeypatch.setattr(tensor_file, "_preadv", None)
    size, parts = PARTS[case]
    tensor = torch.randn(size)
    blocks = []
    for i, (shape, *places) in enumerate(parts):
        places = [[(0, 1)], *places] if len(places) < len(size) else [place or [(0, size[0])] for place in places]
        index = tuple(slice(*place[0]) for place in places)
        path = tmp_path / f"{i}.safetensors"
        save_file({"before": torch.ones(i + 1), "a": tensor[index].reshape(shape).contiguous()}, path)
        whole = (1,) * (len(size) - len(shape)) + shape
        runs = [[(0, length)] for length in whole]
        blocks.append(reading.Block(TensorFile(path), "a", whole, torch.float32, runs, places))
    assert torch.equal(reading.Joined(size, blocks)[...], tensor)
    lie_apart = case != "inside a stack" or band > 96  # an expert at a time is filled with whole rows
    assert bool(copied) == (lie_apart and (how in ("cut short", "missing", "copied") or sys.platform != "linux"))


def test_systems_without_positioned_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("preadv", "posix_fadvise"):
        monkeypatch.delattr(tensor_file.os, name, raising=False)
    monkeypatch.setattr(tensor_file, "_madvise", None)
    monkeypatch.setattr(tensor_file, "_preadv", None)
    tensor = torch.randn(9, 5)
    save_file({"a": tensor}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    assert torch.equal(reading.Block(file, "a", (9, 5), torch.float32, [[(0, 4)], [(0, 3)]])[...], tensor[:4, :3])


def test_the_next_band_is_announced_before_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read was announced just before, and no more than the band after it."""
    monkeypatch.setattr(rows, "_BAND_BYTES", 40)
    monkeypatch.setattr(rows, "_AHEAD_BYTES", 80)
    events: list[tuple[str, int, int]] = []
    read, tensor = TensorFile.read_into, torch.randn(12, 5)
    save_file({"a": tensor}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    start = file.offsets["a"]
    monkeypatch.setattr(TensorFile, "announce", lambda self, at, size: events.append(("announce", at - start, size)))
    monkeypatch.setattr(
        TensorFile,
        "read_into",
        lambda self, target, at: (events.append(("read", at - start, target.nbytes)), read(self, target, at)),
    )
    assert torch.equal(reading.Block(file, "a", (12, 5), torch.float32, [[(0, 12)], [(1, 4)]])[...], tensor[:, 1:4])
    row = 20
    bands = [("announce", i * row, 4 * row) for i in (0, 4, 8)]
    reads = [("read", i * row, 2 * row) for i in range(0, 12, 2)]
    assert events == [*bands[:2], *reads[:2], bands[2], *reads[2:]]


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(9, 5)}, path)
    file = TensorFile(path)
    with path.open("r+b") as opened:
        opened.truncate(path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="ended while it was read"):
        reading.Block(file, "a", (9, 5), torch.float32, [[(0, 9)], [(0, 4)]])[...]
