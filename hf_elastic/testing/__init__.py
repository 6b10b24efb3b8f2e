"""The conformance kit: every exactness check of this library, on a tiny random model of any table, ours or yours."""

from __future__ import annotations

from .conformance import check_architecture
from .report import CheckResult, ConformanceError, ConformanceReport

__all__ = ["CheckResult", "ConformanceError", "ConformanceReport", "check_architecture"]
