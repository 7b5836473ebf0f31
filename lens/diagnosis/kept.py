"""Answers kept for as long as they are likely to be asked for again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kept(Generic[K, V]):
    """The newest answers to questions of one kind; the oldest go first."""

    def __init__(self, most: int = 4) -> None:
        self._most, self._answers = most, dict[K, V]()

    def get(self, key: K, make: Callable[[K], V]) -> V:
        """The answer to a question, made if it is not kept."""
        if key not in self._answers:
            answer = make(key)
            while len(self._answers) >= self._most:
                del self._answers[next(iter(self._answers))]
            self._answers[key] = answer
        return self._answers[key]
