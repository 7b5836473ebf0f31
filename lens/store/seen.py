"""Which batches of which senders are already in the log: numbers kept as ranges, so a long run costs no memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable


class NumberSet:
    """A set of whole numbers as sorted, disjoint, half-open ranges."""

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for number in numbers:
            self.add(number)

    def __contains__(self, number: int) -> bool:
        index = bisect_right(self._starts, number) - 1
        return index >= 0 and number < self._ends[index]

    def __len__(self) -> int:
        return sum(self._ends) - sum(self._starts)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The ranges, each with its first number and the one after its last."""
        return list(zip(self._starts, self._ends, strict=True))

    def add(self, number: int) -> bool:
        """Adds a number; False if it was there."""
        index = bisect_right(self._starts, number) - 1
        if index >= 0 and number < self._ends[index]:
            return False
        touches_left = index >= 0 and self._ends[index] == number
        touches_right = index + 1 < len(self._starts) and self._starts[index + 1] == number + 1
        if touches_left and touches_right:
            self._ends[index] = self._ends.pop(index + 1)
            self._starts.pop(index + 1)
        elif touches_left:
            self._ends[index] = number + 1
        elif touches_right:
            self._starts[index + 1] = number
        else:
            self._starts.insert(index + 1, number)
            self._ends.insert(index + 1, number + 1)
        return True


class SeenBatches:
    """The (source, sequence) pairs taken, for each run by its number."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, str], NumberSet] = {}

    def has(self, run: int, source: str, sequence: int) -> bool:
        """Whether this batch is in the log already."""
        numbers = self._numbers.get((run, source))
        return numbers is not None and sequence in numbers

    def add(self, run: int, source: str, sequence: int) -> None:
        """Note a batch."""
        self._numbers.setdefault((run, source), NumberSet()).add(sequence)
