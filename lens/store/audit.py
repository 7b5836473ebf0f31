"""Who changed what of a store, and who was refused: one line of JSON each, on disk before the answer."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from lens.store.errors import StoreError
from lens.store.lines import add_line

logger = logging.getLogger(__name__)

FILE = "audit.ndjson"
WINDOW_S = 60.0
MOST_LINES = 100


class Audit:
    """The audit log of one data folder; lines are only added. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._lock = threading.Lock()

    def note(self, who: str, action: str, **about: Any) -> None:
        """Add {t_ns, who, action, …}.

        Raises:
            StoreError: it cannot be written.
        """
        try:
            with self._lock:
                add_line(self._path, {"t_ns": time.time_ns(), "who": who, "action": action, **about}, sync=True)
        except OSError as error:
            raise StoreError(
                f"the audit log {self._path} cannot be written: {error}", "free the disk, try again"
            ) from error


class Refusals:
    """Refused requests in the audit log: the first of a kind at once, then how many more came in each minute.

    Whoever is refused can ask as often as they like, and must not be able to fill the disk. Thread-safe.
    """

    def __init__(self, audit: Audit, window_s: float = WINDOW_S, most: int = MOST_LINES) -> None:
        self._audit, self._window_s, self._most = audit, window_s, most
        self._lock = threading.Lock()
        self._ends = 0.0
        self._more: dict[tuple[str, str, int], int] = {}
        """Refusals after the first, by who, address and status."""

    def note(self, who: str, address: str, status: int, request: str, why: str) -> None:
        """Note one; a log that cannot be written changes nothing about the answer."""
        with self._lock:
            if time.monotonic() >= self._ends:
                self._tell()
                self._ends = time.monotonic() + self._window_s
            key = (who, address, status)
            if key not in self._more and len(self._more) >= self._most:
                key = ("others", "", 0)
            first = key not in self._more
            self._more[key] = self._more.get(key, -1) + 1
            if first:
                self._write(*key, request=request[:200], why=why[:200])

    def close(self) -> None:
        """Tell what has not been told."""
        with self._lock:
            self._tell()

    def _tell(self) -> None:
        for key, times in self._more.items():
            if times:
                self._write(*key, more=times)
        self._more = {}

    def _write(self, who: str, address: str, status: int, **about: Any) -> None:
        try:
            self._audit.note(who, "refused", address=address, status=status, **about)
        except StoreError as error:
            logger.error("a refused request could not be noted: %s", error)


def local_user() -> str:
    """Who acts on the folder itself, without a server and its tokens."""
    return f"uid {os.getuid()} on this machine"
