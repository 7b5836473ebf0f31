"""Children that the CLI starts: in groups of their own, ended with their parent, stopped in order."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> Callable[[], None] | None:
    """What a child runs before it becomes its program: the kernel ends it when we are killed."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return ask


def start(
    command: Sequence[str], environment: Mapping[str, str], log: Path | None = None, **more: Any
) -> subprocess.Popen[Any]:
    """Start a child in a group of its own, its output in `log` when one is given."""
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            return start(command, environment, None, stdout=file, stderr=subprocess.STDOUT, **more)
    return subprocess.Popen(
        list(command),
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_end_with_parent(),
        **more,
    )


def stop(child: subprocess.Popen[Any], patience_s: float = 10.0, first: signal.Signals = signal.SIGTERM) -> int:
    """Ask a child and its group to end, then end them; its return code."""
    if child.poll() is None:
        _signal_group(child, first)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience_s)
    # Also when the child itself has gone: its group may hold workers that it left behind.
    _signal_group(child, signal.SIGKILL)
    return int(child.wait())


def _signal_group(child: subprocess.Popen[Any], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def wait_until(condition: Callable[[], bool], seconds: float, child: subprocess.Popen[Any] | None = None) -> bool:
    """Whether the condition came true in time, while the child (if one is named) lives."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if child is not None and child.poll() is not None:
            return condition()
        time.sleep(0.05)
    return condition()
