"""Stored runs in Python: ``lens.open("latest").series("train.loss").pandas()``.

Reads through the server of ``LENS_SERVER``, the one that owns the data folder, or the folder itself when no server
does. Loading this pulls in nothing heavy; pyarrow and pandas come with the first rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from lens.reading.connection import Connection, ReadingError, RefusedError, UnreachableError, owner_of
from lens.reading.rows import Rows
from lens.settings import Settings

if TYPE_CHECKING:
    from lens.store.query import Query

__all__ = ["ReadingError", "RefusedError", "Rows", "StoredRun", "UnreachableError", "open_run"]

_ARROW = "application/vnd.apache.arrow.stream"


def open_run(
    run: str = "latest", *, server: str | None = None, token: str | None = None, data: str | Path | None = None
) -> StoredRun:
    """A stored run, by its id, the beginning of its id, or ``latest``.

    Args:
        server: URL of a lens server; default LENS_SERVER, else the server that owns the data folder.
        token: that server's token; default LENS_TOKEN, else the folder's token file.
        data: the data folder; default LENS_DATA, else ``./lens-data``. Opened here when no server owns it.

    Raises:
        ReadingError: no such run, no folder, or nobody answers.
    """
    settings = Settings.load(server=server, token=token, data=data)
    source = _open_source(settings)
    try:
        return StoredRun(source, _chosen(source, run))
    except BaseException:
        source.close()
        raise


class StoredRun:
    """One stored run. Close it (or use ``with``) when the data folder was opened here: nobody else can meanwhile."""

    def __init__(self, source: _Server | _Folder, run: str) -> None:
        self._source = source
        self.id = run

    def about(self) -> dict[str, Any]:
        """What is known of it: world_size, ranks, groups, config, metrics, last_step, state …"""
        return self._source.run(self.id)

    def metrics(self) -> list[str]:
        """Names of everything that `series` can read."""
        return [each["metric"] for each in self.about()["metrics"]]

    def series(self, metric: str, *, first: int | None = None, last: int | None = None) -> Rows:
        """Every sample of a metric, not reduced: run, metric, rank, host, device, labels, step, t_ns, value.

        Text comes as dictionaries (categories in pandas), sorted by host, device, labels, rank, step and time.
        `first` and `last` are steps; samples without a step count by their time.
        """
        return Rows(self._source.arrow(self.id, "samples", first, last, metric))

    def table(self, name: str, *, first: int | None = None, last: int | None = None) -> Rows:
        """A whole table: samples, steps, spans, collectives, vectors or events (columns as in docs/sql.md)."""
        return Rows(self._source.arrow(self.id, name, first, last, None))

    def sql(self, sql: str, limit: int = 10_000) -> Rows:
        """The rows of a SELECT over the views of docs/sql.md, this run's alone."""
        return Rows(self._source.sql(self.id, sql, limit))

    def diagnosis(self, upto_step: int | None = None) -> dict[str, Any]:
        """The verdict, as in docs/api.md."""
        return self._source.diagnosis(self.id, upto_step)

    def export(self, path: str | Path, format: str = "parquet", table: str = "samples") -> Path:
        """Write the run to a file: parquet, csv, arrow or perfetto; `table` may be ``all`` (ZIP)."""
        target = Path(path)
        partial = target.with_name(target.name + ".part")
        with partial.open("wb") as file:
            for part in self._source.exported(self.id, format, table, None, None, None):
                file.write(part)
        return partial.replace(target)

    def close(self) -> None:
        """Give the data folder back."""
        self._source.close()

    def __enter__(self) -> StoredRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<lens run {self.id}>"


class _Server:
    """A server's answers."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def runs(self) -> list[dict[str, Any]]:
        runs: list[dict[str, Any]] = self._connection.ask("GET", "/api/v1/runs")["runs"]
        return runs

    def run(self, run: str) -> dict[str, Any]:
        return self._connection.ask("GET", _path(run))

    def diagnosis(self, run: str, upto_step: int | None) -> dict[str, Any]:
        return self._connection.ask("GET", _path(run, "/diagnosis", upto_step=upto_step))

    def sql(self, run: str, sql: str, limit: int) -> Iterator[bytes]:
        question = {"sql": sql, "run": run, "limit": limit}
        return self._connection.stream("POST", "/api/v1/query", question, accept=_ARROW)

    def exported(
        self, run: str, format: str, table: str, first: int | None, last: int | None, metric: str | None
    ) -> Iterator[bytes]:
        return self._connection.stream("GET", export_path(run, format, table, first, last, metric))

    def arrow(
        self, run: str, table: str, first: int | None, last: int | None, metric: str | None
    ) -> Iterator[bytes]:
        path = export_path(run, "arrow", table, first, last, metric, compression="lz4")
        return self._connection.stream("GET", path)

    def close(self) -> None:
        """Nothing is held open."""


class _Folder:
    """The answers of a folder that is opened here."""

    def __init__(self, query: Query) -> None:
        self._query = query

    def runs(self) -> list[dict[str, Any]]:
        return self._query.runs()

    def run(self, run: str) -> dict[str, Any]:
        return self._query.run(run)

    def diagnosis(self, run: str, upto_step: int | None) -> dict[str, Any]:
        return self._query.diagnosis(run, upto_step)

    def sql(self, run: str, sql: str, limit: int) -> Iterator[bytes]:
        from lens.store.sql.answer import arrow_of

        yield arrow_of(self._query.sql(sql, run, limit))

    def exported(
        self, run: str, format: str, table: str, first: int | None, last: int | None, metric: str | None
    ) -> Iterator[bytes]:
        from lens.store.export.exporter import Wanted
        from lens.store.export.rows import Steps

        return self._query.export(run, Wanted(format, table, Steps(first, last), metric)).parts

    def arrow(
        self, run: str, table: str, first: int | None, last: int | None, metric: str | None
    ) -> Iterator[bytes]:
        return self.exported(run, "arrow", table, first, last, metric)

    def close(self) -> None:
        self._query.close()


def export_path(
    run: str,
    format: str,
    table: str,
    first: int | None = None,
    last: int | None = None,
    metric: str | None = None,
    compression: str | None = None,
) -> str:
    """Path and query of an export."""
    steps = {"from": first, "to": last}
    return _path(run, "/export", format=format, table=table, **steps, metric=metric, compression=compression)


def _path(run: str, rest: str = "", **words: Any) -> str:
    given = urlencode({key: value for key, value in words.items() if value is not None})
    return f"/api/v1/runs/{quote(run, safe='')}{rest}{'?' if given else ''}{given}"


def _open_source(settings: Settings) -> _Server | _Folder:
    owner = owner_of(settings.data)
    if settings.server or owner:
        return _Server(Connection(settings.server or (owner or {})["url"], settings.read_token()))
    if not settings.data.is_dir():
        raise ReadingError(
            f"there is no data folder {settings.data}", "name one with data=, or make one: lens demo"
        )
    from lens.store.errors import StoreError
    from lens.store.query import Query

    try:
        return _Folder(Query.open_folder(settings.data, settings.clickhouse))
    except StoreError as error:
        raise ReadingError(str(error), error.hint) from error


def _chosen(source: _Server | _Folder, name: str) -> str:
    ids = [str(each["run"]) for each in source.runs()]
    if name == "latest" and ids:
        return ids[0]
    matches: Iterable[str] = [name] if name in ids else [each for each in ids if each.startswith(name)]
    found = list(matches)
    if len(found) == 1:
        return found[0]
    problem = "fits several runs" if found else "is not a run here"
    raise ReadingError(f"{name} {problem}", f"runs here: {', '.join(ids[:5]) or 'none'}")
