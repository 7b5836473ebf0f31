"""One run on this host: its processes, its spool, the agent's own ring for it, and what joins them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from lens.collectors.own_ring import OwnRing
from lens.collectors.poller import Poller
from lens.collectors.process import ProcessCollector, Target
from lens.collectors.protocol import DeviceInfo, Reading
from lens.collectors.registration import RunDescription
from lens.collectors.shipper import compress
from lens.collectors.spool import RunSpool, SpoolFullError, directory_name, take_anchor
from lens.collectors.tracked import Harvest, TrackedProcess, archive_folder, read_about
from lens.ring_files import host_directory
from lens.settings import Settings
from lens.slots import RingPart, encode_batch

ANCHOR_PERIOD_S = 30.0
LAST_LOOKS = 64
STILL_PERIODS, HASTE = 3, 0.5
"""When a rank has not moved for so many periods, heartbeats come after this share of one: nothing else tells for how long
it has stood still, and so when it is hung."""

Place = tuple[int, int | None]
"""Since when (monotonic ns) a process has been in what it is in, 0 where that is not known, and its newest step."""
NOWHERE: Place = (0, None)


class HostedRun:
    """What the agent does for one run.

    Args:
        settings: host, rings, spool, data folder.
        run: run id.
        say: where a line for people goes.

    Raises:
        OSError: the spool cannot be made.
        RecorderError: the agent's own ring cannot be made.
    """

    def __init__(self, settings: Settings, run: str, say: Callable[[str], None]) -> None:
        self.run = run
        self._settings = settings
        self._say = say
        self._host_directory = host_directory(settings)
        folder = settings.spool / directory_name(run)
        self.spool = RunSpool(folder, run, settings.host)
        self.description = RunDescription(folder / "run.json", run)
        self.processes: dict[str, TrackedProcess] = {}
        self.ring = OwnRing(settings, run)
        self.add(TrackedProcess(self.ring.directory, read_about(self.ring.directory), own=True))
        self.device_ranks: dict[str, int] = {}
        self.last_alive = time.monotonic()
        self._process_collector = ProcessCollector(self._targets)
        self._poller = Poller([self._process_collector])
        self._parts: list[RingPart] = []
        self._lost: dict[str, int] = {}
        """Overwritten slots that the parts gathered speak of; they count once these are spooled."""
        self._cursors: dict[str, int] = {}
        self._heartbeat_due = 0.0
        self._moved: dict[str, tuple[Place, float]] = {}
        """Where each process was last seen to be, and since when."""
        self._anchor_due = 0.0
        self._disk_full = False
        self._said_archive = False
        self._reported_lost: dict[str, int] = {}
        self._reported_dropped = self.spool.counts.dropped_batches

    def add(self, process: TrackedProcess) -> None:
        """Follow this process too."""
        process.find_rings(self.spool.cursors)
        self.processes[process.key] = process
        if process.is_agent and not process.own and not process.watch.alive():
            # An agent before us may have told of an end and been killed before that was spooled.
            self.spool.ended |= process.exits_recorded()

    def trainers(self) -> list[TrackedProcess]:
        """Training processes that live."""
        return [process for process in self.processes.values() if not process.is_agent and not process.ended]

    def busy(self) -> bool:
        """Whether a training process lives, or one that ended is not spooled to its end."""
        return any(
            not process.drained for process in self.processes.values() if not (process.is_agent and process.own)
        )

    def describe(self, devices: Mapping[str, DeviceInfo], users: Mapping[int, str]) -> None:
        """Keep the run's description and whose card is whose up to date; `users` is device by pid."""
        for process in self.processes.values():
            if process.is_agent:
                continue
            name = users.get(process.pid) or str(process.about.get("device"))
            device = devices.get(name)
            if process.rank is not None and device is not None and not process.ended:
                self.device_ranks[name] = process.rank
            if process.reload_about() or (device and process.described_device != name):
                process.described_device = name if device else None
                self.description.merge(process.about, _described(device))

    def record_ends(self) -> None:
        """Look which processes have ended and record how."""
        for process in self.processes.values():
            if not process.check_end() or process.is_agent or process.key in self.spool.ended:
                continue
            self._heartbeat(process, "exiting")
            self._record_end(process)
            self.spool.ended.add(process.key)

    def record_heartbeats(self, now: float) -> None:
        """One heartbeat a rank and period; an anchor of the clocks now and then."""
        if now >= self._heartbeat_due:
            period, still = self._settings.heartbeat_s, False
            for process in self.trainers():
                place = self._heartbeat(process, None)
                before, since = self._moved.setdefault(process.key, (place, now))
                if place != before:
                    self._moved[process.key] = place, now
                elif place != NOWHERE:
                    still |= now - since >= STILL_PERIODS * period
                process.greet()
            self._heartbeat_due = now + period * (HASTE if still else 1.0)
            self._record_losses()
        if now >= self._anchor_due:
            self._anchor_due = now + ANCHOR_PERIOD_S
            self._record_anchor()
        if self.trainers():
            self.last_alive = now

    def record(self, readings: list[Reading], now: float) -> None:
        """Record what host and devices gave, and what this run's processes give."""
        self.ring.write(readings + self._poller.poll(now), self.device_ranks)

    def gather(self) -> bool:
        """Take what is new from the processes' rings; whether there may be more right away."""
        self._parts, self._lost = [], {}
        self._cursors = {key: at for key, at in self.spool.cursors.items() if self._still_there(key)}
        more = False
        for process in self.processes.values():
            if process.own:
                continue
            process.find_rings(self.spool.cursors)
            found = [process.harvest(name) for name in list(process.readers)]
            process.drained = process.ended and not any(harvest.part for harvest in found)
            for harvest in found:
                self._take(process, harvest)
                more = more or harvest.full
        return more

    def commit(self) -> bool:
        """Spool what was gathered, together with the agent's own records; whether anything was spooled."""
        own = self.processes[self.ring.directory.name]
        own.find_rings(self.spool.cursors)
        for name in list(own.readers):
            self._take(own, own.harvest(name))
        if not self._parts:
            return False
        slots = sum(part.count for part in self._parts)
        body, encoding = compress(encode_batch(self._settings.host, self.spool.anchor, self._parts))
        try:
            self.spool.append(body, self._cursors, slots, encoding)
        except SpoolFullError as error:
            self._put_back(error)
            return False
        for key, lost in self._lost.items():
            self.processes[key].overwritten += lost
        if self._disk_full:
            self._say(f"spooling run {self.run} again")
        self._disk_full = False
        return True

    def bury(self) -> None:
        """Archive and remove the rings of processes that ended and are spooled to the last slot."""
        for process in list(self.processes.values()):
            if not process.drained or self._disk_full:
                continue
            try:
                if not process.is_agent:
                    folder = archive_folder(self._settings.data, self.run, self._settings.host, process.key)
                    process.archive(folder)
            except OSError as error:
                if not self._said_archive:
                    self._say(f"rings of run {self.run} stay in {process.directory}: {error}")
                self._said_archive = True
                continue
            process.remove()
            del self.processes[process.key]
            self.device_ranks = {name: rank for name, rank in self.device_ranks.items() if rank != process.rank}

    def close(self) -> None:
        """Spool the agent's last records, then let go; the own ring is removed when all of it is spooled."""
        self.ring.close()
        for _ in range(LAST_LOOKS):
            self.gather()
            if not self.commit():
                break
        own = self.processes[self.ring.directory.name]
        if not self._disk_full:
            own.remove()
        for process in self.processes.values():
            process.close()
        self.spool.close()

    def _take(self, process: TrackedProcess, harvest: Harvest) -> None:
        self._cursors[harvest.key] = harvest.cursor
        if harvest.part is None:
            return
        self._parts.append(harvest.part)
        if harvest.part.lost:
            self._lost[process.key] = self._lost.get(process.key, 0) + harvest.part.lost
        if process.workload is not None:
            process.workload.add_slots(harvest.part)

    def _put_back(self, error: OSError) -> None:
        """The rings are the buffer now: read the same again next time."""
        for process in self.processes.values():
            process.rewind(self.spool.cursors)
        if not self._disk_full:
            self._say(
                f"the spool in {self._settings.spool} cannot be written ({error}); the rings keep what is new"
            )
        self._disk_full = True

    def _still_there(self, key: str) -> bool:
        return (self._host_directory / key.partition("/")[0]).exists()

    def _targets(self) -> list[Target]:
        return [Target(process.pid, process.rank, process.about.get("device")) for process in self.trainers()]

    def _heartbeat(self, process: TrackedProcess, state: str | None) -> Place:
        """Record one; where the process is."""
        attrs: dict[str, Any] = {}
        spans = process.open_spans()
        main = process.readers.get("main.ring")
        # What was started and is not waited for holds nobody.
        holding = [s for s in spans if s["kind"] == "collective" and (not s.get("async") or s.get("t_wait"))]
        collective = max(holding, key=lambda span: span["t0"], default=None)
        last = collective or process.last_collective()
        phase = next((span for span in spans if span["kind"] == "phase"), None)
        step = main.last_step() if main else None
        attrs["state"] = state or _state(process, collective, phase)
        if last:
            attrs.update(group=last["group"], seq=last["seq"], op=last["name"])
        if phase:
            attrs["phase"] = phase["name"]
        since = collective or phase
        if since:
            attrs["since_ns"] = self.spool.anchor.unix(since["t0"])
        # In nothing that is recorded: it has been there since the last call that it left.
        place = since["t0"] if since else last["t1"] if last else 0
        if place > 0 and not process.ended and (stack := process.whereabouts.stack(place, time.monotonic_ns())):
            attrs["stack"] = stack
        if step is not None:
            attrs["step"] = step
        self.ring.event("heartbeat", "", rank=process.rank, step=step, attrs=attrs)
        return place, step

    def _record_end(self, process: TrackedProcess) -> None:
        status, clean = process.exit_status, process.closed_cleanly()
        assert status is not None
        attrs: dict[str, Any] = {"exit_code": status.exit_code, "clean": clean, "pid": process.pid}
        attrs["process"] = process.key
        if status.signal is not None:
            attrs["signal"] = status.signal
        failed = bool(status.exit_code) if status.exit_code is not None else not clean
        error = process.reported_error()
        if error is not None:
            self.ring.event(
                "process.error", f"{error['type']}: {error['message']}", "error", process.rank, None, error
            )
        who = f"rank {process.rank}" if process.rank is not None else f"process {process.pid}"
        severity = "error" if failed else "info"
        self.ring.event("process.exit", f"{who} {status.text}", severity, process.rank, None, attrs)

    def _record_losses(self) -> None:
        """Slots overwritten before they were read, batches the spool gave up: counters, when they grew."""
        t_ns, found = time.monotonic_ns(), []
        for process in self.trainers():
            if process.overwritten != self._reported_lost.get(process.key, 0):
                self._reported_lost[process.key] = process.overwritten
                lost = float(process.overwritten)
                found.append(Reading("lens.recorder.overwritten", lost, t_ns, rank=process.rank))
        dropped = self.spool.counts.dropped_batches
        if dropped != self._reported_dropped:
            self._reported_dropped = dropped
            found.append(Reading("lens.spool.dropped", float(dropped), t_ns))
            found.append(Reading("lens.collector.dropped", float(self.spool.counts.dropped_slots), t_ns))
            text = f"the spool was full: {dropped} batches dropped so far, {self.spool.counts.dropped_slots} slots"
            self.ring.event("spool.dropped", text, "warning", attrs=vars(self.spool.counts))
        self.ring.write(found, self.device_ranks)

    def _record_anchor(self) -> None:
        """Both clocks now, and how far they have moved against the run's fixed anchor."""
        now = take_anchor()
        attrs = {
            "monotonic_ns": now.monotonic_ns,
            "unix_ns": now.unix_ns,
            "error_ns": now.error_ns,
            "offset_ns": now.unix_ns - self.spool.anchor.unix(now.monotonic_ns),
        }
        self.ring.event("clock.anchor", "", attrs=attrs)

    def health(self) -> list[Reading]:
        """How the spool is doing."""
        t_ns, counts = time.monotonic_ns(), self.spool.counts
        values = {
            "lens.spool.size": self.spool.size,
            "lens.spool.dropped": counts.dropped_batches,
            "lens.collector.dropped": counts.dropped_slots,
            "lens.spool.corrupt": counts.damaged,
            "lens.spool.quarantined": counts.quarantined,
        }
        return [Reading(name, float(value), t_ns) for name, value in values.items()]


def _state(process: TrackedProcess, collective: Mapping[str, Any] | None, phase: Mapping[str, Any] | None) -> str:
    with contextlib.suppress(OSError):
        if process.watch.state() in ("T", "t"):
            return "stopped"
    if collective is not None:
        return "collective"
    return "data" if phase is not None and phase["name"] == "data" else "running"


def _described(device: DeviceInfo | None) -> dict[str, Any]:
    if device is None:
        return {}
    return {
        "device": device.name,
        "vendor": device.vendor,
        "model": device.model,
        "uuid": device.uuid,
        "simulated": device.simulated,
    }
