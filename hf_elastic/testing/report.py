"""What the conformance kit found: one line per check."""

from __future__ import annotations

from dataclasses import dataclass, field


class ConformanceError(AssertionError):
    """A table does not pass; the message is the whole report."""


@dataclass
class CheckResult:
    """What one check found.

    Args:
        name (`str`): Of the check.
        worst (`float`): Largest deviation of all cases.
        where (`str`): The case that has it.
        failures (`list[str]`): What is wrong, by case; empty if the check passed.
        cases (`int`): How many cases were looked at.
        skipped (`str`): Why it does not apply, if it does not.
    """

    name: str
    worst: float = 0.0
    where: str = ""
    failures: list[str] = field(default_factory=list)
    cases: int = 0
    skipped: str = ""

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.name:<34} does not apply: {self.skipped}"
        state = "FAILED" if self.failures else "passed"
        worst = f", worst {self.worst:.1e} in {self.where}" if self.where else ""
        lines = [f"{self.name:<34} {state} ({self.cases} cases{worst})"]
        return "\n".join(lines + [f"    {failure}" for failure in self.failures[:5]])


@dataclass
class ConformanceReport:
    """All results for one model; `print` it.

    Args:
        model_type (`str`): Of the table.
        results (`list[CheckResult]`): One per check.
        unsaid (`list[str]`): Cases that the stock config cannot say, with its reason.
    """

    model_type: str
    results: list[CheckResult] = field(default_factory=list)
    unsaid: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not any(result.failures for result in self.results)

    def __str__(self) -> str:
        lines = [self.model_type, *(f"  {line}" for result in self.results for line in str(result).splitlines())]
        return "\n".join(lines + [f"  not possible: {reason}" for reason in self.unsaid])
