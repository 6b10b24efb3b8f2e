"""Results files as tables of a model card: no number is typed, and every table says which file it is from.

Four kinds are read: `plans.json` of `hf-elastic evaluate`; results of a benchmark, `{"measurements": [{"name", "unit", "median", "runs"}], ...}`;
records of a training with an evaluation of every budget, `{"evaluation": {"budgets": [{"name", "exact", ...}]}, ...}`; and evaluations of every budget
in several formats, `{"formats": {"nvfp4": [{"name", "exact", ...}], ...}, ...}`. All may have `machine`, `versions` and `commit`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..architectures.cost import Cost
from ..errors import ElasticConfigError, HFElasticError, did_you_mean
from ..generation.plan import who_answers
from ..storage.json_files import parse_json

SEPARATOR = "::"
_COUNTS = ("total_params", "active_params")


@dataclass(frozen=True)
class Results:
    """One results file.

    Args:
        file (`Path`): The file itself.
        tables (`tuple[str, ...]`): Markdown, each with its heading.
        evaluations (`tuple[EvalResult, ...]`): What the Hub's `model-index` can hold of it.
        budgets (`frozenset[str]`): Budgets that it says something about.
    """

    file: Path
    tables: tuple[str, ...]
    evaluations: tuple[EvalResult, ...] = ()
    budgets: frozenset[str] = frozenset()

    @property
    def place(self) -> str:
        """Where the file lies in the repository."""
        return f"results/{self.file.name}"


def read_all(given: Sequence[str | os.PathLike[str]], family: Mapping[str, Cost]) -> list[Results]:
    """Every results file; they lie side by side in the repository, so no two may have the same name.

    Args:
        given: Paths; `FILE::PATTERN` takes only the measurements of a benchmark whose names match, such as `lab_family.json::family: *`.
        family (`dict[str, Cost]`): Exact costs by name of a budget, against which the files are checked.

    Raises:
        `ElasticConfigError`: a file cannot be read, is of none of the kinds, or measures another family.
    """
    if isinstance(given, (str, os.PathLike)):
        raise ElasticConfigError(f"results={given!r} must be a list of paths.")
    read = [_read(str(entry), family) for entry in given]
    names = [results.file.name for results in read]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ElasticConfigError(
            f"two results files are called {twice}; in the repository they lie side by side, rename one."
        )
    return read


def _read(given: str, family: Mapping[str, Cost]) -> Results:
    name, _, pattern = given.partition(SEPARATOR)
    path = Path(name)
    try:
        content = path.read_bytes()
        data = parse_json(content)
    except (OSError, ValueError, RecursionError) as error:
        raise ElasticConfigError(f"{path} cannot be read as a results file: {error}") from error
    readers = {"points": _plans, "measurements": _measurements, "evaluation": _evaluation, "formats": _formats}
    kind = next((key for key in readers if isinstance(data, dict) and key in data), None)
    if kind is None:
        raise ElasticConfigError(
            f"{path} is no results file: it has none of {', '.join(readers)}. Give plans.json of `hf-elastic evaluate`, a benchmark's results, a "
            "record of a training with its evaluation, or evaluations in several formats."
        )
    if pattern and kind != "measurements":
        raise ElasticConfigError(
            f"{given!r}: only the measurements of a benchmark are chosen by a pattern; give {name!r}."
        )
    try:
        tables, evaluations, budgets = readers[kind](data, family, path, pattern)
        source = _source(data, path, content)
    except HFElasticError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ElasticConfigError(f"{path} is no complete results file: {error!r} in its {kind}.") from error
    return Results(path, tuple(f"{table}\n\n{source}" for table in tables), tuple(evaluations), frozenset(budgets))


_Read = tuple[list[str], list[EvalResult], set[str]]


def _plans(data: Mapping[str, Any], family: Mapping[str, Cost], path: Path, _: str) -> _Read:
    """Sizes on their own, the best plans, and the former as evaluations."""
    points, task, by = data["points"], data["task"], data["by"]
    for point in points:
        for role in ("thinking", "answering", "escalate_to"):
            if role in point:
                _known(point[role], family, path)
    fixed = [p for p in points if p.get("escalate_to") is None]
    alone = [p for p in fixed if p["thinking"] == p["answering"] and p["max_thinking_tokens"] is None]
    tables, evaluations = [], []
    if alone:
        metrics = list(alone[0]["metrics"])
        rows = [[p["thinking"], *(number(p["metrics"][metric]) for metric in metrics), str(p["n"])] for p in alone]
        tables.append(f"### {task}\n\n{table(['size', *metrics, 'problems'], rows)}")
        evaluations = [
            _eval_result(task, metric, p["thinking"], p["metrics"][metric]) for p in alone for metric in metrics
        ]
    best = [points[i] for i in data["front"]]
    head = [
        "thinks",
        "answers",
        "cap",
        "accuracy",
        "tokens thought",
        "tokens answered",
        "seconds",
        "modelled cost",
        "problems",
    ]
    rows = []
    for p in best:
        numbers = [number(p[key]) for key in ("accuracy", "thinking_tokens", "answer_tokens", "seconds", "cost")]
        rows.append(
            [
                p["thinking"],
                who_answers(p),
                "none" if p["max_thinking_tokens"] is None else str(p["max_thinking_tokens"]),
                *numbers,
                str(p["n"]),
            ]
        )
    about = f"Of {len(points)} plans, those that no other one beats in accuracy and {by}; means per problem."
    tables.append(f"### Phase plans on {task}\n\n{about}\n\n{table(head, rows)}")
    return tables, evaluations, {p["thinking"] for p in alone}


def _measurements(data: Mapping[str, Any], family: Mapping[str, Cost], path: Path, pattern: str) -> _Read:
    entries = [entry for entry in data["measurements"] if not pattern or fnmatch.fnmatchcase(entry["name"], pattern)]
    if not entries:
        names = [entry["name"] for entry in data["measurements"]]
        raise ElasticConfigError(f"no measurement of {path} matches {pattern!r}.{did_you_mean(pattern, names)}")
    rows, budgets = [], set()
    for entry in entries:
        budget = next((name for name in family if name in re.split(r"[:,\s]+", entry["name"])), None)
        if budget is not None:
            _same_counts(entry, budget, family[budget], path)
            budgets.add(budget)
        runs = entry["runs"]
        spread = f"{number(min(runs))} to {number(max(runs))}" if len(runs) > 1 else ""
        rows.append([entry["name"], number(entry["median"]), spread, str(len(runs)), entry["unit"]])
    return [f"### {path.stem}\n\n{table(['measured', 'median', 'range', 'runs', 'unit'], rows)}"], [], budgets


def _evaluation(data: Mapping[str, Any], family: Mapping[str, Cost], path: Path, _: str) -> _Read:
    evaluation = data["evaluation"]
    entries = evaluation["budgets"]
    rates = [key for key, value in entries[0].items() if isinstance(value, float)]
    rows = []
    for entry in entries:
        _known(entry["name"], family, path)
        _same_counts(entry, entry["name"], family[entry["name"]], path)
        rows.append([entry["name"], *(number(entry[rate]) for rate in rates)])
    about = {key: value for key, value in evaluation.items() if isinstance(value, (int, float, str))}
    about |= {key: data[key] for key in ("seed", "steps") if key in data}
    said = ", ".join(f"{key} {value}" for key, value in about.items())
    heading = f"### {path.stem}\n\n{said}\n\n" if said else f"### {path.stem}\n\n"
    return [heading + table(["size", *rates], rows)], [], {entry["name"] for entry in entries}


def _formats(data: Mapping[str, Any], family: Mapping[str, Cost], path: Path, _: str) -> _Read:
    """A table per rate, with a column per format."""
    formats = data["formats"]
    first = next(iter(formats.values()))
    names = [entry["name"] for entry in first]
    for way, entries in formats.items():
        if [entry["name"] for entry in entries] != names:
            raise ElasticConfigError(f"{path} measures other budgets in {way!r} than in {next(iter(formats))!r}.")
        for entry in entries:
            _known(entry["name"], family, path)
            _same_counts(entry, entry["name"], family[entry["name"]], path)
    rates = [key for key, value in first[0].items() if isinstance(value, float)]
    about = {key: value for key, value in data.items() if isinstance(value, (int, float, str)) and key != "commit"}
    said = ", ".join(f"{key} {value}" for key, value in about.items())
    tables = []
    for rate in rates:
        columns = [{entry["name"]: number(entry[rate]) for entry in entries} for entries in formats.values()]
        rows = [[name, *(column[name] for column in columns)] for name in names]
        tables.append(f"{rate}:\n\n{table(['size', *formats], rows)}")
    parts = [f"### {path.stem}", *([said] if said else []), *tables]
    return ["\n\n".join(parts)], [], set(names)


def _known(budget: str, family: Mapping[str, Cost], path: Path) -> None:
    if budget not in family:
        raise ElasticConfigError(
            f"{path} measures {budget!r}, which is no budget here ({', '.join(family)}): it is of another family.{did_you_mean(budget, family)}"
        )


def _same_counts(entry: Mapping[str, Any], budget: str, cost: Cost, path: Path) -> None:
    """Refuse a measurement of a budget of the same name and another size."""
    for key in _COUNTS:
        given = entry.get(key, [])
        wrong = [count for count in (given if isinstance(given, list) else [given]) if count != getattr(cost, key)]
        if wrong:
            raise ElasticConfigError(
                f"{path}: {entry['name']!r} has {key}={wrong[0]}, budget {budget!r} has {getattr(cost, key)}: it is of another family. Choose the "
                f"measurements of this one, {path.name}{SEPARATOR}PATTERN, or leave the file out."
            )


def _eval_result(task: str, metric: str, budget: str, value: float) -> EvalResult:
    """lm-eval writes a filter behind its metrics (`exact_match,none`); the Hub's type is what stands before it."""
    kind = metric.partition(",")[0]
    return EvalResult(
        task_type="text-generation",
        dataset_type=task,
        dataset_name=task,
        metric_type=kind,
        metric_name=f"{metric}, {budget}",
        metric_value=value,
    )


def _source(data: Mapping[str, Any], path: Path, content: bytes) -> str:
    said = [f"from [`{path.name}`](results/{path.name})", f"sha256 {hashlib.sha256(content).hexdigest()[:12]}"]
    said.append(f"commit {str(data['commit'])[:12]}" if data.get("commit") else "commit not recorded")
    said += [", ".join(map(str, data["machine"].values()))] if data.get("machine") else []
    said += [", ".join(f"{name} {value}" for name, value in data.get("versions", {}).items())]
    return f"<sub>{'; '.join(filter(None, said))}</sub>"


def number(value: float) -> str:
    """A measured number, to four digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; what would end a cell is escaped."""
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )
