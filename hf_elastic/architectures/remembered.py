"""What was found out about a config once, so that a family that is read again and again is not checked from the start each time."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from threading import Lock
from typing import Any


class Remembered:
    """Results by everything that they follow from. Errors are not remembered. Safe to use from any thread.

    Args:
        most (`int`): How many results are kept; the oldest goes first.
    """

    def __init__(self, most: int):
        self._most, self._lock = most, Lock()
        self._results: dict[bytes, Any] = {}

    def __call__(self, facts: Any, make: Callable[[], Any]) -> Any:
        """The result for these facts, made if it is not known. Whoever may change it has to copy it."""
        try:  # a pickle tells every value and its type; `repr` of some does not
            key = hashlib.sha256(pickle.dumps(facts)).digest()
        except Exception:  # whatever an object that does not belong there raises
            return make()
        try:
            return self._results[key]
        except KeyError:
            result = make()
        with self._lock:
            while len(self._results) >= self._most:
                del self._results[next(iter(self._results))]
            self._results[key] = result
        return result
