"""Parts of remote files: of a stock-layout checkpoint on the Hub only the rows that a size needs are fetched, by HTTP range.

A file of which only parts are there has no place in the Hub's ordinary cache. It lies among the cached assets (`HF_ASSETS_CACHE`, or `assets`
in `cache_dir`), sparse and as long as the whole, with a record of the ranges that have arrived. The next load, of this size or another,
fetches what the record lacks, so an interrupted one goes on where it stopped. A file that is needed nearly whole goes into the ordinary
cache as ever.

Where the repository has checksums (see [`hf_elastic.storage.checksums`]), whole blocks are fetched, and only those that are right are kept and
recorded. Where nothing is missing nothing is written, not even a lock, so a cache may be read-only.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from huggingface_hub import cached_assets_path, get_hf_file_metadata, hf_hub_url, is_offline_mode
from huggingface_hub.utils import (
    EntryNotFoundError,
    WeakFileLock,
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
    tqdm,
)

from ..architectures.axes import Run, without
from ..errors import CheckpointError, UnreachableError
from . import retries
from .checksums import CHECKSUMS_NAME, Checksums
from .sources import commit_of

MOSTLY = 0.8
"""Share of a file's bytes above which it is fetched whole, into the ordinary cache."""
_GAP = 1 << 16  # what is cheaper to fetch along than to ask for twice
_PIECE = 1 << 24  # bytes of one request
_WORKERS = 8
_SECONDS = 2.0  # between two writes of the record
_SECONDS_OF_SILENCE = 30.0  # after which a connection is given up
_LARGEST_HEADER = 100_000_000  # as safetensors itself has it


class RangesRefused(CheckpointError):
    """Whole files have to be fetched: the server sends no others, or parts could not be checked."""


class _Damaged(Exception):
    """A block arrived that is not what its checksum says."""


