"""Reading a ring: by the agent while it is written, by ``lens postmortem`` afterwards. Standard library only.

The writer takes no notice of readers. A slot is whole when words 0 and 15 carry its sequence and still do after it
was copied; slots that were overwritten before they could be read are counted from the gap, never passed over.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from pathlib import Path
from typing import Any

from lens.recorder import (
    CLOSED_WORD,
    CONTROL_WORDS,
    FLIGHT_WORDS,
    FLIGHTS,
    FLIGHTS_WORD,
    MAGIC,
    OPEN_COLLECTIVE_WORD,
    OPEN_PHASE_WORD,
    OPEN_STEP_WORD,
    PAGE,
    SLOT_COUNT_WORD,
    SLOTS_AT_WORD,
    STRINGS_AT_WORD,
    STRINGS_SIZE_WORD,
    STRINGS_USED_WORD,
    VERSION,
)
from lens.slots import SLOT_BYTES, RingPart

_WORD = struct.Struct("<q")
_FLIGHTS = struct.Struct(f"<{FLIGHTS * FLIGHT_WORDS}q")
_LENGTH = struct.Struct("<I")
_LOW = (1 << 32) - 1
_LAP_MARGIN = 64
"""Slots kept clear behind a writer that has lapped the reader and is still writing."""


class RingError(ValueError):
    """The file is not a ring that this version reads."""


class RingReader:
    """Follows one ring from a cursor (the sequence it wants next).

    Raises:
        RingError: the file is not a ring, or of another version.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, cursor: int = 1) -> None:
        self.path = path
        self.cursor = cursor
        self.lost = 0
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_size < 2 * PAGE:
                raise RingError(f"{path} is too short for a ring")
            self._map = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        if self._word(0) != MAGIC or self._word(1) != VERSION:
            raise RingError(f"{path} is not a ring of version {VERSION}")
        self._count = self._word(SLOT_COUNT_WORD)
        self._slots_at = self._word(SLOTS_AT_WORD)
        if self._count <= 0 or self._slots_at + self._count * SLOT_BYTES > len(self._map):
            raise RingError(f"{path} is shorter than its header says")
        self._strings: list[str] = [""]
        self._strings_read = 0

    @property
    def about(self) -> dict[str, Any]:
        """``about.json`` beside the ring; empty when it is missing or unreadable."""
        try:
            value = json.loads((self.path.parent / "about.json").read_text())
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def closed(self) -> bool:
        """Whether the writer ended cleanly."""
        return self._word(CLOSED_WORD) == 1

    @property
    def strings(self) -> list[str]:
        """The string table so far; a slot's id is an index."""
        used = min(self._word(STRINGS_USED_WORD), self._word(STRINGS_SIZE_WORD))
        start = self._word(STRINGS_AT_WORD)
        while self._strings_read < used:
            at = start + self._strings_read
            (length,) = _LENGTH.unpack_from(self._map, at)
            self._strings.append(self._map[at + 4 : at + 4 + length].decode("utf-8", "replace"))
            self._strings_read += 4 + length
        return self._strings

    def seek(self, cursor: int) -> None:
        """Go on from this sequence."""
        self.cursor = cursor

    def poll(self, limit: int = 16384) -> RingPart | None:
        """The next whole records, at most about `limit` slots; None when nothing new is there.

        The part's `lost` counts the slots overwritten before it; the cursor then stands behind what was returned.
        """
        lost = self._skip_overwritten()
        head = self._head(self.cursor, limit)
        if head <= self.cursor:
            self.lost += lost
            if lost:
                return RingPart(self.about, list(self.strings), b"", self.cursor, lost)
            return None
        first = self.cursor
        data = self._copy(first, head)
        # A writer that lapped us while we copied has overwritten the oldest slots first.
        torn = self._overwritten_prefix(first, head)
        if torn:
            data = data[torn * SLOT_BYTES :]
            first += torn
            lost += torn
        data, first, skipped = _from_record_start(data, first)
        lost += skipped
        data = _whole_records(data)
        self.cursor = first + len(data) // SLOT_BYTES
        self.lost += lost
        if not data and not lost:
            return None
        return RingPart(self.about, list(self.strings), data, first, lost)

    def open_spans(self) -> list[dict[str, Any]]:
        """Step, phase and collective that the writer has entered and not left: kind, name, t0 (monotonic ns), …"""
        found: list[dict[str, Any]] = []
        strings = self.strings
        t0, number = self._word(OPEN_STEP_WORD), self._word(OPEN_STEP_WORD + 1)
        if t0:
            found.append({"kind": "step", "name": "step", "t0": t0, "step": number})
        t0, name, step = (self._word(OPEN_PHASE_WORD + i) for i in range(3))
        if t0:
            found.append({"kind": "phase", "name": _at(strings, name), "t0": t0, "step": step})
        flights = self._flights()
        collective = self.last_collective()
        if collective and collective["t0"] and all(flight["t0"] != collective["t0"] for flight in flights):
            flights.append(collective)
        return found + sorted(flights, key=_entered)

    def _flights(self) -> list[dict[str, Any]]:
        """Collectives entered and not completed: the native observer notes all that may be several at a time."""
        found = []
        words = _FLIGHTS.unpack_from(self._map, FLIGHTS_WORD * 8)
        for place in range(0, len(words), FLIGHT_WORDS):
            t0 = words[place]
            if not t0:
                continue
            _, ids, seq, size, step, waited_from, done, flags = words[place : place + FLIGHT_WORDS]
            # Read again: a place that was given to another collective meanwhile tells of neither.
            if done or self._word(FLIGHTS_WORD + place) != t0:
                continue
            flight = self._collective(t0, ids, seq, size, step)
            if flags & 1:
                flight |= {"async": True, "t_wait": waited_from or None}
            found.append(flight)
        return found

    def last_step(self) -> int | None:
        """Number of the step entered last, None before the first."""
        began, number, ended = (self._word(OPEN_STEP_WORD + i) for i in range(3))
        return number if began or ended else None

    def last_collective(self) -> dict[str, Any] | None:
        """The collective entered last (t0 is 0 once it was left, t1 its end where that is known); None if none was."""
        t0, ids, seq, size, step, t1 = (self._word(OPEN_COLLECTIVE_WORD + i) for i in range(6))
        return {**self._collective(t0, ids, seq, size, step), "t1": t1} if ids else None

    def _collective(self, t0: int, ids: int, seq: int, size: int, step: int) -> dict[str, Any]:
        return {
            "kind": "collective",
            "name": _at(self.strings, ids & _LOW),
            "group": _at(self.strings, ids >> 32),
            "t0": t0,
            "seq": seq,
            "bytes": size,
            "step": step,
        }

    def close(self) -> None:
        """Let go of the file."""
        self._map.close()

    def _word(self, index: int) -> int:
        return int(_WORD.unpack_from(self._map, index * 8)[0])

    def _offset(self, sequence: int) -> int:
        return self._slots_at + (sequence - 1) % self._count * SLOT_BYTES

    def _first_word(self, sequence: int) -> int:
        return int(_WORD.unpack_from(self._map, self._offset(sequence))[0])

    def _written(self, sequence: int) -> bool:
        at = self._offset(sequence)
        last: int = _WORD.unpack_from(self._map, at + 120)[0]
        return _WORD.unpack_from(self._map, at)[0] == sequence and abs(last) == sequence

    def _head(self, start: int, limit: int) -> int:
        """The sequence behind the newest slot written, from `start` on: slots are written in order."""
        if not self._written(start):
            return start
        low, high = start, start + 1
        while high - start < limit and self._written(high):
            low, high = high, high + (high - start)
        high = min(high, start + limit)
        while high - low > 1:
            middle = (low + high) // 2
            if self._written(middle):
                low = middle
            else:
                high = middle
        return low + 1

    def _skip_overwritten(self) -> int:
        seen = self._first_word(self.cursor)
        if seen <= self.cursor:
            return 0
        head = self._head(seen, self._count)
        oldest = max(self.cursor, head - self._count + _LAP_MARGIN)
        lost, self.cursor = oldest - self.cursor, oldest
        return lost

    def _copy(self, first: int, head: int) -> bytes:
        start, end = self._offset(first), self._offset(head - 1) + SLOT_BYTES
        if start < end:
            return self._map[start:end]
        return self._map[start : self._slots_at + self._count * SLOT_BYTES] + self._map[self._slots_at : end]

    def _overwritten_prefix(self, first: int, head: int) -> int:
        torn = 0
        while first + torn < head and self._first_word(first + torn) != first + torn:
            torn += 1
        return torn


