"""What is done to a data folder so that it stays small: records deleted, parts merged.

Rows go by mutations, which the database writes down before it begins: one that a crash stops goes on at the next
opening. They reach only what was inserted before them. The table of batches is left alone as long as its run is
known, so a batch sent again after its records are gone is still not taken twice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lens.store.audit import Audit, local_user
from lens.store.errors import StoreBehindError, StoreError
from lens.store.folder import DataFolder
from lens.store.schema import MIGRATIONS, OF_SAMPLES, TARGETS
from lens.store.upkeep.retention import (
    EVERY_RUN,
    check_time,
    expired,
    parts_of,
    rules_of,
    set_rule,
    without_renewed,
)

logger = logging.getLogger(__name__)

EVERY_S = 3600.0
"""Seconds between two looks for records past their retention."""
_MUTATION_S = 3600.0
_LOOK_S = 0.05


class Upkeep:
    """The care of one data folder. Thread-safe; pruning and merging happen one after the other.

    `who` is the holder of the token that asked, None for a user of this machine who opened the folder.
    """

    def __init__(self, folder: DataFolder, every_s: float = EVERY_S) -> None:
        self._folder, self._store = folder, folder.store
        self._every_s = every_s
        self._audit = Audit(folder.path)
        self._working = threading.Lock()
        self._compacting = threading.Lock()
        self._stopping = threading.Event()
        self._last: dict[str, Any] = {"status": "idle"}
        self._threads: list[threading.Thread] = []

    @classmethod
    def open_folder(cls, path: Path, dsn: str | None = None) -> Upkeep:
        """The care of a folder that no server owns, for a while; `close` gives it back.

        Raises:
            FolderOwnedError: a server owns it.
            StoreError: it cannot be opened.
        """
        return cls(DataFolder(path, dsn=dsn))

    def close(self) -> None:
        """Finish what was begun, then give the folder back (only after `open_folder`)."""
        try:
            self._wait_deleted(list(TARGETS))
        finally:
            self._folder.close()

    def start(self) -> None:
        """Look after the folder from now on: at once, then on schedule."""
        self._begin(self._work, "lens-upkeep")

    def stop(self) -> None:
        """Stop; merges under way are given up, mutations go on when the folder is opened again."""
        self._stopping.set()
        if any(thread.is_alive() for thread in self._threads):
            for table in TARGETS:
                self._store.command(f"SYSTEM STOP MERGES lens.{table}")
        for thread in self._threads:
            thread.join()

    def retention(self) -> dict[str, Any]:
        """Seconds for which records are kept: {keep_s, runs: [{run, keep_s}]}; None is for ever."""
        rules = rules_of(self._store)
        own = [run for run in self._folder.registry.runs() if run.number in rules.runs]
        return {
            "keep_s": rules.every_run,
            "runs": [{"run": run.id, "keep_s": rules.runs[run.number]} for run in own],
        }

    def set_retention(
        self, run: str | None, keep_s: int | None, follow: bool = False, who: str | None = None
    ) -> dict[str, Any]:
        """Keep the records of all runs, or of one, for so many seconds; None is for ever. With `follow` a run has no
        rule of its own any more. Returns what holds then.

        Raises:
            UnknownRunError: no such run.
            BadRetentionError: no such time.
        """
        number = EVERY_RUN if run is None else self._folder.registry.run(run).number
        check_time(keep_s)
        self._note(who, "retention.set", run=run, keep_s=keep_s, follow=follow)
        set_rule(self._store, number, keep_s, follow)
        return self.retention()

    def info(self) -> dict[str, Any]:
        """Rows and bytes of every table and run, version, retention; see docs/store.md."""
        self._folder.settle()
        tables = self._tables()
        rows = {table: self._rows_by_run(table) for table in TARGETS}
        rules = rules_of(self._store)
        samples = tables["samples"]["rows"]
        bytes_of_samples = sum(tables[name]["bytes"] for name in OF_SAMPLES)
        return {
            "schema": {"version": self._store.version, "newest": len(MIGRATIONS)},
            "rows": sum(each["rows"] for each in tables.values()),
            "bytes": sum(each["bytes"] for each in tables.values()),
            "bytes_merged_away": self._merged_away(),
            "bytes_log": sum(path.stat().st_size for path in self._folder.log.folder.glob("*.log")),
            "samples": samples,
            "bytes_per_sample": bytes_of_samples / samples if samples else None,
            "keep_s": rules.every_run,
            "tables": [{"table": name, **each} for name, each in tables.items()],
            "runs": [
                {
                    "run": run.id,
                    "keep_s": rules.keep_s(run.number),
                    "rows": sum(each.get(run.number, 0) for each in rows.values()),
                    "bytes_about": _share(run.number, rows, tables),
                    "tables": {name: each[run.number] for name, each in rows.items() if run.number in each},
                }
                for run in self._folder.registry.runs()
            ],
        }

    def delete_run(self, run: str, who: str | None = None) -> dict[str, Any]:
        """Delete a run with all its records: {run, removed}, its rows by table. Nobody can read them any more when
        this returns; the disk has its space back some time later (`tidy` waits for that).

        Raises:
            UnknownRunError: no such run.
            StoreError: the database fails; a run that is unknown after that is deleted, its rows go later.
        """
        self._folder.registry.run(run)
        self._note(who, "run.deleted", run=run)
        known = self._folder.delete_run(run)
        rows = _of_runs([known.number])
        removed = self._count(rows)
        self._begin_deleting(rows, removed)
        return {"run": known.id, "removed": removed}

    def compact(self) -> dict[str, Any]:
        """Delete what is past its retention or of deleted runs, and merge parts; returns when all is done:
        {status: done, began_ns, ended_ns, before, after, removed}, bytes and rows before and after.

        Raises:
            StoreError: the database fails.
        """
        self._note(None, "compacted")
        with self._compacting:
            return self._compact()

    def begin_compaction(self, who: str | None = None) -> dict[str, Any]:
        """The same in the background; what `compaction` says from now on. One under way already is as good."""
        if not self._compacting.acquire(blocking=False):
            return self._last
        try:
            self._note(who, "compacted")
        except StoreError:
            self._compacting.release()
            raise
        self._last = began = {"status": "running", "began_ns": time.time_ns()}

        def work() -> None:
            try:
                self._compact()
            except StoreError as error:
                logger.log(logging.INFO if self._stopping.is_set() else logging.ERROR, "compaction: %s", error)
            finally:
                self._compacting.release()

        self._begin(work, "lens-compaction")
        return began

    def compaction(self) -> dict[str, Any]:
        """The newest compaction since the start: its status (idle, running, done, failed), and what `compact` gives."""
        return self._last

    def tidy(self) -> dict[str, int]:
        """Delete rows of deleted runs, and those past their retention; the rows removed by table."""
        with self._working:
            return _sum(self._sweep(), self._prune())

    def _note(self, who: str | None, action: str, **about: Any) -> None:
        """Into the audit log, before it is done: nothing is done that could not be noted."""
        self._audit.note(who or local_user(), action, **about)

    def _begin(self, work: Callable[[], None], name: str) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        while True:
            try:
                removed = self.tidy()
                if removed:
                    logger.info("deleted %s", removed)
            except StoreError as error:
                if not self._stopping.is_set():
                    logger.warning("records past their retention stay for now: %s", error)
            if self._stopping.wait(self._every_s):
                return

    def _compact(self) -> dict[str, Any]:
        self._last = {"status": "running", "began_ns": time.time_ns()}
        try:
            self._folder.settle()
            before = self._size()
            removed = self.tidy()
            with self._working:
                self._merge()
            outcome = {"status": "done", "before": before, "after": self._size(), "removed": removed}
        except StoreError as error:
            self._last = {**self._last, "status": "failed", "ended_ns": time.time_ns(), "error": str(error)}
            raise
        self._last = {**self._last, **outcome, "ended_ns": time.time_ns()}
        return self._last

    def _merge(self) -> None:
        session = self._store.open_session()
        try:
            for table in TARGETS:
                self._store.query(
                    f"OPTIMIZE TABLE lens.{table} FINAL SETTINGS optimize_skip_merged_partitions = 1", session
                )
        finally:
            self._store.close_session(session)

    def _sweep(self) -> dict[str, int]:
        """Delete what is left of deleted runs."""
        rows = _of_runs(sorted(self._folder.registry.deleted))
        removed = self._count(rows)
        self._begin_deleting(rows, removed)
        self._wait_deleted(list(removed))
        return removed

    def _prune(self) -> dict[str, int]:
        rules = rules_of(self._store)
        removed: dict[str, int] = {}
        for run in self._folder.registry.runs():
            keep_s = rules.keep_s(run.number)
            if keep_s is None or self._stopping.is_set():
                continue
            removed = _sum(removed, self._prune_run(run.number, time.time_ns() - keep_s * 1_000_000_000))
        return removed

    def _prune_run(self, number: int, before_ns: int) -> dict[str, int]:
        seen = parts_of(self._store)
        past = expired(self._store, number, before_ns)
        if not past:
            return {}
        counted = self._count(past.conditions())
        # Looking takes long, and inserts go on: a bucket that has got something new meanwhile must stay. What comes
        # after the mutations have begun is not reached by them.
        with self._folder.applier.quiet(self._folder.limits.read_wait_s):
            still = without_renewed(self._store, past, seen)
            removed = counted if still == past else self._count(still.conditions())
            self._begin_deleting(still.conditions(), removed)
            self._folder.applier.forget_moments(number)
        self._wait_deleted(list(removed))
        # What was worked out from the records before does not hold any more.
        self._folder.arrivals.drop(number)
        self._folder.registry.progress(number).pruned += 1
        return removed

    def _count(self, conditions: dict[str, str]) -> dict[str, int]:
        """How many rows are like this, by table, where there are any."""
        counts = {
            table: int(self._store.scalar(f"SELECT count() FROM lens.{table} WHERE {condition}"))
            for table, condition in conditions.items()
        }
        return {table: count for table, count in counts.items() if count}

    def _begin_deleting(self, conditions: dict[str, str], tables: Iterable[str]) -> None:
        for table in tables:
            # Not waited for: the statement would hold up all writing until it is done.
            self._store.command(
                f"ALTER TABLE lens.{table} DELETE WHERE {conditions[table]} SETTINGS mutations_sync = 0"
            )

    def _wait_deleted(self, tables: list[str]) -> None:
        """Returns when the mutations of these tables are done.

        Raises:
            StoreError: one fails, or that takes too long.
        """
        names = ", ".join(f"'{table}'" for table in tables) or "''"
        deadline = time.monotonic() + _MUTATION_S
        while True:
            left = self._store.query(
                "SELECT table, latest_fail_reason FROM system.mutations "
                f"WHERE database = 'lens' AND table IN ({names}) AND NOT is_done"
            ).to_pylist()
            if not left:
                return
            failed = [each for each in left if each["latest_fail_reason"]]
            if failed:
                raise StoreError(
                    f"rows of {failed[0]['table']} cannot be deleted: {failed[0]['latest_fail_reason']}"
                )
            if time.monotonic() > deadline or self._stopping.wait(_LOOK_S):
                raise StoreBehindError("rows are still being deleted", "the database goes on by itself")

    def _tables(self) -> dict[str, dict[str, int]]:
        found = self._store.query(
            "SELECT table, sum(rows) AS rows, sum(bytes_on_disk) AS bytes, count() AS parts FROM system.parts "
            "WHERE database = 'lens' AND active GROUP BY table"
        )
        known = {row.pop("table"): row for row in found.to_pylist()}
        return {table: known.get(table, {"rows": 0, "bytes": 0, "parts": 0}) for table in TARGETS}

    def _size(self) -> dict[str, int]:
        tables = self._tables().values()
        return {key: sum(each[key] for each in tables) for key in ("rows", "bytes", "parts")}

    def _merged_away(self) -> int:
        found = self._store.scalar(
            "SELECT sum(bytes_on_disk) FROM system.parts WHERE database = 'lens' AND NOT active"
        )
        return int(found or 0)

    def _rows_by_run(self, table: str) -> dict[int, int]:
        found = self._store.query(f"SELECT run, count() AS rows FROM lens.{table} GROUP BY run")
        return dict(zip(found.column("run").to_pylist(), found.column("rows").to_pylist(), strict=True))


def _of_runs(numbers: Iterable[int]) -> dict[str, str]:
    """Conditions on all rows of some runs, by table."""
    return dict.fromkeys(TARGETS, f"run IN ({', '.join(map(str, numbers)) or 'NULL'})")


def _share(number: int, rows: dict[str, dict[int, int]], tables: dict[str, dict[str, int]]) -> int:
    """Bytes of a run, about: runs share the parts of a table, each is taken to have its rows' share of them."""
    return round(
        sum(
            tables[name]["bytes"] * of_runs[number] / sum(of_runs.values())
            for name, of_runs in rows.items()
            if number in of_runs
        )
    )


def _sum(some: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    return {name: some.get(name, 0) + more.get(name, 0) for name in {**some, **more}}
