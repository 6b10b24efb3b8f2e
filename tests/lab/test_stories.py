"""The `stories` task: word problems, their price list, their tokenizer, their rows and their score."""

import re
import zlib
from itertools import islice

import pytest
import torch

from hf_elastic.errors import ElasticConfigError
from hf_elastic.lab import stories
from hf_elastic.lab.stories import PRICES, SHOPS
from hf_elastic.lab.tasks import TASKS, get_task

TASK = get_task("stories")


@pytest.fixture(scope="module")
def tokenizer():
    return stories.build_tokenizer()


def take(count, *arguments):
    return list(islice(stories.problems(*arguments), count))


def solve(prompt):
    """Coins of everybody, the shop and who is asked for, read from the story; the last two sentences are the question."""
    *facts, going, question = re.split(r"(?<=[.?]) ", prompt)
    coins = {}
    for fact in facts:
        if start := re.fullmatch(r"(\w+) has (\d+) coins\.", fact):
            coins[start[1]] = int(start[2])
        else:
            name, much, more, before = re.fullmatch(r"(\w+) has (\d+) (more|fewer) than (\w+)\.", fact).groups()
            coins[name] = coins[before] + (int(much) if more == "more" else -int(much))
    shop = re.search(r"to the (\w+ shop)\.", going)[1]
    asked = re.fullmatch(r"What can (\w+)(?: and (\w+))? buy\?", question).groups()
    return coins, shop, [name for name in asked if name]


@pytest.mark.parametrize("people", [1, 2, 5, 12])
def test_stories_agree_with_an_independent_solution(people):
    for problem in take(50, "train", people, 1):
        coins, shop, asked = solve(problem.prompt)
        assert len(coins) == people
        assert len(asked) == min(people, 2)
        assert all(2 <= value <= 20 for value in coins.values())
        bought = [
            f"{name} owns {coins[name]} coins, at the {shop} that buys a {PRICES[shop, coins[name]]}."
            for name in asked
        ]
        assert problem.answer == " ".join(bought)
        sums = re.findall(r"(\w+) has (\d+) ([+-]) (\d+) = (\d+), so (\w+) owns (\d+)\.", problem.thinking)
        names, values = list(coins), list(coins.values())
        assert problem.thinking.startswith(f"{names[0]} owns {values[0]}.")
        assert len(sums) == people - 1
        for i, (name, had, sign, change, result, again, owned) in enumerate(sums, start=1):
            assert name == again == names[i]
            assert int(had) == values[i - 1]
            assert int(had) + int(sign + change) == int(result) == int(owned) == values[i]


def test_prices_are_the_list_the_shipped_models_learned():
    assert set(PRICES) == {(shop, coins) for shop in SHOPS for coins in range(2, 21)}
    assert len({thing.split()[1] for thing in PRICES.values()}) == 114, "a thing is sold twice"
    for (shop, _), thing in PRICES.items():
        look, what = thing.split()
        assert look in stories.LOOKS
        assert what in SHOPS[shop]
        assert look[0] not in "aeiou", "'a' would be wrong before it"
    # Pinned, because another list would make the shipped checkpoints wrong everywhere.
    assert zlib.crc32("".join(PRICES[key] for key in sorted(PRICES)).encode()) == 397291659


