"""Tables of results in Markdown, as `report.py` and its parts write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from result_files import Result


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def spread(entry: Result | None, digits: int = 2) -> str:
    """The mean over seeds, and the range where they differ; empty without a measurement."""
    if entry is None:
        return ""
    low, high = min(entry["runs"]), max(entry["runs"])
    return f"{entry['mean']:.{digits}f}" + (f" ({low:.{digits}f}–{high:.{digits}f})" if low < high else "")


def conditions(result: Result) -> str:
    """On what, with what and at which commit."""
    units = {"cores": "{} cores", "memory_gib": "{} GiB of memory"}
    versions = result["versions"]
    hardware = ", ".join(units.get(name, "{}").format(value) for name, value in result["machine"].items())
    software = ", ".join(f"{name} {value}" for name, value in versions.items())
    commit = result["commit"]
    shown = commit[:12] + (" with changes that were not committed" if commit.endswith("-dirty") else "")
    return f"<sub>Measured on: {hardware}; {software}; commit {shown}</sub>"
