"""What is so about a process and about us, read from /proc. Changes nothing."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lens.attach import inject
from lens.attach.privilege import CAP_SYS_PTRACE

_VERSION = re.compile(r"python(\d+)\.(\d+)")


@dataclass(frozen=True)
class Facts:
    """What was read. None: it could not be read."""

    pid: int
    state: str | None
    """The letter of /proc/PID/stat; None when there is no such process."""
    owner: int | None = None
    own_uid: int = 0
    capable: bool = False
    """Whether we may trace processes of other users (CAP_SYS_PTRACE)."""
    yama: int | None = None
    """kernel.yama.ptrace_scope; None where the kernel has no Yama."""
    descendant: bool = False
    """Whether the process descends from us."""
    tracer: int = 0
    tracer_command: str = ""
    machine: str = "x86_64"
    version: tuple[int, int] | None = None
    """Of the interpreter; None when it is no Python."""
    symbols: bool = False
    """Whether the interpreter's functions can be found."""
    torch: bool = False
    """Whether torch is loaded."""
    forbidden: bool = False
    """Whether its environment says LENS_ATTACH=0."""
    readable: bool = True
    """Whether its memory map could be read."""
    own_version: tuple[int, int] = (sys.version_info[0], sys.version_info[1])
    """Of the interpreter that we run in."""
    sees_lens: bool = True
    """Whether this installation of lens lies in the file system that it sees."""
    inner_pid: int | None = None
    """Its number in its own process namespace; None where that is ours."""
    rank: int | None = None
    world_size: int | None = None
    command: str = ""


def look(pid: int, proc: Path = Path("/proc")) -> Facts:
    """Read the facts about a process. Never raises."""
    folder = proc / str(pid)
    try:
        state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
        status = _status(folder)
    except (OSError, IndexError):
        return Facts(pid, None)
    environment = _environment(folder)
    mapped, readable = _mapped(folder)
    version = _version(mapped)
    return Facts(
        pid,
        state,
        owner=int(status.get("Uid", "-1").split()[0]),
        own_uid=os.geteuid(),
        capable=bool(int(_status(proc / "self").get("CapEff", "0"), 16) & CAP_SYS_PTRACE),
        yama=_number(proc / "sys/kernel/yama/ptrace_scope"),
        descendant=_descends(pid, proc),
        tracer=(tracer := int(status.get("TracerPid", "0"))),
        tracer_command=_command(proc / str(tracer)) if tracer else "",
        machine=platform.machine(),
        version=version,
        symbols=version is not None and _has_symbols(pid),
        torch=any("libtorch" in name for name in mapped),
        forbidden=environment.get("LENS_ATTACH") == "0",
        readable=readable,
        sees_lens=sees(pid, Path(__file__), proc),
        inner_pid=_inner(status, _status(proc / "self")),
        rank=_integer(environment.get("RANK")),
        world_size=_integer(environment.get("WORLD_SIZE")),
        command=_command(folder),
    )


def _inner(status: Mapping[str, str], own: Mapping[str, str]) -> int | None:
    """The last number of a process that has more of them than we have."""
    numbers = status.get("NSpid", "").split()
    return int(numbers[-1]) if len(numbers) > len(own.get("NSpid", "").split() or numbers) else None


def _status(folder: Path) -> dict[str, str]:
    lines = (folder / "status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _environment(folder: Path) -> dict[str, str]:
    try:
        words = (folder / "environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    pairs = (word.decode(errors="replace").partition("=") for word in words if word)
    return {name: value for name, _, value in pairs}


def _mapped(folder: Path) -> tuple[list[str], bool]:
    try:
        lines = (folder / "maps").read_text().splitlines()
    except OSError:
        return [], False
    names = dict.fromkeys(line.split(None, 5)[-1] for line in lines if "/" in line)
    return list(names), bool(lines)


def _version(mapped: list[str]) -> tuple[int, int] | None:
    """By the names of the interpreter and its library; a file of the standard library may name another one."""
    for name in mapped:
        base = Path(name).name
        found = _VERSION.search(base)
        if found and (base.startswith(("libpython", "python"))):
            return int(found[1]), int(found[2])
    for name in mapped:
        if "/lib-dynload/" in name and (found := _VERSION.search(name)):
            return int(found[1]), int(found[2])
    return None


def _has_symbols(pid: int) -> bool:
    try:
        inject.locate(pid)
    except (LookupError, OSError):
        return False
    return True


def sees(pid: int, path: Path, proc: Path = Path("/proc")) -> bool:
    """Whether a process finds under this path what we find there."""
    try:
        theirs = (proc / str(pid) / "root" / str(path.resolve()).lstrip("/")).stat()
    except OSError:
        return False
    return os.path.samestat(theirs, path.stat())


def _descends(pid: int, proc: Path) -> bool:
    own = os.getpid()
    while pid > 1:
        if pid == own:
            return True
        try:
            pid = int((proc / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError, ValueError):
            return False
    return False


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _integer(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _command(folder: Path) -> str:
    try:
        return (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:200]
    except OSError:
        return ""
