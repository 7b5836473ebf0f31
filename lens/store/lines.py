"""Files of JSON lines that are only added to, readable by their owner alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def add_line(path: Path, line: dict[str, Any], *, sync: bool = False) -> None:
    """Add an object at the end of the file; with `sync` it is on disk when this returns.

    A line that was cut short (the disk was full) stays alone: what is added begins on a line of its own.

    Raises:
        OSError: it cannot be written, or the path is a link.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(line, ensure_ascii=False).encode() + b"\n")
        if sync:
            file.flush()
            os.fsync(file.fileno())
