"""A process that writes rings on this host, followed from its first slot to the removal of its directory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens.collectors.exits import ExitStatus, ProcessWatch
from lens.collectors.spool import directory_name
from lens.collectors.whereabouts import Whereabouts
from lens.ring_reader import RingError, RingReader, write_control
from lens.slots import EVENT, RingPart, iter_records

OPEN_AFTER_NS = 1_000_000_000
"""A span still open is reported once it is this old."""
POLL_SLOTS = 8192
KEPT = ("*.ring", "about.json", "oom-*.json")
"""What of a ring directory is copied when the run has ended."""
_REMOVED_PREFIX = ".done-"
_COPY_BLOCK = 64 * 1024


@dataclass
class Harvest:
    """What one look at a ring gave."""

    key: str
    """Names the ring in the spool's cursors: directory/file."""
    part: RingPart | None
    cursor: int
    full: bool
    """Whether there may be more right away."""


class TrackedProcess:
    """One ring directory and the process that writes it.

    Args:
        directory: ``<rings>/<host>/<pid>-<start ticks>``, or an agent's.
        about: what its ``about.json`` says.
        own: whether it is this very agent's.
    """

    def __init__(self, directory: Path, about: Mapping[str, Any], own: bool) -> None:
        self.directory = directory
        self.about = dict(about)
        self.own = own
        self.is_agent = about.get("role") == "agent"
        pid, ticks = _identity(directory, about)
        self.pid = pid
        self.watch = ProcessWatch(pid, ticks)
        self.whereabouts = Whereabouts(pid)
        self.readers: dict[str, RingReader] = {}
        self.ended = False
        self.exit_status: ExitStatus | None = None
        self.overwritten = 0
        self.drained = False
        """Ended, and the last look found nothing new."""
        self.workload: Any = None
        """Where the slots go besides the spool: the rank's simulated card."""
        self.described_device: str | None = None
        self._about_seen: tuple[int, int] = (0, 0)
        self._open_sent: dict[str, set[tuple[str, str, int]]] = {}
        """Open spans already told of, by ring; forgotten once they are closed."""
        self._error_file = _environment(pid).get("TORCHELASTIC_ERROR_FILE") if not own else None

    @property
    def rank(self) -> int | None:
        """The rank it said it is."""
        rank = self.about.get("rank")
        return int(rank) if rank is not None else None

    @property
    def key(self) -> str:
        """The directory's name: names this process for good."""
        return self.directory.name

    def reload_about(self) -> bool:
        """Read ``about.json`` again if it was replaced; whether it was."""
        try:
            found = (self.directory / "about.json").stat()
        except OSError:
            return False
        seen = (found.st_mtime_ns, found.st_ino)
        if seen == self._about_seen:
            return False
        self._about_seen = seen
        self.about = read_about(self.directory) or self.about
        return True

    def find_rings(self, cursors: Mapping[str, int]) -> None:
        """Open the rings that have appeared, each where the spool's cursors stand."""
        with contextlib.suppress(OSError):
            for path in self.directory.glob("*.ring"):
                if path.name not in self.readers:
                    # A ring that is being made has no header yet: the next look finds it.
                    with contextlib.suppress(RingError, OSError, ValueError):
                        self.readers[path.name] = RingReader(path, cursors.get(f"{self.key}/{path.name}", 1))

    def left_nothing(self) -> bool:
        """Whether the process is gone and wrote no slot: it ended before it had begun."""
        if self.watch.alive():
            return False
        self.find_rings({})
        return all(reader.poll(1) is None for reader in self.readers.values())

    def check_end(self) -> bool:
        """Look whether the process has ended; True the first time it is found so."""
        if self.ended or self.own or self.watch.alive():
            return False
        self.exit_status = self.watch.status()
        self.ended = True
        return True

    def harvest(self, name: str) -> Harvest:
        """What is new in one ring."""
        reader = self.readers[name]
        part = reader.poll(POLL_SLOTS)
        spans = self._newly_open(name, reader)
        if spans and part is None:
            part = RingPart(self.about, list(reader.strings), b"", reader.cursor)
        if part is not None:
            part.open = spans
        full = part is not None and part.count >= POLL_SLOTS // 2
        return Harvest(f"{self.key}/{name}", part, reader.cursor, full)

    def rewind(self, cursors: Mapping[str, int]) -> None:
        """Go back to what was spooled: the last look could not be kept."""
        for name, reader in self.readers.items():
            reader.seek(cursors.get(f"{self.key}/{name}", 1))
        self._open_sent.clear()

    def open_spans(self) -> list[dict[str, Any]]:
        """What the process is in right now, over all its threads."""
        return [span for reader in self.readers.values() for span in reader.open_spans()]

    def last_collective(self) -> dict[str, Any] | None:
        """The collective that one of its threads is in, or the one left last; None before the first."""
        found = [call for reader in self.readers.values() if (call := reader.last_collective())]
        return max(found, key=lambda call: (call["t0"] > 0, max(call["t0"], call["t1"]), call["seq"]), default=None)

    def closed_cleanly(self) -> bool:
        """Whether its recorder was closed in an orderly end."""
        main = self.readers.get("main.ring")
        return main is not None and main.closed

    def greet(self) -> None:
        """Tell the hook, on the control page, that an agent is reading."""
        for reader in self.readers.values():
            with contextlib.suppress(OSError, ValueError):
                write_control(reader.path, agent_seen_ns=time.monotonic_ns())

    def reported_error(self) -> dict[str, str] | None:
        """Type and message of the error it ended with, from torchrun's error file; None if there is none.

        A hook that has already recorded the error itself is not repeated.
        """
        if any("process.error" in reader.strings for reader in self.readers.values()) or not self._error_file:
            return None
        try:
            message = json.loads(Path(self._error_file).read_text())["message"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        text = str(message.get("message", "") if isinstance(message, dict) else message)
        kind, found, rest = text.partition(": ")
        return {"type": kind, "message": rest} if found else {"type": "error", "message": text}

    def exits_recorded(self) -> set[str]:
        """Ring directories whose end is told in slots of this ring that nobody has spooled yet."""
        found: set[str] = set()
        for reader in self.readers.values():
            cursor = reader.cursor
            while (part := reader.poll(POLL_SLOTS)) is not None:
                found |= {
                    str(record["attrs"]["process"])
                    for record in iter_records(part)
                    if record["type"] == EVENT and record["kind"] == "process.exit" and "process" in record["attrs"]
                }
            reader.seek(cursor)
        return found

    def archive(self, target: Path) -> None:
        """Copy the rings and what they are about into a folder.

        Raises:
            OSError: the folder cannot be written.
        """
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        for source in [path for name in KEPT for path in self.directory.glob(name)]:
            _copy_sparse(source, target / source.name)

    def remove(self) -> None:
        """Remove the directory: renamed first, so that nobody ever takes half of it for a ring."""
        self.close()
        grave = self.directory.with_name(_REMOVED_PREFIX + self.directory.name)
        with contextlib.suppress(OSError):
            self.directory.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)

    def close(self) -> None:
        """Let go of rings and process."""
        for reader in self.readers.values():
            reader.close()
        self.readers = {}
        self.watch.close()

    def _newly_open(self, name: str, reader: RingReader) -> list[dict[str, Any]]:
        """Spans that are open for long, each once; all of them once the process has ended."""
        now, told = time.monotonic_ns(), self._open_sent.get(name, set())
        still_told, found = set(), []
        for span in reader.open_spans():
            key = (str(span["kind"]), str(span["name"]), int(span["t0"]))
            if key in told:
                still_told.add(key)
            elif self.ended or now - span["t0"] > OPEN_AFTER_NS:
                still_told.add(key)
                found.append(span)
        self._open_sent[name] = still_told
        return found


