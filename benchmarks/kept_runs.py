"""Training runs that are done once: what each measured is kept as JSON under `benchmarks/.runs/`, named by what it was, and models beside it.

A run takes minutes, a benchmark hours. An interrupted benchmark goes on where it stopped; delete the folder to start afresh. Everything runs on
one thread (the models are too small for two), so several scripts may run beside each other.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import ROOT, Report, arguments, commit

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class KeptRuns:
    """Runs, and what they measured; a quick benchmark keeps them as long as this object.

    Args:
        options (`argparse.Namespace`): Of [`run_arguments`].
        steps (`int`): Of a run, for its record.
    """

    def __init__(self, options: argparse.Namespace, steps: int):
        torch.set_num_threads(1)
        self.steps = steps
        # Removed with this object.
        self._scratch = tempfile.TemporaryDirectory(prefix="hf-elastic-lab-") if options.quick else None
        self._folder = Path(self._scratch.name if self._scratch else options.runs)
        self._folder.mkdir(parents=True, exist_ok=True)
        self.commits: set[str] = set()
        """Commits of the code that the runs were done with; kept runs may be older than the result that they are in."""

    def path(self, name: str) -> Path:
        """Where something else is kept besides runs and models."""
        return self._folder / name

    def model(self, name: str, train: Callable[[], Any]) -> Any:
        """The model of this name, stock or elastic; it is trained if it was not yet."""
        folder = self._folder / name
        if not (folder / "config.json").exists():
            print(f"... {name}", flush=True)
            train().save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(self, name: str, action: Callable[[], Any]) -> Any:
        """What the run of this name measured; it is done if it was not yet."""
        file = self._folder / f"{name}.json"
        if not file.exists():
            print(f"... {name}", flush=True)
            result = {"result": action(), "steps": self.steps, "commit": commit()}
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        kept = json.loads(file.read_text(encoding="utf-8"))
        self.commits.add(kept["commit"])
        return kept["result"]

    def kept(self, name: str) -> bool:
        """Whether the run of this name is done."""
        return (self._folder / f"{name}.json").exists()

    def say_commits(self, report: Report) -> None:
        """Record which code the runs were done with, for who wants to do them again."""
        report.measure("commits that the runs were done with", "", [len(self.commits)], commits=sorted(self.commits))


def run_arguments(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark, and where runs are kept."""
    parser = arguments(description)
    parser.add_argument(
        "--runs", default=ROOT / ".runs", help="folder that keeps finished runs (default: benchmarks/.runs)"
    )
    return parser
