"""Where built libraries lie: a folder of the user that nobody else can write, since a training process runs them."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class CacheError(RuntimeError):
    """The cache cannot be trusted or made; the message is one line that says why and what to do."""


def folder() -> Path:
    """``lens`` in the user's cache folder (XDG_CACHE_HOME, else ``~/.cache``).

    Raises:
        CacheError: this user has no home.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "lens" / "native"
    except RuntimeError as error:
        raise CacheError("this user has no home folder; set XDG_CACHE_HOME") from error


def made() -> Path:
    """The folder, made if missing.

    Raises:
        CacheError: it cannot be made, or cannot be trusted.
    """
    path = folder()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise CacheError(f"{path} cannot be made ({error.strerror}); set XDG_CACHE_HOME") from error
    reason = _distrust(path, stat.S_ISDIR)
    if reason:
        raise CacheError(f"{path} {reason}; remove it or set XDG_CACHE_HOME")
    return path


def find(file_name: str) -> Path | None:
    """The built file of this name; None where there is none.

    Raises:
        CacheError: there is one, but others could have written it.
    """
    directory = folder()
    path = directory / file_name
    if not path.exists():
        return None
    for place, kind in ((directory, stat.S_ISDIR), (path, stat.S_ISREG)):
        reason = _distrust(place, kind)
        if reason:
            raise CacheError(f"{place} {reason}; remove it")
    return path


def note_failure(file_name: str, reason: str) -> None:
    """Remember that this file could not be built, so that nobody tries again and again."""
    (made() / f"{file_name}.failed").write_text(reason)


def failure(file_name: str) -> str | None:
    """Why this file could not be built, if somebody has tried."""
    try:
        return (folder() / f"{file_name}.failed").read_text()
    except OSError:
        return None


def forget_failure(file_name: str) -> None:
    """It is built now, or is to be tried again."""
    (folder() / f"{file_name}.failed").unlink(missing_ok=True)


def _distrust(path: Path, is_kind: object) -> str | None:
    """Why a file or folder is not to be trusted; None if it is the user's own, plain, and nobody else's to write."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or not is_kind(found.st_mode):  # type: ignore[operator]
        return "is a link, or not what it should be"
    if found.st_uid != os.getuid():
        return "belongs to somebody else"
    if found.st_mode & 0o022:
        return "can be written by others"
    return None
