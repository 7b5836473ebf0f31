"""The database behind the store: `Store(dsn)` runs SQL and inserts columns; it knows nothing of records.

The embedded engine is chDB (ClickHouse in this process). One process owns a path; a fork would hang the child's
first query, so nothing here may be inherited by one. chDB is imported when a store is opened, not with this module.
A ClickHouse server is asked over HTTP (`clickhouse`) with the same statements.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from lens.store.clickhouse import SCHEMES, HttpSession
from lens.store.errors import StoreError
from lens.store.schema import MIGRATIONS, TARGETS

CHDB_PREFIX = "chdb://"
READERS = 4
MOST_SQL_BYTES = 16 << 20
"""Longest statement of the store's own: a metric of 16,384 cards is named by as many numbers of its series."""
_ENGINE = "SELECT engine FROM system.tables WHERE database = 'lens' AND name = 'samples'"
# The engine compiles an expression once it has seen it three times, for 25 to 80 ms. Here almost every question has
# numbers of its own (a run, a range, a width), so it would compile for ever and answer no faster.
_SESSION = (
    f"max_query_size = {MOST_SQL_BYTES}, compile_expressions = 0, compile_aggregate_expressions = 0, "
    "compile_sort_description = 0"
)
# One insert must become one part, whatever its size: only then is it there as a whole or not at all.
_ONE_PART = (
    "max_threads = 1, max_insert_threads = 1, min_insert_block_size_rows = 1000000000000,"
    " min_insert_block_size_bytes = 0, max_partitions_per_insert_block = 0"
)


