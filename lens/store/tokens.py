"""Tokens for others than the folder's owner, each for some of the things that can be done; kept as hashes in the folder.

The file is read again when it has changed, so a token made or taken back beside a running server holds at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens.store.errors import StoreError

INGEST, READ, ADMIN = "ingest", "read", "admin"
SCOPES = {
    INGEST: "describe runs and send records",
    READ: "see runs, pages and the live feed; ask SQL; export",
    ADMIN: "all of that; set the retention, compact, delete runs",
}
FILE = "tokens.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")


@dataclass(frozen=True)
class Holder:
    """Who a token is of, and what it is for."""

    name: str
    scopes: frozenset[str]
    created_ns: int = 0
    project: str | None = None
    """The one project whose runs it is for; None for all."""

    def may(self, scope: str) -> bool:
        """Whether the token is for this."""
        return scope in self.scopes or ADMIN in self.scopes


OWNER = Holder("owner", frozenset(SCOPES))
"""Who has the folder's own token."""


class Tokens:
    """The tokens of one data folder. Thread-safe, and safe beside another process that changes them."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._lock = threading.Lock()
        self._state: tuple[int, ...] | None = None
        self._holders: dict[str, Holder] = {}

    def find(self, token: str) -> Holder | None:
        """Who has this token.

        Raises:
            StoreError: the file of tokens cannot be read.
        """
        return self._read().get(_hash(token))

    def holders(self) -> list[Holder]:
        """Everybody who has one, by name."""
        return sorted(self._read().values(), key=lambda holder: holder.name)

    def add(self, name: str, scopes: Iterable[str], project: str | None = None) -> str:
        """A new token, which is nowhere kept and cannot be shown again.

        Raises:
            StoreError: no such name or scope, a name that is taken, or a file that cannot be written.
        """
        wanted = frozenset(scopes)
        if not _NAME.fullmatch(name) or name == OWNER.name:
            raise StoreError(f"{name!r} is no name for a token", "use letters, digits and _ . @ -")
        if not wanted or wanted - set(SCOPES):
            raise StoreError("a token is for ingest, read or admin", "several with commas: ingest,read")
        if project is not None and not _NAME.fullmatch(project):
            raise StoreError(f"{project!r} is no name of a project", "use letters, digits and _ . @ -")
        if project is not None and ADMIN in wanted:
            raise StoreError(
                "a token of one project is for ingest and read", "who administers a store sees all of it"
            )
        token = secrets.token_urlsafe(32)
        with self._changing() as holders:
            if any(holder.name == name for holder in holders.values()):
                raise StoreError(
                    f"there is a token of {name}", f"take it back first: lens store token {name} --off"
                )
            holders[_hash(token)] = Holder(name, wanted, time.time_ns(), project)
        return token

    def remove(self, name: str) -> None:
        """Take a token back.

        Raises:
            StoreError: nobody of this name has one, or the file cannot be written.
        """
        with self._changing() as holders:
            found = [key for key, holder in holders.items() if holder.name == name]
            if not found:
                raise StoreError(f"{name} has no token", "lens store token lists those who have one")
            del holders[found[0]]

    def _read(self) -> dict[str, Holder]:
        try:
            stat = self._path.stat()
            state = stat.st_ino, stat.st_mtime_ns, stat.st_size
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise _unusable(self._path, error) from error
        with self._lock:
            if state != self._state:
                self._holders, self._state = _loaded(self._path), state
            return self._holders

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Holder]]:
        """The tokens as they are now; kept as they are left, unless that raises."""
        try:
            lock = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(self._path, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            holders = dict(self._read())
            yield holders
            _save(self._path, holders)
        finally:
            os.close(lock)


def _hash(token: str) -> str:
    """Enough for a token of 256 random bits: there is nothing to guess."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def _loaded(path: Path) -> dict[str, Holder]:
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())["tokens"]
        return {
            row["sha256"]: Holder(row["name"], frozenset(row["scopes"]), row["created_ns"], row.get("project"))
            for row in rows
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unusable(path, error) from error


def _save(path: Path, holders: dict[str, Holder]) -> None:
    rows = [
        {
            "name": each.name,
            "scopes": sorted(each.scopes),
            "sha256": key,
            "created_ns": each.created_ns,
            **({"project": each.project} if each.project is not None else {}),
        }
        for key, each in holders.items()
    ]
    partial = path.with_suffix(".new")
    try:
        partial.unlink(missing_ok=True)
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "w") as file:
            json.dump({"tokens": rows}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: Exception) -> StoreError:
    return StoreError(
        f"the file of tokens {path} cannot be used: {error}", "check it, or delete it and make new tokens"
    )
