"""Where rings lie on this host, and how their files are made: private, reserved before they are mapped.

Standard library only: training processes load this.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

from lens.settings import Settings


class RecorderError(RuntimeError):
    """The recorder cannot record here; the message is one line that says why and what to do."""


def start_ticks(pid: int) -> int:
    """When the process started, in clock ticks since boot: with the pid it names a process for good.

    Raises:
        OSError: no such process.
    """
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rsplit(")", 1)[1].split()[19])


def private_directory(path: Path) -> Path:
    """The directory, made if missing, for this user alone.

    Raises:
        RecorderError: it is a link, belongs to somebody else, or others may read it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise RecorderError(f"no recorder: {path} cannot be made ({error.strerror}); set LENS_RINGS") from error
    if not path.is_dir() or path.is_symlink():
        raise RecorderError(f"no recorder: {path} is not a plain directory; set LENS_RINGS")
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RecorderError(f"no recorder: {path} is not private to this user; remove it or set LENS_RINGS")
    return path


def host_directory(settings: Settings) -> Path:
    """Where the rings of this host's processes lie."""
    return settings.rings / (settings.host.replace("/", "_") or "host")


def door_place(settings: Settings, pid: int) -> Path:
    """Where the socket of a process is by which it lets others in; its start stands in the name, since numbers of
    processes are used again.

    Raises:
        OSError: no such process.
    """
    return settings.rings / f"door-{pid}-{start_ticks(pid)}.sock"


def allocate(path: Path, size: int) -> mmap.mmap:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise RecorderError(f"no recorder: {path} cannot be made ({error.strerror}); set LENS_RINGS") from error
    try:
        # Reserved before it is mapped: writing to a hole on a full disk would kill the process with SIGBUS.
        os.posix_fallocate(descriptor, 0, size)
        # Populated: the first touch of a page would otherwise cost the training a fault.
        return mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise RecorderError(
            f"no recorder: {size >> 20} MiB cannot be had in {path.parent} ({error.strerror}); "
            "set LENS_RINGS to a local disk with room, or LENS_RING_MIB smaller"
        ) from error
    finally:
        os.close(descriptor)


def free_name(directory: Path, stem: str) -> Path:
    path, number = directory / f"{stem}.ring", 1
    while path.exists():
        number += 1
        path = directory / f"{stem}-{number}.ring"
    return path
