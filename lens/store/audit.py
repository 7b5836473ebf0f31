"""Who changed what of a store: one line of JSON for each act of an administrator, on disk before the answer."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from lens.store.errors import StoreError
from lens.store.lines import add_line

FILE = "audit.ndjson"


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


def local_user() -> str:
    """Who acts on the folder itself, without a server and its tokens."""
    return f"uid {os.getuid()} on this machine"
