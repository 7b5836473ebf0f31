"""Which rule, if any, forbids attaching: decided by the facts alone, so that every rule can be tested without its kernel."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lens.attach.facts import Facts

OLDEST, NEWEST = (3, 10), (3, 13)
"""Versions of CPython whose pending calls run in the main thread as soon as it runs Python code."""
REMOTE = (3, 14)
"""From this version on an interpreter runs a script that another process of the same version names."""
MACHINES = ("x86_64",)
STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a device",
    "T": "stopped",
    "t": "traced",
    "Z": "ended",
}
"""What the kernel's letters mean, for people."""


@dataclass(frozen=True)
class Refusal:
    """Why it cannot be attached to. rule: short name; reason and fix: sentences for people."""

    rule: str
    reason: str
    fix: str


_OURS = f"{sys.executable} -m lens attach"
"""This command, as `sudo` and another directory find it."""
Rule = Callable[[Facts], Refusal | None]


def judge(facts: Facts, rules: Iterable[Rule] | None = None) -> Refusal | None:
    """The first of these rules (default: those of attaching) that forbids it; None when it can be done."""
    for rule in RULES if rules is None else rules:
        refusal = rule(facts)
        if refusal is not None:
            return refusal
    return None


def _exists(facts: Facts) -> Refusal | None:
    if facts.state is None or facts.state in "ZX":
        return Refusal(
            "no process",
            f"there is no living process {facts.pid}",
            f"what trains here: {_OURS} --check --all-ranks",
        )
    return None


def _allowed(facts: Facts) -> Refusal | None:
    if not facts.forbidden:
        return None
    return Refusal(
        "LENS_ATTACH=0",
        f"process {facts.pid} forbids it: LENS_ATTACH=0 stands in its environment",
        _next_time(facts, "env -u LENS_ATTACH "),
    )


def _same_user(facts: Facts) -> Refusal | None:
    # Root acts as that user: lens.attach.privilege.
    if facts.owner in (facts.own_uid, None) or (facts.own_uid == 0 and facts.capable):
        return None
    return Refusal(
        "other user",
        f"process {facts.pid} belongs to user {facts.owner}, you are {facts.own_uid}",
        f"sudo -u '#{facts.owner}' {_OURS} {facts.pid}",
    )


def _yama(facts: Facts) -> Refusal | None:
    scope = facts.yama
    if not scope or (facts.capable and scope < 3) or (scope == 1 and facts.descendant):
        return None
    said = {
        1: "only a parent may trace its children here (kernel.yama.ptrace_scope = 1)",
        2: "only the administrator may trace processes here (kernel.yama.ptrace_scope = 2)",
    }
    nobody = "nobody may trace processes here until the next boot (kernel.yama.ptrace_scope = 3)"
    if scope not in said:
        return Refusal(f"Yama {scope}", nobody, _next_time(facts))
    if facts.own_uid == 0:
        return Refusal(
            f"Yama {scope}",
            f"{said[scope]}, and this container's root may not",
            "start the container with --cap-add SYS_PTRACE, or on its host: sysctl kernel.yama.ptrace_scope=0",
        )
    return Refusal(f"Yama {scope}", said[scope], f"sudo {_OURS} {facts.pid}")


def _untraced(facts: Facts) -> Refusal | None:
    if not facts.tracer:
        return None
    return Refusal(
        "already traced",
        f"process {facts.tracer} ({facts.tracer_command or 'a debugger, or another attach'}) traces it already",
        f"leave it there (gdb: detach), then: {_OURS} {facts.pid}",
    )


def _not_stopped(facts: Facts) -> Refusal | None:
    if facts.state not in ("T", "t"):
        return None
    return Refusal(
        "stopped",
        f"process {facts.pid} is stopped: it runs no Python code",
        f"kill -CONT {facts.pid} && {_OURS} {facts.pid}",
    )


def _readable(facts: Facts) -> Refusal | None:
    if facts.readable:
        return None
    return Refusal(
        "not readable",
        f"the memory map of process {facts.pid} cannot be read: it is protected (not dumpable, or in another namespace)",
        f"as root: sudo {_OURS} {facts.pid}; in a container, one started with --cap-add SYS_PTRACE",
    )