def write_control(path: Path, **words: int) -> None:
    """Set words of a ring's control page, such as ``detach=1``; the hook reads them at its next step."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        for name, value in words.items():
            _WORD.pack_into(memory, PAGE + 8 * CONTROL_WORDS.index(name), value)


def _entered(span: dict[str, Any]) -> int:
    return int(span["t0"])


def _at(strings: list[str], index: int) -> str | None:
    return strings[index] if 0 < index < len(strings) else None


def _from_record_start(data: bytes, first: int) -> tuple[bytes, int, int]:
    """Drop continuation slots whose beginning was overwritten; their last word is negative."""
    skipped = 0
    while skipped * SLOT_BYTES < len(data) and _WORD.unpack_from(data, skipped * SLOT_BYTES + 120)[0] < 0:
        skipped += 1
    return data[skipped * SLOT_BYTES :], first + skipped, skipped


def _whole_records(data: bytes) -> bytes:
    """Cut off a last record whose continuation slots are not there yet."""
    count = len(data) // SLOT_BYTES
    start = count - 1
    while start >= 0 and _WORD.unpack_from(data, start * SLOT_BYTES + 120)[0] < 0:
        start -= 1
    if start < 0:
        return data
    more = _WORD.unpack_from(data, start * SLOT_BYTES + 8)[0] >> 8 & 0xFFFFFF
    return data if start + 1 + more <= count else data[: start * SLOT_BYTES]
