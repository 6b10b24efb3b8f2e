"""The tasks of the lab by name: `stories`, word problems in plain English, and `book`, the same idea in signs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ElasticConfigError, did_you_mean

if TYPE_CHECKING:  # the command line has the names without torch
    from .exercises import LabTask

TASKS = ("stories", "book")
"""Names of the tasks."""


def get_task(name: LabTask | str) -> LabTask:
    """A task of the lab.

    Args:
        name (`str`): `"stories"` or `"book"`. A task is given back as it is.

    Returns:
        [`~hf_elastic.lab.exercises.LabTask`]

    Raises:
        `ElasticConfigError`: there is no such task.
    """
    if not isinstance(name, str):
        return name
    if name not in TASKS:
        raise ElasticConfigError(
            f"task {name!r} is unknown; the lab has {', '.join(TASKS)}.{did_you_mean(name, TASKS)}"
        )
    if name == "book":
        from .book import TASK
    else:
        from .stories_task import TASK
    return TASK
