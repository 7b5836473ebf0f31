"""Where a verb reads from: the server that owns a data folder, or the folder itself when no server does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol
from urllib.parse import quote

from lens.cli.errors import UNREACHABLE, UNUSABLE, CommandError, missing_extra
from lens.reading import export_path
from lens.reading.connection import Connection, ReadingError, RefusedError, owner_of
from lens.settings import Settings


class RunReader(Protocol):
    """What verbs ask about runs; both ways in give the same answers."""

    def runs(self) -> list[dict[str, Any]]:
        """All runs, newest first."""

    def run(self, run: str) -> dict[str, Any]:
        """One run: topology, last step, how many ranks report."""

    def now(self, run: str) -> dict[str, Any]:
        """What each rank is doing at this moment."""

    def diagnosis(self, run: str, upto_step: int | None = None) -> dict[str, Any]:
        """The verdict."""

    def sql_reply(self, sql: str, run: str | None = None, limit: int = 10_000) -> dict[str, Any]:
        """The rows of a SELECT over the views: columns, rows, truncated, elapsed_s."""

    def exported(self, run: str, format: str, table: str, first: int | None, last: int | None) -> Iterator[bytes]:
        """The run as a file, in parts."""

    def close(self) -> None:
        """Let go of the connection or the folder."""


class ServerReader:
    """Reads through a server's HTTP API."""

    def __init__(self, url: str, token: str | None) -> None:
        self._connection = Connection(url, token)
        self.url = self._connection.url

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path.

        Raises:
            CommandError: no answer, or an answer that is an error.
        """
        return self.ask("GET", path)

    def ask(self, method: str, path: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that answers a request.

        Raises:
            CommandError: no answer, or an answer that is an error.
        """
        with _as_command_errors():
            return self._connection.ask(method, path, content)

    def runs(self) -> list[dict[str, Any]]:
        """All runs, newest first."""
        runs: list[dict[str, Any]] = self.get("/api/v1/runs")["runs"]
        return runs

    def run(self, run: str) -> dict[str, Any]:
        """One run."""
        return self.get(f"/api/v1/runs/{quote(run, safe='')}")

    def now(self, run: str) -> dict[str, Any]:
        """What each rank is doing at this moment."""
        return self.get(f"/api/v1/runs/{quote(run, safe='')}/now")

    def diagnosis(self, run: str, upto_step: int | None = None) -> dict[str, Any]:
        """The verdict."""
        query = "" if upto_step is None else f"?upto_step={upto_step}"
        return self.get(f"/api/v1/runs/{quote(run, safe='')}/diagnosis{query}")

    def sql_reply(self, sql: str, run: str | None = None, limit: int = 10_000) -> dict[str, Any]:
        """The rows of a SELECT."""
        return self.ask("POST", "/api/v1/query", {"sql": sql, "run": run, "limit": limit})

    def exported(self, run: str, format: str, table: str, first: int | None, last: int | None) -> Iterator[bytes]:
        """The run as a file, in parts.

        Raises:
            CommandError: no answer, an answer that is an error, or one that broke off.
        """
        with _as_command_errors():
            yield from self._connection.stream("GET", export_path(run, format, table, first, last))

    def close(self) -> None:
        """Nothing is held open."""


@contextlib.contextmanager
def _as_command_errors() -> Iterator[None]:
    try:
        yield
    except RefusedError as error:
        code = UNUSABLE if error.status in (400, 404, 422) else UNREACHABLE
        raise CommandError(str(error), error.hint, code) from error
    except ReadingError as error:
        raise CommandError(str(error), error.hint, UNREACHABLE) from error


def server_of(settings: Settings) -> str | None:
    """The server to ask: LENS_SERVER, else the one that owns the folder; None if the folder is there for us to open.

    Raises:
        CommandError: there is neither.
    """
    owner = owner_of(settings.data)
    if settings.server or owner:
        return settings.server or str((owner or {})["url"])
    if not settings.data.is_dir():
        raise CommandError(
            f"there is no data folder {settings.data}",
            "name one with --data, or make one with: lens demo",
            UNUSABLE,
        )
    return None


def open_reader(settings: Settings) -> RunReader:
    """The reader for these settings: LENS_SERVER, else the folder's server, else the folder.

    Raises:
        CommandError: neither is there.
    """
    url = server_of(settings)
    if url is not None:
        return ServerReader(url, settings.read_token())
    try:
        from lens.store.errors import StoreError
        from lens.store.query import Query
    except ImportError as error:
        raise missing_extra(error, "server") from error
    try:
        reader: RunReader = Query.open_folder(settings.data, settings.clickhouse)
    except StoreError as error:
        raise CommandError(str(error), error.hint, UNREACHABLE) from error
    return reader


def choose_run(reader: RunReader, name: str) -> str:
    """The run meant by a name: an id, an id's beginning, or ``latest``.

    Raises:
        CommandError: no such run.
    """
    runs = reader.runs()
    ids = [str(run["run"]) for run in runs]
    if not ids:
        raise CommandError(
            "there is no run yet", "make one with: lens demo, or lens run -- python train.py", UNUSABLE
        )
    if name == "latest":
        return ids[0]
    matches = [name] if name in ids else [run for run in ids if run.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    known = ", ".join(ids[:5])
    problem = "fits several runs" if matches else "is not a run here"
    raise CommandError(f"{name} {problem}", f"runs here: {known}; all of them: lens list", UNUSABLE)
