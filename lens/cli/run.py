"""Run a training command with lens around it: run id, server, agent; the command's own exit code comes back.

    lens run -- torchrun --nproc-per-node 8 train.py

The script needs no line of lens: every Python process below finds `lens.hooks.autoload` first on its path and
records from its first optimizer on. A script that calls `lens.watch` itself is recorded as it says.
Signals reach the command as they are; a command that a signal ended ends `lens run` by the same signal.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from lens.cli.errors import UNUSABLE, CommandError, missing_extra
from lens.cli.options import add_data, add_server, settings_of
from lens.reading.connection import owner_of
from lens.ring_files import RecorderError
from lens.settings import Settings

HELP = "run a training command with lens around it"
AGENT_CHECK_S = 5.0
FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_server(parser)
    add_data(parser)
    parser.add_argument("--name", help="a name for people")
    parser.add_argument("--run", help="run id (default: drawn)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")


def run(arguments: argparse.Namespace) -> int:
    """Run the command to its end."""
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise CommandError("no command was given", "lens run -- torchrun train.py", UNUSABLE)
    if shutil.which(command[0]) is None:
        raise CommandError(f"{command[0]} is not a command here", "check the spelling and PATH", UNUSABLE)
    settings = settings_of(arguments, name=arguments.name, run=arguments.run)
    owner = owner_of(settings.data)
    server = settings.server or (owner or {}).get("url")
    token = settings.read_token()
    environment = {**os.environ, "LENS_RUN": settings.run or new_run_id(), **_autoload()}
    for key, value in (("LENS_SERVER", server), ("LENS_TOKEN", token), ("LENS_NAME", settings.name)):
        if value:
            environment[key] = value
    environment.setdefault("LENS_DATA", str(settings.data))
    keep_agent = _agent_keeper(settings, server, token)
    _start_build(settings)
    where = server or "kept on this machine until a server is there (lens serve)"
    print(f"lens: run {environment['LENS_RUN']} → {where}", file=sys.stderr)
    return _pass_through(command, environment, keep_agent)


def new_run_id() -> str:
    """A run id that sorts by time and is unlikely to be drawn twice."""
    return time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(2)


def _autoload() -> dict[str, str]:
    """What makes the Python processes of the command record by themselves."""
    from lens.hooks import autoload

    ours = str(Path(autoload.__file__).resolve().parent)
    path = os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))
    return {"LENS_AUTOLOAD": "1", "PYTHONPATH": path}


def _agent_keeper(settings: Settings, server: str | None, token: str | None) -> Callable[[], None]:
    """Start this host's agent; returns what starts it again if it has ended, while ranks load or by a kill."""
    if not settings.agent:
        return lambda: None
    try:
        from lens.collectors.agent import ensure_agent
    except ImportError as error:
        raise missing_extra(error, "all") from error
    of_agent = Settings.load(data=settings.data, server=server, token=token)

    def keep(say: bool = False) -> None:
        # Nothing about the agent may end the training's command, or keep it from beginning.
        try:
            ensure_agent(of_agent)
        except (OSError, RecorderError) as error:
            if say:
                print(f"lens: no agent, training goes on ({error})", file=sys.stderr)

    keep(say=True)
    return keep


def _start_build(settings: Settings) -> None:
    """Have what is compiled for this torch ready as soon as may be; training neither waits for it nor needs it."""
    from lens.collectors.building import start_build
    from lens.hooks import native

    if settings.native and native.torch_identity() and not native.complete():
        start_build(sys.executable)


def _pass_through(command: list[str], environment: dict[str, str], keep_agent: Callable[[], None]) -> int:
    started: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if not started:
            early.append(number)
            return
        with contextlib.suppress(ProcessLookupError):
            started[0].send_signal(number)

    # Before the command starts: a signal that comes right after it must not end us and leave it behind.
    previous: dict[int, Any] = {number: signal.signal(number, forward) for number in FORWARDED}
    # Ctrl-C reaches the command from the terminal itself: it shares our process group.
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        child = subprocess.Popen(command, env=environment)
        started.append(child)
        for number in early:
            child.send_signal(number)
        code = _wait(child, keep_agent)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if code < 0:
        # The same end for whoever waits for us; without a core file of our own.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError, ValueError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _wait(child: subprocess.Popen[bytes], keep_agent: Callable[[], None]) -> int:
    """The child's return code once it ends; the agent is looked after meanwhile, and for its last records."""
    while True:
        try:
            code = child.wait(AGENT_CHECK_S)
        except subprocess.TimeoutExpired:
            keep_agent()
        else:
            keep_agent()
            return code
