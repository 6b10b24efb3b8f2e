"""Parts of remote files: of a stock-layout checkpoint on the Hub only the rows that a size needs are fetched, by HTTP range.

A file of which only parts are there has no place in the Hub's ordinary cache. It lies among the cached assets (`HF_ASSETS_CACHE`, or `assets`
in `cache_dir`), sparse and as long as the whole, with a record of the ranges that have arrived. The next load, of this size or another,
fetches what the record lacks, so an interrupted one goes on where it stopped. A file that is needed nearly whole goes into the ordinary
cache as ever.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from huggingface_hub import (
    ResolvedRevision,
    cached_assets_path,
    get_hf_file_metadata,
    hf_hub_url,
    is_offline_mode,
)
from huggingface_hub.utils import (
    EntryNotFoundError,
    WeakFileLock,
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
    tqdm,
)

from .axes import Run, without
from .errors import CheckpointError

MOSTLY = 0.8
"""Share of a file's bytes above which it is fetched whole, into the ordinary cache."""
_GAP = 1 << 16  # what is cheaper to fetch along than to ask for twice
_PIECE = 1 << 24  # bytes of one request
_WORKERS = 8
_TRIES = 5
_WAIT = 0.5  # seconds before the first of them, then twice as long each time
_SECONDS = 2.0  # between two writes of the record
_LARGEST_HEADER = 100_000_000  # as safetensors itself has it


class RangesRefused(CheckpointError):
    """The server sends whole files only."""


class PartialFile:
    """A safetensors file of a Hub repository of which parts are on this machine. Its header always is.

    Args:
        repo (`str`): Repository id.
        name (`str`): File.
        hub (`dict[str, Any]`): `revision` (a commit, or one that was resolved), `token`, `cache_dir`, `subfolder`, `local_files_only`.

    Raises:
        `FileNotFoundError`: the repository has no such file, or offline it is not known.
        `RangesRefused`: the server ignores ranges.
        `CheckpointError`: the header is damaged, or the connection failed.
    """

    def __init__(self, repo: str, name: str, hub: Mapping[str, Any]):
        self.name = f"{hub['subfolder']}/{name}" if hub.get("subfolder") else name
        self._repo, self._token = repo, hub.get("token")
        self._offline = bool(hub.get("local_files_only")) or is_offline_mode()
        self._commit = str(commit_of(hub))
        assets = Path(hub["cache_dir"]) / "assets" if hub.get("cache_dir") else None
        self._folder = cached_assets_path("hf_elastic", repo, "parts", assets_dir=assets)
        self._url: str | None = None
        self._lock = threading.Lock()
        entry = self._folder / f"{self._commit}-{self.name.replace('/', '--')}.json"
        try:
            known = json.loads(entry.read_text(encoding="utf-8"))
            self.etag, self.size = str(known["etag"]), int(known["size"])
        except (OSError, ValueError, KeyError, TypeError):
            self._ask()
            _write(entry, {"etag": self.etag, "size": self.size})
        self.path = self._folder / f"{self.etag}.safetensors"
        self._record = self._folder / f"{self.etag}.json"
        with WeakFileLock(self._folder / f"{self.etag}.lock"):
            self._have = self._recorded()
            self._fetch([(0, 8)], quiet=True)
            with self.path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_LARGEST_HEADER, self.size - 8):
                self._record.unlink(missing_ok=True)
                raise CheckpointError(
                    f"{self.name} of {repo} says that its header has {length:,} bytes, of {self.size:,} of the whole file: it is damaged, or "
                    "no safetensors file."
                )
            if self.missing([(8, 8 + length)]):
                self._fetch([(8, 8 + length)], quiet=True)
                self._note()

    def missing(self, ranges: Sequence[Run]) -> int:
        """How many bytes of some ranges are not there yet."""
        return sum(stop - start for start, stop in without(_merged(ranges), self._have))

    def fetch(self, ranges: Sequence[Run]) -> None:
        """Have these ranges of bytes, shown as a progress bar.

        Raises:
            `CheckpointError`: offline, or the connection failed for good. What arrived stays.
        """
        with WeakFileLock(self._folder / f"{self.etag}.lock"):
            self._have = self._recorded()  # another process may have been at it
            self._fetch(ranges)

    # -- how -----------------------------------------------------------------------------------------------------------

    def _fetch(self, ranges: Sequence[Run], quiet: bool = False) -> None:
        pieces = list(_pieces(without(_merged(ranges), self._have)))
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
                if not quiet:
                    self._note(file)

    def _get(self, start: int, stop: int, file: Any, bar: Any) -> None:
        """Fetch one range; a broken connection is taken up where it broke."""
        tries = _TRIES
        while start < stop and not self._stopped:
            before = start
            try:
                for data in self._stream(start, stop):
                    if self._stopped:
                        return
                    with self._lock:
                        file.seek(start)
                        file.write(data)
                        self._have.append((start, start + len(data)))
                        bar.update(len(data))
                        if monotonic() - self._noted > _SECONDS:
                            self._note(file)
                    start += len(data)
                if start < stop:
                    raise OSError(f"the server sent {start - before} of {stop - before} bytes")
            except CheckpointError:
                raise
            except Exception as error:
                tries = _TRIES if start > before else tries - 1
                self._url = None  # signed addresses expire
                if tries == 0:
                    raise CheckpointError(
                        f"{self.name} of {self._repo} could not be fetched: {error}. What arrived is kept; load again to go on."
                    ) from error
                sleep(_WAIT * 2 ** (_TRIES - tries))

    def _stream(self, start: int, stop: int) -> Iterator[bytes]:
        url, headers = self._address()
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with http_stream_backoff("GET", url, headers=headers, timeout=30, retry_on_exceptions=()) as response:
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
            about = get_hf_file_metadata(self._resolve, token=self._token)
        except EntryNotFoundError as error:
            raise FileNotFoundError(f"{self._repo} has no {self.name}.") from error
        except Exception as error:  # the client lets errors of its HTTP library through
            raise CheckpointError(f"{self.name} of {self._repo} cannot be asked for: {error}") from error
        if not about.etag or not about.size or os.path.basename(about.etag) != about.etag:
            raise RangesRefused(f"the server does not say what {self.name} of {self._repo} is.")
        self.etag, self.size, self._url = about.etag, about.size, about.location

    def _recorded(self) -> list[Run]:
        """The ranges that are there: what the record says, if the file that it is about is there."""
        try:
            if self.path.stat().st_size == self.size:
                return _merged([(int(a), int(b)) for a, b in json.loads(self._record.read_text(encoding="utf-8"))])
        except (OSError, ValueError, TypeError):
            pass
        return []

    def _note(self, file: Any = None) -> None:
        """Write the record, after what it is about is on the disk."""
        if file is not None:
            os.fsync(file.fileno())
        self._have = _merged(self._have)
        _write(self._record, self._have)
        self._noted = monotonic()


def commit_of(hub: Mapping[str, Any]) -> str | None:
    """The commit that `revision` is known to be."""
    revision = hub.get("revision")
    return revision.resolved if isinstance(revision, ResolvedRevision) else revision


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


def _write(path: Path, value: Any) -> None:
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    scratch.write_text(json.dumps(value), encoding="utf-8")
    os.replace(scratch, path)
