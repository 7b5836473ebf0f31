from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lens.collectors import cgroup
from lens.collectors.exits import ExitStatus, ProcessWatch
from lens.collectors.host import HostCollector
from lens.collectors.poller import Poller
from lens.collectors.process import ProcessCollector, Target
from lens.collectors.protocol import Group, Reading
from lens.ring_files import start_ticks
from tests.waiting import wait_for


def values(readings: list[Reading] | object) -> dict[str, float]:
    return {reading.metric: reading.value for reading in readings}  # type: ignore[attr-defined]


def test_the_real_host_gives_memory_and_after_a_second_look_processor_use() -> None:
    collector = HostCollector()
    assert collector.probe().available
    assert "system.cpu.utilization" not in values(collector.read("fast"))
    time.sleep(0.1)
    assert 0 <= values(collector.read("fast"))["system.cpu.utilization"] <= 1
    memory = [r for r in collector.read("slow") if r.metric == "system.memory.usage"]
    limit = values(collector.read("slow"))["system.memory.limit"]
    assert 0 < sum(reading.value for reading in memory) <= limit * 1.01


def test_files_that_a_kernel_does_not_have_leave_their_metrics_out(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text("cpu  10 0 10 80 0 0 0 5 0 0\n")
    collector = HostCollector(tmp_path)
    assert values(collector.read("fast")) == {"system.cpu.steal.time": 0.05}
    assert collector.read("slow") == []
    assert not HostCollector(tmp_path / "nothing").probe().available


def test_disks_are_counted_without_their_partitions(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    rows = ["8 0 sda 1 0 8 0 1 0 16 0 0 0 0", "8 1 sda1 1 0 8 0 1 0 16 0 0 0 0", "7 0 loop0 1 0 8 0 0 0 0 0"]
    (tmp_path / "proc/diskstats").write_text("\n".join(rows))
    readings = HostCollector(tmp_path).read("slow")
    assert [(r.labels["system.device"], r.value) for r in readings] == [("sda", 4096.0), ("sda", 8192.0)]


def test_a_busy_process_shows_its_processor_time_memory_and_switches() -> None:
    code = "import time\nprint('go',flush=True)\nwhile True: sum(range(1000))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        collector = ProcessCollector(lambda: [Target(child.pid, 3)])
        first = collector.read("fast")
        assert "process.cpu.utilization" not in values(first)

        def once_it_has_run() -> list[Reading]:
            time.sleep(0.1)
            read = collector.read("fast")
            return read if values(read)["process.cpu.utilization"] > 0 else []

        second = wait_for(once_it_has_run)
        assert all(reading.rank == 3 for reading in second)
        found = values(second)
        assert found["process.cpu.time"] >= values(first)["process.cpu.time"]
        assert found["process.memory.usage"] > 1e6
        assert found["process.thread.count"] == 1
        kinds = {r.labels["process.context_switch_type"] for r in second if r.metric == "process.context_switches"}
        assert kinds == {"voluntary", "involuntary"}
    finally:
        child.kill()
        child.wait()


def test_a_process_that_is_gone_gives_nothing_and_never_zeros() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    collector = ProcessCollector(lambda: [Target(child.pid, 0)])
    assert collector.read("fast") == []
    assert collector.read("container") == []


def test_a_kernel_that_counts_no_waiting_time_leaves_run_delay_out(tmp_path: Path) -> None:
    directory = tmp_path / "proc/7"
    directory.mkdir(parents=True)
    (directory / "schedstat").write_text("0 0 12\n")
    collector = ProcessCollector(lambda: [Target(7, 0)], tmp_path)
    assert collector.read("fast") == []
    (directory / "schedstat").write_text("5000000000 250000000 12\n")
    assert values(collector.read("fast")) == {"process.cpu.run_delay": 0.25}


@pytest.mark.parametrize("version", [1, 2])
def test_throttled_time_and_memory_come_from_either_version_of_control_groups(tmp_path: Path, version: int) -> None:
    process = tmp_path / "proc/9"
    process.mkdir(parents=True)
    mount = tmp_path / "sys/fs/cgroup"
    if version == 2:
        group = mount / "job"
        group.mkdir(parents=True)
        (mount / "cgroup.controllers").write_text("cpu memory")
        (process / "cgroup").write_text("0::/job\n")
        (group / "cpu.stat").write_text("usage_usec 9\nthrottled_usec 1500000\n")
        (group / "memory.current").write_text("4096\n")
        (group / "memory.max").write_text("max\n")
        (group / "memory.events").write_text("low 0\noom_kill 2\n")
    else:
        for name in ("cpu", "memory"):
            (mount / name / "job").mkdir(parents=True)
        (process / "cgroup").write_text("4:memory:/job\n1:cpu,cpuacct:/job\n0::/\n")
        (mount / "cpu/job/cpu.stat").write_text("nr_periods 3\nthrottled_time 1500000000\n")
        (mount / "memory/job/memory.usage_in_bytes").write_text("4096\n")
        (mount / "memory/job/memory.limit_in_bytes").write_text("9223372036854771712\n")
        (mount / "memory/job/memory.oom_control").write_text("under_oom 0\noom_kill 2\n")
    group_found = cgroup.find(9, tmp_path)
    assert group_found is not None
    assert cgroup.read(group_found) == {
        "container.cpu.throttled.time": 1.5,
        "container.memory.usage": 4096.0,
        "container.oom_kills": 2.0,
    }


def test_a_process_that_is_moved_is_read_in_its_new_group(tmp_path: Path) -> None:
    (tmp_path / "proc/9").mkdir(parents=True)
    for group, throttled in (("free", 0), ("limited", 2_000_000)):
        (tmp_path / "sys/fs/cgroup" / group).mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup" / group / "cpu.stat").write_text(f"throttled_usec {throttled}\n")
    (tmp_path / "sys/fs/cgroup/cgroup.controllers").write_text("cpu")
    collector = ProcessCollector(lambda: [Target(9, 0)], tmp_path)
    for group, throttled in (("free", 0.0), ("limited", 2.0)):
        (tmp_path / "proc/9/cgroup").write_text(f"0::/{group}\n")
        assert values(collector.read("container")) == {"container.cpu.throttled.time": throttled}


def test_without_control_groups_there_are_no_container_metrics(tmp_path: Path) -> None:
    (tmp_path / "proc/9").mkdir(parents=True)
    (tmp_path / "proc/9/cgroup").write_text("0::/\n")
    assert cgroup.find(9, tmp_path) is None
    assert ProcessCollector(lambda: [Target(9, 0)], tmp_path).read("container") == []


@pytest.mark.parametrize(
    ("code", "expected", "text"),
    [
        ("raise SystemExit(5)", ExitStatus(5), "exit code 5"),
        ("import os; os.kill(os.getpid(), 9)", ExitStatus(-9, 9), "SIGKILL"),
        ("", ExitStatus(0), "exit code 0"),
    ],
)
def test_the_exit_status_of_a_process_is_read_while_it_is_a_zombie(
    code: str, expected: ExitStatus, text: str
) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.readline();" + code], stdin=-1)
    watch = ProcessWatch(child.pid, start_ticks(child.pid))
    assert watch.alive()
    assert child.stdin is not None
    child.stdin.write(b"\n")
    child.stdin.flush()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not watch.alive()
    assert watch.status() == expected
    assert text in watch.status().text
    child.wait()
    assert watch.status() in (expected, ExitStatus(None))
    watch.close()


def test_a_pid_given_to_another_process_is_not_taken_for_the_first() -> None:
    watch = ProcessWatch(os.getpid(), start_ticks(os.getpid()) + 1)
    assert not watch.alive()
    assert watch.status() == ExitStatus(None)


class SlowCollector:
    """A collector whose reading costs what the test says."""

    backend = "slow"
    cost_s = 0.005

    def groups(self) -> list[Group]:
        return [Group("all", 0.1)]

    def read(self, group: str) -> list[Reading]:
        time.sleep(self.cost_s)
        return []


def test_every_reading_is_timed_and_a_costly_group_is_read_less_often() -> None:
    collector = SlowCollector()
    poller = Poller([collector])  # type: ignore[list-item]
    readings: list[Reading] = []
    now = 0.0
    for _ in range(40):
        readings += poller.poll(now)
        now += 10
    assert {r.metric for r in readings} == {"lens.collector.read.duration"}
    assert readings[0].labels == {"backend": "slow", "group": "all"}
    slowed = poller.period_of("slow", "all")
    assert slowed >= 0.4
    collector.cost_s = 0.0

    def read_more_often() -> bool:
        nonlocal now
        now += 10
        poller.poll(now)
        return poller.period_of("slow", "all") < slowed

    wait_for(read_more_often)  # a reading that lost its processor counts as a costly one
