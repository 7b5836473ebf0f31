"""Control groups, version 1, version 2 or none: where a process's processor quota and memory limit show.

Values a kernel or a group does not have are absent. The root of the file system is a parameter: tests and
containers that mount the host's tree elsewhere read the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT = 1 << 60
"""Version 1 writes a number beyond this where no limit is set; version 2 writes ``max``."""


@dataclass(frozen=True)
class ControlGroup:
    """The directories of one process's group; None where the controller is not there."""

    version: int
    cpu: Path | None
    memory: Path | None


def find(pid: int, root: Path = Path("/")) -> ControlGroup | None:
    """The control group of a process; None when there is none, or it cannot be seen from here."""
    try:
        lines = (root / f"proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    paths: dict[str, str] = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    mount = root / "sys/fs/cgroup"
    if (mount / "cgroup.controllers").exists():
        directory = _existing(mount, paths.get("", "/"))
        return ControlGroup(2, directory, directory) if directory else None
    cpu = _existing(mount / "cpu", paths.get("cpu", "/")) or _existing(mount / "cpu,cpuacct", paths.get("cpu", "/"))
    memory = _existing(mount / "memory", paths.get("memory", "/"))
    return ControlGroup(1, cpu, memory) if cpu or memory else None


def read(group: ControlGroup) -> dict[str, float]:
    """Metrics of the group by catalogue name: throttled time (s), memory usage and limit (By), kills."""
    sources = _VERSION_2 if group.version == 2 else _VERSION_1
    found: dict[str, float] = {}
    for metric, (controller, file, key, factor) in sources.items():
        directory = group.cpu if controller == "cpu" else group.memory
        value = _number(directory / file, key) if directory else None
        if value is not None and value < _NO_LIMIT:
            found[metric] = value * factor
    return found


_VERSION_1: Mapping[str, tuple[str, str, str | None, float]] = {
    "container.cpu.throttled.time": ("cpu", "cpu.stat", "throttled_time", 1e-9),
    "container.memory.usage": ("memory", "memory.usage_in_bytes", None, 1.0),
    "container.memory.limit": ("memory", "memory.limit_in_bytes", None, 1.0),
    "container.oom_kills": ("memory", "memory.oom_control", "oom_kill", 1.0),
}
_VERSION_2: Mapping[str, tuple[str, str, str | None, float]] = {
    "container.cpu.throttled.time": ("cpu", "cpu.stat", "throttled_usec", 1e-6),
    "container.memory.usage": ("memory", "memory.current", None, 1.0),
    "container.memory.limit": ("memory", "memory.max", None, 1.0),
    "container.oom_kills": ("memory", "memory.events", "oom_kill", 1.0),
}


def _existing(mount: Path, path: str) -> Path | None:
    """The group's directory; inside a container the path of the host is not there and the mount is the group."""
    for directory in (mount / path.lstrip("/"), mount):
        if directory.is_dir():
            return directory
    return None


def _number(file: Path, key: str | None) -> float | None:
    try:
        text = file.read_text()
        if key is None:
            return float(text)
        for line in text.splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return float(value)
    except (OSError, ValueError):
        return None
    return None
