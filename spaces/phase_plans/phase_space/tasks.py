"""What a model that solves only one kind of problem needs: how problems look, examples, an explanation, and what is right."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from hf_elastic.errors import HFElasticError
from hf_elastic.lab.book import BOOK, problems
from hf_elastic.lab.task import DIGITS, LETTERS, OPERANDS, OPERATIONS, PROMPT_END, PROMPT_START


class TaskError(HFElasticError, ValueError):
    """A prompt that the model of a task cannot read; the message is for the visitor."""


@dataclass(frozen=True)
class Solution:
    """What is right for one prompt.

    Args:
        thinking (`str`): As the model should write it.
        answer (`str`): As the model should write it.
        parts (`tuple[str, ...]`): The answer in parts that are right or wrong on their own.
        worked (`tuple[str, ...]`): The same in words, one line per part, to be followed by hand.
    """

    thinking: str
    answer: str
    parts: tuple[str, ...]
    worked: tuple[str, ...]

    def right_parts(self, answer: str) -> int:
        """How many parts of an answer are right; each has its place."""
        width = len(self.parts[0])
        return sum(answer[i * width :][:width] == part for i, part in enumerate(self.parts))


@dataclass(frozen=True)
class Task:
    """One kind of problem.

    Args:
        examples (`tuple[str, ...]`): Prompts to try, the easiest first.
        new (`Callable`): Makes a fresh prompt from a seed.
        solve (`Callable`): The [`Solution`] of a prompt; raises [`TaskError`] for one that is no problem.
        intro (`str`): What the first example means and how to check it, in Markdown.
        about (`str`): What the problems are in general, in Markdown.
        max_thinking_tokens, max_answer_tokens (`int`): Caps that every problem fits into.
    """

    examples: tuple[str, ...]
    new: Callable[[int], str]
    solve: Callable[[str], Solution]
    intro: str
    about: str
    max_thinking_tokens: int
    max_answer_tokens: int


# -- the lab's task --------------------------------------------------------------------------------------------------------

_ALPHABET = frozenset(PROMPT_START + PROMPT_END + OPERATIONS + DIGITS + LETTERS)
_FIRST = re.compile(rf"{re.escape(PROMPT_START)}{LETTERS[0]}(\d)", re.ASCII)
_STEPS = [re.compile(rf"{letter}([{OPERATIONS}])([{OPERANDS}])") for letter in LETTERS[1:]]
_EXAMPLES = ("^a6b-1c-5d-4>", "^a3b+2c-5d+4e+1f-3g+2>", "^a9b+4c+1d-2e-5f+3g+3h-1i-4j+5k-2l+1>")
_FORM = (
    f"It is trained for one kind of problem, such as {_EXAMPLES[0]} : {PROMPT_START}, the letter a with a digit, then b, c, d and so on up to "
    f"{LETTERS[-1]} at most, each with + or - and a digit from {OPERANDS[0]} to {OPERANDS[-1]}, and {PROMPT_END} at the end. "
    "Take an example, or press “New problem”."
)


def _solve_book(prompt: str) -> Solution:
    """Works a problem out; what is no problem is refused with the place where it stops being one."""
    if strange := sorted(set(prompt) - _ALPHABET):
        shown = ", ".join(repr(c) for c in strange[:5]) + (" and others" if len(strange) > 5 else "")
        raise TaskError(f"This small model cannot read that: it does not know {shown} in a problem. {_FORM}")
    if not (first := _FIRST.match(prompt)):
        raise TaskError(
            f"This small model cannot read that: a problem begins with {PROMPT_START}a and a digit. {_FORM}"
        )
    value, place = int(first[1]), first.end()
    thinking, parts, worked = f"a{value}", [], []
    for letter, step in zip(LETTERS[1:], _STEPS, strict=True):
        if not (found := step.match(prompt, place)):
            break
        op, k = found.groups()
        plain = value + int(op + k)
        result, code = plain % 10, BOOK[op, k][plain % 10]
        thinking += f"{letter}{value}{op}{k}={result}"
        parts.append(letter + code)
        sign = "−" if op == "-" else "+"
        kept = "" if plain == result else f" {plain}, and ten {'more' if plain < 0 else 'less'} is".replace("-", "−")
        worked.append(
            f"{letter}: {value} {sign} {k} ={kept} {result}; the code of “{sign}{k} gives {result}” is {code}"
        )
        value, place = result, found.end()
    if not parts or prompt[place:] != PROMPT_END:
        wanted = (
            [f"{LETTERS[len(parts) + 1]} with a sign and a digit from 1 to 5"] if len(parts) + 1 < len(LETTERS) else []
        )
        wanted += [PROMPT_END] if parts else []
        got = f"“{prompt[place:][:12]}”" if prompt[place:] else "nothing"
        where = f"after {prompt[:place]} comes {', or '.join(wanted)}, not {got}"
        raise TaskError(f"This small model cannot read that: {where}. {_FORM}")
    return Solution(thinking, "".join(parts), tuple(parts), tuple(worked))


def _book_problem(seed: int) -> str:
    return next(problems("heldout", (4, 12), seed)).prompt


def _book_intro(prompt: str) -> str:
    solution = _solve_book(prompt)
    steps = "\n".join(f"- {line}" for line in solution.worked)
    said = f"**`{prompt}`** is a small sum: a is {prompt[2]}, and each letter after it adds to the one before or takes away from it. "
    said += "Only one digit is kept: below 0, ten is added; from 10 on, ten is taken away."
    end = "The **thinking** works out the digits. The **answer** is the code of every step, from a table that the model has learned by heart: "
    return f"{said}\n\n{steps}\n\n{end}`{solution.answer}` is right.\n"


_ROWS = "\n".join(f"| `{op}{k}` | {' | '.join(codes)} |" for (op, k), codes in BOOK.items())

BOOK_TASK = Task(
    examples=_EXAMPLES,
    new=_book_problem,
    solve=_solve_book,
    intro=_book_intro(_EXAMPLES[0]),
    about=f"""## The problems

The model here is tiny and solves one made-up kind of problem; it cannot talk. It was trained on problems with 4 to 12 letters. “New problem” makes one that
it has not seen in training.

{_book_intro(_EXAMPLES[0])}
Adding is easy, the table of codes is hard: so a small size can do the thinking for a large one.

### The table of codes

A row for each step, a column for each digit that it can give.

| step | {" | ".join(DIGITS)} |
|---|{"---|" * len(DIGITS)}
{_ROWS}
""",
    max_thinking_tokens=128,
    max_answer_tokens=64,
)
