"""How long records are kept: the rules, and which rows are past them.

What lies in one bucket of the roll-up goes together: a step with its neighbours in the bucket, once the newest record
of any of them is too old; records without a step by their own time, in whole buckets of time. So a roll-up never
speaks of samples that are gone, a step is there with all its records or not at all, and nothing that is newer goes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lens.store.engine import Store, quote
from lens.store.errors import StoreError
from lens.store.moments import timed
from lens.store.schema import FINE_EACH, STEP_AXIS, STEP_BUCKET, TIME_AXIS, TIME_BUCKET_NS

EVERY_RUN = 0
"""Stands for all runs that have no rule of their own."""
_FOREVER, _FOLLOW = -1, -2
"""Words of `keep_s` in the database: kept for ever; no rule of its own."""
LONGEST_S = 100 * 366 * 86_400

_TIMES = {
    "samples": "t_ns",
    "moments": "t_ns",
    "vectors": "t_ns",
    "events": "t_ns",
    "steps": "greatest(t0_ns, t1_ns)",
    "spans": "greatest(t0_ns, t1_ns)",
    "collectives": "greatest(t0_ns, t1_ns, t_done_ns)",
}
"""The newest time that a row of each table of records speaks of."""
_NO_STEP = -1


class BadRetentionError(StoreError):
    """A time to keep records that cannot be used."""


@dataclass(frozen=True)
class Rules:
    """Seconds for which records are kept; None is for ever."""

    every_run: int | None
    runs: dict[int, int | None]
    """Of the runs with a rule of their own, by number."""

    def keep_s(self, number: int) -> int | None:
        """The rule for a run."""
        return self.runs.get(number, self.every_run)


def rules_of(store: Store) -> Rules:
    """The rules that the database holds."""
    rows = store.query(f"SELECT run, keep_s FROM lens.retention FINAL WHERE keep_s != {_FOLLOW}").to_pylist()
    found = {row["run"]: None if row["keep_s"] == _FOREVER else row["keep_s"] for row in rows}
    return Rules(found.pop(EVERY_RUN, None), found)


def check_time(keep_s: int | None) -> None:
    """Refuse a time that records cannot be kept for; None is for ever.

    Raises:
        BadRetentionError: no such time.
    """
    if keep_s is not None and not 1 <= keep_s <= LONGEST_S:
        raise BadRetentionError("keep_s: 1 second to 100 years", 'send {"keep_s": 2592000}, or null for ever')


def set_rule(store: Store, number: int, keep_s: int | None, follow: bool = False) -> None:
    """Keep a run's records, or those of `EVERY_RUN`, for so many seconds (see `check_time`). With `follow` the run has
    no rule of its own any more.

    Raises:
        StoreError: it cannot be noted.
    """
    word = _FOLLOW if follow else _FOREVER if keep_s is None else keep_s
    # Counted, not timed: a clock that goes back must not bring an older rule back.
    newest = "(SELECT max(version) FROM lens.retention)"
    store.command(f"INSERT INTO lens.retention (run, keep_s, version) SELECT {number}, {word}, {newest} + 1")


@dataclass(frozen=True)
class Expired:
    """What of a run is past its retention."""

    run: int
    before_ns: int
    """Records without a step that are older; a multiple of the roll-up's bucket of time."""
    loose: bool
    """Whether there are any such records."""
    buckets: tuple[tuple[int, int], ...]
    """Buckets of steps, as ranges with first and last."""

    def __bool__(self) -> bool:
        """Whether anything is."""
        return self.loose or bool(self.buckets)

    def conditions(self) -> dict[str, str]:
        """By table, which of its rows: SQL for WHERE."""
        rows = {name: self._rows(time_of) for name, time_of in _TIMES.items()}
        in_buckets = _any(f"bucket BETWEEN {first} AND {last}" for first, last in self.buckets)
        rollup = (
            f"run = {self.run} AND ((axis = {TIME_AXIS} AND bucket < {self.before_ns // TIME_BUCKET_NS}) "
            f"OR (axis = {STEP_AXIS} AND {in_buckets}))"
        )
        fine = _any(
            f"bucket BETWEEN {first * FINE_EACH} AND {last * FINE_EACH + FINE_EACH - 1}"
            for first, last in self.buckets
        )
        fine_rollup = f"run = {self.run} AND {fine}"
        return {**rows, "latest": self._rows("t_ns"), "rollup": rollup, "rollup_fine": fine_rollup}

    def _rows(self, time_of: str) -> str:
        steps = _any(
            f"step BETWEEN {first * STEP_BUCKET} AND {last * STEP_BUCKET + STEP_BUCKET - 1}"
            for first, last in self.buckets
        )
        return f"run = {self.run} AND ((step < 0 AND {time_of} < {self.before_ns}) OR (step >= 0 AND {steps}))"


