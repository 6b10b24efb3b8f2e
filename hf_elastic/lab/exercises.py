"""What the tasks of the lab have in common: their training batches, their calibration data, and their score.

A task is a record, [`LabTask`]: where its problems come from, how they are put to a model, what part of an answer is right. Everything
else is the same for all of them, and is here.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

THINK_START, THINK_END, EOS = "<think>", "</think>", "<eos>"
ASSETS = Path(str(resources.files("hf_elastic.lab"))) / "assets"
"""Folder of the trained models that ship with the package."""
MASKED = -100  # the label that the cross-entropy of `transformers` ignores

# Of the training examples: full thinking, none at all, and thinking cut at a random token.
_MIXTURE = {"full": 0.8, "direct": 0.1, "truncated": 0.1}
# Batches are cut from sorted pools of this many batches, so that little of a batch is padding.
_POOL_BATCHES = 8

Sizes = int | tuple[int, int]

SPLITS = ("train", "heldout")

# One prompt in this many is held out.
_HELDOUT_EVERY = 10


def split_of(prompt: str) -> str:
    """Tells the split of a prompt, `"train"` or `"heldout"`, from a checksum of its text.

    The checksum is the same in every process and on every platform, which Python's own `hash` is not.
    """
    return "heldout" if zlib.crc32(prompt.encode()) % _HELDOUT_EVERY == 0 else "train"


def draw_problems(
    make: Callable[[random.Random, int], Any], split: str, sizes: tuple[int, int], seed: int
) -> Iterator[Any]:
    """Draws problems of one split without end, as long as is drawn uniformly from an inclusive range.

    Raises:
        `ValueError`: If `split` is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(map(repr, SPLITS))}, got {split!r}.")
    return _drawn(make, split, range(sizes[0], sizes[1] + 1), random.Random(seed))


def _drawn(make: Callable[[random.Random, int], Any], split: str, sizes: range, rng: random.Random) -> Iterator[Any]:
    while True:
        problem = make(rng, rng.choices(sizes)[0])
        if split_of(problem.prompt) == split:
            yield problem


class Problem(Protocol):
    """One problem: `prompt`, `thinking` and `answer`, as text without the tokens around them."""

    @property
    def prompt(self) -> str: ...
    @property
    def thinking(self) -> str: ...
    @property
    def answer(self) -> str: ...


@dataclass(frozen=True)
class Score:
    """What [`LabTask.evaluate`] measured. All rates are in `[0, 1]`.

    Args:
        exact (`float`): Rate of problems whose whole answer is right and ends where it should.
        trace (`float`): Rate of problems whose thinking is right to the last token; 0 where none was asked for.
        code (`float`): Rate of the parts of all answers that are right: codes, things.
        count (`int`): Number of problems.
        size (`int` or `tuple[int, int]`): How long they were, see [`LabTask`].
    """

    exact: float
    trace: float
    code: float
    count: int
    size: Sizes


