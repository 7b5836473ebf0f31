"""Spool segments: append-only files of checked records.

A record is: magic, lengths, sequence and CRC, then a small JSON head, then the body. The head carries the cursors
that are reached with this body, so that a batch and the place to go on from are durable in the same write: an
agent killed at any byte leaves either both or neither.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = b"LSEG"
_PREFIX = struct.Struct("<4sIIQI")
_CHECKED = struct.Struct("<IIQ")


@dataclass(frozen=True)
class Entry:
    """Where one batch lies in a segment."""

    sequence: int
    path: Path
    offset: int
    """Of the body."""
    length: int
    head: dict[str, Any]
    checksum: int
    """Of the body; see `checksum`."""


class DamagedError(OSError):
    """A batch is not any more what was written."""


@dataclass
class Scan:
    """What a segment holds."""

    entries: list[Entry]
    damaged: int
    """Places passed over because they are not what was written."""
    end: int
    """Where the last whole record ends."""


def pack(sequence: int, head: dict[str, Any], body: bytes) -> bytes:
    """The bytes of one record."""
    head_bytes = json.dumps(head, separators=(",", ":")).encode()
    crc = zlib.crc32(body, zlib.crc32(head_bytes, zlib.crc32(_CHECKED.pack(len(head_bytes), len(body), sequence))))
    return _PREFIX.pack(MAGIC, len(head_bytes), len(body), sequence, crc) + head_bytes + body


def scan(path: Path) -> Scan:
    """Every whole record of a segment, damaged places passed over.

    A tail that is the beginning of a record is no damage: its writer was stopped in the middle, and the cursors of
    the record before still hold.
    """
    data = path.read_bytes()
    entries: list[Entry] = []
    damaged, at, end, in_damage = 0, 0, 0, False
    while at < len(data):
        entry = _entry_at(data, at, path)
        if entry is not None:
            entries.append(entry)
            at = end = entry.offset + entry.length
            in_damage = False
            continue
        following = data.find(MAGIC, at + 1)
        if not in_damage and not (following < 0 and _is_beginning(data, at)):
            damaged, in_damage = damaged + 1, True
        if following < 0:
            break
        at = following
    return Scan(entries, damaged, end)


def checksum(body: bytes | memoryview) -> int:
    """By which a body is known to be as it was written."""
    return zlib.crc32(body)


def read_body(entry: Entry) -> bytes:
    """The body of a batch.

    Raises:
        DamagedError: it is too short, or not what was written.
        OSError: the segment is gone or cannot be read.
    """
    with entry.path.open("rb") as file:
        file.seek(entry.offset)
        body = file.read(entry.length)
    if len(body) != entry.length or checksum(body) != entry.checksum:
        raise DamagedError(f"{entry.path} is damaged")
    return body


def append(descriptor: int, data: bytes) -> None:
    """Write all of it, or take back what was written.

    Raises:
        OSError: the disk is full or fails; the file is as long as before.
    """
    before = os.fstat(descriptor).st_size
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError:
        os.ftruncate(descriptor, before)
        raise


def _entry_at(data: bytes, at: int, path: Path) -> Entry | None:
    if len(data) - at < _PREFIX.size:
        return None
    magic, head_length, body_length, sequence, crc = _PREFIX.unpack_from(data, at)
    head_at = at + _PREFIX.size
    body_at = head_at + head_length
    if magic != MAGIC or body_at + body_length > len(data):
        return None
    head, body = data[head_at:body_at], memoryview(data)[body_at : body_at + body_length]
    checked = zlib.crc32(head, zlib.crc32(_CHECKED.pack(head_length, body_length, sequence)))
    if zlib.crc32(body, checked) != crc:
        return None
    return Entry(sequence, path, body_at, body_length, json.loads(head), checksum(body))


def _is_beginning(data: bytes, at: int) -> bool:
    """Whether what is left is the beginning of a record whose rest was not written."""
    rest = len(data) - at
    if rest < _PREFIX.size:
        return MAGIC.startswith(data[at : at + 4]) or data[at : at + 4] == MAGIC
    magic, head_length, body_length, _, _ = _PREFIX.unpack_from(data, at)
    return bool(magic == MAGIC and at + _PREFIX.size + head_length + body_length > len(data))


def files(directory: Path) -> Iterator[Path]:
    """Segments of a directory, oldest first."""
    yield from sorted(directory.glob("*.segment"))
