"""What befalls a rank's process: it is stopped, throttled, crowded out, cut off, killed, or leaves the others waiting.

Each effect is the system's own (signals, control groups, other processes, the queueing discipline of an interface); no
number is written anywhere. What cannot be done here is refused when the run starts, with what it needs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from sample_runs.moe.faults import Fault

SETTLED_STEPS = 2
"""First steps, which say little about the later ones."""
PERIOD_US, SHORTEST_QUOTA_US = 100_000, 1_000
LEAST_BITS_PER_SECOND, BURST_BYTES = 8_000, 16_384
BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for _ in range(100_000): pass"


class ProcessFaults:
    """What befalls the process of one rank, each from its step on.

    own: the faults of this rank, by name. anywhere: names of all ranks' faults.

    Raises:
        ValueError: something of it cannot be done here.
    """

    def __init__(self, own: Mapping[str, Fault], anywhere: set[str], rank: int, world: int) -> None:
        self._own = own
        self._core = pin(own_core(rank, world)) if "hog" in anywhere else 0
        self._quota = Quota() if "quota" in own else None
        self._uplink = Uplink() if "link" in own else None
        self._helpers: list[subprocess.Popen[bytes]] = []
        self._wall_s = self._cpu_s = 0.0
        self._steps = 1
        self._acts: Mapping[str, Callable[[Fault], None]] = {
            "stop": lambda fault: self._helpers.append(stop_for(fault.factor)),
            "hog": lambda fault: self._helpers.extend(crowd(self._core, round(fault.factor))),
            "quota": self._throttle,
            "link": self._slow_down,
            "worker_death": lambda fault: kill_loader_worker(),
            "killed": lambda fault: os.kill(os.getpid(), signal.SIGKILL),
        }

    def begin_step(self, step: int) -> None:
        """Let what begins at this step take effect."""
        if step == SETTLED_STEPS:
            self._wall_s, self._cpu_s = time.monotonic(), time.process_time()
            if self._uplink:
                self._uplink.count()
        self._steps = max(1, step - SETTLED_STEPS)
        for name, fault in self._own.items():
            if step == fault.step and name in self._acts:
                self._acts[name](fault)

    def end(self) -> None:
        """Undo what outlives the process."""
        if self._quota:
            self._quota.lift()
        for helper in self._helpers:
            helper.kill()
            helper.wait()

    def _throttle(self, fault: Fault) -> None:
        assert self._quota is not None
        used = (time.process_time() - self._cpu_s) / (time.monotonic() - self._wall_s)
        self._quota.limit(used / fault.factor)

    def _slow_down(self, fault: Fault) -> None:
        assert self._uplink is not None
        took = (time.monotonic() - self._wall_s) / self._steps
        self._uplink.slow_down(self._steps, fault.factor * took)


def stop_for(seconds: float) -> subprocess.Popen[bytes]:
    """Stop this process (SIGSTOP) and let it go on (SIGCONT) after so many seconds; the helper that does it."""
    own = os.getpid()
    helper = subprocess.Popen(["sh", "-c", f"kill -STOP {own}; sleep {seconds}; kill -CONT {own}"])
    # Until the helper is at work: the stop is to fall into this step.
    time.sleep(0.05)
    return helper


def stand_still() -> NoReturn:
    """Be in code of one's own for ever, while the others wait."""
    while True:
        time.sleep(1)


def kill_loader_worker() -> None:
    """Kill one worker of this process's loader, as the kernel does when memory runs out.

    Raises:
        ValueError: it has none.
    """
    workers = multiprocessing.active_children()
    if not workers:
        raise ValueError("worker_death needs a loader with workers: --data-workers 1")
    os.kill(int(workers[0].pid or 0), signal.SIGKILL)


def own_core(rank: int, world: int) -> int:
    """The core that a rank has when the ranks are dealt out over the cores in order."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[rank * len(cores) // world]


def crowded(rank: int, world: int) -> list[int]:
    """Ranks that suffer when others crowd a rank's core: itself where the kernel shares a core out by sessions, of which
    each rank has its own and those others are in this rank's; else all ranks on that core."""
    with contextlib.suppress(OSError):
        if Path("/proc/sys/kernel/sched_autogroup_enabled").read_text().strip() == "1":
            return [rank]
    return [other for other in range(world) if own_core(other, world) == own_core(rank, world)]


def pin(core: int) -> int:
    """Keep all threads of this process, and what it starts later, on a core; the core."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})
    return core


def crowd(core: int, count: int) -> list[subprocess.Popen[bytes]]:
    """So many other busy processes on a core; they end with this one."""
    command = [sys.executable, "-S", "-c", BUSY, str(os.getpid())]
    found = [subprocess.Popen(command) for _ in range(count)]
    for one in found:
        os.sched_setaffinity(one.pid, {core})
    return found


class Quota:
    """A control group of this process's own, in which the kernel limits its processor time.

    Raises:
        ValueError: none can be made here.
    """

    def __init__(self, root: Path = Path("/sys/fs/cgroup")) -> None:
        paths: dict[str, str] = {}
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            paths.update(dict.fromkeys(controllers.split(","), path.lstrip("/")))
        unified = (root / "cgroup.controllers").exists()
        self._parent = root / paths.get("", "") if unified else root / "cpu" / paths.get("cpu", "")
        self._group = self._parent / f"lens-quota-{os.getpid()}"
        self._file = self._group / ("cpu.max" if unified else "cpu.cfs_quota_us")
        with contextlib.suppress(OSError):
            self._group.mkdir()
        if not self._file.exists():
            self.lift()
            raise ValueError(
                f"quota needs the right to make control groups with a processor limit in {self._parent}"
            )

    def limit(self, share: float) -> None:
        """Give all threads of this process together this share of one processor."""
        quota = max(SHORTEST_QUOTA_US, round(share * PERIOD_US))
        self._file.write_text(f"{quota} {PERIOD_US}" if self._file.name == "cpu.max" else str(quota))
        (self._group / "cgroup.procs").write_text(str(os.getpid()))

    def lift(self) -> None:
        """Leave the group and remove it."""
        with contextlib.suppress(OSError):
            (self._parent / "cgroup.procs").write_text(str(os.getpid()))
        with contextlib.suppress(OSError):
            self._group.rmdir()


class Uplink:
    """The interface by which this rank sends, made for it in a network namespace of its own.

    Raises:
        ValueError: its name does not begin with "lens": an interface of the machine is left alone.
    """

    def __init__(self) -> None:
        self._name = os.environ.get("GLOO_SOCKET_IFNAME", "")
        if not self._name.startswith("lens"):
            raise ValueError(
                "link needs ranks in network namespaces of their own, GLOO_SOCKET_IFNAME being an interface called lens…"
            )
        self._counter = Path(f"/sys/class/net/{self._name}/statistics/tx_bytes")
        self._before = 0

    def count(self) -> None:
        """Count what leaves from now on."""
        self._before = int(self._counter.read_text())

    def slow_down(self, steps: int, seconds: float) -> None:
        """Let as much as a step has sent, mean of `steps`, take so many seconds from now on."""
        each = (int(self._counter.read_text()) - self._before) / steps
        rate = max(LEAST_BITS_PER_SECOND, round(8 * each / seconds))
        limit = ["rate", f"{rate}bit", "burst", str(BURST_BYTES), "latency", "5s"]
        subprocess.run(["tc", "qdisc", "add", "dev", self._name, "root", "tbf", *limit], check=True)
