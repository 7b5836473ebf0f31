"""Buckets of equal width over steps or time, and how coarse the rows are that a chart is drawn from.

A metric is there as its samples and as two roll-ups of them. Coarser rows make a chart as true as far as its buckets are
whole ones of the roll-up, and cost a tenth or a hundredth: so what a map takes does not grow with the run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lens.store.relations import Relation
from lens.store.schema import FINE_BUCKET, STEP_BUCKET, TIME_BUCKET_NS
from lens.tables import Column

AXIS_COLUMN = {"step": "step", "time": "t_ns"}
FINE_POOLS = ("max", "min")
"""What the fine roll-up knows."""
BUCKET = {"step": STEP_BUCKET, "time": TIME_BUCKET_NS}
"""Width of the buckets of the roll-up, on each axis."""
MANY_ROWS = 2_000_000
"""From so many rows on a map takes the next coarser ones, even where that halves its columns."""


_WIDE = 1 << 60
"""In wider buckets numbers of 64 bits may be too short."""


@dataclass(frozen=True)
class Window:
    """The part of an axis that is asked for, and in how many pieces. Steps, or Unix ns."""

    start: int | None = None
    stop: int | None = None
    """The last step or time, included."""
    pieces: int = 1000


@dataclass(frozen=True)
class Grid:
    """Buckets of equal width over a closed range."""

    low: int
    high: int
    width: int

    @property
    def count(self) -> int:
        """Buckets."""
        return (self.high - self.low) // self.width + 1

    def places(self, at: Column) -> Column:
        """The bucket of each step (or time), all within the grid."""
        return (at - self.low) // self.width

    def starts(self, buckets: Column) -> list[int]:
        """The first step (or time) of some buckets."""
        if self.width > _WIDE:
            return [self.low + bucket * self.width for bucket in buckets.tolist()]
        found: list[int] = (self.low + buckets * self.width).tolist()
        return found

    def is_whole(self, bucket: int) -> bool:
        """Whether its buckets are whole ones of a roll-up with this width, but for the last one's end."""
        return self.width % bucket == 0 and self.low % bucket == 0

    def cut(self, first: int, last: int) -> Grid:
        """The same from one of its buckets to another; ends stay where they are the first and the last."""
        low = self.low + first * self.width
        return replace(self, low=low, high=min(self.high, self.low + (last + 1) * self.width - 1))


def bucket_for(window: Window, low: int, high: int, relation: Relation, axis: str, pool: str | None = None) -> int:
    """How coarse the rows are that a window from `low` to `high` is best drawn from: 1 for the samples themselves, or the
    width of a roll-up's buckets.

    A roll-up is taken where that changes a width by half at most; by a map of many rows (see `MANY_ROWS`) also where it
    halves the columns. `pool` is None for lines: a single series is short enough.
    """
    width = _width(window, low, high)
    rows = 0.0 if pool is None else _rows_within(relation, low, high)
    taken = 1
    for bucket, is_there in (
        (FINE_BUCKET, relation.fine is not None and pool in FINE_POOLS),
        (BUCKET[axis], relation.rollup is not None),
    ):
        is_worth_it = rows / taken > MANY_ROWS and width >= bucket // 2
        if is_there and (is_worth_it or width >= 2 * bucket):
            taken = bucket
    return taken


def grid_of(window: Window, low: int, high: int, bucket: int) -> Grid:
    """The grid of a window that reaches from `low` to `high`, in whole buckets of the rows it is drawn from."""
    width = _width(window, low, high)
    if bucket == 1:
        return Grid(low, high, width)
    return Grid(low // bucket * bucket, (high // bucket + 1) * bucket - 1, -(-width // bucket) * bucket)


def _width(window: Window, low: int, high: int) -> int:
    return max(1, -(-(high - low + 1) // window.pieces))


def may_be_one_each(relation: Relation, window: Window) -> bool:
    """Whether all there may be fits with a piece for each step: then the answer itself tells first and last."""
    if relation.extent is None:
        return False
    low = relation.extent[0] if window.start is None else window.start
    high = relation.extent[1] if window.stop is None else window.stop
    return low <= high and high - low < window.pieces


def _rows_within(relation: Relation, low: int, high: int) -> float:
    """About how many rows lie in a window."""
    if relation.rows is None or relation.extent is None:
        return float(relation.rows or 0)
    first, last = relation.extent
    within = max(0, min(last, high) - max(first, low) + 1)
    return relation.rows * within / (last - first + 1)