Parts = dict[str, list[str]]
"""Names of the files of each table."""


def parts_of(store: Store) -> Parts:
    """The parts that the tables of records have now."""
    found = store.query("SELECT table, name FROM system.parts WHERE database = 'lens' AND active").to_pylist()
    return {table: [row["name"] for row in found if row["table"] == table] for table in _TIMES}


def expired(store: Store, number: int, before_ns: int) -> Expired:
    """What of a run is older than this, as far as whole buckets are. Reads all its records' times."""
    before_ns -= before_ns % TIME_BUCKET_NS
    buckets = _buckets(store, number, f"if(bucket = {_NO_STEP}, first, last) < {before_ns}")
    steps = [each for each in buckets if each != _NO_STEP]
    return Expired(number, before_ns, _NO_STEP in buckets, tuple(_ranges(steps)))


def without_renewed(store: Store, past: Expired, seen: Parts) -> Expired:
    """The same without buckets of steps of which parts not `seen` hold something newer. Reads those parts alone."""
    newer = set(_buckets(store, past.run, f"last >= {past.before_ns}", seen))
    steps = (step for first, last in past.buckets for step in range(first, last + 1) if step not in newer)
    return replace(past, buckets=tuple(_ranges(steps)))


def _buckets(store: Store, number: int, having: str, seen: Parts | None = None) -> list[int]:
    """Buckets of a run's records whose oldest (`first`) and newest time (`last`) are like this, in order."""
    bucket = f"if(step < 0, {_NO_STEP}, intDiv(step, {STEP_BUCKET}))"
    parts = (
        f"SELECT {bucket} AS bucket, min({time_of}) AS oldest, max({time_of}) AS newest "
        f"FROM ({_rows_of(table, number, seen)}) GROUP BY bucket"
        for table, time_of in _TIMES.items()
    )
    found = store.query(
        "SELECT bucket, min(oldest) AS first, max(newest) AS last "
        f"FROM ({' UNION ALL '.join(parts)}) GROUP BY bucket HAVING {having} ORDER BY bucket"
    )
    buckets: list[int] = found.column("bucket").to_pylist()
    return buckets


def _rows_of(table: str, number: int, seen: Parts | None) -> str:
    """The rows of a table that have times of their own: not of samples that have that of their moment."""
    where = f"run = {number}{_not_in(seen[table]) if seen else ''}"
    if table != "samples":
        return f"SELECT * FROM lens.{table} WHERE {where}"
    later = f"{where} AND (step < 0 OR t_ns != 0)"
    return timed(later, f"run = {number} AND (rank, step) IN (SELECT rank, step FROM lens.samples WHERE {later})")


def _not_in(parts: list[str]) -> str:
    return f" AND _part NOT IN ({', '.join(map(quote, parts))})" if parts else ""


def _ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Sorted whole numbers as ranges with first and last."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return found


def _any(conditions: Iterable[str]) -> str:
    return f"({' OR '.join(conditions) or '0'})"
