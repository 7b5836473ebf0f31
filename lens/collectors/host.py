"""The host as a whole: processors, memory, pressure, disks, network, paging. Read from /proc, one line a source."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lens.collectors.protocol import Collector, Group, Probe, Reading, Values, proc_is_there

_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_KIB = 1024
_SECTOR = 512


class HostCollector(Collector):
    """Readings of this host; `root` is where /proc and /sys hang."""

    backend = "host"

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._cpu_before: tuple[float, float] | None = None

    def probe(self) -> Probe:
        """Whether there is a /proc to read."""
        return proc_is_there(self._root)

    def groups(self) -> Sequence[Group]:
        """Fast for what explains a slow step, slow for capacity."""
        return [Group("fast", 1.0), Group("slow", 5.0)]

    def read(self, group: str) -> Sequence[Reading]:
        """One reading of a group; a file this kernel does not have leaves its metrics out."""
        t_ns = time.monotonic_ns()
        readings = []
        for file, parse in _FILES[group].items():
            try:
                values = parse((self._root / file).read_text())
            except (OSError, ValueError, IndexError):
                continue
            readings += [Reading(name, value, t_ns, labels) for name, value, labels in values]
        if group == "fast":
            readings += self._utilization(t_ns)
        return readings

    def _utilization(self, t_ns: int) -> list[Reading]:
        """Share of processor time not idle since the last reading; nothing on the first."""
        try:
            ticks = _cpu_ticks((self._root / "proc/stat").read_text())
        except (OSError, ValueError, IndexError):
            return []
        idle, total = ticks[3] + ticks[4], sum(ticks[:8])
        before, self._cpu_before = self._cpu_before, (idle, total)
        if before is None or total <= before[1]:
            return []
        busy = 1 - (idle - before[0]) / (total - before[1])
        return [Reading("system.cpu.utilization", min(1.0, max(0.0, busy)), t_ns)]


def _cpu_ticks(text: str) -> list[float]:
    """user, nice, system, idle, iowait, irq, softirq, steal, … of all processors together."""
    return [float(word) for word in text.split("\n", 1)[0].split()[1:]]


def _parse_stat(text: str) -> Values:
    return [("system.cpu.steal.time", _cpu_ticks(text)[7] / _TICKS, {})]


def _parse_meminfo(text: str) -> Values:
    sizes = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        sizes[name] = float(value.split()[0]) * _KIB
    total, free = sizes["MemTotal"], sizes["MemFree"]
    cached = sizes.get("Cached", 0.0) + sizes.get("SReclaimable", 0.0) + sizes.get("Buffers", 0.0)
    states = {"free": free, "cached": cached, "used": max(0.0, total - free - cached)}
    values: Values = [("system.memory.limit", total, {})]
    return values + [("system.memory.usage", size, {"system.memory.state": name}) for name, size in states.items()]


def _pressure(resource: str) -> Callable[[str], Values]:
    def parse(text: str) -> Values:
        values: Values = []
        for line in text.splitlines():
            kind, average, *_ = line.split()
            share = float(average.removeprefix("avg10=")) / 100
            values.append((f"host.pressure.{kind}", share, {"resource": resource}))
        return values

    return parse


def _parse_disks(text: str) -> Values:
    """/proc/diskstats, whole disks that did something; partitions repeat them."""
    values: Values = []
    disks: list[str] = []
    for line in text.splitlines():
        fields = line.split()
        name, read, written = fields[2], float(fields[5]) * _SECTOR, float(fields[9]) * _SECTOR
        # A partition follows its disk and begins with the disk's name.
        if name.startswith(("loop", "ram", *disks)) or not (read or written):
            continue
        disks.append(name)
        values.append(("system.disk.io", read, {"system.device": name, "disk.io.direction": "read"}))
        values.append(("system.disk.io", written, {"system.device": name, "disk.io.direction": "write"}))
    return values


def _parse_network(text: str) -> Values:
    """/proc/net/dev: bytes and errors (dropped packets included) in and out, of interfaces in use."""
    values: Values = []
    for line in text.splitlines()[2:]:
        name, _, counts = line.partition(":")
        numbers = [float(word) for word in counts.split()]
        if not numbers[0] and not numbers[8]:
            continue
        for direction, start in (("receive", 0), ("transmit", 8)):
            labels = {"network.interface.name": name.strip(), "network.io.direction": direction}
            values.append(("system.network.io", numbers[start], labels))
            values.append(("system.network.errors", numbers[start + 2] + numbers[start + 3], labels))
    return values


def _parse_paging(text: str) -> Values:
    directions = {"pswpin": "in", "pswpout": "out"}
    values: Values = []
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name in directions:
            labels = {"system.paging.direction": directions[name]}
            values.append(("system.paging.operations", float(value), labels))
    return values


_FILES: Mapping[str, Mapping[str, Callable[[str], Values]]] = {
    "fast": {
        "proc/stat": _parse_stat,
        "proc/pressure/cpu": _pressure("cpu"),
        "proc/pressure/memory": _pressure("memory"),
        "proc/pressure/io": _pressure("io"),
    },
    "slow": {
        "proc/meminfo": _parse_meminfo,
        "proc/diskstats": _parse_disks,
        "proc/net/dev": _parse_network,
        "proc/vmstat": _parse_paging,
    },
}
