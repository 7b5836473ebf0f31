"""One connection to the lens server, standard library only: post bytes, get status, body and retry hint."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lens.settings import Settings

TIMEOUT_S = 30.0


class ServerAwayError(OSError):
    """Nobody answers at the server's address, or the connection broke before the reply."""


@dataclass(frozen=True)
class Reply:
    """What the server answered."""

    status: int
    content: dict[str, Any]
    """The JSON object of the body; empty when it is none."""
    retry_after_s: float | None = None

    @property
    def error(self) -> str:
        """The server's own words for what is wrong."""
        return str(self.content.get("error") or f"status {self.status}")


class Connection:
    """A kept-alive connection, opened again when it broke."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._connection: http.client.HTTPConnection | None = None

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        """Send one request.

        Raises:
            ServerAwayError: no answer. Whether the server took the body is unknown: send it again.
        """
        kept = self._connection is not None
        try:
            return self._post(path, body, headers)
        except ServerAwayError:
            if not kept:
                raise
            # A server that was started again has closed the connection we kept.
            return self._post(path, body, headers)

    def close(self) -> None:
        """Hang up."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _post(self, path: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        try:
            connection = self._connection = self._connection or self._open()
            connection.request("POST", path, body, dict(headers))
            response = connection.getresponse()
            content = response.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.close()
            raise ServerAwayError(f"{self.url} does not answer: {error or type(error).__name__}") from error
        if response.will_close:
            self.close()
        return Reply(response.status, _object(content), _seconds(response.getheader("Retry-After")))

    def _open(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        if not parts.hostname:
            raise ValueError("not an address; use http://host:port")
        return kind(parts.hostname, parts.port, timeout=TIMEOUT_S)


@dataclass(frozen=True)
class Server:
    """Where to send to, and with what token."""

    url: str
    token: str | None


def find_server(settings: Settings, described: str | None = None) -> Server | None:
    """The server of the settings, else of the run's description, else the one that owns the data folder now."""
    token = settings.read_token()
    if settings.server or described:
        return Server((settings.server or described or "").rstrip("/"), token)
    try:
        running = json.loads((settings.data / "server.json").read_text())
        url, token_file = str(running["url"]), running.get("token_file")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not token and token_file:
        with contextlib.suppress(OSError):
            token = Path(token_file).read_text().strip()
    return Server(url.rstrip("/"), token)


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None