class Store:
    """One database, with its schema brought up to date. Thread-safe: each query takes a session of its own.

    Raises:
        StoreError: the address is of no known kind, the path cannot be opened, or a newer lens wrote it.
    """

    def __init__(self, dsn: str) -> None:
        if not dsn.startswith((CHDB_PREFIX, *(f"{scheme}://" for scheme in SCHEMES))):
            raise StoreError(f"cannot open a store at {dsn!r}", "use chdb:///path or http://host:8123")
        self._dsn = dsn
        self._is_embedded = dsn.startswith(CHDB_PREFIX)
        self.place = dsn.removeprefix(CHDB_PREFIX) if self._is_embedded else dsn.rpartition("@")[2]
        """Where it is, for people."""
        self._group = ""
        self._sessions: list[Any] = []
        self._readers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._write_lock = threading.Lock()
        self.version = 0
        """Newest migration of `schema.MIGRATIONS` that the database has."""
        self.early_runs = 0
        """Runs up to this number have no fine roll-up and no moments."""
        try:
            self._writer = self._open_session()
            for _ in range(READERS):
                self._readers.put(self._open_session())
            self._migrate()
            self.early_runs = int(self.scalar("SELECT max(run) FROM lens.early_runs") or 0)
            self._is_cluster = not self._is_embedded and self.scalar(_ENGINE) == "Distributed"
        except StoreError:
            self.close()
            raise
        except Exception as error:
            # chDB raises bare RuntimeError and its own classes; whichever it is, the folder cannot be used.
            self.close()
            raise StoreError(f"the database in {self.place} cannot be opened: {error}") from error

    def query(self, sql: str, session: Any = None) -> pa.Table:
        """The rows of a SELECT, as columns; in a session of `open_session`, or in one of the store's own.

        Raises:
            StoreError: the database refuses or fails.
        """
        if session is not None:
            return _run(session, sql, "ArrowTable")
        with self._reader() as own:
            return _run(own, sql, "ArrowTable")

    def stream(self, sql: str, rows: int) -> Iterator[pa.RecordBatch]:
        """The rows of a SELECT in batches of about `rows`, read as they are asked for; none if there are no rows.

        Raises:
            StoreError: the database refuses or fails, at any batch.
        """
        session = self.open_session()
        try:
            if isinstance(session, HttpSession):
                yield from session.stream(sql, rows)
                return
            with session.send_query(sql, "Arrow") as found:
                yield from (batch for batch in found.record_batch(rows) if batch.num_rows)
        except (RuntimeError, pa.ArrowException) as error:
            raise StoreError(f"the database refused: {str(error)[:500]}") from error
        finally:
            self.close_session(session)

    def scalar(self, sql: str) -> Any:
        """The first value of a SELECT, None when it has no row."""
        table = self.query(sql)
        return table.column(0)[0].as_py() if table.num_rows else None

    def command(self, sql: str) -> None:
        """Run a statement that gives no rows."""
        self._write(sql)

    def insert(self, target: str, rows: pa.Table) -> None:
        """Fill one table of `schema.TARGETS` from these rows, as a single part.

        Raises:
            StoreError: the database refuses or fails; nothing or everything of the rows is in the table.
        """
        columns = TARGETS[target]
        into = f"INSERT INTO lens.{target} ({columns})"
        if self._is_embedded:
            self._write(f"{into} SELECT {columns} FROM Python(rows) SETTINGS {_ONE_PART}", rows)
        else:
            self._write(into, rows.select(columns.split(", ")), f"{self._group}:{target}")

    def begin_group(self, name: str) -> None:
        """What is inserted from now on is of this group: a replicated table takes the same of it once, and drops it when
        it comes again."""
        self._group = name

    def newest_blocks(self) -> dict[str, int]:
        """Number of the newest block inserted into each table; a table never filled is absent, and so is all of a
        cluster: its tables know by the name of the group whether an insert has happened.

        Every insert takes the next number, merging keeps it: this tells whether an insert has happened.
        """
        if self._is_cluster:
            return {}
        found = self.query(
            "SELECT table, max(max_block_number) AS newest FROM system.parts WHERE database = 'lens' GROUP BY table"
        )
        return {row["table"]: row["newest"] for row in found.to_pylist()}

    def open_session(self, *statements: str) -> Any:
        """A session for somebody who must not share one, after these statements in it; closed with the store.

        One in which a query has failed must be closed: chDB may put what was left of that answer before the next.
        """
        session = self._open_session()
        for statement in statements:
            _run(session, statement, "Null")
        return session

    def close_session(self, session: Any) -> None:
        """Closes one session, unless the store was closed before."""
        with contextlib.suppress(ValueError):
            self._sessions.remove(session)
            session.close()

    def _renewed(self, session: Any) -> Any:
        """Another session in the place of one in which a query has failed."""
        if session not in self._sessions:
            return session  # the store was closed meanwhile
        self.close_session(session)
        return self._open_session()

    def close(self) -> None:
        """Closes every session; the path is free afterwards."""
        while self._sessions:
            self._sessions.pop().close()

    @contextlib.contextmanager
    def _reader(self) -> Iterator[Any]:
        session = self._readers.get()
        try:
            yield session
        except StoreError:
            session = self._renewed(session)
            raise
        finally:
            self._readers.put(session)

    def _write(self, sql: str, rows: pa.Table | None = None, token: str = "") -> None:
        with self._write_lock:
            try:
                if rows is not None and isinstance(self._writer, HttpSession):
                    settings = dict(each.split(" = ") for each in _ONE_PART.split(", "))
                    self._writer.insert(sql, rows, {**settings, "insert_deduplication_token": token})
                else:
                    _run(self._writer, sql, "Null", rows)
            except StoreError:
                self._writer = self._renewed(self._writer)
                raise

    def _open_session(self) -> Any:
        opened: Any
        if self._is_embedded:
            from chdb import session

            path = Path(self.place)
            path.parent.mkdir(parents=True, exist_ok=True)
            opened = session.Session(str(path.resolve()))
        else:
            opened = HttpSession(self._dsn)
        self._sessions.append(opened)
        _run(opened, f"SET {_SESSION}", "Null")
        return opened

    def _migrate(self) -> None:
        self.command("CREATE DATABASE IF NOT EXISTS lens")
        self.command(
            "CREATE TABLE IF NOT EXISTS lens.migrations (version UInt32) ENGINE = MergeTree ORDER BY version"
        )
        self.version = int(self.scalar("SELECT max(version) FROM lens.migrations") or 0)
        if self.version > len(MIGRATIONS):
            raise StoreError(
                f"{self.place} was written by a newer lens (schema {self.version}, this one knows {len(MIGRATIONS)})",
                "upgrade lens, or use another data folder",
            )
        if self.version < len(MIGRATIONS) and self.scalar(_ENGINE) == "Distributed":
            raise StoreError(
                f"{self.place} is a cluster with tables of an older lens (schema {self.version})",
                "bring them up to date: lens store init --cluster NAME --apply URL",
            )
        for version, statements in enumerate(MIGRATIONS[self.version :], self.version + 1):
            for statement in statements:
                self.command(statement)
            self.command(f"INSERT INTO lens.migrations VALUES ({version})")
            self.version = version


def quote(text: str) -> str:
    """The text as an SQL literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _run(session: Any, sql: str, output: str, rows: pa.Table | None = None) -> Any:
    # `rows` is not unused: chDB finds the table of Python(rows) by its name in this frame.
    try:
        return session.query(sql, output)
    except StoreError:
        raise
    except Exception as error:
        # chDB has no class of its own for a refused query.
        raise StoreError(f"the database refused: {str(error)[:500]}") from error
