"""What a spool remembers beside its segments: two files alike, each with its own checksum.

Without it an agent would begin every ring anew, and what is read twice would be stored twice: so one damaged file
must not cost it. Each is replaced atomically, the second only when the first is whole.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STATE, COPY = "state.json", "state.copy.json"
_CHECKSUM = "crc32"


def write_atomically(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a small JSON file so that nobody ever sees half of it.

    Raises:
        OSError: it cannot be written; the old file is as it was.
    """
    partial = path.with_suffix(".new")
    partial.write_text(json.dumps(content))
    partial.replace(path)


def write_state(directory: Path, content: Mapping[str, Any]) -> None:
    """Keep the state of the spool in this directory, twice.

    Raises:
        OSError: it cannot be written; at least one of the files is whole, as it was or as it is now.
    """
    checked = {**content, _CHECKSUM: _checksum(content)}
    for name in (COPY, STATE):
        write_atomically(directory / name, checked)


def read_state(directory: Path) -> dict[str, Any]:
    """The state of the spool in this directory, the newer of those that are whole; empty when none is."""
    # An agent of before checksums and copies left one file.
    unchecked = not (directory / COPY).exists()
    found = [_read(directory / name, unchecked) for name in (STATE, COPY)]
    return max(filter(None, found), key=_age, default={})


def _read(path: Path, unchecked: bool) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(state, dict):
        return {}
    given = state.pop(_CHECKSUM, None)
    return state if given == _checksum(state) or (unchecked and given is None) else {}


def _age(state: Mapping[str, Any]) -> tuple[int, int]:
    return int(state.get("saved_at", 0)), int(state.get("acknowledged", 0))


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
