"""How long collectives hold up their rank: the union of the intervals in which it can do nothing else.

A blocking collective holds its rank from its start, an asynchronous one from when the rank begins to wait for it.
What is left of a step is the rank's own time.
"""

from __future__ import annotations

import numpy as np

from lens.slots import NULL
from lens.tables import Column, Table

HELD_FROM = "if(is_async = 1, t_wait_ns, t0_ns)"
"""When a row of lens.collectives begins to hold its rank; NULL if it never does."""


def held_from(rows: Table) -> Column:
    """The same of rows of collectives; NULL for one that its rank never waited for."""
    return np.where(rows["is_async"] == 1, rows["t_wait_ns"], rows["t0_ns"])


def covered(begin: Column, end: Column, group: Column) -> Column:
    """Length of the union of the intervals [begin, end] of each group, in their unit.

    Args:
        begin, end, group: whole numbers, equally long; groups are numbered from 0 on.
    """
    count = int(group.max()) + 1 if len(group) else 0
    order = np.lexsort((begin, group))
    begin, end, group = begin[order], end[order], group[order]
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    # Groups are laid one behind the other on one axis, so that one running maximum serves them all.
    first = begin[starts]
    spans = np.maximum.reduceat(end, starts) - first if len(starts) else np.empty(0, np.int64)
    shift = np.repeat(np.cumsum(spans) - spans - first, np.diff(np.append(starts, len(group))))
    begin, end = begin + shift, np.maximum(end, begin) + shift
    before = np.maximum.accumulate(np.append(np.int64(0), end))[:-1]
    added = np.maximum(end - np.maximum(begin, before), 0)
    return np.bincount(group, added, count)


def held_seconds(rows: Table, group: Column) -> Column:
    """Seconds in which collectives hold each group (such as a rank, or a rank's step), open ones left out."""
    begin = held_from(rows)
    known = (rows["t1_ns"] != NULL) & (begin != NULL)
    result = np.zeros(int(group.max()) + 1 if len(group) else 0)
    sums = covered(begin[known], rows["t1_ns"][known], group[known]) / 1e9
    result[: len(sums)] = sums
    return result