def read_about(directory: Path) -> dict[str, Any]:
    """``about.json`` of a ring directory; empty when there is none yet."""
    try:
        about = json.loads((directory / "about.json").read_text())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def run_of(directory: Path, about: Mapping[str, Any], alive: Callable[[], bool]) -> str | None:
    """The run a process belongs to; None while a living process has not said it yet.

    A process that ended before it learned its run becomes a run of its own.
    """
    if about.get("run"):
        return str(about["run"])
    return None if alive() else f"{directory.parent.name}-{directory.name}"


def ring_directories(host_directory: Path) -> list[Path]:
    """Directories of processes that have written rings here; remains of interrupted removals are cleared away."""
    found = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(host_directory):
            if not entry.is_dir(follow_symlinks=False):
                continue
            if entry.name.startswith(_REMOVED_PREFIX):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif not entry.name.startswith("."):
                found.append(Path(entry.path))
    return sorted(found)


def archive_folder(data: Path, run: str, host: str, key: str) -> Path:
    """Where the rings of an ended process are kept."""
    return data / "rings" / directory_name(run) / f"{host.replace('/', '_')}-{key}"


def _identity(directory: Path, about: Mapping[str, Any]) -> tuple[int, int]:
    if "pid" in about and "start_ticks" in about:
        return int(about["pid"]), int(about["start_ticks"])
    pid, _, ticks = directory.name.partition("-")
    return (int(pid), int(ticks)) if pid.isdigit() and ticks.isdigit() else (0, 0)


def _environment(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    decoded = (pair.decode("utf-8", "replace").partition("=") for pair in pairs)
    return {name: value for name, _, value in decoded}


def _copy_sparse(source: Path, target: Path) -> None:
    """Copy a file, leaving holes where it is empty: a ring is mostly unwritten after a short run."""
    partial = target.with_name(target.name + ".new")
    with source.open("rb") as reader, partial.open("wb") as writer:
        while block := reader.read(_COPY_BLOCK):
            if block.count(0) == len(block):
                writer.seek(len(block), os.SEEK_CUR)
            else:
                writer.write(block)
        writer.truncate()
    partial.chmod(0o600)
    partial.replace(target)
