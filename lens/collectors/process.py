"""One training process seen from outside: memory, processor time, waiting for a processor, faults, disk, group.

Everything comes from /proc, so a stopped, deadlocked or crashed rank is still measured. Run delay and context
switches are the main thread's: that is the thread the step waits for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lens.collectors import cgroup
from lens.collectors.protocol import Collector, Group, Probe, Reading, Values, proc_is_there

_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass(frozen=True)
class Target:
    """A process to measure."""

    pid: int
    rank: int | None
    device: str | None = None


class ProcessCollector(Collector):
    """Readings of each target process; who the targets are is asked anew each time.

    Args:
        targets: gives the processes that live now.
        root: where /proc and /sys hang.
    """

    backend = "process"

    def __init__(self, targets: Callable[[], Sequence[Target]], root: Path = Path("/")) -> None:
        self._targets = targets
        self._root = root
        self._cpu_before: dict[int, tuple[float, int]] = {}

    def probe(self) -> Probe:
        """Whether there is a /proc to read."""
        return proc_is_there(self._root)

    def groups(self) -> Sequence[Group]:
        """Fast for what explains a slow step, slow for the control group."""
        return [Group("fast", 1.0), Group("container", 2.0)]

    def read(self, group: str) -> Sequence[Reading]:
        """One reading of every target; a process that is gone gives nothing."""
        targets = self._targets()
        living = {target.pid for target in targets}
        self._cpu_before = {pid: value for pid, value in self._cpu_before.items() if pid in living}
        readings = []
        for target in targets:
            t_ns = time.monotonic_ns()
            values = self._fast(target.pid, t_ns) if group == "fast" else self._container(target.pid)
            readings += [Reading(name, value, t_ns, labels, rank=target.rank) for name, value, labels in values]
        return readings

    def _fast(self, pid: int, t_ns: int) -> Values:
        directory = self._root / f"proc/{pid}"
        values: Values = []
        for file, parse in _FILES.items():
            try:
                text = (directory / file).read_text()
                values += parse(text)
            except (OSError, ValueError, IndexError):
                continue
        cpu = next((value for name, value, _ in values if name == "process.cpu.time"), None)
        if cpu is not None:
            before = self._cpu_before.get(pid)
            self._cpu_before[pid] = (cpu, t_ns)
            if before and t_ns > before[1]:
                share = (cpu - before[0]) / ((t_ns - before[1]) * 1e-9)
                values.append(("process.cpu.utilization", max(0.0, share), {}))
        return values

    def _container(self, pid: int) -> Values:
        # Looked up anew each time: a process can be moved to another group, and that may be the one with the quota.
        group = cgroup.find(pid, self._root)
        return [(name, value, {}) for name, value in cgroup.read(group).items()] if group else []


def resident_bytes(pid: int, root: Path = Path("/")) -> int | None:
    """Resident memory of a process, bytes; None when it cannot be read."""
    try:
        return int((root / f"proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return None


def _parse_stat(text: str) -> Values:
    """/proc/PID/stat: the name in parentheses may hold spaces, so fields are counted behind it."""
    fields = text.rsplit(")", 1)[1].split()
    if fields[0] in "ZX":
        return []
    return [
        ("process.paging.faults", float(fields[7]), {"process.paging.fault_type": "minor"}),
        ("process.paging.faults", float(fields[9]), {"process.paging.fault_type": "major"}),
        ("process.cpu.time", (int(fields[11]) + int(fields[12])) / _TICKS, {}),
        ("process.thread.count", float(fields[17]), {}),
    ]


def _parse_statm(text: str) -> Values:
    resident = int(text.split()[1])
    return [("process.memory.usage", float(resident * _PAGE), {})] if resident else []


def _parse_schedstat(text: str) -> Values:
    """/proc/PID/schedstat: ns on a processor, ns waiting for one, turns."""
    ran, waited, turns = (int(word) for word in text.split()[:3])
    # Some sandboxed kernels count turns and no time: waiting is unknown there, not zero.
    return [("process.cpu.run_delay", waited * 1e-9, {})] if ran or not turns else []


def _parse_status(text: str) -> Values:
    kinds = {"voluntary_ctxt_switches": "voluntary", "nonvoluntary_ctxt_switches": "involuntary"}
    values: Values = []
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name in kinds:
            labels = {"process.context_switch_type": kinds[name]}
            values.append(("process.context_switches", float(value), labels))
    return values


def _parse_io(text: str) -> Values:
    directions = {"read_bytes": "read", "write_bytes": "write"}
    values: Values = []
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name in directions:
            values.append(("process.disk.io", float(value), {"disk.io.direction": directions[name]}))
    return values


_FILES: Mapping[str, Callable[[str], Values]] = {
    "stat": _parse_stat,
    "statm": _parse_statm,
    "schedstat": _parse_schedstat,
    "status": _parse_status,
    "io": _parse_io,
}
