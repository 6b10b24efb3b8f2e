"""The problems of the `book` task and its tokenizer.

A problem is a lettered programme of additions and subtractions modulo 10, read from left to right. The thinking works
it out one line per letter; the answer translates every line through [`BOOK`], a fixed random table the model has to
memorise. For `letters = 4`:

    ^a6b-1c-5d-4><think>a6b6-1=5c5-5=0d0-4=6</think>bLcLdJ

Each character is one token, and so are `<think>` and `</think>`. With n letters the prompt has 3n + 1 tokens, the
thinking 6n - 4 (n = 4: 20) and the answer 2n - 2, the end-of-sequence token not counted.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_elastic.lab.exercises import EOS, THINK_END, THINK_START, draw_problems
from hf_elastic.lab.exercises import split_of as split_of

LETTERS = "abcdefghijklmnopqrst"
DIGITS = "0123456789"
OPERATIONS = "+-"
OPERANDS = "12345"
CODES = "ABCDEFGHIJKL"
PROMPT_START, PROMPT_END = "^", ">"
PAD = "<pad>"


_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + THINK_START + "{% endif %}"
)


def _make_book(seed: int) -> dict[tuple[str, str], str]:
    # `choices` draws through `random()`, the one method whose sequence Python promises to keep.
    rng = random.Random(seed)
    return {(op, k): "".join(rng.choices(CODES, k=len(DIGITS))) for op in OPERATIONS for k in OPERANDS}


BOOK = _make_book(seed=0)
"""`BOOK[op, k][result]` is the code of a line: 2 operations x 5 operands x 10 results onto 12 codes, 100 entries."""


@dataclass(frozen=True)
class Problem:
    """One problem of the task, as text.

    Args:
        prompt (`str`): The programme, from `^` to `>`, such as `"^a6b-1>"`.
        thinking (`str`): The worked lines, without the `<think>` tokens around them, such as `"a6b6-1=5"`.
        answer (`str`): A letter and a code for every line with an operation, without the end-of-sequence token.

    Example:

    ```python
    >>> from hf_elastic.lab.book import Problem
    >>> Problem("^a6b-1>", "a6b6-1=5", "bL").text
    '^a6b-1><think>a6b6-1=5</think>bL'
    ```
    """

    prompt: str
    thinking: str
    answer: str

    @property
    def text(self) -> str:
        """`str`: Prompt, thinking and answer in a row, without the end-of-sequence token."""
        return f"{self.prompt}{THINK_START}{self.thinking}{THINK_END}{self.answer}"


def _letter_range(letters: int | tuple[int, int]) -> tuple[int, int]:
    low, high = (letters, letters) if isinstance(letters, int) else letters
    if not 2 <= low <= high <= len(LETTERS):
        raise ValueError(
            f"`letters` must be a number from 2 to {len(LETTERS)} or an inclusive range (low, high) of such "
            f"numbers, got {letters!r}."
        )
    return low, high


def make_problem(rng: random.Random, letters: int) -> Problem:
    """Draws one problem.

    Args:
        rng (`random.Random`): Where the start value, the operations and the operands come from.
        letters (`int`): Number of letters, from 2 to 20: a start value and `letters - 1` operations.

    Returns:
        `Problem`: The problem with its worked thinking and its answer. It belongs to either split.

    Raises:
        `ValueError`: If `letters` is out of range.
    """
    _letter_range(letters)
    value = rng.choices(DIGITS)[0]
    prompt, thinking, answer = LETTERS[0] + value, LETTERS[0] + value, ""
    for letter in LETTERS[1:letters]:
        op, k = rng.choices(OPERATIONS)[0], rng.choices(OPERANDS)[0]
        result = DIGITS[(int(value) + int(op + k)) % 10]
        prompt += letter + op + k
        # The previous value is written again because the model then finds all it needs within four tokens.
        thinking += f"{letter}{value}{op}{k}={result}"
        answer += letter + BOOK[op, k][int(result)]
        value = result
    return Problem(f"{PROMPT_START}{prompt}{PROMPT_END}", thinking, answer)


def problems(split: str, letters: int | tuple[int, int], seed: int) -> Iterator[Problem]:
    """Draws problems of one split without end.

    Args:
        split (`str`): `"train"` or `"heldout"`. No prompt is in both, whatever the seed.
        letters (`int` or `tuple[int, int]`): Letters per problem, from 2 to 20, or an inclusive range to draw from
            uniformly.
        seed (`int`): The same seed gives the same problems.

    Returns:
        `Iterator[Problem]`: Drawn with replacement: short problems come back (4 letters have 10,000 prompts in all).

    Raises:
        `ValueError`: If `split` is unknown or `letters` out of range.

    Example:

    ```python
    >>> from hf_elastic.lab.book import problems
    >>> problem = next(problems("heldout", letters=3, seed=0))
    >>> problem.prompt, problem.thinking, problem.answer
    ('^a7b+2c-3>', 'a7b7+2=9c9-3=6', 'bKcJ')
    ```
    """
    return draw_problems(make_problem, split, _letter_range(letters), seed)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer of the task: 51 tokens, one per character.

    The tokens are `<pad>`, `<eos>`, `^` (the beginning of a sequence), `<think>`, `</think>`, `>`, `=`, 2 operations,
    10 digits, 20 letters and 12 codes. Nothing is added to a text, not even the end-of-sequence token, and decoding
    gives the text back exactly. `<think>` and `</think>` stay when special tokens are skipped; `^` does not.
    A character outside the vocabulary is an error, not an unknown token.

    Returns:
        `PreTrainedTokenizerFast`: Pads on the left, as generation wants it. It has a chat template that joins the
        messages as they are, ends an assistant's with `<eos>` and starts the thinking as generation prompt.

    Example:

    ```python
    >>> from hf_elastic.lab.book import build_tokenizer
    >>> tokenizer = build_tokenizer()
    >>> tokenizer.tokenize("^a6b-1><think>")
    ['^', 'a', '6', 'b', '-', '1', '>', '<think>']
    ```
    """
    symbols = [PAD, EOS, PROMPT_START, THINK_START, THINK_END, PROMPT_END, "=", *OPERATIONS, *DIGITS, *LETTERS, *CODES]
    backend = Tokenizer(models.WordLevel({symbol: index for index, symbol in enumerate(symbols)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    # Without a decoder the tokens are joined by spaces.
    backend.decoder = decoders.Fuse()
    # Not special, so that decoding with `skip_special_tokens=True` still shows where the thinking is.
    backend.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in (THINK_START, THINK_END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=PROMPT_START,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=_CHAT_TEMPLATE,
    )
