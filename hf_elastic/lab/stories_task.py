"""The `stories` task as the lab runs it: its problems, its model, its sizes."""

from __future__ import annotations

from . import stories
from .exercises import ASSETS, LabTask
from .stories_model import SIZES, new_parent

TASK = LabTask(
    name="stories",
    unit="people",
    trained=stories.TRAINED_PEOPLE,
    measured=5,
    build_tokenizer=stories.build_tokenizer,
    problems=stories.problems,
    opening=stories.opening,
    right=stories.right_sentences,
    explain=stories.explain,
    shown=3,
    new_parent=new_parent,
    sizes=SIZES,
    parent_folder=ASSETS / "stories-parent",
    family_folder=ASSETS / "stories",
    parent_steps=800,
    family_steps=700,
    learning_rate=5e-3,
)
