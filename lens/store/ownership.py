"""Who owns a data folder: one process at a time, known to all others by the URL it serves."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from lens.store.errors import FolderOwnedError, StoreError

LOCK, SERVER = "lock", "server.json"


class Ownership:
    """Holds a data folder for this process until released; the system releases it when the process dies.

    Raises:
        FolderOwnedError: another process has it.
        StoreError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(
                f"the data folder {folder} cannot be used: {error.strerror}", "choose another with --data"
            ) from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._handle)
            raise _owned(folder) from None
        os.ftruncate(self._handle, 0)
        os.write(self._handle, str(os.getpid()).encode())

    def announce(self, url: str, token_file: Path) -> None:
        """Say where this process serves the folder."""
        said = {"url": url, "pid": os.getpid(), "token_file": str(token_file.resolve())}
        partial = self.folder / (SERVER + ".new")
        partial.write_text(json.dumps(said) + "\n")
        partial.replace(self.folder / SERVER)

    def release(self) -> None:
        """Give the folder back."""
        if self._handle >= 0:
            announced = read_server(self.folder)
            if announced is not None and announced.get("pid") == os.getpid():
                (self.folder / SERVER).unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = -1


def read_server(folder: Path) -> dict[str, Any] | None:
    """What the folder's server said of itself: url, pid, token_file; None if none did. It may be dead by now."""
    try:
        said = json.loads((folder / SERVER).read_text())
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None


def living_server(folder: Path) -> dict[str, Any] | None:
    """What the server that owns the folder now said of itself; None if no process owns it."""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return read_server(folder)
    finally:
        os.close(handle)
    return None


def _owned(folder: Path) -> FolderOwnedError:
    said = read_server(folder)
    if said is None:
        return FolderOwnedError(
            f"the data folder {folder} is in use by another process", "wait until it has ended", None
        )
    url = str(said.get("url"))
    return FolderOwnedError(
        f"the data folder {folder} is served at {url} (process {said.get('pid')})",
        f"ask that server, or stop process {said.get('pid')}",
        url,
    )
