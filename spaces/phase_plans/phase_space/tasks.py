"""What a model that solves only one kind of problem needs: how problems look, examples, an explanation, what is right, and how to check it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from hf_elastic.errors import HFElasticError
from hf_elastic.lab.stories import PRICES, SHOPS, TRAINED_PEOPLE, price_list, problems
from hf_elastic.lab.story_reader import EXAMPLE, read


class TaskError(HFElasticError, ValueError):
    """A prompt that the model of a task cannot read; the message is for the visitor."""


@dataclass(frozen=True)
class Solution:
    """What is right for one prompt.

    Args:
        prompt (`str`): As the model was trained to read it.
        thinking (`str`): As the model should write it.
        answer (`str`): As the model should write it.
        worked (`tuple[str, ...]`): The same in short, a line per step, to be followed by hand.
    """

    prompt: str
    thinking: str
    answer: str
    worked: tuple[str, ...]

    @property
    def parts(self) -> list[str]:
        """`list[str]`: The sentences of the answer, which are right or wrong on their own."""
        return _sentences(self.answer)

    def right_parts(self, answer: str) -> int:
        """How many sentences of an answer are right; each has its place."""
        return sum(ours == theirs for ours, theirs in zip(_sentences(answer), self.parts, strict=False))


@dataclass(frozen=True)
class Sheet:
    """What is needed to check an answer by hand: a title, and entries with their number."""

    title: str
    entries: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Task:
    """One kind of problem.

    Args:
        examples (`tuple[str, ...]`): Prompts to try, the easiest first.
        new (`Callable`): Makes a fresh prompt from a seed.
        solve (`Callable`): The [`Solution`] of a prompt; raises [`TaskError`] for one that is no problem.
        sheet (`Callable`): The [`Sheet`] for a prompt, also an unfinished one; `None` if it does not say which.
        intro (`str`): What the first example means and how to check it, in Markdown.
        about (`str`): What the problems are in general, in Markdown.
        max_thinking_tokens, max_answer_tokens (`int`): Caps that every problem fits into.
    """

    examples: tuple[str, ...]
    new: Callable[[int], str]
    solve: Callable[[str], Solution]
    sheet: Callable[[str], Sheet | None]
    intro: str
    about: str
    max_thinking_tokens: int
    max_answer_tokens: int


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=\.) ", text)


# -- the lab's task --------------------------------------------------------------------------------------------------------


def _story(people: int | tuple[int, int], seed: int) -> str:
    return next(problems("heldout", people, seed)).prompt


_EXAMPLES = tuple(_story(people, seed=0) for people in (2, 3, 5))
_MOST_PEOPLE = 10  # whose story fits into the context of the model
_FORM = f"It reads stories of one form only, such as: {EXAMPLE} Take an example, or press “New problem”."


def _solve(prompt: str) -> Solution:
    """Works a story out; what is none is refused with the sentence that is wrong."""
    try:
        story = read(prompt)
    except ValueError as error:
        raise TaskError(f"This small model cannot read that: {error} {_FORM}") from None
    owned = re.findall(r"(\w+) owns (\d+)", story.thinking)
    if len(owned) > _MOST_PEOPLE:
        raise TaskError(
            f"This story has {len(owned)} people, and the model has room for {_MOST_PEOPLE}. Leave some of them out."
        )
    shop = _shop(story.prompt)
    assert shop is not None
    sums = ["", *re.findall(r"(\d+ [+-] \d+ = )\d+", story.thinking)]
    worked = [f"{name}: {sum_}{coins} coins" for sum_, (name, coins) in zip(sums, owned, strict=True)]
    for i in range(len(owned))[-2:]:
        worked[i] += f"; in the {shop} that buys a {PRICES[shop, int(owned[i][1])]}"
    return Solution(story.prompt, story.thinking, story.answer, tuple(worked))


def _shop(prompt: str) -> str | None:
    """The shop that a text names."""
    return next((shop for shop in SHOPS if shop in prompt), None)


def _sheet(prompt: str) -> Sheet | None:
    return Sheet(f"What the {shop} sells, by coins", tuple(price_list(shop))) if (shop := _shop(prompt)) else None


def _intro(prompt: str) -> str:
    solution = _solve(prompt)
    steps = "\n".join(f"- {line}" for line in solution.worked)
    said = "The **thinking** works out who has how many coins. The **answer** says what the last two of the people can buy."
    end = "The model is not shown the price list: it has learned the lists of all shops by heart."
    return f"**{solution.prompt}**\n\n{said}\n\n{steps}\n\n{end}\n"


STORIES_TASK = Task(
    examples=_EXAMPLES,
    new=lambda seed: _story((2, TRAINED_PEOPLE[1]), seed),
    solve=_solve,
    sheet=_sheet,
    intro=_intro(_EXAMPLES[0]),
    about=f"""## The problems

The model here is tiny. It was trained on one kind of problem, short stories about people who go shopping; it cannot talk about anything else. “New problem”
makes a story that it has not seen in training.

{_intro(_EXAMPLES[0])}
It was trained on stories of up to {TRAINED_PEOPLE[1]} people. There are {len(SHOPS)} shops: {", ".join(SHOPS)}. Each sells one thing for every number of
coins, so there are {sum(len(price_list(shop)) for shop in SHOPS)} prices to remember. Most of what is written is thinking, so a small size that
thinks saves the most. An answer is right only if all of it is.
""",
    max_thinking_tokens=128,
    max_answer_tokens=64,
)
