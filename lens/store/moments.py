"""Times of samples, kept once for each rank and step.

What a rank reports of one step has one time, or nearly: twenty metrics would keep the same nanoseconds twenty times, and
they take more room than the values. So `moments` holds a time for each (run, rank, step), the first that came, and a
sample holds how much later than that it is, which is nearly always 0. A sample without a step, or one whose step has no
moment, holds its time as it is. Either way its time is what it holds and the moment, 0 where there is none:
`timed` says that in SQL, `Times` for columns.

Runs that began before there were moments (`Store.early_runs`) have none.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lens.store.engine import Store
from lens.store.groups import grouped
from lens.tables import Column

logger = logging.getLogger(__name__)

MOST_STEP, MOST_RANK = 1 << 39, 1 << 23
"""Beyond them a sample has no moment: rank and step are put into one number."""
MOST_KEPT, WORTH_A_LIST, MOST_RUNS = 500_000, 1 << 16, 8
"""Newest moments of a run kept in memory, about; short lists of them are joined to longer ones; of how many runs."""
STEPS_AT_ONCE = 1024
"""Older moments are looked up in blocks of so many steps."""
_MUTATION_S = 30.0


def timed(where: str, moments: str) -> str:
    """A SELECT of samples with their times: run, mid, rank, step, t_ns, value.

    Args:
        where: a condition on samples, without their time.
        moments: the same on run, rank and step alone.
    """
    return (
        "SELECT run, mid, rank, step, s.t_ns + m.t_ns AS t_ns, value "
        f"FROM (SELECT * FROM lens.samples WHERE {where}) AS s GLOBAL ANY LEFT JOIN "
        f"(SELECT run, rank, step, t_ns FROM lens.moments WHERE {moments}) AS m USING (run, rank, step)"
    )


@dataclass(frozen=True)
class _Sorted:
    """Moments of one run by rank and step."""

    keys: Column
    times: Column

    @classmethod
    def of(cls, rank: Column, step: Column, times: Column) -> _Sorted:
        keys = _keys(rank, step)
        if (keys[1:] < keys[:-1]).any():
            order = np.argsort(keys, kind="stable")
            keys, times = keys[order], times[order]
        return cls(keys, times)

    def find(self, keys: Column) -> tuple[Column, Column]:
        """Which of these there are, and the times of those."""
        if not len(self.keys):
            return np.zeros(len(keys), bool), self.times
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        is_there = self.keys[place] == keys
        return is_there, self.times[place[is_there]]

    def joined(self, other: _Sorted) -> _Sorted:
        keys, times = np.concatenate((self.keys, other.keys)), np.concatenate((self.times, other.times))
        order = np.argsort(keys, kind="stable")
        return _Sorted(keys[order], times[order])


class _Known:
    """What is kept in memory of the moments of one run."""

    def __init__(self, rank: Column, step: Column) -> None:
        self._newest = np.full(1, -1, "<i8")
        """By rank, from -1 on, the largest step that has a moment."""
        self._recent: deque[_Sorted] = deque()
        self._count = 0
        self._reach(rank, step)

    def may_exist(self, rank: Column, step: Column) -> Column:
        """Which of them are not beyond all that there are."""
        place = rank.astype("<i8") + 1
        within = place < len(self._newest)
        return within & (step <= self._newest[np.where(within, place, 0)])

    def find(self, keys: Column, wanted: Column, times: Column) -> Column:
        """Fill in the times of those that are in memory; of the rows `wanted`, those that are not."""
        for each in reversed(self._recent):
            if not len(wanted):
                break
            is_there, found = each.find(keys[wanted])
            times[wanted[is_there]] = found
            wanted = wanted[~is_there]
        return wanted

    def add(self, rank: Column, step: Column, times: Column) -> None:
        """Moments that are new."""
        self._reach(rank, step)
        fresh = _Sorted.of(rank, step, times)
        self._count += len(fresh.keys)
        if self._recent and len(self._recent[-1].keys) + len(fresh.keys) <= WORTH_A_LIST:
            fresh = self._recent.pop().joined(fresh)
        self._recent.append(fresh)
        while self._count > MOST_KEPT and len(self._recent) > 1:
            self._count -= len(self._recent.popleft().keys)

    def _reach(self, rank: Column, step: Column) -> None:
        if not len(rank):
            return
        short = int(rank.max()) + 2 - len(self._newest)
        if short > 0:
            self._newest = np.append(self._newest, np.full(short, -1, "<i8"))
        np.maximum.at(self._newest, rank.astype("<i8") + 1, step)


class Moments:
    """What the one writer knows of moments: the newest ones, and how far each rank is."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._runs: dict[int, _Known] = {}
        """The one last used comes last."""

    def forget(self, run: int) -> None:
        """Records of a run are being deleted: what is kept of it does not hold any more."""
        self._runs.pop(run, None)

    def split(self, samples: pa.Table) -> dict[str, pa.Table]:
        """Rows of `moments`, those that are new, and of `samples`, with what they are later than their moment.

        A group that is taken again after a crash finds in the database the moments that it left there, so its samples
        are the same.

        Args:
            samples: run, mid, rank, step, t_ns and value, sorted by run; t_ns is the time.

        Raises:
            StoreError: the database refuses or fails; nothing is noted then.
        """
        rows = {name: samples.column(name).to_numpy() for name in ("run", "rank", "step")}
        t_ns = samples.column("t_ns").to_numpy().copy()
        bounds = np.flatnonzero(np.diff(rows["run"].astype("<i8"), prepend=-1, append=-1)).tolist()
        fresh = []
        for start, stop in itertools.pairwise(bounds):
            run, part = int(rows["run"][start]), slice(start, stop)
            if run > self._store.early_runs:
                fresh.append((run, *self._of_run(run, rows["rank"][part], rows["step"][part], t_ns[part])))
        for run, *columns in fresh:
            self._runs[run].add(*columns)
        while len(self._runs) > MOST_RUNS:
            del self._runs[next(iter(self._runs))]
        found = {"samples": samples.set_column(samples.column_names.index("t_ns"), "t_ns", pa.array(t_ns))}
        made = [_table(run, *columns) for run, *columns in fresh if len(columns[0])]
        return {"moments": pa.concat_tables(made).combine_chunks(), **found} if made else found

    def _of_run(self, run: int, rank: Column, step: Column, t_ns: Column) -> tuple[Column, Column, Column]:
        """Make times what they are later than their moment, in place; rank, step and time of new moments."""
        known = self._runs.pop(run, None) or _Known(*self._newest_steps(run))
        self._runs[run] = known
        fits = _fit(rank, step)
        rows = slice(None) if fits.all() else np.flatnonzero(fits)
        rank, step, times = rank[rows], step[rows], t_ns[rows]
        if not len(step):
            return rank, step, times
        low = int(step.min())
        groups = grouped([rank, step - low], [int(rank.max()) + 1, int(step.max()) - low + 1])
        ranks, steps, moments = rank[groups.first], step[groups.first], times[groups.first]
        keys = _keys(ranks, steps)
        wanted = np.flatnonzero(known.may_exist(ranks, steps))
        is_new = np.ones(len(keys), bool)
        is_new[wanted] = False
        is_new[self._stored(run, ranks, steps, moments, known.find(keys, wanted, moments))] = True
        t_ns[rows] = times - moments[groups.member]
        return ranks[is_new], steps[is_new], moments[is_new]

    def _stored(self, run: int, ranks: Column, steps: Column, times: Column, wanted: Column) -> Column:
        """Fill in the times of those that are in the database; of the rows `wanted`, those that are not."""
        if not len(wanted):
            return wanted
        self._wait_deleted()
        missing = []
        blocks = steps[wanted] // STEPS_AT_ONCE
        for block in np.unique(blocks).tolist():
            some = wanted[blocks == block]
            between = (int(ranks[some].min()), int(ranks[some].max()))
            found = stored(self._store, run, between, (int(steps[some].min()), int(steps[some].max())))
            is_there, known = found.find(_keys(ranks[some], steps[some]))
            times[some[is_there]] = known
            missing.append(some[~is_there])
        return np.concatenate(missing)

    def _wait_deleted(self) -> None:
        """Moments that are being deleted must not be found: what refers to them would lose its time with them."""
        going = (
            "SELECT count() FROM system.mutations WHERE database = 'lens' AND table LIKE 'moments%' AND NOT is_done"
        )
        deadline = time.monotonic() + _MUTATION_S
        while self._store.scalar(going):
            if time.monotonic() > deadline:
                logger.warning("moments are still being deleted; times of late samples may be off")
                return
            time.sleep(0.05)

    def _newest_steps(self, run: int) -> tuple[Column, Column]:
        found = self._store.query(
            f"SELECT rank, max(step) AS step FROM lens.moments WHERE run = {run} GROUP BY rank"
        )
        return found.column("rank").to_numpy(), found.column("step").to_numpy()


