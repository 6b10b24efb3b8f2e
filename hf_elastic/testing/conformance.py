"""`check_architecture`: run every check of the kit and report."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from .checks import CHECKS, Check, NotApplicable
from .models import tiny_config
from .report import CheckResult, ConformanceError, ConformanceReport
from .subject import Subject


def check_architecture(
    model: str | PreTrainedConfig,
    *,
    budgets: Mapping[str, Mapping[str, Any]] | None = None,
    checks: Sequence[str] | None = None,
    each_axis: bool = True,
    variant: int = 0,
    seed: int = 0,
    raise_on_failure: bool = True,
) -> ConformanceReport:
    """Check a table on a tiny random model: whatever way a size is reached, it is one and the same model.

    The sizes that are checked follow from the table: the whole, every axis alone, with other sizes in other layers, all axes together, fewer
    layers, and both. All of it in float32 on the CPU.

    Args:
        model (`str` or `PreTrainedConfig`): A `model_type` of this library, or the stock config of a tiny model (some ten thousand parameters).
        budgets (`dict[str, dict]`, *optional*): Sizes of your own that are checked as well, by name.
        checks (`list[str]`, *optional*): Names of the checks to run; all of [`hf_elastic.testing.checks.CHECKS`] by default.
        each_axis (`bool`, *optional*, defaults to `True`):
            Also every axis by itself, which takes twice as long and says where something is wrong. All axes together are checked in any case.
        variant (`int`, *optional*, defaults to 0): Which of the tiny models of a `model_type`.
        seed (`int`, *optional*, defaults to 0): Of the random weights and tokens.
        raise_on_failure (`bool`, *optional*, defaults to `True`): `False` returns the report of a table that fails.

    Returns:
        [`ConformanceReport`]: `print` it.

    Raises:
        [`ConformanceError`]: a check failed; the message is the report.
        `ElasticConfigError`: an axis that nothing can be cut from in this config.
    """
    config = tiny_config(model, variant) if isinstance(model, str) else model
    report = ConformanceReport(config.model_type)
    with a_subject(config, seed, each_axis, budgets) as subject:
        report.unsaid = subject.cases.unsaid
        report.results += run_checks(subject, checks)
    if raise_on_failure and not report.passed:
        raise ConformanceError(str(report))
    return report


@contextmanager
def a_subject(config: PreTrainedConfig, seed: int = 0, *more: Any) -> Iterator[Subject]:
    """What is checked, with a folder of its own; random numbers of the caller stay what they were."""
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        yield Subject(config, seed, Path(folder), *more)


def run_checks(subject: Subject, checks: Iterable[str] | None = None) -> Iterator[CheckResult]:
    """Run checks one after the other, as far as results are asked for."""
    for name in CHECKS if checks is None else checks:
        yield _run(name, CHECKS[name], subject)


def _run(name: str, check: Check, subject: Subject) -> CheckResult:
    result, seen = CheckResult(name), set()
    try:
        for found in check(subject):
            seen.add(found.case)
            if found.wrong:
                result.failures.append(f"{found.case}: {found.wrong}")
            elif not found.by <= found.limit:
                result.failures.append(f"{found.case}: off by {found.by:.1e}, allowed {found.limit:.0e}")
            if found.by > result.worst:
                result.worst, result.where = found.by, found.case
    except NotApplicable as reason:
        result.skipped = str(reason)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        result.failures.append(f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})")
    result.cases = len(seen)
    return result
