"""Reads stories as somebody writes them: the problem with its solution, or what is wrong in which sentence."""

from __future__ import annotations

import re

from ..errors import did_you_mean, shown
from .stories import LEAST_COINS, MOST_COINS, MOST_DIFFERENCE, NAMES, SHOPS, Problem, tell

_FIRST = re.compile(r"(\w+) has (-?\d{1,6}) coins?\.", re.ASCII)
_NEXT = re.compile(r"(\w+) has (-?\d{1,6}) (more|fewer) than (\w+)\.", re.ASCII)
_GOING = re.compile(r"(All go|\w+ goes) to the ([\w ]+)\.", re.ASCII)
_QUESTION = re.compile(r"What can (.+) buy\?")

EXAMPLE = tell(("Mia", "Tom", "Ana"), (7, 11, 9), "toy shop").prompt
"""A story in the form that is read."""


def read(prompt: str) -> Problem:
    """Reads one story.

    Args:
        prompt (`str`): In the form of [`EXAMPLE`], from 1 to 12 people; white space does not matter.

    Returns:
        `Problem`: With the prompt as the models were trained on it, and its solution.

    Raises:
        `ValueError`: says which sentence is not of that form, what stands there, and what could.

    Example:

    ```python
    >>> from hf_elastic.lab.story_reader import read
    >>> read("Mia has 7 coins. Mia goes to the toy shop. What can Mia buy?").thinking
    'Mia owns 7.'
    >>> read("Mia has 7 coins. Tom has 40 more than Mia. All go to the toy shop. What can Mia and Tom buy?")
    Traceback (most recent call last):
    ...
    ValueError: “Tom has 40 more than Mia.”: the difference must be from 1 to 5, not 40.
    ```
    """
    sentences = re.split(r"(?<=[.?]) ", " ".join(prompt.split()))
    if len(sentences) < 3:
        raise ValueError(
            "a story has a sentence for each person, one about the shop, and the question: 3 at least, each with . or ? at its end; "
            f"this has {len(sentences)}."
        )
    *people, going, question = sentences
    names: list[str] = []
    coins: list[int] = []
    for sentence in people:
        name, has = _next(sentence, names, coins) if names else _first(sentence)
        if not LEAST_COINS <= has <= MOST_COINS:
            raise ValueError(
                f"{_said(sentence)}: {name} would have {has} coins; from {LEAST_COINS} to {MOST_COINS} can be spent."
            )
        names.append(name)
        coins.append(has)
    shop = _shop(going, names)
    _check_question(question, names)
    return tell(names, coins, shop)


def _first(sentence: str) -> tuple[str, int]:
    if not (found := _FIRST.fullmatch(sentence)):
        raise _unlike(sentence, "Mia has 7 coins.")
    return _known(found[1], sentence), int(found[2])


def _next(sentence: str, names: list[str], coins: list[int]) -> tuple[str, int]:
    if not (found := _NEXT.fullmatch(sentence)):
        raise _unlike(sentence, f"{_somebody_else(names)} has 4 more than {names[-1]}.")
    name, difference, before = _known(found[1], sentence), int(found[2]), found[4]
    if name in names:
        raise ValueError(f"{_said(sentence)}: {name} has been told of already.")
    if before != names[-1]:
        raise ValueError(f"{_said(sentence)}: it must say how many more or fewer than {names[-1]}, the one before.")
    if not 1 <= difference <= MOST_DIFFERENCE:
        raise ValueError(f"{_said(sentence)}: the difference must be from 1 to {MOST_DIFFERENCE}, not {difference}.")
    return name, coins[-1] + (difference if found[3] == "more" else -difference)


def _shop(sentence: str, names: list[str]) -> str:
    who = "All go" if len(names) > 1 else f"{names[0]} goes"
    if not (found := _GOING.fullmatch(sentence)) or found[1] != who:
        raise _unlike(sentence, f"{who} to the toy shop.")
    if found[2] not in SHOPS:
        raise ValueError(
            f"{_said(sentence)}: there is no {shown(found[2])}, but {', '.join(SHOPS)}.{did_you_mean(found[2], SHOPS)}"
        )
    return found[2]


def _check_question(sentence: str, names: list[str]) -> None:
    wanted = f"What can {' and '.join(names[-2:])} buy?"
    if not _QUESTION.fullmatch(sentence):
        raise _unlike(sentence, wanted)
    if sentence != wanted:
        raise ValueError(f"{_said(sentence)}: the question must be about the last of the people: “{wanted}”")


def _known(name: str, sentence: str) -> str:
    if name not in NAMES:
        raise ValueError(
            f"{_said(sentence)}: {shown(name)} is not known; the people are {', '.join(NAMES)}.{did_you_mean(name, NAMES)}"
        )
    return name


def _somebody_else(names: list[str]) -> str:
    return next((name for name in NAMES if name not in names), "nobody")


def _unlike(sentence: str, example: str) -> ValueError:
    return ValueError(f"{_said(sentence)} must be a sentence like “{example}”")


def _said(sentence: str) -> str:
    return f"“{sentence if len(sentence) <= 80 else sentence[:79] + '…'}”"