class Times:
    """Times of a run's samples from what they hold; the moments last needed are kept, by whole ranks."""

    def __init__(self, store: Store, run: int, steps: tuple[int | None, int | None] = (None, None)) -> None:
        """`steps` are the first and last that will be asked for."""
        self._store, self._run = store, run
        low, high = steps
        self._steps = (0 if low is None else low, MOST_STEP if high is None else high)
        self._ranks = (0, -1)
        self._moments = _Sorted(np.empty(0, "<i8"), np.empty(0, "<i8"))

    def of(self, rank: Column, step: Column, t_ns: Column) -> Column:
        """The times of samples.

        Args:
            rank, step, t_ns: as the table `samples` has them.

        Raises:
            StoreError: the database refuses or fails.
        """
        if self._run <= self._store.early_runs:
            return t_ns
        rows = np.flatnonzero(_fit(rank, step))
        if not len(rows):
            return t_ns
        rank, step = rank[rows], step[rows]
        low, high = int(rank.min()), int(rank.max())
        if low < self._ranks[0] or high > self._ranks[1]:
            self._moments, self._ranks = stored(self._store, self._run, (low, high), self._steps), (low, high)
        is_there, times = self._moments.find(_keys(rank, step))
        found = t_ns.copy()
        found[rows[is_there]] += times
        return found


def stored(store: Store, run: int, ranks: tuple[int, int], steps: tuple[int, int]) -> _Sorted:
    """The moments of some ranks and steps of a run, each from the first to the last.

    Raises:
        StoreError: the database refuses or fails.
    """
    found = store.query(
        f"SELECT rank, step, t_ns FROM lens.moments WHERE run = {run} AND rank BETWEEN {ranks[0]} AND {ranks[1]} "
        f"AND step BETWEEN {steps[0]} AND {steps[1]} ORDER BY run, rank, step"
    )
    return _Sorted.of(*(found.column(name).to_numpy() for name in ("rank", "step", "t_ns")))


def _fit(rank: Column, step: Column) -> Column:
    """Which have a moment."""
    fits: Column = (step >= 0) & (step < MOST_STEP) & (rank >= -1) & (rank < MOST_RANK)
    return fits


def _keys(rank: Column, step: Column) -> Column:
    """Rank and step as one number, in their order."""
    return (rank.astype("<i8") + 1) * MOST_STEP + step


def _table(run: int, rank: Column, step: Column, t_ns: Column) -> pa.Table:
    return pa.table({"run": np.full(len(step), run, "<u4"), "rank": rank, "step": step, "t_ns": t_ns})
