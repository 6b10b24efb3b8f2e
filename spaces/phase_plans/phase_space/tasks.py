"""What a model that solves only one kind of problem needs: how problems look, examples, an explanation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_elastic.errors import HFElasticError
from hf_elastic.lab.book import BOOK, problems
from hf_elastic.lab.task import CODES, DIGITS, LETTERS, OPERATIONS, PROMPT_END, PROMPT_START, THINK_END, THINK_START


class TaskError(HFElasticError, ValueError):
    """A prompt that the model of a task cannot read; the message is for the visitor."""


@dataclass(frozen=True)
class Task:
    """One kind of problem.

    Args:
        examples (`tuple[str, ...]`): Prompts to try.
        alphabet (`frozenset[str]`): Characters that the model reads.
        markers (`tuple[str, ...]`): Texts that it reads as one token although their characters are not in the alphabet.
        new (`Callable`): Makes a fresh prompt from a seed.
        about (`str`): What the problems are, in Markdown.
        max_thinking_tokens, max_answer_tokens (`int`): Caps that every problem fits into.
    """

    examples: tuple[str, ...]
    alphabet: frozenset[str]
    markers: tuple[str, ...]
    new: Callable[[int], str]
    about: str
    max_thinking_tokens: int
    max_answer_tokens: int

    def check(self, prompt: str) -> None:
        """Refuse a prompt with a character that the model does not know.

        Raises:
            `TaskError`: says which characters, and what a problem looks like.
        """
        rest = prompt
        for marker in self.markers:
            rest = rest.replace(marker, "")
        if strange := sorted(set(rest) - self.alphabet):
            shown = ", ".join(repr(c) for c in strange[:5]) + (" and others" if len(strange) > 5 else "")
            raise TaskError(
                f"This small model reads only problems such as {self.examples[0]}; it does not know {shown}. "
                "Take one of the examples, or press “New problem”."
            )


def _book_problem(seed: int) -> str:
    return next(problems("heldout", (4, 12), seed)).prompt


_ROWS = "\n".join(
    f"| `{op}{k}` | " + " | ".join(f"`{code}`" for code in codes) + " |" for (op, k), codes in BOOK.items()
)

BOOK_TASK = Task(
    examples=("^a6b-1c-5d-4>", "^a3b+2c-5d+4e+1f-3g+2>", "^a9b+4c+1d-2e-5f+3g+3h-1i-4j+5k-2l+1>"),
    alphabet=frozenset(PROMPT_START + PROMPT_END + "=" + OPERATIONS + DIGITS + LETTERS + CODES),
    markers=(THINK_START, THINK_END),
    new=_book_problem,
    about=f"""### The problems

The embedded model is tiny (141,856 parameters) and solves one made-up task. `^a6b-1c-5d-4>` is a small program: start with 6, subtract 1, then 5,
then 4, always modulo 10, and give every step a letter.

- It **thinks** by working out the steps: `a6 b6-1=5 c5-5=0 d0-4=6` (without the spaces).
- It **answers** with a code for every step, `bL cL dJ`, which it looks up in a table of 100 entries that it has learned by heart.

Speed hardly depends on the size here: a step of such a small model is nearly all overhead. What larger models gain is in the compute.

Thinking is easy and the table is hard, so a small submodel can think for a large one. Problems with 4 to 12 letters can be expected to work;
“New problem” makes one that was held out of training.

<details><summary>The table</summary>

| step | {" | ".join(DIGITS)} |
|---|{"---|" * len(DIGITS)}
{_ROWS}

The columns are the results.
</details>
""",
    max_thinking_tokens=128,
    max_answer_tokens=64,
)
