"""Starting the agent when none runs, and the lock by which one host has one.

The lock is held by whoever has the open file: a starter takes it and hands it down to the agent it starts, so that
several ranks starting at once start one agent, and a killed agent's lock is free at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from lens.ring_files import RecorderError, host_directory, private_directory
from lens.settings import Settings

_LOCK_VARIABLE = "LENS_AGENT_LOCK_FD"
_OF_THE_RANK = ("run", "name", "device", "agent", "disabled")
_LOG_BYTES = 1024 * 1024


class AgentLock:
    """The right to be this host's agent, while it is open."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __enter__(self) -> AgentLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def tell(self, settings: Settings) -> None:
        """Say whom the agent ships to, for `agent_about`."""
        with contextlib.suppress(OSError):
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, json.dumps({"pid": os.getpid(), "server": settings.server}).encode(), 0)

    def release(self) -> None:
        """Let another agent have it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


def take_lock(settings: Settings) -> AgentLock | None:
    """The lock of this host and these rings; None when an agent has it.

    Raises:
        RecorderError: the place of the rings cannot be used.
    """
    private_directory(settings.rings)
    path = private_directory(host_directory(settings)) / "agent.lock"
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise RecorderError(f"no agent: {path} cannot be opened ({error.strerror})") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return AgentLock(descriptor)


def inherited_lock() -> AgentLock | None:
    """The lock that the starter of this process handed down; None when it was started by hand."""
    text = os.environ.pop(_LOCK_VARIABLE, "")
    if not text.isdigit():
        return None
    descriptor = int(text)
    try:
        os.set_inheritable(descriptor, False)
    except OSError:
        return None
    return AgentLock(descriptor)


def agent_running(settings: Settings) -> bool:
    """Whether an agent serves this host and these rings.

    Raises:
        RecorderError: the place of the rings cannot be used.
    """
    lock = take_lock(settings)
    if lock is None:
        return True
    lock.release()
    return False


def agent_about(settings: Settings) -> tuple[int, str | None] | None:
    """Process and server of the agent that serves this host and these rings; None when it has not said."""
    try:
        said = json.loads((host_directory(settings) / "agent.lock").read_text())
        return int(said["pid"]), said["server"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def ensure_agent(settings: Settings) -> bool:
    """Start an agent for this host in the background if none runs; whether one was started.

    It outlives the caller, in a session of its own, and writes what it has to say into ``agent.log`` of the spool.

    Raises:
        RecorderError: the place of the rings cannot be used.
        OSError: the process cannot be started.
    """
    lock = take_lock(settings)
    if lock is None:
        return False
    with lock:
        settings.spool.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = settings.spool / "agent.log"
        with contextlib.suppress(OSError):
            if log.stat().st_size > _LOG_BYTES:
                log.replace(log.with_suffix(".log.1"))
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "lens.collectors.agent"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env=_environment(settings, lock),
                pass_fds=(lock.descriptor,),
                start_new_session=True,
            )
    # Not waited for on purpose: it ends after its starter.
    process.returncode = 0
    return True


def _environment(settings: Settings, lock: AgentLock) -> dict[str, str]:
    """The caller's environment with these settings; the agent serves the host, so the rank's own are left out."""
    of_the_rank = {"LENS_" + name.upper() for name in _OF_THE_RANK}
    environment = {key: value for key, value in os.environ.items() if key not in of_the_rank}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is None or field.name in _OF_THE_RANK:
            continue
        text = str(value.absolute()) if isinstance(value, Path) else str(value)
        environment["LENS_" + field.name.upper()] = text
    package_parent = str(Path(__file__).resolve().parents[2])
    known = environment.get("PYTHONPATH", "")
    environment["PYTHONPATH"] = package_parent + (os.pathsep + known if known else "")
    environment[_LOCK_VARIABLE] = str(lock.descriptor)
    return environment
