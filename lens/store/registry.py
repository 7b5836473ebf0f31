"""What the store knows without asking the database: runs, how far they are, batches taken, series met.

Loaded when a data folder is opened, then kept up to date as entries go into the log. Every method is thread-safe.
"""

from __future__ import annotations

import json
import threading
import time
from typing import Any

from lens.store.engine import Store
from lens.store.entries import BatchEntry, RunEntry
from lens.store.errors import UnknownRunError
from lens.store.progress import Progress, RankProgress
from lens.store.rows import Series
from lens.store.runs import Run, merged
from lens.store.seen import SeenBatches
from lens.tables import Tables

_KNOWN = "run NOT IN (SELECT run FROM lens.deleted)"
"""Rows of a deleted run may be there for a while yet."""


class Registry:
    """The store's memory of one data folder."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.seen = SeenBatches()
        self.counted = 0
        """Offset in the log up to which the batches loaded from the database reach."""
        self.deleted: set[int] = set()
        """Numbers of runs that are gone; nothing gets one of them again."""
        self._runs: dict[str, Run] = {}
        self._progress: dict[int, Progress] = {}
        self._series: dict[int, dict[int, Series]] = {}

    @classmethod
    def load(cls, store: Store) -> Registry:
        """What the database holds."""
        registry = cls()
        registry.deleted = set(store.query("SELECT run FROM lens.deleted").column(0).to_pylist())
        runs = f"SELECT run, json, version FROM lens.runs FINAL WHERE {_KNOWN} ORDER BY run"
        for row in store.query(runs).to_pylist():
            kept = json.loads(row["json"])
            run = Run(row["run"], kept["created_ns"], kept["described"], row["version"])
            registry._runs[run.id] = run
            registry._progress[run.number] = Progress()
            registry._series[run.number] = {}
        for row in store.query(f"SELECT * EXCEPT version FROM lens.progress FINAL WHERE {_KNOWN}").to_pylist():
            run_number, rank = row.pop("run"), row.pop("rank")
            registry._progress[run_number].ranks[rank] = RankProgress(**row)
        registry._load_batches(store)
        for row in store.query(f"SELECT * FROM lens.series FINAL WHERE {_KNOWN}").to_pylist():
            texts = {name: row[name] or None for name in ("host", "device", "labels")}
            registry._series[row["run"]][row["mid"]] = Series(row["mid"], row["metric"], **texts)
        return registry

    def _load_batches(self, store: Store) -> None:
        totals = store.query("SELECT run, sum(lost) AS lost, sum(rejected) AS rejected, count() AS batches "
                             f"FROM lens.batches WHERE {_KNOWN} GROUP BY run")  # fmt: skip
        for row in totals.to_pylist():
            progress = self._progress[row["run"]]
            progress.lost_slots, progress.rejected = row["lost"], row["rejected"]
            progress.batches = row["batches"]
        self.counted = int(store.scalar("SELECT max(position) FROM lens.batches") or 0)
        taken = store.query(
            f"SELECT run, source, sequence FROM lens.batches WHERE sequence >= 0 AND {_KNOWN} ORDER BY ALL"
        )
        columns = (taken.column(name).to_pylist() for name in ("run", "source", "sequence"))
        for run, source, sequence in zip(*columns, strict=True):
            self.seen.add(run, source, sequence)

    def runs(self) -> list[Run]:
        """All runs, newest first."""
        with self.lock:
            return sorted(self._runs.values(), key=lambda run: (run.created_ns, run.number), reverse=True)

    def find(self, run_id: str) -> Run | None:
        """The run of this id, if there is one."""
        return self._runs.get(run_id)

    def run(self, run_id: str) -> Run:
        """The run of this id.

        Raises:
            UnknownRunError: there is none.
        """
        run = self._runs.get(run_id)
        if run is None:
            raise UnknownRunError(run_id)
        return run

    def next_number(self) -> int:
        """A number that no run has or had."""
        return max(self.deleted.union(run.number for run in self._runs.values()), default=0) + 1

    def progress(self, number: int) -> Progress:
        """How far the run of this number is."""
        return self._progress[number]

    def state_of(self, run_id: str) -> tuple[int, int, int]:
        """Numbers that change when a run's records do: its version, its batches, how often old ones were deleted.

        Raises:
            UnknownRunError: there is no such run.
        """
        run = self.run(run_id)
        progress = self.progress(run.number)
        return run.version, progress.batches, progress.pruned

    def series(self, number: int, metric: str | None = None) -> list[Series]:
        """The series of a run, or those of one metric."""
        with self.lock:
            found = list(self._series[number].values())
        return found if metric is None else [series for series in found if series.metric == metric]

    def count_series(self, number: int) -> int:
        """How many series the run has."""
        return len(self._series[number])

    def new_series(self, number: int, found: dict[int, Series]) -> list[Series]:
        """Those of these series that the run did not have; it has them from now on."""
        with self.lock:
            known = self._series[number]
            new = [series for mid, series in found.items() if mid not in known]
            known.update((series.mid, series) for series in new)
            return new

    def take_run(self, entry: RunEntry, offset: int) -> Run:
        """Note what was said about a run."""
        with self.lock:
            run = self._runs.get(entry.described["run"])
            if run is None:
                run = Run(entry.number, entry.received_ns, entry.described)
                self._runs[run.id] = run
                self._progress.setdefault(run.number, Progress())
                self._series.setdefault(run.number, {})
            run.described = merged(run.described, entry.described)
            run.version = offset
            return run

    def take_batch(
        self, entry: BatchEntry, offset: int, tables: Tables, rejected: int, lost: int
    ) -> set[tuple[int, int]]:
        """Note a batch; returns the (run, rank) pairs that it speaks of."""
        with self.lock:
            if entry.source is not None and entry.sequence is not None:
                self.seen.add(entry.number, entry.source, entry.sequence)
            progress = self._progress[entry.number]
            if offset > self.counted:
                progress.batches += 1
                progress.rejected += rejected
                progress.lost_slots += lost
            return {(entry.number, rank) for rank in progress.take(tables)}

    def arrived(self, number: int) -> None:
        """Note that a batch of this run has come just now."""
        self._progress[number].arrived = time.monotonic()

    def forget(self, run: Run) -> None:
        """Note that a run is gone. How far it came stays, for readers that have only just asked."""
        with self.lock:
            self.deleted.add(run.number)
            self._runs.pop(run.id, None)
            self._series[run.number] = {}

    def run_rows(self, numbers: set[int]) -> list[dict[str, Any]]:
        """Rows of the table `runs` for these runs, as they are known now."""
        with self.lock:
            return [
                {
                    "run": run.number,
                    "id": run.id,
                    "json": json.dumps({"created_ns": run.created_ns, "described": run.described}),
                    "version": run.version,
                }
                for run in self._runs.values()
                if run.number in numbers
            ]

    def rank_rows(self, numbers: set[int]) -> list[dict[str, Any]]:
        """Rows of the table `ranks` for these runs."""
        with self.lock:
            return [
                {
                    "run": run.number,
                    "rank": entry["rank"],
                    "local_rank": _whole(entry.get("local_rank")),
                    "version": run.version,
                    **{key: str(entry.get(key) or "") for key in ("host", "device", "vendor", "model")},
                }
                for run in self._runs.values()
                if run.number in numbers
                for entry in run.described.get("ranks", ())
            ]

    def progress_rows(self, touched: set[tuple[int, int]], version: int) -> list[dict[str, Any]]:
        """Rows of the table `progress` for these (run, rank) pairs."""
        with self.lock:
            return [
                {"run": run, "rank": rank, "version": version, **vars(self._progress[run].ranks[rank])}
                for run, rank in sorted(touched)
            ]


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and -(2**31) <= value < 2**31 else -1
