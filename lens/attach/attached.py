"""One process from the first stop to the first record, and back to how it was."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens.attach import inject, payload, ways
from lens.attach.facts import look, sees
from lens.attach.ptrace import TraceError
from lens.attach.ways import Way
from lens.ring_files import host_directory, private_directory
from lens.ring_reader import RingError, RingReader, write_control
from lens.settings import Settings

WAKE_AFTER_S = 0.5
"""A main thread that has not looked at its queue after so long may wait for a lock, and is woken once."""
_LOOK_AGAIN_S = 0.01


@dataclass(frozen=True)
class Outcome:
    """What came of attaching to a process.

    state: watching, already, waiting (it will be watched at its next backward pass) or failed. stopped_ms: how long
    its main thread stood still. took_s: until its hooks were in place.
    """

    pid: int
    state: str
    text: str
    rank: int | None = None
    ring: Path | None = None
    stopped_ms: float | None = None
    took_s: float | None = None


def attach(pid: int, settings: Settings, patience_s: float, way: Way | None = None) -> Outcome:
    """Let the hooks of a running process begin; waits for them so many seconds. Never raises for what the target does.

    Args:
        way: how it is entered; default: see `ways.choose`.

    Raises:
        RecorderError: the place of the rings cannot be used.
    """
    began = time.monotonic()
    way = way or ways.choose(look(pid), settings)
    wanted = {
        "run": settings.run, "name": settings.name, "rings": str(settings.rings.absolute()),
        "data": str(settings.data.absolute()), "server": settings.server, "agent": False,
    }  # fmt: skip
    known = {key: value for key, value in wanted.items() if value is not None}
    try:
        stopped, answer = (_by_door if way is ways.DOOR else _by_line)(pid, settings, known, patience_s, way)
    except (TraceError, LookupError, OSError) as error:
        return Outcome(pid, "failed", str(error))
    ring = answer.get("ring")
    return Outcome(
        pid, answer["state"], answer["text"], answer.get("rank"), Path(ring) if ring else None,
        None if stopped is None else stopped * 1e3, time.monotonic() - began,
    )  # fmt: skip


def _by_line(
    pid: int, settings: Settings, wanted: Mapping[str, Any], patience_s: float, way: Way
) -> tuple[float | None, Mapping[str, Any]]:
    """Let it run a line that loads the payload, and read its report."""
    deadline = time.monotonic() + patience_s
    folder = Path(tempfile.mkdtemp(prefix="attach-", dir=private_directory(settings.rings)))
    report = folder / "report.json"
    try:
        if not sees(pid, folder):
            raise LookupError(f"it sees another {settings.rings} than we do: attach inside its container")
        stopped = way.run_line(pid, payload.line(report, wanted, _attacher()), settings)
        return stopped, _answer(pid, report, deadline)
    finally:
        # A target that is late writes into a folder that is gone, and takes no harm.
        shutil.rmtree(folder, ignore_errors=True)


def _by_door(
    pid: int, settings: Settings, wanted: Mapping[str, Any], patience_s: float, _: Way
) -> tuple[float | None, Mapping[str, Any]]:
    """Ask at the socket that it has opened; it does not stand still."""
    answer: Mapping[str, Any] = {"state": "waiting", "text": "it has not answered"}
    asked = {"ask": "attach", "settings": wanted, "attacher": _attacher()}
    for told in ways.ask_at_door(pid, settings, asked, patience_s):
        answer = told
    return None, answer


def rings_of(pid: int, settings: Settings) -> list[Path]:
    """The rings that a process writes now."""
    found = []
    for path in sorted(host_directory(settings).parent.glob(f"*/{pid}-*/*.ring")):
        with contextlib.suppress(OSError, RingError):
            reader = RingReader(path)
            if not reader.closed:
                found.append(path)
            reader.close()
    return found


def ask_to_leave(rings: list[Path]) -> None:
    """Ask the hooks that write these rings to put everything back; they do so at the end of their step."""
    for ring in rings:
        with contextlib.suppress(OSError):
            write_control(ring, detach=1)


def has_left(ring: Path) -> bool:
    """Whether the hooks that wrote a ring have put everything back."""
    try:
        reader = RingReader(ring)
    except (OSError, RingError):
        return True
    closed = reader.closed
    reader.close()
    return closed


def _answer(pid: int, report: Path, deadline: float) -> Mapping[str, Any]:
    """The target's last word until then."""
    answer: dict[str, Any] = {"state": "waiting", "text": "its main thread has run no Python code since"}
    wake_at = time.monotonic() + WAKE_AFTER_S
    woken = False
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            answer = json.loads(report.read_text())
            woken = True
        if answer["state"] != "waiting":
            break
        if not woken and time.monotonic() > wake_at:
            woken = True
            with contextlib.suppress(TraceError, OSError):
                inject.wake(pid)
        time.sleep(_LOOK_AGAIN_S)
    return answer


def _attacher() -> str:
    try:
        name = os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):
        name = str(os.getuid())
    return f"{name} (process {os.getpid()}) at {time.strftime('%Y-%m-%d %H:%M:%S')}"
