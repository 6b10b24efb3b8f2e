"""The `book` task: a small reasoning problem on which thinking, model size and the answer can be told apart.

A problem is a lettered programme of additions and subtractions modulo 10; see [`~hf_elastic.lab.task`] for its form.
Here are its training batches, its calibration data and its score; the names of the task are here too, so that this is
the one module to import.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

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
    "Evaluation",
    "Problem",
    "build_tokenizer",
    "calibration_dataset",
    "evaluate",
    "make_problem",
    "problems",
    "split_of",
    "training_batches",
    "training_dataset",
]

TRAINING_LETTERS = (4, 12)
MASKED = -100  # the label that the cross-entropy of `transformers` ignores

# Of the training examples: full thinking, none at all, and thinking cut at a random token.
_MIXTURE = {"full": 0.8, "direct": 0.1, "truncated": 0.1}
# Batches are cut from sorted pools of this many batches, so that little of a batch is padding.
_POOL_BATCHES = 8


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


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number!r}.")


def _training_text(problem: Problem, rng: random.Random) -> tuple[str, bool]:
    """Draws the form of a training example: its text, and whether `</think>` comes where the model did not choose."""
    form = rng.choices(list(_MIXTURE), list(_MIXTURE.values()))[0]
    if form == "full":
        return problem.text + EOS, False
    kept = 0 if form == "direct" else rng.choices(range(1, len(problem.thinking)))[0]
    return f"{problem.prompt}{THINK_START}{problem.thinking[:kept]}{THINK_END}{problem.answer}{EOS}", True


def _labels(input_ids: list[int], think_start: int, think_end: int, forced: bool) -> list[int]:
    start = input_ids.index(think_start) + 1
    labels = [MASKED] * start + input_ids[start:]
    if forced:
        labels[input_ids.index(think_end)] = MASKED
    return labels


def _collate(examples: list[tuple[list[int], list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    width = max(len(input_ids) for input_ids, _ in examples)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for input_ids, labels in examples:
        padding = width - len(input_ids)
        rows["input_ids"].append(input_ids + [pad_id] * padding)
        rows["attention_mask"].append([1] * len(input_ids) + [0] * padding)
        rows["labels"].append(labels + [MASKED] * padding)
    return {name: torch.tensor(values) for name, values in rows.items()}


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
    _check_positive(batch_size=batch_size)
    return _draw_batches(tokenizer, seed, batch_size)


def _draw_batches(tokenizer: PreTrainedTokenizerFast, seed: int, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    source = problems("train", TRAINING_LETTERS, seed)
    rng = random.Random(f"forms of {seed}")
    think_start, think_end = tokenizer.convert_tokens_to_ids([THINK_START, THINK_END])
    while True:
        drawn = [_training_text(next(source), rng) for _ in range(_POOL_BATCHES * batch_size)]
        encoded = tokenizer([text for text, _ in drawn])["input_ids"]
        pool = [
            (input_ids, _labels(input_ids, think_start, think_end, forced))
            for input_ids, (_, forced) in zip(encoded, drawn, strict=True)
        ]
        pool.sort(key=lambda example: len(example[0]))
        starts = list(range(0, len(pool), batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield _collate(pool[start : start + batch_size], tokenizer.pad_token_id)


def training_dataset(tokenizer: PreTrainedTokenizerFast, seed: int, batch_size: int = 32) -> IterableDataset:
    """The rows of [`training_batches`] without end, unpadded and in the same order, for a trainer that batches by itself.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): The tokenizer of the task.
        seed (`int`): The same seed gives the same rows.
        batch_size (`int`, *optional*, defaults to 32): Rows that are taken together; they have similar lengths.

    Returns:
        `datasets.IterableDataset`: With the columns `input_ids` and `labels`.
    """

    def rows() -> Iterator[dict[str, list[int]]]:
        for batch in training_batches(tokenizer, seed, batch_size):
            for input_ids, mask, labels in zip(*(batch[key].tolist() for key in batch), strict=True):
                length = sum(mask)
                yield {"input_ids": input_ids[:length], "labels": labels[:length]}

    return IterableDataset.from_generator(rows)


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
    _check_positive(size=size)
    source = problems("train", TRAINING_LETTERS, seed)
    return Dataset.from_dict(dict(tokenizer([next(source).text + EOS for _ in range(size)])))


def _score(problem: Problem, completion: str, thinking: bool) -> tuple[bool, bool, int]:
    """Compares a completion, up to `<eos>`, with a problem: answer right, thinking right, number of right codes."""
    trace, _, answer = completion.partition(THINK_END) if thinking else ("", "", completion)
    right_codes = sum(ours == theirs for ours, theirs in zip(answer[1::2], problem.answer[1::2], strict=False))
    return answer == problem.answer, trace == problem.thinking, right_codes


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
    _check_positive(count=count, batch_size=batch_size)
    source = problems("heldout", letters, seed)
    todo = [next(source) for _ in range(count)]
    scores = []
    for start in tqdm(range(0, count, batch_size), desc="evaluate", unit="batch", disable=not progress):
        batch = todo[start : start + batch_size]
        completions = _complete(model, tokenizer, batch, thinking)
        scores += [_score(problem, text, thinking) for problem, text in zip(batch, completions, strict=True)]
    exact, trace, right_codes = (sum(column) for column in zip(*scores, strict=True))
    codes = sum(len(problem.answer) // 2 for problem in todo)
    return Evaluation(exact / count, trace / count, right_codes / codes, count, letters)


def _complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch: list[Problem], thinking: bool
) -> list[str]:
    opening = THINK_START if thinking else THINK_START + THINK_END
    rest = [problem.thinking + THINK_END + problem.answer if thinking else problem.answer for problem in batch]
    inputs = tokenizer(
        [problem.prompt + opening for problem in batch], padding=True, padding_side="left", return_tensors="pt"
    ).to(model.device)
    outputs = model.generate(
        **inputs,
        max_new_tokens=max(map(len, tokenizer([text + EOS for text in rest])["input_ids"])),
        do_sample=False,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :])
    return [text.partition(EOS)[0] for text in texts]
