"""What is told while `make` installs: plain lines, how far it is, and what pip said if it fails."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))

from install import Progress, duration, pip  # noqa: E402 - it lies in tools/

PIP = """\
Obtaining file:///home/somebody/hf-elastic
  Installing build dependencies: started
Collecting torch==2.13.0
  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (191.4 MB)
Collecting numpy
  Downloading https://example.org/packages/numpy-2.4.6-cp311-cp311-linux_x86_64.whl.metadata (6.1 kB)
  Using cached numpy-2.4.6-cp311-cp311-linux_x86_64.whl (16.0 MB)
Collecting gradio[mcp]>=6.31
Requirement already satisfied: pip in ./.venv
Installing collected packages: numpy, torch, gradio, hf-elastic
"""


def test_the_lines_of_pip_become_few_plain_ones():
    """A large download and the beginning of the installation at once, the rest when it is time; the time left follows."""
    seconds, installed = [0.0], [3]
    progress = Progress(expected=8, installed=lambda: installed[0], clock=lambda: seconds[0])
    told = []
    for line in PIP.splitlines():
        seconds[0] += 7
        told.append(progress.read(line))
    assert [line for line in told if line] == [
        "   28 s: 2 packages found, downloading torch-2.13.0 (191.4 MB), about 2 min 12 s left",
        "   1 min 10 s: installing, 0 of 4 packages, about 30 s left",
    ]
    installed[0], seconds[0] = 5, 80.0
    assert progress.told() == "   1 min 20 s: installing, 2 of 4 packages, about 14 s left"
    installed[0] = 20
    assert progress.told().endswith("installing, 4 of 4 packages, about 0 s left")
    assert progress.read("Collecting one-more==1.0") is None


def test_a_large_download_is_told_by_its_bytes():
    seconds, here = [0.0], [0.0]
    progress = Progress(100, lambda: 0, lambda: here[0], clock=lambda: seconds[0])
    progress.read("Collecting torch==2.13.0")
    seconds[0] = 10
    line = "  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (1.2 GB)"
    assert progress.read(line) == "   10 s: 1 packages found, downloading torch-2.13.0 (1.2 GB)"
    seconds[0], here[0] = 40, 300.0
    said = progress.told()
    assert said.endswith("downloading torch-2.13.0 (1.2 GB), 300 MB of it here, about 1 min 30 s left for this one")
    progress.read("Processing /somewhere/numpy-2.4.6-cp311-cp311-linux_x86_64.whl")
    assert progress.told() == "   40 s: 2 packages found, looking for numpy-2.4.6-cp311-cp311-linux_x86_64.whl"


def test_nothing_is_said_of_the_time_left_before_anything_is_known():
    assert Progress(10, lambda: 0, clock=lambda: 3.0).told() == "   0 s: 0 packages found, looking for versions"
    assert [duration(s) for s in (0.4, 59.6, 61, 3600)] == ["0 s", "1 min 0 s", "1 min 1 s", "60 min 0 s"]


def test_what_pip_says_is_shown_if_it_fails(tmp_path, capsys):
    arguments = ["--no-index", "--find-links", str(tmp_path), "no-such-package-at-all"]
    with pytest.raises(SystemExit, match=r"(?s)No matching distribution found.*pip failed: .* install ") as caught:
        pip(Path(sys.executable), arguments, 1)
    assert caught.value.code != 0


def test_make_installs_with_it():
    makefile = (ROOT / "Makefile").read_text()
    rule = re.search(r"^\$\(VENV\)/installed: .*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert "tools/install.py $(VENV)" in rule[1]
    assert "--quiet" not in makefile