@dataclass(frozen=True)
class LabTask:
    """A task of the lab.

    Args:
        name (`str`): As `hf-elastic lab --task` takes it.
        unit (`str`): What a problem has more of if it is longer, such as `"letters"`.
        trained (`tuple[int, int]`): How many of them problems of the training have.
        measured (`int`): And those that accuracy is measured on.
        build_tokenizer (`Callable`): Makes the tokenizer.
        problems (`Callable`): Of a split, a size and a seed, problems without end.
        opening (`Callable`): Of a prompt, the text that a model goes on from, which ends with `<think>`.
        right (`Callable`): Of a problem and a written answer, how many parts of the answer are right, and how many it has.
        explain (`Callable`): Of a problem, the task in words, for somebody who sees it for the first time and wants to check an answer.
        shown (`int`): How long the problem is that serves as example.
        new_parent (`Callable`): Of a seed (and sizes), an untrained parent.
        sizes (`dict`): Budgets of its family.
        parent_folder, family_folder (`Path`): Where the package has them, trained.
        parent_steps, family_steps (`int`): Optimizer steps that they take.
        learning_rate (`float`): Of the family.
    """

    name: str
    unit: str
    trained: tuple[int, int]
    measured: int
    build_tokenizer: Callable[[], PreTrainedTokenizerFast]
    problems: Callable[[str, Sizes, int], Iterator[Any]]
    opening: Callable[[str], str]
    right: Callable[[Any, str], tuple[int, int]]
    explain: Callable[[Any], str]
    shown: int
    new_parent: Callable[..., PreTrainedModel]
    sizes: Mapping[str, Mapping[str, Any]]
    parent_folder: Path
    family_folder: Path
    parent_steps: int = 1000
    family_steps: int = 1000
    learning_rate: float = 6e-3

    def training_batches(
        self, tokenizer: PreTrainedTokenizerFast, seed: int, batch_size: int = 32
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Makes training batches without end, from fresh problems of the training split.

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
        return self._draw_batches(tokenizer, seed, batch_size)

    def _draw_batches(
        self, tokenizer: PreTrainedTokenizerFast, seed: int, batch_size: int
    ) -> Iterator[dict[str, torch.Tensor]]:
        source = self.problems("train", self.trained, seed)
        rng = random.Random(f"forms of {seed}")
        while True:
            pool = self._examples(tokenizer, [next(source) for _ in range(_POOL_BATCHES * batch_size)], rng)
            pool.sort(key=lambda example: len(example[0]))
            starts = list(range(0, len(pool), batch_size))
            rng.shuffle(starts)
            for start in starts:
                yield _collate(pool[start : start + batch_size], _pad(tokenizer))

    def _examples(
        self, tokenizer: PreTrainedTokenizerFast, drawn: list[Any], rng: random.Random
    ) -> list[tuple[list[int], list[int]]]:
        """Tokens and labels of problems, each in a form that is drawn."""
        openings, thoughts, answers = (
            tokenizer(texts, add_special_tokens=False)["input_ids"]
            for texts in (
                [self.opening(problem.prompt) for problem in drawn],
                [problem.thinking for problem in drawn],
                [problem.answer + EOS for problem in drawn],
            )
        )
        end = tokenizer.convert_tokens_to_ids(THINK_END)
        examples = []
        for opening, thinking, answer in zip(openings, thoughts, answers, strict=True):
            form = rng.choices(list(_MIXTURE), list(_MIXTURE.values()))[0]
            if form != "full":
                thinking = thinking[: 0 if form == "direct" else rng.choices(range(1, len(thinking)))[0]]
            labels = [MASKED] * len(opening) + thinking + [end if form == "full" else MASKED] + answer
            examples.append(([*opening, *thinking, end, *answer], labels))
        return examples

    def training_dataset(self, tokenizer: PreTrainedTokenizerFast, seed: int, batch_size: int = 32) -> IterableDataset:
        """The rows of [`LabTask.training_batches`] without end, unpadded and in the same order, for a trainer that batches by itself.

        Returns:
            `datasets.IterableDataset`: With the columns `input_ids` and `labels`.
        """

        def rows() -> Iterator[dict[str, list[int]]]:
            for batch in self.training_batches(tokenizer, seed, batch_size):
                for input_ids, mask, labels in zip(*(batch[key].tolist() for key in batch), strict=True):
                    length = sum(mask)
                    yield {"input_ids": input_ids[:length], "labels": labels[:length]}

        return IterableDataset.from_generator(rows)

    def calibration_dataset(self, tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> Dataset:
        """Makes a dataset to measure activations on: training problems with full thinking and `<eos>`.

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
        source = self.problems("train", self.trained, seed)
        return Dataset.from_dict(dict(tokenizer([self.solved(next(source)) + EOS for _ in range(size)])))

    def solved(self, problem: Any) -> str:
        """A problem as a model reads it, with its thinking and its answer, without the end-of-sequence token."""
        return f"{self.opening(problem.prompt)}{problem.thinking}{THINK_END}{problem.answer}"

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        size: Sizes | None = None,
        count: int = 100,
        batch_size: int = 50,
        seed: int = 0,
        split: str = "heldout",
        thinking: bool = True,
        progress: bool = False,
    ) -> Score:
        """Lets a model solve held-out problems by greedy generation with a cache, and scores its text.

        Args:
            model (`PreTrainedModel`): The model, or anything with its `generate` and `device`.
            tokenizer (`PreTrainedTokenizerFast`): The tokenizer of the task.
            size (`int` or `tuple[int, int]`, *optional*): How long problems are; by default `measured`.
            count (`int`, *optional*, defaults to 100): Number of problems.
            batch_size (`int`, *optional*, defaults to 50): Problems generated together.
            seed (`int`, *optional*, defaults to 0): The same seed gives the same problems.
            split (`str`, *optional*, defaults to `"heldout"`):
                `"train"` for whoever chooses something by the result: then use a seed that no training has.
            thinking (`bool`, *optional*, defaults to `True`): Whether the model thinks. If not, it is given
                `<think></think>` and answers at once.
            progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

        Returns:
            [`Score`]: The rates. Text is compared up to `<eos>`; generation stops there, or at the length of the
            longest true solution.

        Raises:
            `ValueError`: If `size` or `split` is out of range, or `count` or `batch_size` is not positive.
        """
        _check_positive(count=count, batch_size=batch_size)
        size = self.measured if size is None else size
        source = self.problems(split, size, seed)
        todo = [next(source) for _ in range(count)]
        scores = []
        for start in tqdm(range(0, count, batch_size), desc="evaluate", unit="batch", disable=not progress):
            batch = todo[start : start + batch_size]
            completions = self.complete(model, tokenizer, batch, thinking)
            scores += [self.score(problem, text, thinking) for problem, text in zip(batch, completions, strict=True)]
        exact, trace, right, parts = (sum(column) for column in zip(*scores, strict=True))
        return Score(exact / count, trace / count, right / parts, count, size)

    def score(self, problem: Any, completion: str, thinking: bool = True) -> tuple[bool, bool, int, int]:
        """Compares a completion, up to `<eos>`, with a problem: answer right, thinking right, parts right, parts there are."""
        trace, _, answer = completion.partition(THINK_END) if thinking else ("", "", completion)
        return answer == problem.answer, trace == problem.thinking, *self.right(problem, answer)

    def verdict(self, problem: Any, written: str) -> Mapping[str, str | bool]:
        """What a model wrote after the opening of a problem, in parts.

        Returns:
            `dict`: `thinking`, `answer` (texts) and `right`, whether the whole answer is and ends where it should.
        """
        thinking, _, answer = written.removeprefix(THINK_START).partition(THINK_END)
        right = answer == problem.answer + EOS
        return {"thinking": thinking, "answer": answer.removesuffix(EOS), "right": right}

    def complete(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch: list[Any], thinking: bool = True
    ) -> list[str]:
        """What a model writes for each problem, greedily, up to `<eos>`."""
        forced = "" if thinking else THINK_END
        rest = [problem.thinking + THINK_END + problem.answer if thinking else problem.answer for problem in batch]
        inputs = tokenizer(
            [self.opening(problem.prompt) + forced for problem in batch],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        outputs = model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=max(map(len, tokenizer([text + EOS for text in rest])["input_ids"])),
            do_sample=False,
            use_cache=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :])
        return [text.partition(EOS)[0] for text in texts]


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number!r}.")


def _pad(tokenizer: PreTrainedTokenizerFast) -> int:
    pad: Any = tokenizer.pad_token_id
    return int(pad)


def _collate(examples: list[tuple[list[int], list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    width = max(len(input_ids) for input_ids, _ in examples)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for input_ids, labels in examples:
        padding = width - len(input_ids)
        rows["input_ids"].append(input_ids + [pad_id] * padding)
        rows["attention_mask"].append([1] * len(input_ids) + [0] * padding)
        rows["labels"].append(labels + [MASKED] * padding)
    return {name: torch.tensor(values) for name, values in rows.items()}
