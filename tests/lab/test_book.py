"""The `book` task: problems, tokenizer, batches and score."""

import dataclasses
import re
import subprocess
import sys
import zlib
from collections import Counter
from itertools import islice

import pytest
import torch
from transformers import AutoTokenizer

from hf_elastic.lab import book, task
from hf_elastic.lab.book import BOOK, Problem


@pytest.fixture(scope="module")
def tokenizer():
    return book.build_tokenizer()


def solve(prompt):
    """Thinking and answer of a prompt, from running totals instead of step by step in digits."""
    start = int(re.match(r"\^a(\d)", prompt)[1])
    lines = re.findall(r"([b-t])([+-])([1-5])", prompt)
    assert "".join(map("".join, lines)) == prompt[3:-1], "the prompt has something else in it"
    totals = [start + sum(int(op + k) for _, op, k in lines[:count]) for count in range(len(lines) + 1)]
    thinking = f"a{start}" + "".join(
        f"{letter}{before % 10}{op}{k}={after % 10}"
        for (letter, op, k), before, after in zip(lines, totals, totals[1:], strict=False)
    )
    answer = "".join(
        letter + BOOK[op, k][after % 10] for (letter, op, k), after in zip(lines, totals[1:], strict=True)
    )
    return thinking, answer


def take(count, *arguments):
    return list(islice(book.problems(*arguments), count))


# Problems


def test_book_is_the_table_the_shipped_parent_learned():
    assert {(op, k): len(row) for (op, k), row in BOOK.items()} == {(op, k): 10 for op in "+-" for k in "12345"}
    assert set("".join(BOOK.values())) == set("ABCDEFGHIJKL")
    # Pinned, because another table would make the shipped checkpoint wrong everywhere.
    assert BOOK["+", "1"] == "KJFDGEJDFH"
    assert zlib.crc32("".join(BOOK[key] for key in sorted(BOOK)).encode()) == 3061046023


@pytest.mark.parametrize("letters", [2, 4, 12, 20])
def test_problems_agree_with_an_independent_solution(letters):
    for problem in take(50, "train", letters, 1):
        assert (problem.thinking, problem.answer) == solve(problem.prompt)
        sizes = len(problem.prompt), len(problem.thinking), len(problem.answer)
        assert sizes == (3 * letters + 1, 6 * letters - 4, 2 * letters - 2)
        assert problem.text == f"{problem.prompt}<think>{problem.thinking}</think>{problem.answer}"


def test_problem_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Problem("^a1>", "a1", "").prompt = ""


def test_problems_are_deterministic_and_depend_on_the_seed():
    assert take(20, "heldout", (4, 12), 3) == take(20, "heldout", (4, 12), 3)
    assert take(20, "heldout", (4, 12), 3) != take(20, "heldout", (4, 12), 4)
    assert take(1, "heldout", 3, 0) == [Problem("^a7b+2c-3>", "a7b7+2=9c9-3=6", "bKcJ")]


