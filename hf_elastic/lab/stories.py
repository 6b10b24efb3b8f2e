"""The problems of the `stories` task, in plain English, and its tokenizer.

A problem is a short story: one person has some coins, every other one has more or fewer than the one before, and all go to a shop.
The thinking works out who has how many coins. The answer says what the last two of them can buy: every shop sells one thing for every
number of coins, [`PRICES`], a list that the model has to know by heart. With `people = 3`:

    Ida has 11 coins. Max has 5 more than Ida. Ana has 2 fewer than Max. All go to the toy shop. What can Max and Ana buy?
    <think>Ida owns 11. Max has 11 + 5 = 16, so Max owns 16. Ana has 16 - 2 = 14, so Ana owns 14.</think>
    Max owns 16 coins, at the toy shop that buys a big plane. Ana owns 14 coins, at the toy shop that buys a big doll.

Nearly every word is one token, and so is every number; any other text is read byte by byte.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_elastic.lab.exercises import EOS, THINK_END, THINK_START, draw_problems
from hf_elastic.lab.exercises import split_of as split_of

NAMES = ("Mia", "Tom", "Ana", "Ben", "Eva", "Leo", "Zoe", "Max", "Ida", "Sam", "Amy", "Jon")
# All begin with a consonant, so that "a" is right before them.
_GOODS = {
    "toy shop": "kite drum doll robot train puzzle ball top castle truck boat plane rocket teddy marble whistle bus tent horse flute",
    "farm shop": "pear plum melon lemon mango peach banana cherry fig lime grape berry kiwi date papaya pumpkin tomato carrot radish walnut",
    "book shop": "map diary novel comic poster play cookbook songbook calendar dictionary pen pencil notebook postcard bookmark ruler stamp "
    "riddle globe crayon",
    "pet shop": "fish bowl leash parrot turtle rabbit hamster kitten brush cage puppy mouse bone basket collar lizard canary snail spider blanket",
    "garden shop": "rose tulip spade bucket fern cactus bench rake hose pot ladder shovel lily daisy seed fence swing lantern hammock "
    "wheelbarrow",
    "clothes shop": "hat scarf belt shirt coat sock glove dress sweater cap jacket skirt boot tie vest robe shoe ribbon button mitten",
}
LOOKS = ("red", "blue", "green", "white", "black", "small", "big", "new")
SHOPS = {shop: tuple(goods.split()) for shop, goods in _GOODS.items()}
TRAINED_PEOPLE = (1, 5)
LEAST_COINS, MOST_COINS = 2, 20
MOST_DIFFERENCE = 5

PAD, USER, ASSISTANT = "<pad>", "<|user|>", "<|assistant|>"

_VOCABULARY = 1024  # more than it takes until every word is one token

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}" + ASSISTANT + "{{ message['content'] }}{{ eos_token }}"
    "{% else %}" + USER + "{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + THINK_START + "{% endif %}"
)


def _make_prices(seed: int) -> dict[tuple[str, int], str]:
    rng = random.Random(seed)
    return {
        (shop, coins): f"{rng.choices(LOOKS)[0]} {thing}"
        for shop, things in SHOPS.items()
        for coins, thing in enumerate(_some(rng, list(things), MOST_COINS + 1 - LEAST_COINS), start=LEAST_COINS)
    }


def _some(rng: random.Random, things: list[Any], count: int) -> list[Any]:
    """So many different ones in random order, by `choices`: it draws through `random()`, the one method whose sequence Python promises to keep."""
    return [things.pop(rng.choices(range(len(things)))[0]) for _ in range(count)]


PRICES = _make_prices(seed=0)
"""`PRICES[shop, coins]` is what a shop sells for so many coins: 6 shops x 19 amounts, 114 entries."""


@dataclass(frozen=True)
class Problem:
    """One story, as text.

    Args:
        prompt (`str`): The story with its question.
        thinking (`str`): Who has how many coins, without the `<think>` tokens around it.
        answer (`str`): What the last two of the people buy, a sentence for each, without the end-of-sequence token.
    """

    prompt: str
    thinking: str
    answer: str

    @property
    def text(self) -> str:
        """`str`: Prompt, thinking and answer as the model reads them, without the end-of-sequence token."""
        return f"{opening(self.prompt)}{self.thinking}{THINK_END}{self.answer}"


def opening(prompt: str) -> str:
    """What a model goes on from: the story as the chat template puts it, with an open `<think>`."""
    return f"{USER}{prompt}{ASSISTANT}{THINK_START}"


def _people_range(people: int | tuple[int, int]) -> tuple[int, int]:
    low, high = (people, people) if isinstance(people, int) else people
    if not 1 <= low <= high <= len(NAMES):
        raise ValueError(
            f"`people` must be a number from 1 to {len(NAMES)} or an inclusive range (low, high) of such numbers, got {people!r}."
        )
    return low, high


def make_problem(rng: random.Random, people: int) -> Problem:
    """Draws one story.

    Args:
        rng (`random.Random`): Where everything that is drawn comes from.
        people (`int`): From 1 to 12.

    Returns:
        `Problem`: The story with its worked thinking and its answer. It belongs to either split.

    Raises:
        `ValueError`: If `people` is out of range.
    """
    _people_range(people)
    names = _some(rng, list(NAMES), people)
    shop = rng.choices(list(SHOPS))[0]
    coins = [rng.choices(range(LEAST_COINS, MOST_COINS + 1))[0]]
    for _ in names[1:]:
        had = coins[-1]
        changes = [
            k for k in range(-MOST_DIFFERENCE, MOST_DIFFERENCE + 1) if k and LEAST_COINS <= had + k <= MOST_COINS
        ]
        coins.append(had + rng.choices(changes)[0])
    return tell(names, coins, shop)


def tell(names: Sequence[str], coins: Sequence[int], shop: str) -> Problem:
    """The story of these people in this shop, with its thinking and its answer.

    Args:
        names (`Sequence[str]`): Of [`NAMES`], each once.
        coins (`Sequence[int]`): How many each of them has, from 2 to 20, at most 5 more or fewer than the one before.
        shop (`str`): Of [`SHOPS`].
    """
    story = [f"{names[0]} has {coins[0]} coins."]
    thinking = [f"{names[0]} owns {coins[0]}."]
    for before, name, had, has in zip(names, names[1:], coins, coins[1:], strict=False):
        story.append(f"{name} has {abs(has - had)} {'more' if has > had else 'fewer'} than {before}.")
        sign = "+" if has > had else "-"
        # What the answer looks up is said in the words of the answer, and in no others: "Max owns" is followed by one number only.
        thinking.append(f"{name} has {had} {sign} {abs(has - had)} = {has}, so {name} owns {has}.")
    # Of anybody, the model would have to look up whose number is whose, which it does not learn in time.
    asked = range(len(names))[-2:]
    who = " and ".join(names[i] for i in asked)
    story.append(f"{'All go' if len(names) > 1 else names[0] + ' goes'} to the {shop}. What can {who} buy?")
    answer = [f"{names[i]} owns {coins[i]} coins, at the {shop} that buys a {PRICES[shop, coins[i]]}." for i in asked]
    return Problem(" ".join(story), " ".join(thinking), " ".join(answer))


def problems(split: str, people: int | tuple[int, int], seed: int) -> Iterator[Problem]:
    """Draws stories of one split without end.

    Args:
        split (`str`): `"train"` or `"heldout"`. No story is in both, whatever the seed.
        people (`int` or `tuple[int, int]`): People per story, from 1 to 12, or an inclusive range to draw from uniformly.
        seed (`int`): The same seed gives the same stories.

    Raises:
        `ValueError`: If `split` is unknown or `people` out of range.

    Example:

    ```python
    >>> from hf_elastic.lab.stories import problems
    >>> problem = next(problems("heldout", people=2, seed=0))
    >>> problem.prompt
    'Amy has 19 coins. Ben has 1 fewer than Amy. All go to the garden shop. What can Amy and Ben buy?'
    >>> problem.thinking
    'Amy owns 19. Ben has 19 - 1 = 18, so Ben owns 18.'
    >>> problem.answer
    'Amy owns 19 coins, at the garden shop that buys a green rose. Ben owns 18 coins, at the garden shop that buys a blue swing.'
    ```
    """
    return draw_problems(make_problem, split, _people_range(people), seed)


def right_sentences(problem: Problem, answer: str) -> tuple[int, int]:
    """How many sentences of an answer are right, and how many there are."""
    wanted = problem.answer.split(". ")
    right = sum(ours.strip(".") == theirs.strip(".") for ours, theirs in zip(answer.split(". "), wanted, strict=False))
    return right, len(wanted)


def price_list(shop: str) -> list[tuple[int, str]]:
    """What a shop sells: numbers of coins, each with its thing."""
    return [(coins, PRICES[shop, coins]) for coins in range(LEAST_COINS, MOST_COINS + 1)]


def explain(problem: Problem) -> str:
    """The task on one example, with the price list of its shop: enough to check the answer by hand.

    Args:
        problem ([`Problem`]): The example; short ones are easier to follow.

    Returns:
        `str`: Several lines.
    """
    shop = next(shop for shop in SHOPS if f"the {shop}." in problem.prompt)
    goods = [f"{coins:>2} {thing}" for coins, thing in price_list(shop)]
    width = max(map(len, goods)) + 3
    rows = ["".join(f"{entry:<{width}}" for entry in goods[i : i + 5]).rstrip() for i in range(0, len(goods), 5)]
    return "\n".join(
        [
            "The task: short stories about people who go shopping. For example",
            "",
            f"  question  {problem.prompt}",
            f"  thinking  {problem.thinking}",
            f"  answer    {problem.answer}",
            "",
            f"In the {shop} every number of coins buys one thing:",
            "",
            *(f"  {row}" for row in rows),
            "",
            f"There are {len(SHOPS)} shops, each with a list of its own. The model is not shown them; it learned them by heart. So it has to count in its",
            "thinking and to remember in its answer. An answer is right if all of it is.",
        ]
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer of the task: byte-level BPE, in which every word and every number of the stories is one token.

    `<think>` and `</think>` stay when special tokens are skipped; the tokens of the chat template do not. Nothing is added to a text.

    Returns:
        `PreTrainedTokenizerFast`: Pads on the left, as generation wants it. Its chat template opens the thinking as generation prompt.

    Example:

    ```python
    >>> from hf_elastic.lab.stories import build_tokenizer
    >>> build_tokenizer().tokenize("Mia has 7 coins.")
    ['Mia', 'Ġhas', 'Ġ7', 'Ġcoins', '.']
    ```
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [PAD, EOS, USER, ASSISTANT]
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=_VOCABULARY, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator([_all_words()], trainer)
    # Not special, so that decoding with `skip_special_tokens=True` still shows where the thinking is.
    backend.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in (THINK_START, THINK_END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=_CHAT_TEMPLATE,
    )


def _all_words() -> str:
    """Every word of the stories twice, as pairs that are seen once are not merged: names also as a text begins, without a space."""
    things = [thing for things in SHOPS.values() for thing in things]
    said = "has coins more fewer than owns so All go goes to the What can and buy at that buys a + - =".split(" ")  # noqa: SIM905
    words = [*NAMES, *SHOPS, *things, *LOOKS, *said, *map(str, range(1, MOST_COINS + 1))]
    text = "".join(f" {word}" for word in words)
    return 2 * text + "".join(f"\n{name}." for name in 2 * NAMES)