class PartialFile:
    """A safetensors file of a Hub repository of which parts are on this machine. Its header always is.

    Args:
        repo (`str`): Repository id.
        name (`str`): File.
        hub (`dict[str, Any]`): `revision` (a commit, or one that was resolved), `token`, `cache_dir`, `subfolder`, `local_files_only`.
        checksums (`Checksums`, *optional*): Of its blocks. Without, what is fetched is not checked.
        verify (`bool`, *optional*, defaults to `False`): Check also what is there already, and fetch again what has changed since it arrived.

    Raises:
        `FileNotFoundError`: the repository has no such file, or offline it is not known.
        `RangesRefused`: the server ignores ranges, or the checksums are of another file.
        `CheckpointError`: the header is damaged, or the connection failed.
    """

    def __init__(
        self,
        repo: str,
        name: str,
        hub: Mapping[str, Any],
        checksums: Checksums | None = None,
        *,
        verify: bool = False,
    ):
        self.name = f"{hub['subfolder']}/{name}" if hub.get("subfolder") else name
        self._repo, self._token = repo, hub.get("token")
        self._offline = bool(hub.get("local_files_only")) or is_offline_mode()
        self._commit = str(commit_of(hub))
        self._checksums = checksums
        self._url: str | None = None
        self._lock = threading.Lock()
        assets = Path(hub["cache_dir"]) / "assets" if hub.get("cache_dir") else None
        try:
            self._folder = cached_assets_path("hf_elastic", repo, "parts", assets_dir=assets)
        except OSError as error:  # a read-only cache without one
            self._ask()  # says so if the repository has no such file
            raise self._not_kept(error) from error
        entry = self._folder / f"{self._commit}-{self.name.replace('/', '--')}.json"
        try:
            known = _read(entry)
            self.etag, self.size = str(known["etag"]), int(known["size"])
        except (OSError, ValueError, KeyError, TypeError):
            self._ask()
            with self._writing():
                _write(entry, {"etag": self.etag, "size": self.size})
        if checksums is not None and checksums.size != self.size:
            raise RangesRefused(f"{CHECKSUMS_NAME} of {repo} belongs to another {self.name}.")
        self.path = self._folder / f"{self.etag}.safetensors"
        self._record = self._folder / f"{self.etag}.json"
        self._have, checked = self._recorded()
        if checksums is not None and self._have and (verify or not checked):
            self._check_again(checksums, checked)
        self._have_header()

    def _have_header(self) -> None:
        self.fetch([(0, 8)], quiet=True)
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(_LARGEST_HEADER, self.size - 8):
            with self._writing():
                self._record.unlink(missing_ok=True)
            raise CheckpointError(
                f"{self.name} of {self._repo} says that its header has {length:,} bytes, of {self.size:,} of the whole file: it is damaged, or "
                "no safetensors file."
            )
        self.fetch([(8, 8 + length)], quiet=True)

    def missing(self, ranges: Sequence[Run]) -> int:
        """How many bytes have to be fetched to have some ranges."""
        return sum(stop - start for start, stop in self._lacking(ranges))

    def fetch(self, ranges: Sequence[Run], quiet: bool = False) -> None:
        """Have these ranges of bytes, shown as a progress bar.

        Args:
            quiet (`bool`, *optional*, defaults to `False`): Without the bar.

        Raises:
            `CheckpointError`: offline, the connection failed for good, or a block is damaged. What arrived stays.
        """
        if not self._lacking(ranges):
            return
        with self._writing():
            recorded, checked = self._recorded()  # another process may have been at it
            if checked or self._checksums is None:
                self._have = _merged([*self._have, *recorded])
            self._fetch(self._lacking(ranges), quiet)

    # -- how -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Alone with the files of this one."""
        try:
            with WeakFileLock(self._folder / f"{self.etag}.lock"):
                yield
        except CheckpointError:
            raise
        except OSError as error:
            raise self._not_kept(error) from error

    def _not_kept(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"parts of {self.name} of {self._repo} cannot be kept in the cache ({error}); make room, or give a cache_dir that can be written to."
        )

    def _lacking(self, ranges: Sequence[Run]) -> list[Run]:
        wanted = ranges if self._checksums is None else self._checksums.covering(ranges)
        return without(_merged(wanted), self._have)

    def _fetch(self, ranges: Sequence[Run], quiet: bool) -> None:
        pieces = list(_pieces(ranges))
        if not pieces:
            return
        total = sum(stop - start for start, stop in pieces)
        if self._offline:
            raise CheckpointError(
                f"{total:,} bytes of {self.name} of {self._repo} are needed and not in the cache, and this is offline; load this budget once "
                "with a connection."
            )
        with self.path.open("ab") as file:
            file.truncate(self.size)  # sparse where the system can
        self._noted, self._stopped = monotonic(), False
        bar = tqdm(total=total, unit="B", unit_scale=True, desc=self.name, disable=quiet or None)
        with self.path.open("r+b", buffering=0) as file, bar, ThreadPoolExecutor(_WORKERS) as pool:
            try:
                for done in [pool.submit(self._get, start, stop, file, bar) for start, stop in pieces]:
                    done.result()
            finally:
                self._stopped = True  # after an error or an interrupt the others end, too
                pool.shutdown(cancel_futures=True)
                self._note(file)

    def _get(self, start: int, stop: int, file: Any, bar: Any) -> None:
        """Fetch one range; a broken connection is taken up where it broke."""
        tries, damaged = retries.TRIES, -1
        while start < stop and not self._stopped:
            before = start
            try:
                for data in self._checked(start, self._stream(start, stop)):
                    if self._stopped:
                        return
                    with self._lock:
                        file.seek(start)
                        _write_all(file, data)
                        self._have.append((start, start + len(data)))
                        bar.update(len(data))
                        if monotonic() - self._noted > _SECONDS:
                            self._note(file)
                    start += len(data)
                if start < stop:
                    raise OSError(f"the server sent {start - before} of {stop - before} bytes")
            except CheckpointError:
                raise
            except _Damaged as error:
                if damaged == start:
                    raise CheckpointError(
                        f"{self.name} of {self._repo} arrived damaged, twice: the bytes from {start:,} on are not what {CHECKSUMS_NAME} says. "
                        "Either the connection changes them, or the checksums are of another save; verify=True and force_download=True "
                        "fetches whole files, which are compared with the Hub's sha256. If another program saved over the repository, its "
                        f"{CHECKSUMS_NAME} belongs to an earlier save: delete it from the repository, or save there with this package."
                    ) from error
                damaged, self._url = start, None
            except Exception as error:
                if isinstance(error, OSError) and error.errno is not None:  # of this machine, such as a full disk
                    raise
                tries = retries.TRIES if start > before else tries - 1
                self._url = None  # signed addresses expire
                if tries == 0:
                    raise CheckpointError(
                        f"{self.name} of {self._repo} could not be fetched: {error}. What arrived is kept; load again to go on."
                    ) from error
                sleep(retries.WAIT * 2 ** (retries.TRIES - tries))

    def _checked(self, start: int, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """What arrives, in whole blocks that are right, where there are checksums."""
        if self._checksums is None:
            yield from chunks
            return
        waiting = b""
        for data in chunks:
            waiting, done, fits = waiting + data, 0, True
            while fits and 0 < (size := self._checksums.end(start) - start) <= len(waiting) - done:
                fits = self._checksums.fit(start, waiting[done : done + size])
                if fits:
                    start, done = start + size, done + size
            if done:
                yield waiting[:done]
            if not fits:
                raise _Damaged
            waiting = waiting[done:]

    def _stream(self, start: int, stop: int) -> Iterator[bytes]:
        url, headers = self._address()
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        again: dict[str, Any] = {
            "retry_on_exceptions": (),
            "retry_on_status_codes": (429,),
        }  # what else passes, the caller tries
        with http_stream_backoff("GET", url, headers=headers, timeout=_SECONDS_OF_SILENCE, **again) as response:
            hf_raise_for_status(response)
            if (
                response.status_code != 206
                or response.headers.get("Content-Range") != f"bytes {start}-{stop - 1}/{self.size}"
            ):
                raise RangesRefused(
                    f"the server does not send parts of {self.name} of {self._repo} as they were asked for."
                )
            left = stop - start
            for data in response.iter_bytes():
                yield data[:left]
                left -= len(data)

    def _address(self) -> tuple[str, dict[str, str]]:
        """Where the contents are; a token does not go to another host than the Hub's."""
        with self._lock:
            if self._url is None:
                self._ask()
            hub = self._url == self._resolve
            return str(self._url), build_hf_headers(token=self._token if hub else False)

    @property
    def _resolve(self) -> str:
        return hf_hub_url(self._repo, self.name, revision=self._commit)

    def _ask(self) -> None:
        """Etag, size and address from the Hub."""
        if self._offline:
            raise FileNotFoundError(f"{self.name} of {self._repo} is not in the cache, and this is offline.")
        try:
            about = get_hf_file_metadata(self._resolve, token=self._token, retry_on_errors=True)
        except EntryNotFoundError as error:
            raise FileNotFoundError(f"{self._repo} has no {self.name}.") from error
        except Exception as error:  # the client lets errors of its HTTP library through
            kind = UnreachableError if retries.passes(error) else CheckpointError
            raise kind(f"{self.name} of {self._repo} cannot be asked for: {error}") from error
        if not about.etag or not about.size or os.path.basename(about.etag) != about.etag:
            raise RangesRefused(f"the server does not say what {self.name} of {self._repo} is.")
        self.etag, self.size, self._url = about.etag, about.size, about.location

    def _recorded(self) -> tuple[list[Run], bool]:
        """The ranges that are there, and whether they were checked: what the record says, if the file that it is about is there."""
        try:
            if self.path.stat().st_size == self.size:
                record = _read(self._record)
                return _merged([(int(a), int(b)) for a, b in record["ranges"]]), bool(record["checked"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return [], True

    def _check_again(self, checksums: Checksums, checked: bool) -> None:
        """Forget what is not on the disk as its checksums say."""
        before, self._have = self._have, self._right(self._have, checksums)
        if self._have != before or not checked:
            with self._writing(), self.path.open("r+b") as file:
                self._note(file)

    def _right(self, ranges: Sequence[Run], checksums: Checksums) -> list[Run]:
        """The whole blocks of some ranges that are on the disk as their checksums say."""
        right = []
        with self.path.open("rb") as file:
            for start, stop in ranges:
                start = -(-start // checksums.block) * checksums.block
                file.seek(start)
                while start < stop and (end := checksums.end(start)) <= stop:
                    if checksums.fit(start, file.read(end - start)):
                        right.append((start, end))
                    start = end
        return _merged(right)

    def _note(self, file: Any) -> None:
        """Write the record, after what it is about is on the disk."""
        os.fsync(file.fileno())
        self._have = _merged(self._have)
        _write(self._record, {"ranges": self._have, "checked": self._checksums is not None})
        self._noted = monotonic()


def _merged(ranges: Sequence[Run], gap: int = 0) -> list[Run]:
    """Ranges in order, joined where they touch or no more than `gap` lies between them."""
    merged: list[Run] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _pieces(ranges: Sequence[Run]) -> Iterator[Run]:
    for start, stop in _merged(ranges, _GAP):
        yield from ((at, min(at + _PIECE, stop)) for at in range(start, stop, _PIECE))


def _write_all(file: Any, data: bytes) -> None:
    """An unbuffered file may take less than it is given, on a disk that is nearly full."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _write(path: Path, value: Any) -> None:
    """Write a value with a checksum, as one damaged digit would make others out of the bytes that are there."""
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    scratch.write_text(json.dumps([value, _sum(value)]), encoding="utf-8")
    os.replace(scratch, path)


def _read(path: Path) -> Any:
    """A value as it was written; `ValueError` for any other."""
    try:
        value, crc = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError from error
    if crc != _sum(value):
        raise ValueError(f"{path} is damaged")
    return value


def _sum(value: Any) -> int:
    return zlib.crc32(json.dumps(value).encode())
