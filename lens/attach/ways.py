"""The ways into a process, and which one is taken."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens.attach import inject, preflight
from lens.attach.facts import Facts
from lens.attach.preflight import DOOR_RULES, GDB_RULES, REMOTE, RULES, Refusal, Rule
from lens.attach.ptrace import TraceError
from lens.ring_files import door_place, private_directory
from lens.settings import Settings


@dataclass(frozen=True)
class Way:
    """One way in. run_line: queue a line of Python in its main thread; seconds that it stood still (None: not known)."""

    name: str
    rules: tuple[Rule, ...]
    run_line: Callable[[int, str, Settings], float | None]


def _pending(pid: int, line: str, _: Settings) -> float:
    return inject.run_line(pid, line).stopped_s


def _gdb(pid: int, line: str, _: Settings) -> float:
    from lens.attach import gdb  # what seldom is needed is loaded when it is: a refusal comes at once

    return gdb.run_line(pid, line)


def _remote(pid: int, line: str, settings: Settings) -> None:
    """By the interpreter's own means: it runs a script at its next safe point."""
    script = private_directory(settings.rings) / f"line-{pid}-{time.monotonic_ns()}.py"
    # It may be read long after we are gone, and then nobody else would remove it.
    content = f"try:\n    __import__('os').unlink({str(script)!r})\nexcept OSError: pass\n{line}"
    descriptor = os.open(script, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(content)
    remote_exec: Callable[[int, str], None] | None = getattr(sys, "remote_exec", None)
    try:
        if remote_exec is None:
            raise TraceError("this Python cannot enter another one by itself (sys.remote_exec came with 3.14)")
        remote_exec(pid, str(script))
    except (OSError, RuntimeError, ValueError, TraceError) as error:
        script.unlink(missing_ok=True)
        raise TraceError(f"the interpreter was not reached ({error})") from error


def _no_line(pid: int, line: str, settings: Settings) -> None:
    raise TraceError("no line can be run by the way of its socket")


PENDING = Way("pending", RULES, _pending)
GDB = Way("gdb", GDB_RULES, _gdb)
REMOTE_EXEC = Way("remote", RULES, _remote)
DOOR = Way("socket", DOOR_RULES, _no_line)
WAYS: Mapping[str, Way] = {way.name: way for way in (PENDING, GDB, REMOTE_EXEC, DOOR)}


def choose(facts: Facts, settings: Settings) -> Way:
    """The way for a process: the socket that it has opened, else what its version of Python allows."""
    if door_of(facts.pid, settings) is not None:
        return DOOR
    return REMOTE_EXEC if facts.version is not None and facts.version >= REMOTE else PENDING


def judge(facts: Facts, way: Way, settings: Settings) -> Refusal | None:
    """What forbids this way, if anything."""
    if way is GDB and shutil.which("gdb") is None:
        return Refusal(
            "no gdb", "gdb is not installed on this host", "install it (apt-get install gdb), or leave --method out"
        )
    if way is DOOR and door_of(facts.pid, settings) is None:
        return Refusal(
            "no socket",
            f"process {facts.pid} has opened no socket for it in {settings.rings}",
            "set LENS_ATTACH=1 at its next start, or call lens.attachable() in it",
        )
    return preflight.judge(facts, way.rules)


def door_of(pid: int, settings: Settings) -> Path | None:
    """The socket that a process has opened; None where it has not."""
    with contextlib.suppress(OSError):
        found = door_place(settings, pid)
        if found.is_socket():
            return found
    return None


def ask_at_door(
    pid: int, settings: Settings, asked: Mapping[str, Any], patience_s: float
) -> Iterator[Mapping[str, Any]]:
    """What a process answers, line by line, to the last; ends early when the time is over.

    Raises:
        OSError: nobody opens.
    """
    import json
    import socket

    end = time.monotonic() + patience_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as guest:
        guest.settimeout(max(patience_s, 0.1))
        guest.connect(str(door_place(settings, pid)))
        text = b""
        try:
            guest.sendall(json.dumps(asked).encode() + b"\n")
            while time.monotonic() < end:
                guest.settimeout(max(end - time.monotonic(), 0.01))
                part = guest.recv(65_536)
                if not part:
                    return
                *lines, text = (text + part).split(b"\n")
                for answer in map(json.loads, lines):
                    yield answer
                    if answer["state"] != "waiting":
                        return
        except (TimeoutError, ConnectionError):
            return  # it is late, or lets us not in
