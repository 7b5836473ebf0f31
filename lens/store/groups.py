"""Rows that have the same codes, found without sorting them: codes are small numbers, so a table of them is looked up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lens.tables import Column

MOST_PLACES = 1 << 22
"""Largest table of codes; beyond it they are sorted once."""


@dataclass(frozen=True)
class Groups:
    """The distinct combinations of codes among some rows."""

    first: Column
    """First row of each."""
    member: Column
    """Which of them every row is."""

    @property
    def count(self) -> int:
        """How many."""
        return len(self.first)

    def sorted_rows(self) -> tuple[Column, Column]:
        """The rows group by group, in their order within each; and where in them each group ends."""
        # 16 bits are sorted by radix: one pass over the rows.
        narrow = self.member.astype("<u2" if self.count <= 1 << 16 else "<i8")
        order = np.argsort(narrow, kind="stable")
        return order, np.cumsum(np.bincount(self.member, minlength=self.count))


def grouped(codes: list[Column], sizes: list[int]) -> Groups:
    """The groups of rows, in the order of their codes.

    Args:
        codes: equally long columns of whole numbers from -1 on.
        sizes: for each column a number larger than any in it.
    """
    key, width = codes[0].astype("<i8") + 1, sizes[0] + 1
    for column, size in zip(codes[1:], sizes[1:], strict=True):
        if width * (size + 1) >= 2**62:
            distinct, key = np.unique(key, return_inverse=True)
            width = len(distinct)
        key = key * (size + 1) + column + 1
        width *= size + 1
    if width > MOST_PLACES:
        _, first, member = np.unique(key, return_index=True, return_inverse=True)
        return Groups(first, member)
    place = np.full(width, -1, "<i8")
    # Of several rows at one place the last one written stays: written backwards, that is the first row.
    place[key[::-1]] = np.arange(len(key) - 1, -1, -1)
    found = np.flatnonzero(place >= 0)
    first = place[found]
    place[found] = np.arange(len(found))
    return Groups(first, place[key])