def _machine(facts: Facts) -> Refusal | None:
    if facts.machine in MACHINES or _asks_in(facts):
        return None
    return Refusal("architecture", f"attaching is not written for {facts.machine} yet", _next_time(facts))


def _python(facts: Facts) -> Refusal | None:
    if facts.version is not None:
        return None
    return Refusal(
        "not Python",
        f"process {facts.pid} ({facts.command or 'unknown'}) is no Python interpreter",
        f"what trains here: {_OURS} --check --all-ranks",
    )


def _supported(facts: Facts) -> Refusal | None:
    version = facts.version
    if version is None or OLDEST <= version <= NEWEST:
        return None
    if _asks_in(facts):
        same = f"python{version[0]}.{version[1]}"
        return (
            None
            if version == facts.own_version
            else Refusal(
                "Python version",
                f"process {facts.pid} runs Python {version[0]}.{version[1]}, which only lets its own version in",
                f"{same} -m pip install mistrallens; {same} -m lens attach {facts.pid}",
            )
        )
    known = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    return Refusal(
        "Python version",
        f"process {facts.pid} runs Python {version[0]}.{version[1]}; {known} can be attached to",
        _next_time(facts),
    )


def _symbols(facts: Facts) -> Refusal | None:
    if facts.symbols or _asks_in(facts):
        return None
    return Refusal(
        "no symbols",
        f"the interpreter of process {facts.pid} does not show its functions (stripped or linked statically)",
        _next_time(facts),
    )


def _same_numbers(facts: Facts) -> Refusal | None:
    if facts.inner_pid is None:
        return None
    return Refusal(
        "process namespace",
        f"process {facts.pid} runs in a container, where it is process {facts.inner_pid}",
        f"inside its container: pip install mistrallens && lens attach {facts.inner_pid}",
    )


def _asks_in(facts: Facts) -> bool:
    """Whether its interpreter lets others in by itself (`sys.remote_exec`)."""
    return facts.version is not None and facts.version >= REMOTE


def _visible(facts: Facts) -> Refusal | None:
    if facts.sees_lens:
        return None
    return Refusal(
        "file system",
        f"process {facts.pid} cannot read this lens ({Path(__file__).parents[1]}): it sees other files, or may not",
        f"nsenter -t {facts.pid} -m -r sh -c 'pip install mistrallens && lens attach {facts.pid}'",
    )


RULES: tuple[Rule, ...] = (
    _exists, _allowed, _same_user, _yama, _untraced, _not_stopped, _readable, _machine, _python, _supported, _symbols,
    _same_numbers, _visible,
)  # fmt: skip
"""In the order in which they are asked: what a person must settle first comes first."""
READING_RULES: tuple[Rule, ...] = (_exists, _allowed, _same_user, _yama, _readable, _python)
"""What forbids reading its memory: a process that is stopped or traced can be read."""
OBSERVING_RULES: tuple[Rule, ...] = (_exists,)
"""What forbids looking at it from outside, as any tool may."""
DOOR_RULES: tuple[Rule, ...] = (_exists, _allowed, _same_user, _not_stopped)
"""What forbids coming in by the socket that a process has opened itself."""
GDB_RULES: tuple[Rule, ...] = tuple(rule for rule in RULES if rule is not _machine)
"""gdb knows the processors that we do not."""


def said(facts: Facts) -> Mapping[str, str]:
    """The facts for people, a line each."""
    version = f"{facts.version[0]}.{facts.version[1]}" if facts.version else "no Python"
    return {
        "command": facts.command or "n/a",
        "state": STATES.get(facts.state or "", facts.state or "no such process"),
        "interpreter": f"{version}{', torch loaded' if facts.torch else ', torch not loaded'}",
        "rank": "n/a" if facts.rank is None else f"{facts.rank} of {facts.world_size or 'unknown'}",
        "user": f"{facts.owner} (you: {facts.own_uid})",
        "yama": "not in this kernel" if facts.yama is None else str(facts.yama),
    }


def _next_time(facts: Facts, before: str = "") -> str:
    return f"from its next start on: {before}lens run -- {facts.command or 'COMMAND'}"
