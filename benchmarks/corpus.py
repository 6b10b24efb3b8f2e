"""Text that anybody can get: documentation and sources of packages that are installed here. None of it is in this repository.

The packages are named below; which of them are there, and in which version, [`collect`] says, so that a result can record it. Of a package from
PyPI it takes the Python files and documents that its list of files names, of the interpreter its standard library, of a Debian package Perl
modules and manual pages. Tests, vendored copies, files of more than 256 KiB, files that are not UTF-8 and repeated files are left out. One file in
32 is held out, by the checksum of its name, so that a file is in the same split on every machine.
"""

from __future__ import annotations

import gzip
import subprocess
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from platform import python_version

PYPI = ("numpy", "scipy", "pandas", "scikit-learn", "sympy", "networkx", "matplotlib", "nltk", "torch")
DEBIAN = ("perl-modules-*", "manpages", "manpages-dev", "git-man")
SUFFIXES = {".py", ".md", ".rst", ".txt", ".pm", ".pod"}
SKIPPED = {"test", "tests", "testing", "idle_test", "idlelib", "encodings", "site-packages", "_vendor", "vendored"}
HELD_OUT_EVERY = 32
LARGEST = 256 << 10


@dataclass
class Corpus:
    """Texts of both splits, in the order of the checksums of their names, which is a random one and the same everywhere."""

    packages: dict[str, str] = field(default_factory=dict)
    """Versions by `pypi:name`, `debian:name` and `python`."""
    train: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)


def collect(limit: int) -> Corpus:
    """Files until their texts in training have `limit` bytes.

    Raises:
        `FileNotFoundError`: none of the packages is installed here with its files.
    """
    corpus, files = Corpus(), []
    for package, version, found in (*_pypi(), *_debian()):
        corpus.packages[package] = version
        files += [(zlib.crc32(f"{package}/{name}".encode()), path) for name, path in found]
    if not files:
        raise FileNotFoundError(
            f"None of {', '.join((*PYPI, *DEBIAN))} is installed here with sources or manual pages."
        )
    seen, size = set(), 0
    for checksum, path in sorted(files):
        text = _read(path)
        if text is None or (content := zlib.crc32(text.encode())) in seen:
            continue
        seen.add(content)
        if checksum % HELD_OUT_EVERY == 0:
            corpus.held_out.append(text)
        else:
            corpus.train.append(text)
            size += len(text.encode())
        if size >= limit:
            break
    return corpus


Found = tuple[str, str, list[tuple[str, Path]]]


def _pypi() -> Iterator[Found]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [(path.relative_to(root).as_posix(), path) for path in sorted(root.rglob("*.py"))]
    yield "python", python_version(), [entry for entry in files if _wanted(entry[0])]
    for package in PYPI:
        try:
            found = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            continue
        names = [(file.as_posix(), Path(str(file.locate()))) for file in found.files or () if _wanted(file.as_posix())]
        yield f"pypi:{package}", found.version, names


def _debian() -> Iterator[Found]:
    command = ["dpkg-query", "--show", "--showformat", "${Package} ${Version}\\n", *DEBIAN]
    try:
        listed = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        for package, _, version in (line.partition(" ") for line in listed):
            if version:
                files = subprocess.run(["dpkg", "--listfiles", package], capture_output=True, text=True).stdout
                yield (
                    f"debian:{package}",
                    version,
                    [(name, Path(name)) for name in files.splitlines() if _wanted(name)],
                )
    except FileNotFoundError:
        return  # another system


def _wanted(name: str) -> bool:
    path = Path(name)
    manual = name.startswith("/usr/share/man/man") and path.suffix == ".gz"
    return (manual or path.suffix in SUFFIXES) and not SKIPPED & set(path.parts)


def _read(path: Path) -> str | None:
    """The text of a file; `None` if it is none of use."""
    try:
        if path.is_symlink() or not path.is_file():
            return None
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return content.decode("utf-8") if 64 <= len(content) <= LARGEST else None
    except (UnicodeDecodeError, OSError):
        return None
