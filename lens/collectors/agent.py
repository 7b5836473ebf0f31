"""The agent: one process per host that reads rings and collectors, spools, and lets the shipper ship.

    python -m lens.collectors.agent

Everything it knows is in files, so it may be killed at any moment: the next one goes on where the spool stands.
Imports neither numpy nor pyarrow nor torch.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable

from lens.collectors import launch
from lens.collectors.amd import AmdCollector
from lens.collectors.building import Builder
from lens.collectors.host import HostCollector
from lens.collectors.hosted_run import HostedRun
from lens.collectors.infiniband import InfinibandCollector
from lens.collectors.launch import ensure_agent
from lens.collectors.nvidia import NvidiaCollector
from lens.collectors.poller import EventPump, Poller
from lens.collectors.process import resident_bytes
from lens.collectors.protocol import Collector, DeviceInfo, Reading
from lens.collectors.shipper import Shipper
from lens.collectors.simulated.cards import SimulatedCards, SimulationError
from lens.collectors.spool import enforce_bound, run_of_spool
from lens.collectors.tracked import TrackedProcess, read_about, ring_directories, run_of
from lens.ring_files import RecorderError, host_directory
from lens.settings import Settings

__all__ = ["Agent", "ensure_agent", "run_agent"]

FLUSH_S = 5.0
UNDELIVERED_LINGER_S = 600.0
MOST_ROUNDS = 64
"""Looks at the rings in one tick, when they hold more than one look takes."""
OWN_PERIOD_S = 5.0
FORGOTTEN_SPOOL_S = 7 * 86400.0


class Agent:
    """Serves every run on this host.

    Args:
        settings: what to read, where to spool, whom to ship to.
        say: where a line for people goes.
    """

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._say = say
        self._runs: dict[str, HostedRun] = {}
        self._tracked: set[str] = set()
        self._said: set[str] = set()
        self._started = time.monotonic()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._stopping = False
        self._shipper = Shipper(settings, say)
        self._builder = Builder(settings.native)
        self._cards = self._simulate()
        self._collectors = self._open_collectors()
        self._devices: dict[str, DeviceInfo] = {
            device.name: device for collector in self._collectors for device in collector.devices()
        }
        self._device_users: dict[int, str] = {}
        self._poller = Poller(self._collectors)
        self._pumps = [EventPump(collector) for collector in self._collectors if collector.devices()]
        self._own_due = 0.0
        self._own_cpu = (time.monotonic(), time.process_time())

    def run(self) -> int:
        """Serve until told to stop, or until nothing has been left to serve for a while; the exit code."""
        self._shipper.start()
        self._adopt_spools()
        while not self._stopping:
            began = time.monotonic()
            self.tick()
            if self._idle(time.monotonic()):
                break
            self._sleep(max(0.0, began + self._settings.ship_s - time.monotonic()))
        return self._finish()

    def stop(self) -> None:
        """End the loop soon; safe in a signal handler."""
        self._stopping = True
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"x")

    def tick(self) -> None:
        """One look at everything."""
        self._find_processes()
        for run in self._runs.values():
            run.record_ends()
            run.record_heartbeats(time.monotonic())
        more = self._gather()
        self._advance_cards()
        self._read_collectors()
        rounds = 0
        while self._commit() and more and rounds < MOST_ROUNDS:
            more, rounds = self._gather(), rounds + 1
        for run in list(self._runs.values()):
            run.bury()
        if enforce_bound([run.spool for run in self._runs.values()], self._settings.spool_mib << 20):
            self._say(f"the spool is full ({self._settings.spool_mib} MiB): the oldest batches are dropped")
        self._retire_runs()

    def _find_processes(self) -> None:
        for directory in ring_directories(host_directory(self._settings)):
            if directory.name in self._tracked:
                continue
            about = read_about(directory)
            process = TrackedProcess(directory, about, own=False)
            if not about and process.left_nothing():
                process.remove()
                continue
            name = run_of(directory, about, process.watch.alive)
            run = self._hosted(name) if name else None
            if run is None:
                process.close()
                continue
            self._tracked.add(directory.name)
            if directory.name not in run.processes:
                run.add(process)
        for run in self._runs.values():
            self._equip(run)
            for process in run.trainers():
                self._builder.look(process.about.get("lacks_native"))

    def _equip(self, run: HostedRun) -> None:
        """Tell the run of its devices, and give each rank on a simulated card its workload."""
        run.describe(self._devices, self._device_users)
        if self._cards is None:
            return
        local = [process.rank for process in run.trainers() if process.rank is not None]
        for process in run.trainers():
            if process.workload is None:
                process.workload = self._cards.workload(process.about, local)
            elif len(local) != len(process.workload.local_ranks):
                process.workload.local_ranks = frozenset(local)

    def _hosted(self, name: str) -> HostedRun | None:
        """The run of this name, begun if it is new; None where its spool or ring cannot be made."""
        if name in self._runs:
            return self._runs[name]
        try:
            run = HostedRun(self._settings, name, self._say)
        except (OSError, RecorderError) as error:
            self._say_once(f"run {name} cannot be served: {error}")
            return None
        self._runs[name] = run
        self._tracked.add(run.ring.directory.name)
        self._shipper.add(run.spool, run.description)
        return run

    def _adopt_spools(self) -> None:
        """Go on with what an agent before left in its spools; forget what has been done for a week."""
        with contextlib.suppress(OSError):
            for directory in sorted(path for path in self._settings.spool.iterdir() if path.is_dir()):
                if any(directory.glob("*.segment")):
                    self._hosted(run_of_spool(directory))
                elif time.time() - directory.stat().st_mtime > FORGOTTEN_SPOOL_S:
                    shutil.rmtree(directory, ignore_errors=True)

    def _gather(self) -> bool:
        more = [run.gather() for run in self._runs.values()]
        return any(more)

    def _commit(self) -> bool:
        spooled = [run.commit() for run in self._runs.values()]
        if any(spooled):
            self._shipper.notify()
        return any(spooled)

    def _advance_cards(self) -> None:
        if self._cards is None:
            return
        now_ns = time.monotonic_ns()
        memory: dict[str, list[tuple[int, int]]] = {}
        for run in self._runs.values():
            for process in run.trainers():
                if process.workload is None:
                    continue
                process.workload.add_open(process.open_spans(), now_ns)
                size = resident_bytes(process.pid)
                if size is not None:
                    memory.setdefault(str(process.about.get("device")), []).append((process.pid, size))
        self._cards.advance(now_ns, memory)

    def _read_collectors(self) -> None:
        if not self._runs:
            return
        now = time.monotonic()
        readings = self._poller.poll(now)
        if now >= self._own_due:
            self._own_due = now + OWN_PERIOD_S
            readings += self._own_readings(now)
            self._device_users = {
                use.pid: use.device for collector in self._collectors for use in collector.processes()
            }
        events = [event for pump in self._pumps for event in pump.fetch()]
        for run in self._runs.values():
            run.record(readings, now)
            for event in events:
                run.ring.report(event, run.device_ranks)

    def _own_readings(self, now: float) -> list[Reading]:
        """What the agent itself costs, and how its spools are doing."""
        cpu = time.process_time()
        (then, before), self._own_cpu = self._own_cpu, (now, cpu)
        t_ns = time.monotonic_ns()
        readings = [reading for run in self._runs.values() for reading in run.health()]
        if now > then:
            readings.append(Reading("lens.agent.cpu.utilization", (cpu - before) / (now - then), t_ns))
        resident = resident_bytes(os.getpid())
        if resident is not None:
            readings.append(Reading("lens.agent.memory.usage", float(resident), t_ns))
        return readings

    def _retire_runs(self) -> None:
        """Let go of runs that ended a while ago and are shipped to the last batch."""
        now = time.monotonic()
        for name, run in list(self._runs.items()):
            quiet = now - run.last_alive > 2 * self._settings.agent_linger
            if quiet and len(run.processes) == 1 and not run.spool.waiting and len(self._runs) > 1:
                run.close()
                if not run.spool.waiting:
                    self._shipper.remove(name)
                    del self._runs[name]

    def _idle(self, now: float) -> bool:
        quiet = now - max([self._started, *(run.last_alive for run in self._runs.values())])
        if quiet < self._settings.agent_linger or any(run.busy() for run in self._runs.values()):
            return False
        if not self._shipper.reachable() or not self._undelivered():
            return True
        return quiet > UNDELIVERED_LINGER_S

    def _undelivered(self) -> bool:
        """Whether batches pile up; one or two always wait for a moment."""
        return any(run.spool.waiting > 2 for run in self._runs.values())

    def _finish(self) -> int:
        """Spool the last records, ship what can be shipped in a few seconds, and end."""
        self._find_processes()
        for run in self._runs.values():
            run.record_ends()
            run.close()
        left = self._shipper.stop(FLUSH_S)
        if left:
            self._say(f"{left} batches stay in {self._settings.spool} for the next agent")
        for pump in self._pumps:
            pump.stop()
        return 0

    def _sleep(self, seconds: float) -> None:
        """Until the next tick, a stop, or the end of a process."""
        poller = select.poll()
        poller.register(self._wake_read, select.POLLIN)
        for run in self._runs.values():
            for process in run.trainers():
                if process.watch.descriptor >= 0:
                    poller.register(process.watch.descriptor, select.POLLIN)
        poller.poll(seconds * 1000)

    def _simulate(self) -> SimulatedCards | None:
        if not self._settings.simulate:
            return None
        try:
            return SimulatedCards(self._settings.simulate, self._settings.host, self._settings.rings / "sim")
        except SimulationError as error:
            self._say(str(error))
            return None

    def _open_collectors(self) -> list[Collector]:
        host = self._settings.host
        if self._cards is not None:
            candidates = [HostCollector(), self._cards.collector(), self._cards.network_collector()]
            return [collector for collector in candidates if collector.probe().available]
        # Both makers call their cards gpu0, gpu1, …: beside NVIDIA cards an AMD one is a processor's own graphics.
        makers: list[Collector] = [NvidiaCollector(host), AmdCollector(host)]
        cards = next(([collector] for collector in makers if collector.probe().available), [])
        others: list[Collector] = [HostCollector(), InfinibandCollector(host)]
        return [*(collector for collector in others if collector.probe().available), *cards]

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)


def run_agent(settings: Settings) -> int:
    """Be this host's agent until told to stop; a second one for the same host and rings says so and ends.

    Returns:
        The exit code: 0, or 1 when the place of the rings cannot be used.
    """
    try:
        lock = launch.inherited_lock() or launch.take_lock(settings)
    except RecorderError as error:
        print(f"lens agent: {error}", file=sys.stderr)
        return 1
    if lock is None:
        print(f"lens agent: another agent already serves host {settings.host}", file=sys.stderr)
        return 0
    with lock:
        lock.tell(settings)
        agent = Agent(settings, _say)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: agent.stop())
        return agent.run()


def _say(text: str) -> None:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S")
    print(f"{moment} lens agent: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_agent(Settings.load()))
