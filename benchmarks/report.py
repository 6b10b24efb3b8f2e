"""Write the README's results from the files in `results/`, so that no number there is typed by hand.

`python benchmarks/report.py` rewrites the block between the `results` markers; `--check` only tells whether it is up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
_BLOCK = re.compile(r"(<!-- results:begin -->\n).*?(<!-- results:end -->)", re.DOTALL)


def render(results: Path = RESULTS) -> str:
    """The results block: a table of claims per result file, and what they were measured on."""
    parts = []
    for path in sorted(results.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        rows = [f"| {_claim(claim)} |" for claim in result["claims"]]
        head = f"| [`{path.stem}`](benchmarks/{path.stem}.py) | measured | limit | |\n|---|---|---|---|"
        parts.append("\n".join([head, *rows, "", _conditions(result)]))
    return "\n\n".join(parts) + "\n" if parts else "No benchmark was run yet.\n"


def _claim(claim: Mapping[str, Any]) -> str:
    return (
        f"{claim['name']} | {claim['value']:.3g} | {claim['limit']:.3g} | {'holds' if claim['holds'] else '**fails**'}"
    )


def _conditions(result: Mapping[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    hardware = ", ".join(str(value) for value in machine.values())
    software = ", ".join(f"{name} {value}" for name, value in versions.items())
    return f"<sub>{hardware}; {software}; commit {result['commit'][:12]}</sub>"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the README is not up to date")
    args = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    wanted = _BLOCK.sub(lambda match: match[1] + render() + match[2], text)
    if args.check:
        return int(wanted != text)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
