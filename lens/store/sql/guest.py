"""Runs a checked SELECT in sessions of its own, in which nothing can be written and time, memory and rows end."""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import pyarrow as pa

from lens.store.engine import MOST_SQL_BYTES, Store
from lens.store.errors import BadQueryError, StoreError, StoreFullError
from lens.store.projects import run_of, those_of
from lens.store.registry import Registry
from lens.store.rows import Series
from lens.store.runs import Run
from lens.store.sql.check import Select, checked, resolved
from lens.store.sql.functions import forbidden_names
from lens.store.sql.views import COLUMNS, OWN_FUNCTIONS, OWN_TABLES, VIEWS, with_clause

MOST_ROWS = 200_000
"""Most rows of one answer; export is for more."""
FEW_SERIES = 2000
"""So many are named in the query itself; the names of more are joined from their table."""
EMPTY_DATABASE = "lens_guest"
"""Where names are looked up that are no view: it holds nothing, and is not the database that opens files by name."""


@dataclass(frozen=True)
class SqlLimits:
    """What one query of a user may take."""

    seconds: float = 10.0
    """Looked at between two blocks of rows: blocks are small, and functions that make much of little are refused."""
    memory: int = field(default_factory=lambda: min(2 << 30, psutil.virtual_memory().total // 4))
    """Bytes."""
    queries: int = 2
    """At the same time; further ones are told to wait."""


@dataclass(frozen=True)
class SqlAnswer:
    """The rows found."""

    table: pa.Table
    truncated: bool
    """Whether there are more rows than were asked for."""
    elapsed_s: float


class Guest:
    """SQL of users over one store. Thread-safe; sessions are opened with the first query."""

    def __init__(self, store: Store, registry: Registry, limits: SqlLimits | None = None) -> None:
        self._store, self._registry = store, registry
        self._limits = limits or SqlLimits()
        self._places: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(self._limits.queries):
            self._places.put(None)
        self._names: frozenset[str] | None = None

    def ask(self, sql: str, run: str | None = None, limit: int = 10_000, project: str | None = None) -> SqlAnswer:
        """The first `limit` rows of a SELECT over views of all runs, of one, or of those of a project.

        Raises:
            BadQueryError: no SELECT, not allowed, refused by the engine, or over a limit.
            UnknownRunError: no such run.
            StoreFullError: enough queries are running.
        """
        if not 1 <= limit <= MOST_ROWS:
            raise BadQueryError(f"limit: 1 to {MOST_ROWS}", "use lens export for more rows")
        try:
            session = self._places.get_nowait()
        except queue.Empty:
            raise StoreFullError("enough SQL queries are running", "ask again in a moment") from None
        try:
            session = session or self._open()
            began = time.monotonic()
            select = checked(self._store, sql, self._forbidden())
            # INTO, FORMAT and SETTINGS have no place inside parentheses; an ORDER BY in them is kept.
            full = f"{self._views(select, run, project)}SELECT * FROM (\n{select.text}\n) LIMIT {limit + 1}"
            try:
                plan = self._store.query(f"EXPLAIN QUERY TREE passes = 1 {full}", session).column(0).to_pylist()
                resolved("\n".join(plan), OWN_FUNCTIONS, OWN_TABLES)
                table = self._store.query(full, session)
            except BadQueryError:
                raise
            except StoreError as error:
                self._store.close_session(session)
                session = None
                raise _polite(error) from error
            return SqlAnswer(table.slice(0, limit), table.num_rows > limit, time.monotonic() - began)
        finally:
            self._places.put(session)

    def _forbidden(self) -> frozenset[str]:
        if self._names is None:
            functions = self._store.query("SELECT name FROM system.functions").column(0).to_pylist()
            self._names = forbidden_names(functions, COLUMNS)
        return self._names

    def _views(self, select: Select, run: str | None, project: str | None) -> str:
        names = select.tables()
        if run is not None:
            runs = [run_of(self._registry, run, project)]
        else:
            runs = those_of(self._registry.runs(), project)
        pins = [select.pinned(name, "run") for name in names & set(VIEWS)]
        if pins and None not in pins:
            wanted = set().union(*(pin for pin in pins if pin is not None))
            runs = [each for each in runs if each.id in wanted]
        metrics = {name: select.pinned(name, "metric") for name in names}
        return with_clause(
            names, {each.number: each.id for each in runs}, metrics, not select.may_read("t_ns"), self._series(runs)
        )

    def _series(self, runs: Sequence[Run]) -> list[Series] | None:
        """The series of some runs, None where they are many."""
        if sum(self._registry.count_series(run.number) for run in runs) > FEW_SERIES:
            return None
        return list({each.mid: each for run in runs for each in self._registry.series(run.number)}.values())

    def _open(self) -> Any:
        """A session that can write nothing, for good: `readonly` cannot be undone."""
        settings = {
            "max_execution_time": self._limits.seconds,
            "timeout_overflow_mode": "'throw'",
            "max_memory_usage": self._limits.memory,
            "max_query_size": MOST_SQL_BYTES,
            "max_threads": 2,
            "max_block_size": 8192,
            "max_joined_block_size_rows": 8192,
            "max_recursive_cte_evaluation_depth": 100,
            "query_plan_remove_redundant_sorting": 0,
            "enable_global_with_statement": 1,
            "output_format_arrow_low_cardinality_as_dictionary": 0,
            "cast_keep_nullable": 1,
            "readonly": 1,
        }
        self._store.command(f"CREATE DATABASE IF NOT EXISTS {EMPTY_DATABASE} ENGINE = Memory")
        return self._store.open_session(
            f"USE {EMPTY_DATABASE}", "SET " + ", ".join(f"{name} = {value}" for name, value in settings.items())
        )


def _polite(error: StoreError) -> BadQueryError:
    """The engine's complaint in its own words, with what to do about it."""
    text = str(error).partition("DB::Exception: ")[2] or str(error)
    code = text.rstrip().rpartition("(")[2].rstrip(")\n ")
    return BadQueryError(text.partition(" In scope")[0][:300].rstrip(), _HINTS.get(code, "see docs/sql.md"))


_HINTS = {
    "TIMEOUT_EXCEEDED": "name a run, a metric and a range of steps",
    "MEMORY_LIMIT_EXCEEDED": "name a run, a metric and a range of steps; group by less",
    "UNKNOWN_IDENTIFIER": "docs/sql.md lists the columns of every view",
    "UNKNOWN_TABLE": f"views: {', '.join(VIEWS)}",
}