def test_letters_of_a_range_are_all_drawn():
    lengths = Counter(len(problem.answer) // 2 + 1 for problem in take(900, "train", (4, 12), 0))
    assert set(lengths) == set(range(4, 13))
    # 100 expected of each; 60 is four standard deviations away.
    assert min(lengths.values()) > 60


def test_splits_share_no_prompt():
    # Of the 1,000 prompts of three letters, 3,000 draws of each split meet nearly all, so an overlap would show.
    train, heldout = ({problem.prompt for problem in take(3000, split, 3, 0)} for split in ("train", "heldout"))
    assert not train & heldout
    assert len(train) > 800
    assert 50 < len(heldout) < 150


def test_split_is_the_same_in_another_process():
    prompts = [problem.prompt for problem in take(40, "train", 3, 5) + take(40, "heldout", 3, 5)]
    # A process of its own has another hash seed. It runs the file by itself, without the imports of the package.
    code = "import runpy, sys; print(*map(runpy.run_path(sys.argv[1])['split_of'], sys.argv[2:]))"
    command = [sys.executable, "-c", code, task.__file__, *prompts]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["train"] * 40 + ["heldout"] * 40


@pytest.mark.parametrize("letters", [1, 21, (6, 4), (0, 4), (4, 21)])
def test_letters_out_of_range(letters):
    with pytest.raises(
        ValueError, match=re.escape(f"from 2 to 20 or an inclusive range (low, high) of such numbers, got {letters!r}")
    ):
        book.problems("train", letters, 0)


def test_unknown_split():
    with pytest.raises(ValueError, match="'train', 'heldout', got 'test'"):
        book.problems("test", 4, 0)


# Tokenizer


def test_tokenizer_round_trips_and_adds_nothing(tokenizer):
    assert len(tokenizer) == 51
    for problem in take(20, "train", (2, 20), 0):
        text = problem.text + "<eos>"
        input_ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(input_ids) == text
        assert len(input_ids) == len(text.replace("<think>", "T").replace("</think>", "/").replace("<eos>", "."))


def test_tokenizer_shows_the_thinking_when_special_tokens_are_skipped(tokenizer):
    input_ids = tokenizer("<pad>a6<think>a6</think>bL<eos>")["input_ids"]
    assert tokenizer.decode(input_ids, skip_special_tokens=True) == "a6<think>a6</think>bL"


@pytest.mark.parametrize("text", ["a b", "a\nb", "z", "<thinking>"])
def test_tokenizer_refuses_other_characters(tokenizer, text):
    with pytest.raises(Exception, match="WordLevel error"):
        tokenizer(text)


def test_tokenizer_reloads_without_a_config(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.get_vocab() == tokenizer.get_vocab()
    ids = ("pad_token_id", "bos_token_id", "eos_token_id", "padding_side", "model_input_names", "chat_template")
    assert [getattr(reloaded, name) for name in ids] == [getattr(tokenizer, name) for name in ids]
    text = take(1, "train", 12, 0)[0].text
    assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert reloaded.decode(reloaded(text)["input_ids"]) == text


def test_tokenizer_pads_on_the_left(tokenizer):
    inputs = tokenizer(["^a6>", "^a6b+1>"], padding=True)
    assert list(inputs) == ["input_ids", "attention_mask"]
    assert inputs["attention_mask"] == [[0, 0, 0, 1, 1, 1, 1], [1] * 7]
    assert tokenizer.decode(inputs["input_ids"][0]) == "<pad><pad><pad>^a6>"


def test_chat_template_joins_prompt_and_solution(tokenizer):
    messages = [{"role": "user", "content": "^a6b-1>"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == "^a6b-1><think>"
    messages.append({"role": "assistant", "content": "<think>a6b6-1=5</think>bL"})
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "^a6b-1><think>a6b6-1=5</think>bL<eos>"


# Data


def test_training_targets_are_thinking_and_answer_but_no_forced_end(tokenizer):
    forms = Counter()
    lengths = set()
    for batch in islice(book.training_batches(tokenizer, 0), 64):
        for input_ids, mask, labels in zip(*batch.values(), strict=True):
            size = int(mask.sum())
            assert mask.tolist() == [1] * size + [0] * (len(mask) - size)
            assert set(input_ids[size:].tolist()) <= {tokenizer.pad_token_id}
            is_target = labels != -100
            assert torch.equal(labels[is_target], input_ids[is_target])

            text, targets = tokenizer.decode(input_ids[:size]), tokenizer.decode(labels[is_target])
            prompt, thinking, answer = re.fullmatch("(.*)<think>(.*)</think>(.*)<eos>", text).groups()
            full_thinking, full_answer = solve(prompt)
            assert book.split_of(prompt) == "train"
            assert answer == full_answer
            assert full_thinking.startswith(thinking)
            if thinking == full_thinking:
                assert targets == thinking + "</think>" + answer + "<eos>"
            else:
                assert targets == thinking + answer + "<eos>"
                assert labels[input_ids.tolist().index(tokenizer.convert_tokens_to_ids("</think>"))] == -100
            forms["full" if thinking == full_thinking else "truncated" if thinking else "direct"] += 1
            lengths.add(len(answer) // 2 + 1)
    assert lengths == set(range(4, 13))
    # Of 2,048 examples; four standard deviations are 0.035 and 0.027.
    assert forms["full"] / forms.total() == pytest.approx(0.8, abs=0.035)
    assert forms["direct"] / forms.total() == pytest.approx(0.1, abs=0.027)
    assert forms["truncated"] / forms.total() == pytest.approx(0.1, abs=0.027)


def test_training_batches_are_deterministic_and_sorted_by_length(tokenizer):
    def first(seed):
        return list(islice(book.training_batches(tokenizer, seed, batch_size=16), 8))

    one, again, other = first(0), first(0), first(1)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(one, again, strict=True) for name in a)
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, other, strict=True))
    assert all(batch["input_ids"].shape[0] == 16 for batch in one)
    # The 8 batches are one sorted pool: their lengths do not interleave, and they do not come in order.
    spans = [(min(sizes), max(sizes)) for sizes in (batch["attention_mask"].sum(dim=1).tolist() for batch in one)]
    assert all(a[1] <= b[0] for a, b in zip(sorted(spans), sorted(spans)[1:], strict=False))
    assert spans != sorted(spans)


def test_calibration_rows_are_whole_training_problems(tokenizer):
    dataset = book.calibration_dataset(tokenizer, 30, seed=2)
    assert dataset.column_names == ["input_ids", "attention_mask"]
    assert len(dataset) == 30
    assert len({len(row) for row in dataset["input_ids"]}) > 1
    for row in dataset:
        assert row["attention_mask"] == [1] * len(row["input_ids"])
        prompt, thinking, answer = re.fullmatch(
            "(.*)<think>(.*)</think>(.*)<eos>", tokenizer.decode(row["input_ids"])
        ).groups()
        assert (thinking, answer) == solve(prompt)
        assert book.split_of(prompt) == "train"
    assert book.calibration_dataset(tokenizer, 30, seed=2)["input_ids"] == dataset["input_ids"]


# Score


class Oracle:
    """Solves prompts, then spoils its completions as told; stands in for a model in `evaluate`."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, spoil=lambda thinking, answer: (thinking, answer)):
        self.tokenizer, self.spoil, self.prompts, self.budgets = tokenizer, spoil, [], []

    def generate(self, input_ids, attention_mask, max_new_tokens, **options):
        self.budgets.append(max_new_tokens)
        completions = []
        for row, mask in zip(input_ids, attention_mask, strict=True):
            given = self.tokenizer.decode(row[mask.bool()])
            assert mask[-1] == 1, "prompts must be padded on the left"
            prompt, thinks = given.split("<think>")[0], not given.endswith("</think>")
            self.prompts.append(prompt)
            thinking, answer = self.spoil(*solve(prompt))
            completions.append((f"{thinking}</think>" if thinks else "") + answer + "<eos>")
        tail = self.tokenizer(completions, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, tail[:, :max_new_tokens]], dim=1)


@pytest.mark.parametrize("letters", [4, (4, 12)])
@pytest.mark.parametrize("thinking", [True, False])
def test_evaluate_gives_full_marks_on_heldout_problems_only(tokenizer, letters, thinking):
    oracle = Oracle(tokenizer)
    result = book.evaluate(oracle, tokenizer, letters=letters, count=25, batch_size=10, thinking=thinking)
    assert result == book.Evaluation(1.0, float(thinking), 1.0, 25, letters)
    assert oracle.prompts == [problem.prompt for problem in take(25, "heldout", letters, 0)]
    assert len(oracle.budgets) == 3
    if letters == 4:
        # Thinking, its end, the answer and the end of the sequence.
        assert set(oracle.budgets) == {20 + 1 + 6 + 1 if thinking else 6 + 1}


SPOILED = {
    "wrong-last-code": (lambda t, a: (t, a[:-1] + ("A" if a[-1] != "A" else "B")), 0, 1, 2 / 3),
    "missing-last-line": (lambda t, a: (t, a[:-2]), 0, 1, 2 / 3),
    "one-line-too-many": (lambda t, a: (t, a + "eA"), 0, 1, 1),
    "wrong-letter": (lambda t, a: (t, "t" + a[1:]), 0, 1, 1),
    "no-thinking": (lambda t, a: ("", a), 1, 0, 1),
    "wrong-thinking": (lambda t, a: (t[:-1] + str((int(t[-1]) + 1) % 10), a), 1, 0, 1),
    "no-answer": (lambda t, a: (t, ""), 0, 1, 0),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_evaluate_tells_exact_trace_and_code_apart(tokenizer, kind):
    spoil, exact, trace, code = SPOILED[kind]
    result = book.evaluate(Oracle(tokenizer, spoil), tokenizer, letters=4, count=12)
    assert (result.exact, result.trace) == (exact, trace)
    assert result.code == pytest.approx(code)


@pytest.mark.parametrize("options", [{"count": 0}, {"batch_size": 0}])
def test_evaluate_needs_positive_numbers(tokenizer, options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be at least 1, got 0"):
        book.evaluate(Oracle(tokenizer), tokenizer, **options)


def test_data_needs_positive_numbers(tokenizer):
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        book.training_batches(tokenizer, 0, batch_size=0)
    with pytest.raises(ValueError, match="`size` must be at least 1, got -1"):
        book.calibration_dataset(tokenizer, -1, 0)
