"""What every benchmark shares: claims stated up front, runs that can be compared, and one JSON file with the outcome.

A script makes a [`Report`] with its claims, adds measurements, decides every claim with `settle`, and ends with
`sys.exit(report.finish(options))`, which is 1 if a claim does not hold. The file is

```
{"machine": {...}, "versions": {...}, "commit": "...", "measurements": [{"name", "unit", "median", "runs", ...}],
 "claims": [{"name", "value", "limit", "holds"}]}
```

Actions are timed in turns rather than one after the other, so that a machine that slows down meanwhile slows all of them down.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, TypeVar

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
T = TypeVar("T")

_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


@dataclass(frozen=True)
class Claim:
    """Something a benchmark shows or fails to show.

    Args:
        name (`str`): What `value` is, as a reader of the result file understands it.
        limit (`float`): What it is compared with.
        comparison (`str`, *optional*, defaults to `"<="`): How the value has to compare with the limit: `<=`, `>=` or `==`.
    """

    name: str
    limit: float
    comparison: Literal["<=", ">=", "=="] = "<="

    def holds(self, value: float) -> bool:
        return _COMPARISONS[self.comparison](value, self.limit)


@dataclass
class Report:
    """Measurements and claims of one benchmark.

    Args:
        name (`str`): Name of the script and of its result file.
        claims (`Sequence[Claim]`): All of them have to be settled before the end.
    """

    name: str
    claims: Sequence[Claim]
    measurements: list[dict[str, Any]] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)

    def measure(self, name: str, unit: str, runs: Iterable[float], **about: Any) -> float:
        """Record the runs of one measurement; returns their median."""
        runs = list(runs)
        median = statistics.median(runs)
        self.measurements.append({"name": name, "unit": unit, "median": median, "runs": runs, **about})
        print(f"  {name:<72} {median:>14,.6g} {unit}", flush=True)
        return median

    def settle(self, name: str, value: float) -> bool:
        """Decide a claim."""
        claim = next((claim for claim in self.claims if claim.name == name), None)
        if claim is None:
            raise KeyError(f"{name!r} is not among the claims of {self.name}: {[claim.name for claim in self.claims]}")
        self.values[name] = value
        return claim.holds(value)

    def to_dict(self) -> dict[str, Any]:
        """JSON form.

        Raises:
            `RuntimeError`: a claim was not settled, so nothing may be published.
        """
        open_claims = [claim.name for claim in self.claims if claim.name not in self.values]
        if open_claims:
            raise RuntimeError(f"{self.name} ended without a value for {open_claims}")
        return {
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
            "measurements": self.measurements,
            "claims": [
                {
                    "name": claim.name,
                    "value": self.values[claim.name],
                    "limit": claim.limit,
                    "holds": claim.holds(self.values[claim.name]),
                }
                for claim in self.claims
            ],
        }

    def finish(self, options: argparse.Namespace) -> int:
        """Print the claims, write the result file, and give the exit status: 1 if a claim does not hold.

        A quick run is too small to publish, so it writes a file only where `--output` says.
        """
        result = self.to_dict()
        for claim, outcome in zip(self.claims, result["claims"], strict=True):
            verdict = "holds" if outcome["holds"] else "FAILS"
            print(f"{verdict}: {claim.name}: {outcome['value']:.4g} (claim: {claim.comparison} {claim.limit:g})")
        output = options.output or (None if options.quick else RESULTS / f"{self.name}.json")
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return 0 if all(outcome["holds"] for outcome in result["claims"]) else 1


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="small sizes and few runs, under a minute; not published")
    parser.add_argument("--output", type=Path, help="write the results here instead of into benchmarks/results/")
    return parser


# -- where it ran ------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the numbers depend on, and nothing that names the machine or its users."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "os": f"{platform.system()} {platform.release().partition('-')[0]}",
        **gpu,
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of everything that is measured."""
    import hf_elastic

    packages = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {"python": platform.python_version(), **packages, "hf_elastic": hf_elastic.__version__}


def commit() -> str:
    """Commit of the code that ran, marked if the library differs from it; `"unknown"` outside a repository."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT.parent, check=True, capture_output=True, text=True).stdout

    try:
        head = git("rev-parse", "HEAD").strip()
        return head + ("-dirty" if git("status", "--porcelain", "--", "hf_elastic").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# -- how it ran --------------------------------------------------------------------------------------------------------


def in_turns(actions: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Run every action once per round, in alternating order so that none always comes first."""
    results: dict[str, list[T]] = {name: [] for name in actions}
    for turn in range(rounds):
        for name in list(actions)[:: 1 if turn % 2 == 0 else -1]:
            results[name].append(actions[name]())
    return results


def seconds(action: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = perf_counter()
    action()
    return perf_counter() - start
