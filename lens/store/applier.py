"""Moves what is in the log into the database, in groups, each exactly once.

A group is cut, and the cut is written to the log and synced, before any of it is inserted. The cut says how far
every table had come (the number of its newest block). After a crash the same group is taken again, and a table that
has come further since holds the group's rows already. Each insert is one part: there as a whole or not at all.

Why not ``insert_deduplication_token``: MergeTree notes the token before it renames the part into place. A process
killed between the two leaves a token without rows, and the repeated insert is then dropped: acknowledged data lost.
A cluster's replicated tables note it together with the part, in their Keeper: there the token decides (`Store.begin_group`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from lens.store.aggregates import aggregated
from lens.store.engine import Store
from lens.store.entries import CUT, Cut
from lens.store.errors import StoreBehindError, StoreError
from lens.store.log import Log
from lens.store.moments import Moments
from lens.store.registry import Registry
from lens.store.rows import RowGroup, RowMaker, join_rows, table_of
from lens.store.schema import TARGETS
from lens.tables import Tables

logger = logging.getLogger(__name__)

GROUP_ROWS = 50_000
"""Rows that are worth an insert at once."""
MOST_GROUP_ROWS = 1_000_000
GATHER_S = 1.0
"""How long rows wait for company when nobody asks for them: each insert costs a part in every table."""
_RETRY_S = (0.1, 0.5, 2.0, 5.0)

_SCHEMAS = {
    "runs": pa.schema({"run": pa.uint32(), "id": pa.string(), "json": pa.string(), "version": pa.uint64()}),
    "ranks": pa.schema(
        {
            "run": pa.uint32(),
            "rank": pa.int32(),
            **dict.fromkeys(("host", "device", "vendor", "model"), pa.string()),
            "local_rank": pa.int32(),
            "version": pa.uint64(),
        }
    ),
    "progress": pa.schema(
        {
            "run": pa.uint32(),
            "rank": pa.int32(),
            **dict.fromkeys(("last_step", "first_t_ns", "last_t_ns", "exit_t_ns"), pa.int64()),
            "version": pa.uint64(),
        }
    ),
    "batches": pa.schema(
        {
            "run": pa.uint32(),
            "source": pa.string(),
            "sequence": pa.int64(),
            "position": pa.uint64(),
            "received_ns": pa.int64(),
            "accepted": pa.uint32(),
            "rejected": pa.uint32(),
            "lost": pa.uint64(),
        }
    ),
    "series": pa.schema(
        {
            "run": pa.uint32(),
            "mid": pa.uint64(),
            **dict.fromkeys(("metric", "host", "device", "labels"), pa.string()),
        }
    ),
}


@dataclass
class Pending:
    """One entry of the log on its way into the database."""

    end: int
    """Offset in the log after the entry."""
    run: int
    tables: Tables = field(default_factory=Tables)
    described: bool = False
    """Whether the entry describes the run."""
    batch: dict[str, Any] | None = None
    """Its row in `batches`."""
    touched: set[tuple[int, int]] = field(default_factory=set)
    """(run, rank) pairs whose progress it moved."""

    @property
    def rows(self) -> int:
        """Rows of records."""
        return self.tables.total

    @property
    def size(self) -> int:
        """Bytes held in memory, about."""
        return 1000 + 100 * self.rows + self.tables.vector_values.nbytes


class Applier:
    """The one thread that writes to the database.

    `recovered` are groups that were cut before a crash, to be taken again as they were.
    """

    def __init__(
        self,
        log: Log,
        store: Store,
        registry: Registry,
        pointer: Path,
        recovered: list[tuple[Cut, list[Pending]]],
    ) -> None:
        self._log, self._store, self._registry, self._pointer = log, store, registry, pointer
        self._recovered = recovered
        self._maker, self._moments = RowMaker(), Moments(store)
        self._pending: deque[tuple[float, Pending]] = deque()
        self._pending_rows = 0
        self._pending_bytes = 0
        self._changed = threading.Condition()
        self._inserting = threading.Lock()
        self._applied = read_pointer(pointer)
        self._wanted = 0
        self._stopping = False
        self.failure: str | None = None
        """Why the database takes nothing at the moment; None while all is well."""
        self._thread = threading.Thread(target=self._work, name="lens-applier", daemon=True)

    @property
    def applied(self) -> int:
        """Offset up to which the log is in the database."""
        return self._applied

    @property
    def pending_bytes(self) -> int:
        """Memory that waiting entries take, about."""
        return self._pending_bytes

    def start(self) -> None:
        """Start working."""
        self._thread.start()

    def submit(self, pending: Pending) -> None:
        """Take an entry; entries come in the order of the log."""
        with self._changed:
            self._pending.append((time.monotonic(), pending))
            self._pending_rows += pending.rows
            self._pending_bytes += pending.size
            self._changed.notify_all()

    def wait(self, offset: int, timeout_s: float) -> None:
        """Returns when everything before this offset can be read.

        Raises:
            StoreBehindError: that takes longer than the time given.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._wanted = max(self._wanted, offset)
            self._changed.notify_all()
            while self._applied < offset:
                left = deadline - time.monotonic()
                if left <= 0 or not self._thread.is_alive():
                    raise StoreBehindError(
                        f"the database is behind the log{f': {self.failure}' if self.failure else ''}",
                        "ask again in a moment",
                    )
                self._changed.wait(min(left, 0.5))

    def forget_moments(self, run: int) -> None:
        """Records of a run are being deleted; to be told while all is quiet (see `quiet`)."""
        self._moments.forget(run)

    @contextlib.contextmanager
    def quiet(self, timeout_s: float) -> Iterator[int]:
        """Nothing is inserted while this lasts; the offset up to which the log is in the database.

        Raises:
            StoreBehindError: an insert takes longer than the time given.
        """
        if not self._inserting.acquire(timeout=timeout_s):
            raise StoreBehindError("the database is busy inserting", "ask again in a moment")
        try:
            yield self._applied
        finally:
            self._inserting.release()

    def stop(self) -> None:
        """Apply what is there, then stop. What cannot be applied stays in the log."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        for cut, items in self._recovered:
            self._apply(cut, items, inserted_before=True)
        self._recovered = []
        while items := self._gather():
            fresh = self._cut(items)
            if fresh is None:
                return
            self._apply(fresh, items, inserted_before=False)

    def _gather(self) -> list[Pending]:
        """The entries of the next group; none when it is time to stop."""
        with self._changed:
            while not self._pending:
                if self._stopping:
                    return []
                self._changed.wait()
            while not self._is_due():
                self._changed.wait(max(0.001, self._pending[0][0] + GATHER_S - time.monotonic()))
            items: list[Pending] = []
            rows = 0
            while self._pending and (not items or rows + self._pending[0][1].rows <= MOST_GROUP_ROWS):
                _, pending = self._pending.popleft()
                rows += pending.rows
                items.append(pending)
            return items

    def _is_due(self) -> bool:
        return (
            self._stopping
            or self._pending_rows >= GROUP_ROWS
            or self._wanted > self._applied
            or time.monotonic() - self._pending[0][0] >= GATHER_S
        )

    def _cut(self, items: list[Pending]) -> Cut | None:
        """The group's boundary, in the log and on disk; None if the server stops before that succeeds."""
        for attempt in range(10**9):
            try:
                cut = Cut(self._applied, items[-1].end, self._store.newest_blocks())
                self._log.sync(self._log.append(CUT, cut.pack()))
                return cut
            except StoreError as error:
                if self._failed(error, attempt):
                    return None
        return None

    def _apply(self, cut: Cut, items: list[Pending], inserted_before: bool) -> None:
        with self._inserting:
            self._apply_group(cut, items, inserted_before)

    def _apply_group(self, cut: Cut, items: list[Pending], inserted_before: bool) -> None:
        group = self._group(cut, items)
        ready: RowGroup | None = None
        for attempt in range(10**9):
            try:
                ready = ready or self._with_moments(group)
                self._insert(cut, ready, check=inserted_before or attempt > 0)
                break
            except StoreError as error:
                if self._failed(error, attempt):
                    return
        self.failure = None
        try:
            write_pointer(self._pointer, cut.end)
        except OSError as error:
            logger.warning("%s cannot be written (%s); a restart will take longer", self._pointer, error)
        with self._changed:
            self._applied = cut.end
            self._pending_rows -= 0 if inserted_before else sum(item.rows for item in items)
            self._pending_bytes -= 0 if inserted_before else sum(item.size for item in items)
            self._changed.notify_all()
        self._log.forget(cut.end)

    def _with_moments(self, group: RowGroup) -> RowGroup:
        return {**group, **self._moments.split(group["samples"])} if "samples" in group else group

    def _insert(self, cut: Cut, group: RowGroup, check: bool) -> None:
        newest = self._store.newest_blocks() if check else {}
        self._store.begin_group(f"{self._log.identity}:{cut.start}:{cut.end}")
        for target in TARGETS:
            if target in group and newest.get(target, 0) <= cut.blocks.get(target, 0):
                self._store.insert(target, group[target])

    def _failed(self, error: StoreError, attempt: int) -> bool:
        """Wait before the next attempt; true when the server stops, and the log keeps what is not applied."""
        self.failure = str(error)
        logger.error("the database takes nothing, trying again: %s", error)
        with self._changed:
            self._changed.notify_all()
            if not self._stopping:
                self._changed.wait(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])
            return self._stopping

    def _group(self, cut: Cut, items: list[Pending]) -> RowGroup:
        parts: list[RowGroup] = []
        series: list[dict[str, Any]] = []
        for item in items:
            rows, found = self._maker.rows(item.run, item.tables)
            parts.append(rows)
            for new in self._registry.new_series(item.run, found):
                texts = {name: getattr(new, name) or "" for name in ("metric", "host", "device", "labels")}
                series.append({"run": item.run, "mid": new.mid, **texts})
        described = {item.run for item in items if item.described}
        touched = set().union(*(item.touched for item in items))
        small = {
            "runs": self._registry.run_rows(described),
            "ranks": self._registry.rank_rows(described),
            "series": series,
            "progress": self._registry.progress_rows(touched, cut.end),
            "batches": [item.batch for item in items if item.batch is not None],
        }
        group = join_rows(parts)
        if "samples" in group:
            group |= aggregated(group["samples"])
        group.update({name: table_of(_SCHEMAS[name], rows) for name, rows in small.items() if rows})
        return group


def read_pointer(path: Path) -> int:
    """Offset up to which the log is in the database, as last noted; 0 if it never was."""
    try:
        return int(json.loads(path.read_text())["applied"])
    except FileNotFoundError:
        return 0
    except (ValueError, KeyError, TypeError):
        # Losing the pointer costs time, not rows: groups applied before are recognised by their blocks.
        logger.warning("%s cannot be read, the log is taken again from its start", path)
        return 0


def write_pointer(path: Path, applied: int) -> None:
    """Note how far the database is, atomically."""
    partial = path.with_suffix(".new")
    with partial.open("w") as file:
        json.dump({"applied": applied}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
