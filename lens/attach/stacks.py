"""The Python stacks of a process, by the way that it allows: read from its memory, or written down by itself."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lens.attach import frames, inject, preflight, ways
from lens.attach.attached import WAKE_AFTER_S
from lens.attach.facts import Facts
from lens.attach.frames import Frame, ThreadStack, UnreadableError
from lens.attach.preflight import READING_RULES
from lens.attach.ptrace import TraceError
from lens.attach.ways import Way
from lens.ring_files import private_directory
from lens.settings import Settings

_LOOK_AGAIN_S = 0.005

_WRITE_THEM = """
import json, os, sys, threading
natives = {thread.ident: thread.native_id for thread in threading.enumerate()}
found = []
for thread, frame in sys._current_frames().items():
    if thread == threading.get_ident():
        frame = sys._getframe(1).f_back
    stack = []
    while frame is not None:
        code = frame.f_code
        stack.append((code.co_filename, frame.f_lineno, getattr(code, 'co_qualname', code.co_name)))
        frame = frame.f_back
    found.append((natives.get(thread), thread == threading.main_thread().ident, stack))
with os.fdopen(os.open(out + '.new', os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), 'w') as file:
    json.dump(found, file)
os.rename(out + '.new', out)
"""
"""Run in the target, within a line that leaves no name behind: its own frame and that line's are left out."""


@dataclass(frozen=True)
class ProcessStacks:
    """What was learned of one process.

    how: read (from outside, nothing ran in it), asked (it wrote its stacks down), or None where neither was possible;
    then error says why. state: R, S, D, T … of its main thread, as the kernel has it. threads: the main thread first.
    """

    pid: int
    rank: int | None
    how: str | None
    state: str | None = None
    threads: tuple[ThreadStack, ...] = ()
    error: str | None = None


def of_process(facts: Facts, settings: Settings, patience_s: float) -> ProcessStacks:
    """The stacks of a process; waits at most so many seconds for one that has to write them itself. Never raises for
    what the target does.

    Raises:
        RecorderError: the private directory for its answer cannot be used.
    """
    blank = ProcessStacks(facts.pid, facts.rank, None, facts.state)
    refusal = preflight.judge(facts, READING_RULES)
    if refusal is not None and ways.judge(facts, ways.DOOR, settings) is None:
        return _at_door(blank, settings, patience_s)
    if refusal is not None:
        return replace(blank, error=f"{refusal.reason}; {refusal.fix}")
    assert facts.version is not None
    try:
        return replace(blank, how="read", threads=tuple(frames.read(facts.pid, facts.version)))
    except UnreadableError as error:
        unreadable = str(error)
    way = ways.choose(facts, settings)
    if way is ways.DOOR:
        return _at_door(blank, settings, patience_s)
    refusal = ways.judge(facts, way, settings)
    if refusal is not None:
        return replace(blank, error=f"{unreadable}, and it cannot be asked: {refusal.reason}")
    try:
        return replace(blank, how="asked", threads=asked(facts.pid, settings, patience_s, way))
    except (TraceError, LookupError, OSError, TimeoutError) as error:
        return replace(blank, error=f"{unreadable}, and it did not answer: {error}")


def _at_door(blank: ProcessStacks, settings: Settings, patience_s: float) -> ProcessStacks:
    """What a process tells at the socket that it has opened; a main thread that is parked in C does not hinder it."""
    try:
        for answer in ways.ask_at_door(blank.pid, settings, {"ask": "stacks"}, patience_s):
            return replace(blank, how="asked", threads=_threads(answer["threads"]))
    except (OSError, KeyError, ValueError) as error:
        return replace(blank, error=f"it did not answer at its socket: {error}")
    return replace(blank, error=f"it has not answered at its socket within {patience_s:g} s")


def asked(pid: int, settings: Settings, patience_s: float, way: Way = ways.PENDING) -> tuple[ThreadStack, ...]:
    """Let a process write its stacks into a private file, and read that.

    Raises:
        TimeoutError: its main thread has run no Python code in that time.
        TraceError, LookupError, OSError: see `ways`.
    """
    folder = Path(tempfile.mkdtemp(prefix="stacks-", dir=private_directory(settings.rings)))
    try:
        out = folder / "stacks.json"
        code = f"exec({_WRITE_THEM!r}, {{'out': {str(out)!r}}})"
        way.run_line(pid, f"try:\n    {code}\nexcept BaseException: pass\n", settings)
        end, wake_at = (time.monotonic() + seconds for seconds in (patience_s, WAKE_AFTER_S))
        while not out.exists():
            if time.monotonic() > end:
                raise TimeoutError(f"its main thread has run no Python code for {patience_s:g} s")
            if time.monotonic() > wake_at:
                wake_at = end
                with contextlib.suppress(TraceError, OSError):
                    inject.wake(pid)
            time.sleep(_LOOK_AGAIN_S)
        return _threads(json.loads(out.read_text()))
    finally:
        # A target that is late writes into a folder that is gone, and takes no harm.
        shutil.rmtree(folder, ignore_errors=True)


def _threads(found: list[Any]) -> tuple[ThreadStack, ...]:
    known = [
        ThreadStack(native, main, tuple(Frame(file, line, name) for file, line, name in stack))
        for native, main, stack in found
    ]
    return tuple(sorted(known, key=lambda stack: not stack.main))
