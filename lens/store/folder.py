"""One data folder: its log, its database, and what is known of both. The only way in which records get in.

data/
  token         what clients have to know
  lock          held by the one process that owns the folder
  server.json   where that process serves it
  log/          write-ahead log (`log`), and how far the database is
  chdb/         the database (`engine`), or
  clickhouse    the address of the server that keeps the tables
"""

from __future__ import annotations

import atexit
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lens.store import runs
from lens.store.applier import Applier, Pending, read_pointer
from lens.store.cardinality import beyond, without
from lens.store.decode import Decoded, decode
from lens.store.encodings import unpack
from lens.store.engine import Store, quote
from lens.store.entries import BATCH, CUT, RUN, BatchEntry, Cut, RunEntry
from lens.store.errors import StoreError, StoreFullError, UnknownRunError
from lens.store.history import Arrivals
from lens.store.log import Log
from lens.store.ownership import Ownership
from lens.store.registry import Registry
from lens.store.runs import Run
from lens.store.sql.guest import SqlLimits


@dataclass(frozen=True)
class Limits:
    """What one server takes. Sizes in bytes."""

    body: int = 64 << 20
    """Largest request body as sent."""
    unpacked: int = 256 << 20
    """Largest body after its content encoding is undone."""
    series: int = 1_000_000
    """Most series of one run, about: labels that never repeat (a request's id, a time) would make one a sample."""
    waiting: int = 512 << 20
    """Most that may wait for the database before senders are told to wait, about."""
    requests: int = 32
    """Most ingest requests at the same time."""
    read_wait_s: float = 20.0
    """How long a read waits until what was acknowledged before it can be seen."""
    sql: SqlLimits = field(default_factory=SqlLimits)
    """What one query of a user may take."""


@dataclass(frozen=True)
class Receipt:
    """What became of a batch."""

    accepted: int
    rejected: list[dict[str, Any]]
    rejected_count: int
    duplicate: bool
    """Whether it had been taken before, and so was not taken again."""


def embedded(path: Path) -> str:
    """The database in a folder."""
    return f"chdb://{(path / 'chdb').resolve()}"


