"""A server on this machine that speaks as much of the Hub's HTTP as the real client needs to download and to push.

    with LocalHub() as hub:
        commit = hub.commit("org/name", folder)
        ...  # HF_ENDPOINT=hub.url
        print(hub.sent)

It counts the bytes of bodies that it sends, can cut a connection, fail in other ways, send other bytes than a file has, and ask for a token. Weights are served as
the Hub serves them: `resolve` redirects to another address, with the sha256 of the file as its etag.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import unquote

import yaml

Content = Path | bytes
_CHUNK = 1 << 20
_STALL = 1.0  # seconds; clients have to wait for less


@dataclass
class Repository:
    """Commits and branches of one repository; `token` is what a reader has to send, if there is one."""

    token: str | None = None
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Content]] = field(default_factory=dict)

    def add(self, files: Mapping[str, Content], branch: str = "main") -> str:
        listing = "".join(f"{path} {_digest(content)}\n" for path, content in sorted(files.items()))
        commit = hashlib.sha1(f"{self.refs.get(branch)}\n{listing}".encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[branch] = commit
        return commit


class LocalHub:
    """The server; it runs between `with` and the end of the block.

    Attributes:
        url (`str`): What `HF_ENDPOINT` has to be.
        repositories (`dict[str, Repository]`): By id.
        sent (`Counter[str]`): Bytes of bodies that were sent, per file.
        requests (`list[str]`): Method and address of every request.
        cuts (`dict[str, list[int]]`): Per file after how many bytes of a body the connection is cut, once per entry.
        limit (`int`): Bytes of bodies after which every connection is cut, if it is not `None`.
        corrupt (`set[str]`): Files of which one byte is sent wrong.
        flips (`dict[str, list[int]]`): Per file places of bytes that are sent wrong, each once; with `flips_stay` whenever they are sent.
        faults (`dict[str, Iterator[int | str | None]]`):
            Per pattern of requests (`GET /cdn/.*model`) what they get, one after the other: a status, `"hang up"` or `"stall"`, or `None` for
            what was asked for, as after the last.
        ranges (`bool`): Whether ranges are honoured; without, the whole file is sent.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.sent: Counter[str] = Counter()
        self.requests: list[str] = []
        self.cuts: dict[str, list[int]] = {}
        self.limit: int | None = None
        self.corrupt: set[str] = set()
        self.flips: dict[str, list[int]] = {}
        self.flips_stay = False
        self.faults: dict[str, Iterator[int | str | None]] = {}
        self.ranges = True
        self.lock = Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.url, self.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"  # another host, as the Hub's
        self.blobs: dict[str, Content] = {}

    def __enter__(self) -> LocalHub:
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repo: str, folder: Path, branch: str = "main", token: str | None = None) -> str:
        """Make the files of a folder the newest commit of a repository; they are served from there. Returns the commit."""
        repository = self.repositories.setdefault(repo, Repository(token))
        files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        return repository.add(files, branch)

    def reset(self) -> None:
        """Forget what was sent and asked for."""
        self.sent.clear()
        self.requests.clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    # -- routes ----------------------------------------------------------------------------------------------------

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        body = self._body()
        self.hub.requests.append(f"{self.command} {path}")
        if (fault := self._fault(f"{self.command} {path}")) is not None:
            if fault == "stall":
                Event().wait(_STALL)
            self.close_connection = True
            return self._error(fault, "", "a fault") if isinstance(fault, int) else None
        if match := re.fullmatch(r"/cdn/([0-9a-f]{64})/(.+)", path):
            return self._cdn(*match.groups())
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*match.groups())
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            errors = [{"message": message} for message in metadata_errors(json.loads(body)["content"])]
            return self._json({"errors": errors, "warnings": []}, 400 if errors else 200)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([a-z-]+)/?([^/]*))?(?:/.*)?", path):
            return self._api(match[1], match[2] or "revision", match[3] or "main", body)
        self._error(404, "", "no such address")

    def _fault(self, request: str) -> int | str | None:
        with self.hub.lock:
            found = (next(faults, None) for pattern, faults in self.hub.faults.items() if re.search(pattern, request))
            return next((fault for fault in found if fault is not None), None)

    def _api(self, repo: str, action: str, revision: str, body: bytes) -> None:
        if action == "branch":
            return self._branch(repo, revision)
        found = self._files(repo, revision)
        if found is None:
            return
        commit, files = found
        if action == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self._json({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "private": False})
        if action in ("tree", "paths-info"):
            return self._json([_entry(path, content) for path, content in files.items()])
        if action == "preupload":
            wanted = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]
            return self._json({"files": modes})
        if action == "commit":
            return self._commit(repo, revision, files, body)
        self._error(404, "", "no such action")

    def _commit(self, repo: str, branch: str, files: Mapping[str, Content], body: bytes) -> None:
        new = dict(files)
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif key == "deletedFile":
                del new[value["path"]]
        commit = self.hub.repositories[repo].add(new, branch)
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit, "success": True})

    def _branch(self, repo: str, name: str) -> None:
        refs = self.hub.repositories[repo].refs
        status = 409 if name in refs else 200
        refs.setdefault(name, refs["main"])
        self._json({}, status)

    def _create(self, request: Mapping[str, Any]) -> None:
        repo = "/".join(filter(None, (request.get("organization"), request["name"])))
        if repo in self.hub.repositories:
            return self._json({"error": "exists", "url": f"{self.hub.url}/{repo}"}, 409)
        self.hub.repositories[repo] = Repository()
        self.hub.repositories[repo].add({})
        self._json({"url": f"{self.hub.url}/{repo}", "id": repo})

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._files(repo, revision)
        if found is None:
            return
        commit, files = found
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            return self._error(404, "EntryNotFound", f"{path} does not exist", headers)
        content = files[path]
        if not path.endswith(".safetensors"):
            return self._send(path, content, {**headers, "ETag": f'"{_git_digest(content)}"'})
        digest = _digest(content)
        self.hub.blobs[digest] = content
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(_size(content))}
        self._respond(302, {**headers, "Location": f"{self.hub.cdn}/cdn/{digest}/{path}", "Content-Length": "0"})

    def _cdn(self, digest: str, path: str) -> None:
        self._send(path, self.hub.blobs[digest], {"ETag": f'"{digest[:32]}"'})

    def _files(self, repo: str, revision: str) -> tuple[str, dict[str, Content]] | None:
        """Commit and files of a revision; where it may not be read, the error is sent."""
        repository = self.hub.repositories.get(repo)
        if repository is None or (
            repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}"
        ):
            self._error(
                401, "RepoNotFound", "Invalid username or password."
            )  # the Hub does not say which repositories exist
            return None
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit, repository.commits[commit]

    # -- answers ---------------------------------------------------------------------------------------------------

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            return b"".join(self._chunks())
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().strip(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, name: str, content: Content, headers: Mapping[str, str]) -> None:
        size = _size(content)
        start, stop, status, extra = 0, size, 200, {"Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and self.hub.ranges:
            start, stop = int(asked[1]), min(size, int(asked[2] or size) + 1)
            status, extra = 206, {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        self._respond(status, {**headers, **extra, "Content-Length": str(stop - start)})
        if self.command == "HEAD":
            return
        if self.hub.cuts.get(name):
            stop = min(stop, start + self.hub.cuts[name].pop(0))
            self.close_connection = True
        with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
            file.seek(start)
            while start < stop and (data := file.read(min(_CHUNK, stop - start))):
                data = self._flipped(name, start, data)
                start += len(data)
                if start == size and name in self.hub.corrupt:
                    data = data[:-1] + bytes([data[-1] ^ 1])
                with self.hub.lock:
                    left = len(data) if self.hub.limit is None else max(0, self.hub.limit - self.hub.sent.total())
                    self.hub.sent[name] += min(left, len(data))
                self.wfile.write(data[:left])
                if left < len(data):
                    self.close_connection = True
                    return

    def _flipped(self, name: str, start: int, data: bytes) -> bytes:
        changed = bytearray(data)
        with self.hub.lock:
            for place in [place for place in self.hub.flips.get(name, []) if 0 <= place - start < len(data)]:
                changed[place - start] ^= 1
                if not self.hub.flips_stay:
                    self.hub.flips[name].remove(place)
        return bytes(changed)

    def _json(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self._respond(status, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        self._respond(
            status, {**(headers or {}), "X-Error-Code": code, "X-Error-Message": message, "Content-Length": "0"}
        )

    def _respond(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


def metadata_errors(content: str) -> list[str]:
    """A part of what the Hub checks of a model card's metadata; a card without errors here can still have some there."""
    block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    try:
        fields = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError as error:
        return [f"no YAML: {error}"]
    if not isinstance(fields, dict):
        return ["the metadata is no mapping"]
    errors = [
        f"{key} must be text"
        for key in ("license", "library_name", "pipeline_tag")
        if not isinstance(fields.get(key, ""), str)
    ]
    if fields.get("base_model_relation", "finetune") not in ("adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
    if not all(isinstance(tag, str) for tag in fields.get("tags", [])):
        errors.append("tags must be texts")
    if fields.get("license") == "other" and "license_name" not in fields:
        errors.append("license other needs a license_name")
    for result in (result for model in fields.get("model-index", []) for result in model["results"]):
        missing = [key for key in ("type", "name") if key not in result["dataset"]]
        missing += [key for metric in result["metrics"] for key in ("type", "value") if key not in metric]
        errors += [f"model-index: {key} is missing" for key in missing + ["type"] * ("type" not in result["task"])]
    return errors


def _entry(path: str, content: Content) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": _size(content), "oid": _digest(content)[:40]}
    if path.endswith(".safetensors"):
        entry["lfs"] = {"oid": _digest(content), "size": _size(content), "pointerSize": 134}
    return entry


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _digest(content: Content) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    about = content.stat()
    return _file_digest(content, about.st_mtime_ns, about.st_size)


@cache
def _file_digest(file: Path, *_: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while data := opened.read(_CHUNK):
            digest.update(data)
    return digest.hexdigest()


def _git_digest(content: Content) -> str:
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
