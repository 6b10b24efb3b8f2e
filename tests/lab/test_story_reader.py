"""Stories that somebody writes: read with their solution, or refused with the sentence that is wrong."""

from itertools import islice

import pytest

from hf_elastic.lab.stories import MOST_DIFFERENCE, problems
from hf_elastic.lab.story_reader import EXAMPLE, read

GOING, QUESTION = "All go to the toy shop.", "What can Mia and Tom buy?"


@pytest.mark.parametrize("people", [1, 2, 5, 12])
def test_every_story_of_the_task_is_read_with_its_solution(people):
    for problem in islice(problems("train", people, 3), 40):
        assert read(problem.prompt) == problem


def test_white_space_is_read_as_the_task_writes_it():
    plain = read(f"Mia has 2 coins. Tom has 2 more than Mia. {GOING} {QUESTION}")
    assert read(f"\n Mia  has 2 coins.\nTom has 2 more than Mia. \t{GOING}\n\n{QUESTION} ") == plain
    assert plain.prompt.startswith("Mia has 2 coins. Tom")
    assert read(EXAMPLE).prompt == EXAMPLE


@pytest.mark.parametrize(
    ("story", "message"),
    [
        ("Hello there!", "a sentence for each person.*this has 1"),
        (f"Mia owns 7 coins. {GOING} {QUESTION}", "“Mia owns 7 coins.” must be a sentence like “Mia has 7 coins.”"),
        (f"Mio has 7 coins. {GOING} {QUESTION}", "'Mio' is not known; the people are Mia, .* Did you mean 'Mia'"),
        (f"Mia has 0 coins. {GOING} {QUESTION}", "Mia would have 0 coins; from 2 to 20"),
        (f"Mia has 7 coins. Tom has 2. {GOING} {QUESTION}", "“Tom has 2.” must be .*“Tom has 4 more than Mia.”"),
        (f"Mia has 2 coins. Tom has 3 fewer than Mia. {GOING} {QUESTION}", "Tom would have -1 coins"),
        (f"Mia has 7 coins. Mia has 3 fewer than Mia. {GOING} {QUESTION}", "Mia has been told of already"),
        (f"Mia has 7 coins. Tom has 3 more than Ana. {GOING} {QUESTION}", "more or fewer than Mia, the one before"),
        (
            f"Mia has 7 coins. Tom has {MOST_DIFFERENCE + 1} more than Mia. {GOING} {QUESTION}",
            f"from 1 to {MOST_DIFFERENCE}, not {MOST_DIFFERENCE + 1}",
        ),
        (
            f"Mia has 7 coins. Tom has 3 more than Mia. Mia goes to the toy shop. {QUESTION}",
            "“All go to the toy shop.”",
        ),
        (f"Mia has 7 coins. {GOING} What can Mia buy?", "“Mia goes to the toy shop.”"),
        (
            f"Mia has 7 coins. Tom has 3 more than Mia. All go to the toys shop. {QUESTION}",
            "no 'toys shop', but .*'toy shop'",
        ),
        (
            f"Mia has 7 coins. Tom has 3 more than Mia. {GOING} And?",
            "“And\\?” must be .*“What can Mia and Tom buy\\?”",
        ),
        (f"Mia has 7 coins. Tom has 3 more than Mia. {GOING} What can Mia buy?", "about the last of the people"),
        (f"{'Mia ' * 1000}. {GOING} {QUESTION}", "Mia…” must be"),
        (f"Mia has {'7' * 5000} coins. {GOING} {QUESTION}", "777…” must be"),
    ],
)
def test_what_is_no_story_is_refused_with_the_sentence(story, message):
    with pytest.raises(ValueError, match=message) as refused:
        read(story)
    assert len(str(refused.value)) < 300