def test_no_story_is_in_both_splits():
    train, heldout = ({p.prompt for p in take(400, split, (1, 3), 5)} for split in ("train", "heldout"))
    assert train
    assert heldout
    assert not train & heldout
    assert {stories.split_of(prompt) for prompt in train} == {"train"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stories.problems("test", 3, 0), "'test'"),
        (lambda: stories.problems("train", 13, 0), "from 1 to 12.*13"),
        (lambda: stories.problems("train", (3, 2), 0), r"\(3, 2\)"),
        (lambda: TASK.evaluate(None, None, count=0), "`count`"),
        (lambda: TASK.training_batches(None, 0, batch_size=0), "`batch_size`"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_tasks_are_found_by_name():
    assert [get_task(name).name for name in TASKS] == list(TASKS)
    with pytest.raises(ElasticConfigError, match="'story'.*stories, book.*stories"):
        get_task("story")


def test_every_word_is_one_token_and_other_text_comes_back(tokenizer):
    for problem in take(200, "train", (1, 5), 2):
        text = problem.text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        words = re.findall(r" ?[A-Za-z]+| ?\d+|(?: ?[+=-])|[.,?]", re.sub(r"<[^>]*>", "", text))
        assert len(tokenizer(re.sub(r"<[^>]*>", "", text))["input_ids"]) <= len(words) + 2
    for text in ("Où est l'été ? 猫", "tabs\tand\nlines", "xyzzy 99"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template_is_what_the_model_was_trained_on(tokenizer):
    problem = take(1, "train", 3, 0)[0]
    messages = [{"role": "user", "content": problem.prompt}]
    opened = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert opened == TASK.opening(problem.prompt)
    assert TASK.solved(problem) == problem.text == opened + f"{problem.thinking}</think>{problem.answer}"
    messages.append({"role": "assistant", "content": "Yes."})
    assert tokenizer.apply_chat_template(messages, tokenize=False).endswith("<|assistant|>Yes.<eos>")


def test_rows_ask_for_thinking_and_answer_alone(tokenizer):
    end = tokenizer.convert_tokens_to_ids("</think>")
    forms = set()
    for batch in islice(TASK.training_batches(tokenizer, 3, 16), 12):
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            ids, labels = ids[mask.bool()], labels[mask.bool()]
            text = tokenizer.decode(ids)
            opening, answer = text[: text.index("<think>") + 7], text[text.index("</think>") + 8 :]
            prompt = opening[len("<|user|>") : -len("<|assistant|><think>")]
            coins, shop, asked = solve(prompt)
            assert (
                answer
                == " ".join(
                    f"{n} owns {coins[n]} coins, at the {shop} that buys a {PRICES[shop, coins[n]]}." for n in asked
                )
                + "<eos>"
            )
            start, stop = len(tokenizer(opening)["input_ids"]), ids.tolist().index(end)
            assert (labels[:start] == -100).all()
            assert torch.equal(labels[start:stop], ids[start:stop])
            assert torch.equal(labels[stop + 1 :], ids[stop + 1 :])
            thinking = tokenizer.decode(ids[start:stop])
            whole = thinking.endswith(f"owns {list(coins.values())[-1]}.") and thinking.count("owns") == len(coins)
            assert (labels[stop] == end) == whole, "a forced </think> is no target"
            forms.add("full" if whole else "cut" if thinking else "none")
    assert forms == {"full", "cut", "none"}


class Oracle:
    """Answers every story by the solution above; with `slip` it buys the wrong thing for the second person of each."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, slip=False):
        self.tokenizer, self.slip = tokenizer, slip

    def generate(self, input_ids, **options):
        written = []
        for row in input_ids:
            text = self.tokenizer.decode(row).rpartition("<|user|>")[2]
            problem = next(p for p in take(300, "heldout", 3, 0) if p.prompt == text.partition("<|assistant|>")[0])
            answer = problem.answer.rpartition(" ")[0] + " nothing." if self.slip else problem.answer
            written.append(self.tokenizer(f"{problem.thinking}</think>{answer}<eos>")["input_ids"])
        width = max(map(len, written))
        rows = [ids + [self.tokenizer.pad_token_id] * (width - len(ids)) for ids in written]
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)


def test_score_counts_answers_thinking_and_sentences(tokenizer):
    right = TASK.evaluate(Oracle(tokenizer), tokenizer, size=3, count=20)
    assert (right.exact, right.trace, right.code, right.count, right.size) == (1.0, 1.0, 1.0, 20, 3)
    half = TASK.evaluate(Oracle(tokenizer, slip=True), tokenizer, size=3, count=20)
    assert (half.exact, half.trace, half.code) == (0.0, 1.0, 0.5)
