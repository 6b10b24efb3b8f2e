"""What docs say of `baselines.py`: a table of ways and sizes per task, one of fewer experts, one of sizes between, and what was not run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markdown_tables import conditions, spread, table
from result_files import by_name, load

NOT_COMPARED = ("one-shot", "experts", "offered", "between")
"""Ways whose sizes are others: they have tables of their own."""
Found = Mapping[str, Any]


def baselines(results: Path) -> str:
    """All tasks that were measured, a title each where there are several."""
    paths = sorted(results.glob("baselines_*.json"))
    parts = [_task(load(path)) for path in paths]
    if len(paths) > 1:
        titles = [path.stem.removeprefix("baselines_") for path in paths]
        parts = [f"### Baselines: `{title}`\n\n{part}" for title, part in zip(titles, parts, strict=True)]
    return "\n\n".join(parts) + "\n" if parts else "Not measured yet.\n"


def _task(result: Any) -> str:
    found = by_name(result)
    parts = [_ways(found), _one_shot(found), _between(found), _about(found), conditions(result)]
    return "\n\n".join(part for part in parts if part)


def _sizes(found: Found, way: str, when: str = "trained") -> list[str]:
    """Sizes that a way was measured at, in its order."""
    start, end = f"{way}, {when}: ", ", exact"
    return [name[len(start) : -len(end)] for name in found if name.startswith(start) and name.endswith(end)]


def _cell(found: Found, way: str, size: str, when: str = "trained") -> str:
    """Whole answers right, and the divergence."""
    exact, kl = (found.get(f"{way}, {when}: {size}, {rate}") for rate in ("exact", "kl"))
    return f"{spread(exact)} · {abs(kl['mean']):.3f}" if exact and kl else ""


def _ways(found: Found) -> str:
    labels = found["runs that were not done"]["labels"]
    sizes = [size for size in _sizes(found, "one-run") if size != "between"]
    if not sizes:
        return ""
    active = {size: found[f"one-run, trained: {size}, exact"]["active_params"] for size in sizes}
    head = [f"{size} ({active[size] / active['full']:.0%})" for size in sizes]
    rows = []
    for way, label in labels.items():
        if way in NOT_COMPARED or f"{way}: tokens" not in found:
            continue
        seeds = len(found[f"{way}: tokens"]["runs"])
        cells = [_cell(found, way, size) for size in sizes]
        if way == "depth":  # its sizes are only about those of the others
            entries = [found.get(f"depth, trained: {size}, exact") for size in sizes]
            shares = [entry["active_params"] / active["full"] if entry else 1 for entry in entries]
            costs = [f" ({share:.0%})" if share < 1 else "" for share in shares]
            cells = [cell + cost for cell, cost in zip(cells, costs, strict=True)]
        rows.append([label, *cells, str(seeds)])
    return table(["", *head, "seeds"], rows)


def _one_shot(found: Found) -> str:
    """What is left without training, by the order that sizes are cut in; experts beside those that were trained as well."""
    names = list(dict.fromkeys([*_sizes(found, "one-shot", "importance"), *_sizes(found, "experts")]))
    fewer = [name for name in _sizes(found, "experts") if name != "full"]
    rows = []
    for name in names:
        if name == "full":
            continue
        cells = [_cell(found, "one-shot", name, order) for order in ("unsorted", "random", "importance")]
        rows.append([name, *cells, _cell(found, "experts" if name in fewer else "one-run", name)])
    head = ["", "parent's order, not trained", "random order, not trained", "by importance, not trained", "one run"]
    return table(head, rows) if rows else ""


def _between(found: Found) -> str:
    rows = []
    if _cell(found, "between", "between"):
        rows.append(_pair(found, "between (given)", ("one-run", "trained"), ("between", "trained"), "between"))
    for size in _sizes(found, "router", "offered"):
        rows.append(_pair(found, f"{size} (offered)", ("router", "offered"), ("offered", "offered"), size))
    for size in _sizes(found, "one-run") if _cell(found, "between", "between") else ():
        if size != "between":
            rows.append(_pair(found, f"{size}, beside it", ("one-run", "trained"), ("between", "trained"), size))
    return table(["size between two others", "never drawn", "drawn as well"], rows) if rows else ""


def _pair(found: Found, label: str, never: tuple[str, str], drawn: tuple[str, str], size: str) -> list[str]:
    return [label, *(_cell(found, way, size, when) for way, when in (never, drawn))]


def _about(found: Found) -> str:
    entry = next(entry for name, entry in found.items() if name.endswith("trained: full, exact"))
    missing = found["runs that were not done"]
    labels = missing["labels"]
    left: dict[tuple[int, ...], list[str]] = {}
    for way, seeds in missing["missing"].items():
        if seeds:
            left.setdefault(tuple(seeds), []).append(labels[way])
    parts = [
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))} of {'; '.join(ways)}"
        for seeds, ways in left.items()
    ]
    not_run = "\n\nNot run:\n\n" + "\n".join(f"- {part}" for part in parts) if parts else ""
    return (
        f"Share of {entry['problems']} held-out problems whose whole answer is right, mean of the seeds (range) · divergence from the parent in nats "
        f"per token. {entry['steps']} steps of {entry['rows']} rows for every way in total; in brackets active parameters.{not_run}"
    )
