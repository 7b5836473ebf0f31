"""The write-ahead log: what it has synced survives any crash, and is what an acknowledgement means.

A folder of segment files, each named by the offset of its first byte. An entry is a header (magic, kind, length,
CRC-32 of kind, length and payload) and its payload. Offsets run through all segments and never repeat.

After a crash the last entry may be torn: it was never acknowledged, and is cut off. Damage before a readable entry
is something else (a failing disk): those bytes are skipped, counted and kept beside the segment, never silently.
"""

from __future__ import annotations

import logging
import os
import secrets
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lens.store.errors import StoreError, StoreFullError

logger = logging.getLogger(__name__)

MAGIC = b"LNSL"
_HEADER = struct.Struct("<4sBxxxII")
_CHECKED = struct.Struct("<BI")
SEGMENT_BYTES = 64 << 20
MAX_ENTRY_BYTES = 1 << 30


@dataclass(frozen=True)
class Entry:
    """One entry: where it starts and ends in the log, what kind it is, and its payload."""

    start: int
    end: int
    kind: int
    payload: bytes


@dataclass(frozen=True)
class Damage:
    """Bytes in the middle of the log that are no entry."""

    start: int
    end: int


class Log:
    """Append-only log of one folder; one process owns it. Thread-safe.

    Raises:
        StoreError: the folder cannot be read or written.
    """

    def __init__(self, folder: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.folder = folder
        self.damage: list[Damage] = []
        self.torn_bytes = 0
        self._segment_bytes = segment_bytes
        self._append_lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._broken: str | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._bases = sorted(int(path.stem) for path in folder.glob("*.log"))
        if not self._bases:
            self._bases = [0]
        self._base = self._bases[-1]
        self._file = os.open(self._path(self._base), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._end = self._base + self._cut_torn_tail()
        self._durable = self._end
        self.identity = _identity(folder)
        """A name that no other log has: offsets say which entry is meant only together with it."""
        _sync_folder(folder)

    @property
    def start(self) -> int:
        """Offset of the oldest byte kept."""
        return self._bases[0]

    @property
    def end(self) -> int:
        """Offset after the newest entry."""
        return self._end

    def append(self, kind: int, payload: bytes) -> int:
        """Writes one entry and returns the offset after it. Not on disk before :meth:`sync`.

        Raises:
            StoreFullError: the disk is full; nothing of the entry stays.
            StoreError: the log is broken and takes nothing more.
        """
        if len(payload) > MAX_ENTRY_BYTES:
            raise StoreError(f"an entry of {len(payload)} bytes is over the log's limit")
        checksum = zlib.crc32(payload, zlib.crc32(_CHECKED.pack(kind, len(payload))))
        header = _HEADER.pack(MAGIC, kind, len(payload), checksum)
        with self._append_lock:
            self._refuse_if_broken()
            if self._end - self._base >= self._segment_bytes:
                self._start_segment()
            position = self._end - self._base
            try:
                _write_all(self._file, header, payload)
            except OSError as error:
                self._undo(position, error)
            self._end += _HEADER.size + len(payload)
            return self._end

    def sync(self, offset: int) -> None:
        """Returns when everything before this offset is on disk; concurrent callers share one fsync.

        Raises:
            StoreError: the disk refused; nothing can be promised any more until a restart.
        """
        if self._durable >= offset:
            return
        with self._sync_lock:
            if self._durable >= offset:
                return
            self._refuse_if_broken()
            with self._append_lock:
                file, end = os.dup(self._file), self._end
            try:
                os.fsync(file)
            except OSError as error:
                self._broken = f"fsync of the log failed: {error}"
                self._refuse_if_broken()
            finally:
                os.close(file)
            self._durable = max(self._durable, end)

    def read(self, offset: int = 0) -> Iterator[Entry]:
        """The entries that start at or after this offset, oldest first."""
        self.damage.clear()
        for base, following in zip(self._bases, [*self._bases[1:], None], strict=True):
            if following is not None and following <= offset:
                continue
            data = self._path(base).read_bytes()
            for entry in self._scan(data, base, is_last=following is None, report=True):
                if entry.start >= offset:
                    yield entry

    def forget(self, offset: int) -> None:
        """Deletes the segments that hold nothing at or after this offset."""
        with self._append_lock:
            while len(self._bases) > 1 and self._bases[1] <= offset:
                self._path(self._bases.pop(0)).unlink(missing_ok=True)

    def close(self) -> None:
        """Syncs and closes."""
        if self._file >= 0:
            if self._broken is None:
                self.sync(self._end)
            os.close(self._file)
            self._file = -1

    def _path(self, base: int) -> Path:
        return self.folder / f"{base:020d}.log"

    def _refuse_if_broken(self) -> None:
        if self._broken:
            raise StoreError(self._broken, "check the disk that holds the data folder, then restart the server")

    def _start_segment(self) -> None:
        os.fsync(self._file)
        self._durable = max(self._durable, self._end)
        file = os.open(self._path(self._end), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.close(self._file)
        self._file, self._base = file, self._end
        self._bases.append(self._end)
        _sync_folder(self.folder)

    def _undo(self, position: int, error: OSError) -> None:
        try:
            os.ftruncate(self._file, position)
        except OSError as second:
            self._broken = f"the log cannot be written ({error}) nor repaired ({second})"
            self._refuse_if_broken()
        raise StoreFullError(
            f"the log cannot be written: {error}", "free space on the disk that holds the data folder"
        ) from error

    def _cut_torn_tail(self) -> int:
        """Length of the last segment up to its last readable entry; what follows is cut off."""
        data = self._path(self._base).read_bytes()
        length = 0
        for entry in self._scan(data, self._base):
            length = entry.end - self._base
        self.torn_bytes = len(data) - length
        if self.torn_bytes:
            os.ftruncate(self._file, length)
            os.fsync(self._file)
        return length

    def _scan(self, data: bytes, base: int, is_last: bool = True, report: bool = False) -> Iterator[Entry]:
        position = 0
        while position < len(data):
            entry = _entry_at(data, position, base)
            if entry is None:
                following = _next_entry(data, position + 1, base)
                if following is None:
                    if is_last:
                        return
                    following = len(data)
                if report:
                    self._note_damage(data, position, following, base)
                position = following
                continue
            yield entry
            position = entry.end - base

    def _note_damage(self, data: bytes, start: int, end: int, base: int) -> None:
        self.damage.append(Damage(base + start, base + end))
        aside = self.folder / f"{base + start:020d}.damaged"
        aside.write_bytes(data[start:end])
        logger.error("log: %d damaged bytes at offset %d skipped, kept in %s", end - start, base + start, aside)


def _entry_at(data: bytes, position: int, base: int) -> Entry | None:
    if position + _HEADER.size > len(data):
        return None
    magic, kind, length, checksum = _HEADER.unpack_from(data, position)
    body = position + _HEADER.size
    if magic != MAGIC or body + length > len(data):
        return None
    payload = data[body : body + length]
    if zlib.crc32(payload, zlib.crc32(_CHECKED.pack(kind, length))) != checksum:
        return None
    return Entry(base + position, base + body + length, kind, payload)


def _next_entry(data: bytes, position: int, base: int) -> int | None:
    """Position of the next readable entry, so that one bad spot does not cost all that follows it."""
    while (position := data.find(MAGIC, position)) >= 0:
        if _entry_at(data, position, base) is not None:
            return position
        position += 1
    return None


def _write_all(file: int, *parts: bytes) -> None:
    views = [memoryview(part) for part in parts if part]
    while views:
        written = os.writev(file, views)
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if views:
            views[0] = views[0][written:]


def _identity(folder: Path) -> str:
    path = folder / "id"
    if not path.exists():
        partial = path.with_suffix(".new")
        with partial.open("w") as file:
            file.write(secrets.token_hex(8))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    return path.read_text()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
