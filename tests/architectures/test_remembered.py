"""What is remembered of configs: by value and type, bounded, and never an error."""

import pytest

from hf_elastic.architectures.remembered import Remembered


def test_results_by_what_they_follow_from():
    remembered, made = Remembered(2), []

    def ask(facts):
        return remembered(facts, lambda: made.append(facts) or len(made))

    assert [ask(1), ask(1), ask(True), ask(True), ask(1)] == [1, 1, 2, 2, 1]
    assert ask("third") == 3  # the oldest goes
    assert [ask(True), ask("third"), ask(1)] == [2, 3, 4]
    assert ask(lambda: None) == 5  # cannot be told from others, so it is made every time
    assert ask(lambda: None) == 6


def test_errors_are_not_remembered():
    remembered = Remembered(2)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            remembered("facts", lambda: 1 / 0)
    assert remembered("facts", lambda: 3) == 3
