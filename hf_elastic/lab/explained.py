"""The `book` task in words, for somebody who sees it for the first time: enough to check an answer by hand."""

from __future__ import annotations

import re

from .task import BOOK, DIGITS, LETTERS, OPERANDS, OPERATIONS, Problem

_STEP = re.compile(rf"([{LETTERS}])([{OPERATIONS}])([{OPERANDS}])")


def explain(problem: Problem) -> str:
    """The rules on one example, with the whole table of codes.

    Args:
        problem ([`Problem`]): The example; short ones are easier to follow.

    Returns:
        `str`: Several lines.
    """
    first, *_ = re.findall(r"[A-L]", problem.answer)
    letter, op, k = _STEP.search(problem.prompt).groups()  # type: ignore[union-attr]
    result = problem.thinking.partition("=")[2][:1]
    return "\n".join(
        [
            "The task: a chain of sums, of which only the last digit counts. For example",
            "",
            f"  problem   {problem.prompt}",
            f"            {_in_words(problem)}",
            f"  thinking  {problem.thinking}",
            "            for every letter the value before, the step and the result",
            f"  answer    {problem.answer}",
            "            for every step its letter and a code, which stands in this table (row: the step, column: the result)",
            "",
            f"       {' '.join(DIGITS)}",
            *(f"  {op} {k}  {' '.join(BOOK[op, k])}" for op in OPERATIONS for k in OPERANDS),
            "",
            f"So {letter} = {op}{k} with the result {result} is row {op} {k}, column {result}: {letter}{first}. The model is not shown the table; it learned "
            "it by heart.",
            "An answer is right if all of it is.",
        ]
    )


def _in_words(problem: Problem) -> str:
    """`a is 4; b = 4 + 3 = 7; c = 7 - 1 = 6`."""
    start, *lines = re.findall(r"[a-t]\d(?:[+-]\d=\d)?", problem.thinking)
    steps = [f"{line[0]} = {line[1]} {line[2]} {line[3]} = {line[5]}" for line in lines]
    return "; ".join([f"{start[0]} is {start[1]}", *steps])
