"""The `book` task: a small reasoning problem on which thinking, model size and the answer can be told apart.

A problem is a lettered programme of additions and subtractions modulo 10; see [`~hf_elastic.lab.task`] for its form.
Here are its training batches, its calibration data and its score, as [`~hf_elastic.lab.exercises`] makes them for every task; the names
of the task are here too, so that this is the one module to import.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_elastic.lab.book_model import FAMILY, new_parent
from hf_elastic.lab.exercises import ASSETS, LabTask
from hf_elastic.lab.explained import explain
from hf_elastic.lab.task import (
    BOOK,
    EOS,
    THINK_END,
    THINK_START,
    Problem,
    build_tokenizer,
    make_problem,
    problems,
    split_of,
)

__all__ = [
    "BOOK",
    "EOS",
    "TASK",
    "THINK_END",
    "THINK_START",
    "Evaluation",
    "Problem",
    "build_tokenizer",
    "calibration_dataset",
    "evaluate",
    "make_problem",
    "problems",
    "right_codes",
    "split_of",
    "training_batches",
    "training_dataset",
]

TRAINING_LETTERS = (4, 12)


@dataclass(frozen=True)
class Evaluation:
    """What [`evaluate`] measured. All rates are in `[0, 1]`.

    Args:
        exact (`float`): Rate of problems whose whole answer is right and ends where it should.
        trace (`float`): Rate of problems whose thinking is right to the last token; 0 where none was asked for.
        code (`float`): Rate of code symbols that are right, over all lines. The letters beside them do not count, for
            they follow from the prompt alone. Knowing the table but no result scores 0.29 at best.
        count (`int`): Number of problems.
        letters (`int` or `tuple[int, int]`): Letters per problem, or their inclusive range.
    """

    exact: float
    trace: float
    code: float
    count: int
    letters: int | tuple[int, int]


def right_codes(problem: Problem, answer: str) -> tuple[int, int]:
    """How many codes of an answer are right, and how many there are."""
    right = sum(ours == theirs for ours, theirs in zip(answer[1::2], problem.answer[1::2], strict=False))
    return right, len(problem.answer) // 2


TASK = LabTask(
    name="book",
    unit="letters",
    trained=TRAINING_LETTERS,
    measured=12,
    build_tokenizer=build_tokenizer,
    problems=problems,
    opening=lambda prompt: prompt + THINK_START,
    right=right_codes,
    explain=explain,
    shown=5,
    new_parent=new_parent,
    sizes=FAMILY,
    parent_folder=ASSETS / "parent",
    family_folder=ASSETS / "family",
)
"""The task as the lab runs it."""


def training_batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, batch_size: int = 32
) -> Iterator[dict[str, torch.Tensor]]:
    """Makes training batches without end, from fresh problems of the training split with 4 to 12 letters.

    Of the examples 80 % have their full thinking, 10 % none (`<think></think>`) and 10 % a thinking cut at a random
    token. The thinking and the answer with its `<eos>` are targets; the prompt, `<think>` and padding are not, and
    `</think>` only where the thinking was complete, for elsewhere it came from outside.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): The tokenizer of the task.
        seed (`int`): The same seed gives the same batches.
        batch_size (`int`, *optional*, defaults to 32): Examples per batch.

    Returns:
        `Iterator[dict[str, torch.Tensor]]`: `input_ids`, `attention_mask` and `labels` (-100 where there is no
        target), each `int64` of shape `(batch_size, tokens)`, padded on the right. Examples of a batch have similar
        lengths.

    Raises:
        `ValueError`: If `batch_size` is not positive.
    """
    return TASK.training_batches(tokenizer, seed, batch_size)


def training_dataset(tokenizer: PreTrainedTokenizerFast, seed: int, batch_size: int = 32) -> IterableDataset:
    """The rows of [`training_batches`] without end, unpadded and in the same order, for a trainer that batches by itself.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): The tokenizer of the task.
        seed (`int`): The same seed gives the same rows.
        batch_size (`int`, *optional*, defaults to 32): Rows that are taken together; they have similar lengths.

    Returns:
        `datasets.IterableDataset`: With the columns `input_ids` and `labels`.
    """

    return TASK.training_dataset(tokenizer, seed, batch_size)


def calibration_dataset(tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> Dataset:
    """Makes a dataset to measure activations on: training problems of 4 to 12 letters with full thinking and `<eos>`.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): The tokenizer of the task.
        size (`int`): Number of rows.
        seed (`int`): The same seed gives the same rows.

    Returns:
        `datasets.Dataset`: Columns `input_ids` and `attention_mask`, lists of different lengths, not padded.

    Raises:
        `ValueError`: If `size` is not positive.
    """
    return TASK.calibration_dataset(tokenizer, size, seed)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    letters: int | tuple[int, int] = 12,
    count: int = 100,
    batch_size: int = 50,
    seed: int = 0,
    thinking: bool = True,
    progress: bool = False,
) -> Evaluation:
    """Lets a model solve held-out problems by greedy generation with a cache, and scores its text.

    Args:
        model (`PreTrainedModel`): The model, or anything with its `generate` and `device`.
        tokenizer (`PreTrainedTokenizerFast`): The tokenizer of the task.
        letters (`int` or `tuple[int, int]`, *optional*, defaults to 12): Letters per problem, from 2 to 20, or an
            inclusive range.
        count (`int`, *optional*, defaults to 100): Number of problems.
        batch_size (`int`, *optional*, defaults to 50): Problems generated together.
        seed (`int`, *optional*, defaults to 0): The same seed gives the same problems.
        thinking (`bool`, *optional*, defaults to `True`): Whether the model thinks. If not, it is given
            `<think></think>` and answers at once.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

    Returns:
        `Evaluation`: The rates. Text is compared up to `<eos>`; generation stops there, or at the length of the
        longest true solution.

    Raises:
        `ValueError`: If `letters` is out of range, or `count` or `batch_size` is not positive.
    """
    found = TASK.evaluate(
        model,
        tokenizer,
        size=letters,
        count=count,
        batch_size=batch_size,
        seed=seed,
        thinking=thinking,
        progress=progress,
    )
    return Evaluation(found.exact, found.trace, found.code, found.count, found.size)
