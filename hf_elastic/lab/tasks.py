"""The tasks of the lab by name: `stories`, word problems in plain English, and `book`, the same idea in signs."""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path

from ..errors import ElasticConfigError, did_you_mean
from .exercises import LabTask

ASSETS = Path(str(resources.files("hf_elastic.lab"))) / "assets"
"""Folder of the trained models that ship with the package."""


def _book() -> LabTask:
    from . import book, task
    from .book_model import new_parent
    from .family import FAMILY

    return LabTask(
        name="book",
        unit="letters",
        trained=book.TRAINING_LETTERS,
        measured=12,
        build_tokenizer=task.build_tokenizer,
        problems=task.problems,
        opening=lambda prompt: prompt + task.THINK_START,
        right=book.right_codes,
        new_parent=new_parent,
        sizes=FAMILY,
        parent_folder=ASSETS / "parent",
        family_folder=ASSETS / "family",
    )


def _stories() -> LabTask:
    from . import stories
    from .stories_model import SIZES, new_parent

    return LabTask(
        name="stories",
        unit="people",
        trained=stories.TRAINED_PEOPLE,
        measured=6,
        build_tokenizer=stories.build_tokenizer,
        problems=stories.problems,
        opening=lambda prompt: f"{stories.USER}{prompt}{stories.ASSISTANT}{stories.THINK_START}",
        right=stories.right_sentences,
        new_parent=new_parent,
        sizes=SIZES,
        parent_folder=ASSETS / "stories-parent",
        family_folder=ASSETS / "stories",
    )


TASKS = {"stories": _stories, "book": _book}
"""Names of the tasks; each is made when it is asked for."""


@functools.cache
def get_task(name: str) -> LabTask:
    """A task of the lab.

    Args:
        name (`str`): `"stories"` or `"book"`.

    Returns:
        [`~hf_elastic.lab.exercises.LabTask`]

    Raises:
        `ElasticConfigError`: there is no such task.
    """
    if name not in TASKS:
        raise ElasticConfigError(
            f"task {name!r} is unknown; the lab has {', '.join(TASKS)}.{did_you_mean(name, TASKS)}"
        )
    return TASKS[name]()
