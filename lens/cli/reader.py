"""Where a verb reads from: the server that owns a data folder, or the folder itself when no server does."""

from __future__ import annotations

import http.client
import json
import os
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from lens.cli.errors import UNREACHABLE, UNUSABLE, CommandError, missing_extra
from lens.settings import Settings

TIMEOUT_S = 60.0


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

    def close(self) -> None:
        """Let go of the connection or the folder."""


class ServerReader:
    """Reads through a server's HTTP API."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url.rstrip("/")
        self._token = token

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path.

        Raises:
            CommandError: no answer, or an answer that is an error.
        """
        return self._ask("GET", path)

    def post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that answers this one.

        Raises:
            CommandError: no answer, or an answer that is an error.
        """
        return self._ask("POST", path, json.dumps(content).encode())

    def _ask(self, method: str, path: str, content: bytes | None = None) -> dict[str, Any]:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        if content is not None:
            headers["Content-Type"] = "application/json"
        try:
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            body = json.loads(response.read() or b"{}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise CommandError(
                f"{self.url} does not answer: {error}", "start one with: lens serve", UNREACHABLE
            ) from error
        finally:
            connection.close()
        if response.status >= 400:
            message = str(body.get("error", f"HTTP {response.status}"))
            code = UNUSABLE if response.status in (400, 404, 422) else UNREACHABLE
            raise CommandError(message, str(body.get("hint", "see: lens doctor")), code)
        result: dict[str, Any] = body
        return result

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
        return self.post("/api/v1/query", {"sql": sql, "run": run, "limit": limit})

    def close(self) -> None:
        """Nothing is held open."""


def owner_of(data: Path) -> dict[str, Any] | None:
    """What the server that owns this folder says of itself (url, pid), or None when none lives."""
    try:
        found: dict[str, Any] = json.loads((data / "server.json").read_text())
        os.kill(int(found["pid"]), 0)
    except PermissionError:
        return found
    except (OSError, ValueError, KeyError):
        return None
    return found


def open_reader(settings: Settings) -> RunReader:
    """The reader for these settings: LENS_SERVER, else the folder's server, else the folder.

    Raises:
        CommandError: neither is there.
    """
    owner = owner_of(settings.data)
    if settings.server or owner:
        url = settings.server or (owner or {})["url"]
        return ServerReader(url, settings.read_token())
    if not settings.data.is_dir():
        raise CommandError(
            f"there is no data folder {settings.data}",
            "name one with --data, or make one with: lens demo",
            UNUSABLE,
        )
    try:
        from lens.store.errors import StoreError
        from lens.store.query import Query
    except ImportError as error:
        raise missing_extra(error, "server") from error
    try:
        reader: RunReader = Query.open_folder(settings.data)
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
