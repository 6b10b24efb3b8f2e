"""The README says what the files it is made from say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from hf_elastic.architectures import ARCHITECTURES
from hf_elastic.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_results_are_those_of_the_result_files():
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "report.py", "--check"])
    assert done.returncode == 0, "run python benchmarks/report.py"


def test_the_table_of_models_is_the_registry():
    rows = re.findall(r"^\| `(\w+)` \|.*?\| (.*?) \|$", README, re.MULTILINE)
    rows = [row for row in rows if row[0] != "model_type"]
    assert [name for name, _ in rows] == list(ARCHITECTURES)
    assert re.findall(r"`(\w+)`", rows[0][1]) == [axis.name for axis in ARCHITECTURES["nemotron_h"].axes] + ["layers"]
    others = {axis.name for axis in ARCHITECTURES["granitemoehybrid"].axes} | {"ffn"}
    assert others == {axis.name for axis in ARCHITECTURES["nemotron_h"].axes}  # "the same without ffn"


def test_every_command_in_the_readme_exists():
    used = set(re.findall(r"hf-elastic (\w+)", README))
    assert used
    assert used <= set(COMMANDS)


def test_set_up_is_two_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
