"""Asks a lens server: JSON and streams over HTTP, standard library only."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 60.0
PIECE_BYTES = 1 << 20


class ReadingError(RuntimeError):
    """What was asked for cannot be read; `hint` says what to do about it."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class UnreachableError(ReadingError):
    """No server answers, or the answer broke off."""


class RefusedError(ReadingError):
    """The server answered with an error; `status` is its HTTP status."""

    def __init__(self, message: str, hint: str, status: int) -> None:
        super().__init__(message, hint)
        self.status = status


class Connection:
    """A server and its token; each question takes a connection of its own."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url.rstrip("/")
        self._token = token

    def ask(self, method: str, path: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that answers.

        Raises:
            UnreachableError: no answer, or none in JSON.
            RefusedError: the answer is an error.
        """
        try:
            found: dict[str, Any] = json.loads(b"".join(self.stream(method, path, content)) or b"{}")
        except ValueError as error:
            raise UnreachableError(f"{self.url} does not answer: {error}", "start one with: lens serve") from error
        return found

    def stream(
        self, method: str, path: str, content: Mapping[str, Any] | None = None, accept: str = "*/*"
    ) -> Iterator[bytes]:
        """The answer's body, in pieces.

        Raises:
            UnreachableError: no answer, or it broke off.
            RefusedError: the answer is an error.
        """
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
        headers = {"Accept": accept}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        body = None
        if content is not None:
            headers["Content-Type"], body = "application/json", json.dumps(content)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            if response.status >= 400:
                raise _refused(response.status, response.read())
            while piece := response.read(PIECE_BYTES):
                yield piece
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise UnreachableError(f"{self.url} does not answer: {reason}", "start one with: lens serve") from error
        finally:
            connection.close()


def owner_of(data: Path) -> dict[str, Any] | None:
    """What the server that owns this folder says of itself (url, pid), or None when none lives."""
    try:
        found: dict[str, Any] = json.loads((data / "server.json").read_text())
        pid = int(found["pid"])
    except (OSError, ValueError, KeyError):
        return None
    try:
        os.kill(pid, 0)
    except PermissionError:
        return found  # it lives, and is another user's
    except OSError:
        return None
    return found


def _refused(status: int, body: bytes) -> RefusedError:
    said: dict[str, Any] = {}
    with contextlib.suppress(ValueError, TypeError):
        said = dict(json.loads(body))
    return RefusedError(str(said.get("error", f"HTTP {status}")), str(said.get("hint", "see: lens doctor")), status)
