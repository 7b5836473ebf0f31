"""The spool of one run: batches that wait for the server, and the place in every ring to go on from.

Appending is the only commitment: a batch is spooled together with the cursors reached by it, under a sequence
number of a source that belongs to this spool for good. Whatever is sent again carries the same pair, so the server
keeps it once. The state (`spool_state`) only remembers what was acknowledged.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from lens.collectors import segments
from lens.collectors.missing import gaps, not_told, slots_before, slots_of, slots_through
from lens.collectors.segments import Entry
from lens.collectors.spool_state import read_state, write_atomically, write_state
from lens.slots import Anchor

SEGMENT_BYTES = 4 * 1024 * 1024
QUARANTINE_FILES = 64


class SpoolFullError(OSError):
    """Nothing could be appended: the disk is full or fails. The rings keep what is new."""


def take_anchor() -> Anchor:
    """Both clocks at one moment: of several tries the one whose two monotonic readings lie closest."""
    best: Anchor | None = None
    for _ in range(16):
        before, unix, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        tried = Anchor((before + after) // 2, unix, (after - before + 1) // 2)
        if best is None or tried.error_ns < best.error_ns:
            best = tried
    assert best is not None
    return best


def directory_name(run: str) -> str:
    """A run id as a file name."""
    return quote(run, safe="").replace(".", "%2E")[:200] or "run"


def run_of_spool(directory: Path) -> str:
    """The run whose spool this directory is: as its state says, else as it is named."""
    return str(read_state(directory).get("run") or unquote(directory.name))


@dataclass
class Counts:
    """What the spool had to give up, since the run began on this host."""

    dropped_batches: int = 0
    """Given up because the spool was full."""
    dropped_slots: int = 0
    """Slots of all that was given up, for whatever reason."""
    damaged: int = 0
    """Places, or batches, that were not any more what was written."""
    quarantined: int = 0


class RunSpool:
    """Batches of one run on one host.

    Args:
        directory: where it lives; made if missing.
        run: run id.
        host: name of this host, part of the source.

    Raises:
        OSError: the directory cannot be made or written.
    """

    def __init__(self, directory: Path, run: str, host: str) -> None:
        self.directory = directory
        self.run = run
        self.counts = Counts()
        self.cursors: dict[str, int] = {}
        self.ended: set[str] = set()
        """Ring directories whose process's end has been recorded."""
        self.pieces: dict[str, list[str]] = {}
        """Batches too large for the server: which halves of halves are still to be sent."""
        self._lock = threading.RLock()
        self._pending: deque[Entry] = deque()
        self._bytes: dict[Path, int] = {}
        self._descriptor = -1
        self._segment: Path | None = None
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.source = f"agent:{host}:{secrets.token_hex(8)}"
        self.anchor = take_anchor()
        self._acknowledged = 0
        self._next = 1
        self._slots = 0
        """Slots of all batches ever appended: what a missing batch held is told by its neighbours."""
        self._gaps: dict[str, int] = {}
        """Slots missing before a batch, and damaged places of a segment, that are counted already."""
        self._damaged: dict[str, int] = {}
        try:
            self._restore(read_state(directory))
        except (TypeError, ValueError, KeyError, AttributeError):
            # Readable and yet not a state. The segments say where to go on, and under which source.
            self._restore({})
        self._save()

    @property
    def size(self) -> int:
        """Bytes on disk."""
        with self._lock:
            return sum(self._bytes.values())

    @property
    def waiting(self) -> int:
        """Batches not acknowledged yet."""
        return len(self._pending)

    @property
    def oldest_change(self) -> float:
        """Modification time of the oldest segment, Unix s; infinite when there is none."""
        with self._lock:
            oldest = min(self._bytes, default=None)
            with contextlib.suppress(OSError):
                return oldest.stat().st_mtime if oldest else float("inf")
        return float("inf")

    def append(self, body: bytes, cursors: Mapping[str, int], slots: int, encoding: str) -> None:
        """Spool a batch and go on from these cursors.

        Raises:
            SpoolFullError: nothing was written; cursors are as before.
        """
        with self._lock:
            head = {
                "source": self.source,
                "cursors": dict(cursors),
                "ended": sorted(self.ended),
                "slots": slots,
                "slots_before": self._slots,
                "encoding": encoding,
            }
            record = segments.pack(self._next, head, body)
            try:
                path = self._open_segment(len(record))
                segments.append(self._descriptor, record)
            except OSError as error:
                raise SpoolFullError(error.errno, error.strerror or str(error)) from error
            self._bytes[path] += len(record)
            offset = self._bytes[path] - len(body)
            self._pending.append(Entry(self._next, path, offset, len(body), head, segments.checksum(body)))
            self._next += 1
            self._slots += slots
            self.cursors = dict(cursors)

    def oldest(self) -> Entry | None:
        """The batch to send next."""
        with self._lock:
            return self._pending[0] if self._pending else None

    def acknowledge(self, sequence: int) -> None:
        """The server has everything up to this batch: forget it."""
        with self._lock:
            self._acknowledged = max(self._acknowledged, sequence)
            while self._pending and self._pending[0].sequence <= sequence:
                self.pieces.pop(str(self._pending.popleft().sequence), None)
            if self._save():
                self._remove_sent_segments()

    def quarantine(self, entry: Entry, body: bytes, reason: str) -> None:
        """Put a batch aside that the server refuses for good, so that it holds up nobody else."""
        with self._lock:
            self.counts.quarantined += 1
            self.counts.dropped_slots += slots_of(entry)
            folder = self.directory / "quarantine"
            with contextlib.suppress(OSError):
                folder.mkdir(mode=0o700, exist_ok=True)
                kept = sorted(folder.glob("*.batch"))
                for path in kept[: max(0, len(kept) - QUARANTINE_FILES + 1)]:
                    path.unlink()
                name = f"{entry.sequence:012d}"
                (folder / f"{name}.batch").write_bytes(body)
                write_atomically(folder / f"{name}.json", {"reason": reason, "source": self.source})
            self.acknowledge(entry.sequence)

    def give_up(self, entry: Entry) -> None:
        """Go on without a batch that the disk does not hold any more, counted."""
        with self._lock:
            self.counts.damaged += 1
            self.counts.dropped_slots += slots_of(entry)
            self.acknowledge(entry.sequence)

    def split(self, entry: Entry, pieces: Iterable[str]) -> None:
        """Remember which pieces of a batch are still to be sent."""
        with self._lock:
            self.pieces[str(entry.sequence)] = list(pieces)
            self._save()

    def drop_oldest_segment(self) -> bool:
        """Give up the oldest segment, counted; False when there is nothing to give up."""
        with self._lock:
            oldest = min(self._bytes, default=None)
            if oldest is None:
                return False
            if oldest == self._segment:
                self._close_segment()
            while self._pending and self._pending[0].path == oldest:
                entry = self._pending.popleft()
                self.counts.dropped_batches += 1
                self.counts.dropped_slots += slots_of(entry)
                self._acknowledged = max(self._acknowledged, entry.sequence)
            self._save()
            self._remove(oldest)
            self._save()
            return True

    def close(self) -> None:
        """Let go of the files."""
        with self._lock:
            self._close_segment()
            if self._save():
                self._remove_sent_segments()

    def _restore(self, state: Mapping[str, Any]) -> None:
        """State first, then what was appended after it was written."""
        self.source = str(state.get("source", self.source))
        self.anchor = _kept_anchor(state) or self.anchor
        self._acknowledged = int(state.get("acknowledged", 0))
        self._next = int(state.get("saved_at", 0)) + 1
        self._slots = int(state.get("slots", 0))
        self.cursors = {str(key): int(value) for key, value in state.get("cursors", {}).items()}
        self.ended = set(state.get("ended", ()))
        self.pieces = {key: list(value) for key, value in state.get("pieces", {}).items()}
        self.counts = Counts(**{key: int(state.get("counts", {}).get(key, 0)) for key in vars(Counts())})
        self._pending.clear()
        self._bytes.clear()
        told, self._damaged = state.get("damaged", {}), {}
        paths = list(segments.files(self.directory))
        found = [entry for path in paths for entry in self._restore_segment(path, told)]
        missing = gaps([entry for entry in found if entry.sequence > self._acknowledged], state)
        self.counts.dropped_slots += not_told(missing, state.get("gaps", {}))
        self._gaps = {str(gap.before): gap.slots for gap in missing}
        for entry in found:
            if entry.sequence >= self._next:
                self._next = entry.sequence + 1
                self._slots = slots_through(entry)
                self.source = str(entry.head["source"])
                self.cursors = {key: int(value) for key, value in entry.head["cursors"].items()}
                self.ended = set(entry.head["ended"])

    def _restore_segment(self, path: Path, told: Mapping[str, int]) -> list[Entry]:
        """The batches of a segment; it goes when none of them waits."""
        found = segments.scan(path)
        self.counts.damaged += max(0, found.damaged - told.get(path.name, 0))
        waiting = [entry for entry in found.entries if entry.sequence > self._acknowledged]
        self._pending.extend(waiting)
        if waiting:
            self._bytes[path] = path.stat().st_size
            self._damaged[path.name] = found.damaged
        else:
            path.unlink()
        return found.entries

    def _open_segment(self, more: int) -> Path:
        """The segment to append to; a new one when the last is full or belongs to an agent before."""
        if self._segment is not None and self._bytes[self._segment] + more <= SEGMENT_BYTES:
            return self._segment
        self._close_segment()
        path = self.directory / f"{self._next:012d}.segment"
        # A torn record of the same number may lie there: its batch was never spooled.
        self._descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._segment = path
        self._bytes[path] = 0
        return path

    def _close_segment(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._segment = -1, None

    def _remove_sent_segments(self) -> None:
        waiting = {entry.path for entry in self._pending}
        for path in [path for path in self._bytes if path not in waiting and path != self._segment]:
            self._remove(path)

    def _remove(self, path: Path) -> None:
        self._bytes.pop(path, None)
        with contextlib.suppress(OSError):
            path.unlink()

    def _save(self) -> bool:
        """Write the state. When the disk is full the old one stays, and so must the segments after it."""
        try:
            write_state(
                self.directory,
                {
                    "run": self.run,
                    "source": self.source,
                    "boot": _boot_id(),
                    "anchor": [self.anchor.monotonic_ns, self.anchor.unix_ns, self.anchor.error_ns],
                    "saved_at": self._next - 1,
                    "acknowledged": self._acknowledged,
                    "gaps": self._gaps,
                    "damaged": self._damaged,
                    "slots": self._slots,
                    "slots_acknowledged": slots_before(self._pending[0]) if self._pending else self._slots,
                    "cursors": self.cursors,
                    "ended": sorted(self.ended),
                    "pieces": self.pieces,
                    "counts": vars(self.counts),
                },
            )
        except OSError:
            return False
        return True


def enforce_bound(spools: Iterable[RunSpool], limit_bytes: int) -> int:
    """Drop oldest segments until all spools together fit; the number of batches given up."""
    spools = list(spools)
    before = sum(spool.counts.dropped_batches for spool in spools)
    while sum(spool.size for spool in spools) > limit_bytes:
        oldest = min(spools, key=lambda spool: spool.oldest_change)
        if not oldest.drop_oldest_segment():
            break
    return sum(spool.counts.dropped_batches for spool in spools) - before


def _kept_anchor(state: Mapping[str, Any]) -> Anchor | None:
    """The run's anchor, unless the host has booted since: then the monotonic clock began anew."""
    if state.get("boot") != _boot_id() or "anchor" not in state:
        return None
    monotonic, unix, error = state["anchor"]
    return Anchor(int(monotonic), int(unix), int(error))


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
