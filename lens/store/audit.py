"""Who changed what of a store: one line of JSON for each act of an administrator, on disk before the answer."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from lens.store.errors import StoreError

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
        line = json.dumps({"t_ns": time.time_ns(), "who": who, "action": action, **about}) + "\n"
        try:
            with self._lock:
                handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
                with os.fdopen(handle, "ab") as file:
                    file.write(line.encode())
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise StoreError(
                f"the audit log {self._path} cannot be written: {error}", "free the disk, try again"
            ) from error


def local_user() -> str:
    """Who acts on the folder itself, without a server and its tokens."""
    return f"uid {os.getuid()} on this machine"
