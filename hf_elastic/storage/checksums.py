"""Checksums of the blocks of weight files, so that rows fetched by HTTP range can be checked as whole files are.

Of a whole file the Hub says the sha256; of a part nothing. A save writes `weights.checksums.json` beside the weights, with the
first 8 bytes of the sha256 of every block of every weight file, headers included. It is found by its name, as an index is, and not named in
`config.json`: readers that know nothing of it go on as before, and what a stock program uploads again without it is read unchecked.

It is itself compared with what the Hub says it has, so together they protect what is fetched as well as a whole file is protected: against
damage on the way and in a cache, not against somebody who may write to the repository.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..architectures.axes import Run
from ..errors import CheckpointError
from .files import with_variant
from .json_files import LARGEST_INDEX, read_json

CHECKSUMS_NAME = "weights.checksums.json"
BLOCK_BYTES = 1 << 14
"""Bytes of the smallest blocks: what is fetched is made of whole blocks, so small ones save traffic, and large ones room."""
_MOST_BLOCKS = 1 << 20  # in a larger checkpoint, of larger matrices, blocks are larger; so the file stays below 12 MB
_VERSION = 1
_DIGEST_BYTES = 8
_MOST_BLOCK_BYTES = 1 << 26
_WORKERS = 4
_STALE = "belongs to an earlier save, and another program wrote the weights since: if they are as they have to be, delete {}."
_READ_BYTES = 1 << 24


@dataclass(frozen=True)
class Checksums:
    """Of one file.

    Args:
        size (`int`): Bytes of the file.
        block (`int`): Bytes of a block; the last one may be shorter.
        digests (`bytes`): Of all blocks, one after the other.
    """

    size: int
    block: int
    digests: bytes

    def covering(self, ranges: Sequence[Run]) -> list[Run]:
        """The ranges of whole blocks that some ranges of bytes lie in."""
        size = self.block
        return [
            (start // size * size, min(-(-stop // size) * size, self.size)) for start, stop in ranges if start < stop
        ]

    def end(self, start: int) -> int:
        """Where the block ends that starts there."""
        return min(start + self.block, self.size)

    def fit(self, start: int, data: bytes | bytearray | memoryview) -> bool:
        """Whether this is the block that starts there."""
        at = start // self.block * _DIGEST_BYTES
        return _digest(data) == self.digests[at : at + _DIGEST_BYTES]

    def first_wrong(self, path: Path) -> int | None:
        """Where the first block of a file starts that is another one; `None` if all are right."""
        if path.stat().st_size != self.size:
            return 0
        found = _digests(path, self.block)
        wrong = (at for at in range(0, len(found), _DIGEST_BYTES) if found[at : at + 8] != self.digests[at : at + 8])
        at = next(wrong, None)
        return None if at is None else at // _DIGEST_BYTES * self.block


def write_checksums(folder: Path, variant: str | None = None) -> None:
    """Write the checksums of all weight files in a folder and below it, if there are any."""
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        return
    sizes = [file.stat().st_size for file in files]
    block = BLOCK_BYTES
    while sum(sizes) > block * _MOST_BLOCKS:
        block *= 2
    entries = {
        file.relative_to(folder).as_posix(): {
            "bytes": size,
            "digests": base64.b64encode(_digests(file, block)).decode(),
        }
        for file, size in zip(files, sizes, strict=True)
    }
    written = {"version": _VERSION, "block_bytes": block, "files": entries}
    (folder / with_variant(CHECKSUMS_NAME, variant)).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def read_checksums(path: Path) -> dict[str, Checksums]:
    """The checksums in a file, per weight file.

    Raises:
        `CheckpointError`: it holds no checksums, or those of a newer version.
    """
    written = read_json(path, LARGEST_INDEX)
    try:
        version, block, files = written["version"], written["block_bytes"], dict(written["files"])
        if version == _VERSION:
            return {name: _read_entry(entry, block) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} holds no checksums of weight files ({error!r}); save the checkpoint again."
        ) from error
    raise CheckpointError(
        f"{path} holds checksums of version {version!r}, this hf_elastic reads {_VERSION}; pip install --upgrade hf-elastic."
    )


def has_checksums(folder: str | os.PathLike[str]) -> bool:
    """Whether this is a folder, and a save wrote checksums of its weights into it. What copies weights on compares them then."""
    return Path(folder, CHECKSUMS_NAME).is_file()


def verify_files(folder: Path, files: Sequence[Path], variant: str | None = None) -> None:
    """Compare weight files of a folder with the checksums that were saved with them.

    Raises:
        `CheckpointError`: one is damaged, or there are no checksums of it.
    """
    path = folder / with_variant(CHECKSUMS_NAME, variant)
    known = read_checksums(path) if path.is_file() else {}
    for file in files:
        name = file.relative_to(folder).as_posix()
        if name not in known and path.is_file():
            raise CheckpointError(
                f"{file} cannot be verified: {path.name} does not list it, so it {_STALE.format(path)}"
            )
        if name not in known:
            raise CheckpointError(
                f"{file} cannot be verified: there is no {path.name} with its checksums beside it. Load it without verify=True. "
                "(save_pretrained of an elastic model writes them; exports and plain checkpoints have none.)"
            )
        if (at := known[name].first_wrong(file)) is not None:
            raise CheckpointError(
                f"{file} is damaged from byte {at:,} on: fetch or save it again. Or {path.name} {_STALE.format(path)}"
            )


def _read_entry(entry: Mapping[str, Any], block: int) -> Checksums:
    size, digests = entry["bytes"], base64.b64decode(entry["digests"], validate=True)
    if isinstance(size, bool) or isinstance(block, bool) or not isinstance(size, int) or not isinstance(block, int):
        raise TypeError("sizes are whole numbers")
    if not 0 < block <= _MOST_BLOCK_BYTES or size < 0 or len(digests) != -(-size // block) * _DIGEST_BYTES:
        raise ValueError(f"{len(digests)} bytes of checksums for blocks of {block} of {size} bytes")
    return Checksums(size, block, digests)


def _digests(path: Path, block: int) -> bytes:
    """Of all blocks of a file; hashing and reading let other threads go on."""
    step = max(1, _READ_BYTES // block) * block

    def digests(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            data = memoryview(file.read(step))
        return b"".join(_digest(data[at : at + block]) for at in range(0, len(data), block))

    with ThreadPoolExecutor(_WORKERS) as pool:
        return b"".join(pool.map(digests, range(0, path.stat().st_size, step)))


def _digest(data: bytes | bytearray | memoryview) -> bytes:
    return hashlib.sha256(data).digest()[:_DIGEST_BYTES]
