"""What `make` installs into its virtual environment, with a line every few seconds on what goes on. Needs nothing but Python.

python3 tools/install.py .venv
"""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EVERY = 10.0
"""Seconds between two lines."""
LARGE = 20.0
"""Megabytes from which a download is told on its own."""
PACKAGES = 150
"""About as many packages as are installed; from it follows the time left while pip has not said how many."""
SHARE = 0.7
"""Of the time that is spent before pip begins to install: finding versions and downloading."""


class Progress:
    """Follows what pip prints.

    Args:
        expected (`int`): Packages there will be, about.
        installed (`Callable[[], int]`): How many are in the environment now.
        fetched (`Callable[[], float]`): Megabytes of the file that is being downloaded.
        clock (`Callable[[], float]`): Seconds.
    """

    def __init__(
        self,
        expected: int,
        installed: Callable[[], int],
        fetched: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.expected, self.installed, self.fetched, self.clock = expected, installed, fetched, clock
        self.begun, self.before = clock(), installed()
        self.found, self.to_install, self.now = 0, 0, "looking for versions"
        self.large: tuple[float, float] | None = None  # megabytes of a large download, and when it began

    def read(self, line: str) -> str | None:
        """Take in a line of pip; returns what is worth telling at once."""
        if match := re.match(r"\s*(?:Collecting|Obtaining|Processing) (?:\S*/)?([\w.-]+)", line):
            self.found += 1
            self.now, self.large = f"looking for {match[1]}", None
        elif match := re.match(r"\s*Downloading (?:\S*/)?([\w.]+-[\w.]+)\S* \(([\d.]+) ?(\w+)\)", line):
            self.now, self.large = f"downloading {match[1]} ({match[2]} {match[3]})", None
            size = float(match[2]) * {"GB": 1000.0, "MB": 1.0}.get(match[3], 0.0)
            if size >= LARGE:
                self.large = size, self.clock()
                return self.told()
        elif line.startswith("Installing collected packages"):
            self.to_install, self.large = line.count(",") + 1, None
            return self.told()
        return None

    @property
    def share(self) -> float:
        """How much is done, from 0 to 1."""
        if not self.to_install:
            return SHARE * min(1.0, self.found / self.expected)
        return SHARE + (1 - SHARE) * min(1.0, (self.installed() - self.before) / self.to_install)

    def told(self) -> str:
        """What goes on, since when, and about how long it will take."""
        passed = self.clock() - self.begun
        what = f"{self.found} packages found, {self.now}"
        if self.to_install:
            what = f"installing, {min(self.installed() - self.before, self.to_install)} of {self.to_install} packages"
        left = f", about {duration(passed * (1 - self.share) / self.share)} left" if self.share > 0.1 else ""
        if self.large and (have := min(self.fetched(), self.large[0])) > 0:
            size, begun = self.large
            rest = duration((self.clock() - begun) * (size - have) / have)
            left = f", {have:.0f} MB of it here, about {rest} left for this one"
        return f"   {duration(passed)}: {what}{left}"


def duration(seconds: float) -> str:
    """`75.2` as `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def lines_of(process: subprocess.Popen[str]) -> Iterator[str | None]:
    """Its lines as they come, and `None` every few seconds in which there is none."""
    read: queue.Queue[str | None] = queue.Queue()

    def fill() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            read.put(line.rstrip())
        read.put(None)

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    while True:
        try:
            line = read.get(timeout=EVERY)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


def pip(python: Path, arguments: Sequence[str], expected: int) -> None:
    """`pip install`, told in plain lines; on a failure with all that pip said."""
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    folder = tempfile.TemporaryDirectory(prefix="hf-elastic-install-")  # where pip keeps a file while it downloads it
    sizes = lambda: [file.stat().st_size for file in Path(folder.name).rglob("*.whl") if file.exists()]  # noqa: E731
    progress = Progress(
        expected, lambda: len(list(Path(site).glob("*.dist-info"))), lambda: max(sizes(), default=0) / 1e6
    )
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": folder.name}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said, last = [], time.monotonic()
    for line in lines_of(process):
        text = progress.read(line) if line is not None else None
        said += [line] if line else []
        if text or time.monotonic() - last >= EVERY:
            print(text or progress.told(), flush=True)
            last = time.monotonic()
    if process.wait():
        sys.exit("\n".join([*said, "", f"pip failed: {' '.join(command)}"]))


def main(folder: str) -> None:
    """Make the environment, then install torch alone, then everything else at the versions that CI uses."""
    begun, python = time.monotonic(), Path(folder, "bin", "python").absolute()
    print(f"1/3 a virtual environment in {folder}, with Python {sys.version.split()[0]}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    print(f"2/3 {torch}, the largest download", flush=True)
    pip(python, [torch], 12)
    print("3/3 hf_elastic and what it needs, at the versions of constraints.txt", flush=True)
    pip(python, ["--constraint", "constraints.txt", "--editable", ".[dev]"], PACKAGES)
    print(f"installed in {duration(time.monotonic() - begun)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