class DataFolder:
    """An open data folder. Thread-safe.

    `dsn` is a ClickHouse server that is this folder's alone, in the place of the database in it.

    Raises:
        FolderOwnedError: another process has it open.
        StoreError: it cannot be opened.
    """

    def __init__(self, path: Path, limits: Limits | None = None, dsn: str | None = None) -> None:
        self.path = path
        self.limits = limits or Limits()
        self.ownership = Ownership(path)
        self._order = threading.Lock()
        self.arrivals = Arrivals()
        try:
            self.log = Log(path / "log")
            self._check_place(dsn)
            self.store = Store(dsn or embedded(path))
            self.registry = Registry.load(self.store)
            pointer = path / "log" / "applied.json"
            recovered, fresh = self._replay(read_pointer(pointer))
            self.applier = Applier(self.log, self.store, self.registry, pointer, recovered)
            self._newest = max((item.end for _, items in recovered for item in items), default=0)
            for pending in fresh:
                self._submit(pending)
            self.applier.start()
        except BaseException:
            self._release()
            raise
        # A process that ends with the database open may crash or hang in the engine's own exit handlers.
        atexit.register(self.close)

    def _check_place(self, dsn: str | None) -> None:
        """Note which server keeps the tables: opened without it, the folder would look empty.

        Raises:
            StoreError: another keeps them.
        """
        note = self.path / "clickhouse"
        place = None if dsn is None else dsn.rpartition("@")[2].removeprefix("http://").removeprefix("https://")
        known = note.read_text() if note.exists() else None
        if known is None and place is not None and (self.path / "chdb").exists():
            raise StoreError(f"{self.path} keeps its own tables", "name an empty folder with --data")
        if known is not None and known != place:
            raise StoreError(
                f"the tables of {self.path} are kept by {known}", f"set LENS_CLICKHOUSE=http://{known}"
            )
        if place is not None:
            note.write_text(place)

    def describe_run(self, described: Any) -> tuple[Run, bool]:
        """Take a description of a run; returns the run, and whether it is new. On disk when this returns.

        Raises:
            BadRunError: it is no description.
            StoreError: it cannot be kept.
        """
        checked = runs.checked(described)
        with self._order:
            known = self.registry.find(checked["run"])
            if known is not None and runs.merged(known.described, checked) == known.described:
                end, run = known.version, known
            else:
                number = known.number if known else self.registry.next_number()
                entry = RunEntry(number, time.time_ns(), checked)
                end = self.log.append(RUN, entry.pack())
                run = self.registry.take_run(entry, end)
                if known is None:
                    self.arrivals.begin(number)
                self._submit(Pending(end, number, described=True))
        self.log.sync(end)
        return run, known is None

    def ingest(
        self,
        run_id: str,
        body: bytes,
        content_type: str,
        encoding: str,
        decoded: Decoded,
        source: str | None = None,
        sequence: int | None = None,
    ) -> Receipt:
        """Take a batch. Returns when it is on disk.

        `body` is as sent, `decoded` what is in it. A batch whose (source, sequence) was taken before is not taken
        again.

        Raises:
            UnknownRunError: no run of this id.
            StoreFullError: too much is waiting already.
            StoreError: it cannot be kept.
        """
        for described in decoded.runs:
            self.describe_run({**described, "run": run_id})
        number = self.registry.run(run_id).number
        refused = beyond(self.registry, number, decoded.tables, self.limits.series)
        if refused:
            decoded = without(decoded, refused, self.limits.series)
        rejected = decoded.rejected
        if self.applier.pending_bytes > self.limits.waiting:
            raise StoreFullError(
                "the database is behind, no more records for now", "send the batch again in a moment"
            )
        entry = BatchEntry(number, time.time_ns(), content_type, encoding, source, sequence, body, refused)
        packed = entry.pack()
        with self._order:
            if number in self.registry.deleted:
                raise UnknownRunError(run_id)
            duplicate = (
                source is not None and sequence is not None and self.registry.seen.has(number, source, sequence)
            )
            if duplicate:
                # It may be on its way to the disk in another thread: this sender waits for it too.
                end = self._newest
            else:
                end = self.log.append(BATCH, packed)
                self._submit(self._pending(entry, end, decoded))
                self.arrivals.add(number, end, decoded.tables)
        self.log.sync(end)
        self.registry.arrived(number)
        return Receipt(decoded.accepted, rejected.listed, rejected.count, duplicate)

    def delete_run(self, run_id: str) -> Run:
        """Make a run unknown, for good when this returns; its rows are left for `upkeep.keeper.Upkeep`.

        A run described by this id later is another one, which takes batches that this one had taken.

        Raises:
            UnknownRunError: no run of this id.
            StoreError: it cannot be deleted now.
        """
        with self._order:
            run = self.registry.run(run_id)
            # Nothing of it may be on its way into the database when its rows are deleted.
            self.settle()
            row = f"({run.number}, {quote(run.id)}, {time.time_ns()})"
            self.store.command(f"INSERT INTO lens.deleted (run, id, deleted_ns) VALUES {row}")
            self.registry.forget(run)
            self.arrivals.drop(run.number)
        return run

    def settle(self, patience_s: float | None = None) -> None:
        """Returns when everything acknowledged before this call can be read from the database.

        Raises:
            StoreBehindError: that takes longer than `patience_s`, or than the limit.
        """
        self.applier.wait(self._newest, self.limits.read_wait_s if patience_s is None else patience_s)

    def close(self) -> None:
        """Apply what is in the log, close everything, give the folder back. Closing again does nothing."""
        atexit.unregister(self.close)
        self.applier.stop()
        self._release()

    def _release(self) -> None:
        for name in ("log", "store"):
            if hasattr(self, name):
                getattr(self, name).close()
        self.ownership.release()

    def _submit(self, pending: Pending) -> None:
        self._newest = pending.end
        self.applier.submit(pending)

    def _pending(self, entry: BatchEntry, end: int, decoded: Decoded) -> Pending:
        rejected, lost = decoded.rejected.count, decoded.lost
        touched = self.registry.take_batch(entry, end, decoded.tables, rejected, lost)
        row = {
            "run": entry.number,
            "source": entry.source or "",
            "sequence": -1 if entry.sequence is None else entry.sequence,
            "position": end,
            "received_ns": entry.received_ns,
            "accepted": decoded.accepted,
            "rejected": rejected,
            "lost": lost,
        }
        return Pending(end, entry.number, decoded.tables, batch=row, touched=touched)

    def _replay(self, applied: int) -> tuple[list[tuple[Cut, list[Pending]]], list[Pending]]:
        """What is in the log but maybe not in the database: groups cut before, and entries in no group yet."""
        waiting: list[tuple[int, Pending]] = []
        cuts: list[Cut] = []
        for entry in self.log.read(applied):
            if entry.kind == CUT:
                cuts.append(Cut.unpack(entry.payload))
            elif entry.kind == RUN:
                said = RunEntry.unpack(entry.payload)
                if said.number in self.registry.deleted:
                    continue
                self.registry.take_run(said, entry.end)
                waiting.append((entry.start, Pending(entry.end, said.number, described=True)))
            elif entry.kind == BATCH:
                batch = BatchEntry.unpack(entry.payload)
                if batch.number in self.registry.deleted:
                    continue
                decoded = decode(unpack(batch.body, batch.encoding, self.limits.unpacked), batch.content_type)
                if batch.refused:
                    decoded = without(decoded, batch.refused, self.limits.series)
                waiting.append((entry.start, self._pending(batch, entry.end, decoded)))
            else:
                raise StoreError(
                    f"the log holds an entry of kind {entry.kind}", "a newer lens wrote it: upgrade this one"
                )
        groups = []
        for cut in cuts:
            items = [item for start, item in waiting if cut.start <= start and item.end <= cut.end]
            waiting = [(start, item) for start, item in waiting if item.end > cut.end]
            if items:
                groups.append((cut, items))
        return groups, [item for _, item in waiting]
