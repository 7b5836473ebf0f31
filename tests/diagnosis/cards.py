"""What the cards and processes of a simulated cluster show, once a second of event time, and what faults do to it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cluster import Cluster, Fault, Simulation

SLOWS_CLOCK = ("compute", "thermal", "power_cap", "brake", "lower_limit")
REASONS = {"thermal": 0x40, "power_cap": 0x4, "brake": 0x80, "lower_limit": 0x4}
STALLS = ("stop", "io", "hog")
"""A step that takes seconds: the process stopped, waiting for a disk, or kept off the processor by another."""
LANES, PCIE_SPEED = 16.0, 32.0


class Cards:
    """Gauges and counters by rank."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        ranks = np.arange(cluster.ranks)
        self.device = [cluster._device(r) for r in range(cluster.ranks)]
        # Rows that failed long ago are no news.
        self.rows = np.where(ranks % 3 == 0, 2.0, 0.0)
        self.throttled = {mask: np.zeros(cluster.ranks) for mask in (0x4, 0x40, 0x80)}
        self.next_second = 0.0
        self.stalls: list[tuple[Fault, float]] = []
        self.cpu, self.cpu_at = np.zeros(cluster.ranks), 0.0

    def stalled(self, fault: Fault, second: float) -> None:
        """A rank stands still from a second on."""
        self.stalls.append((fault, second))

    def _within(self, kind: str, second: float) -> list[int]:
        """Ranks that a stall of a kind holds at a second."""
        held = [f.ranks for f, at in self.stalls if f.kind == kind and at <= second < at + f.strength]
        return [rank for ranks in held for rank in ranks]

    def _active(self, step: int, *kinds: str) -> list[Fault]:
        return [fault for fault in self.cluster.faults if fault.kind in kinds and fault.active(step)]

    def passed(self, simulation: Simulation, step: int) -> None:
        """Take the samples that are due by the end of a step."""
        for fault in self._active(step, "ecc"):
            if (step - fault.step) % 20 == 0:
                self.rows[list(fault.ranks)] += 1
                if self.cluster.xids:
                    self._xid(simulation, fault)
        while self.next_second <= float(simulation.clock.min()):
            self.next_second += 1.0
            self._sample(simulation, step, self.next_second - 1.0)

    def _xid(self, simulation: Simulation, fault: Fault) -> None:
        for rank in fault.ranks:
            simulation.writer.event(
                "gpu.xid", int(simulation.stamp(simulation.clock)[rank]), {"xid": 63}, device=self.device[rank],
                severity=2, text="Xid 63",
            )  # fmt: skip

    def _sample(self, simulation: Simulation, step: int, second: float) -> None:
        c, random, writer = self.cluster, simulation.random, simulation.writer
        clock, reasons = np.full(c.ranks, 1980.0), np.zeros(c.ranks, np.int64)
        heat, power, limit = np.full(c.ranks, 62.0), np.full(c.ranks, 610.0), np.full(c.ranks, 700.0)
        lanes = np.full(c.ranks, LANES)
        memory = 4e8 + 3e7 * (1 - np.exp(-step / 40)) + random.normal(0, 3e5, c.ranks)
        if c.capped:
            reasons |= 0x4
        for fault in self._active(step, *SLOWS_CLOCK, "leak", "pcie"):
            ranks = list(fault.ranks)
            if fault.kind in SLOWS_CLOCK:
                clock[ranks] /= fault.strength
            reasons[ranks] |= REASONS.get(fault.kind, 0)
            if fault.kind == "leak":
                memory[ranks] += fault.strength * (step - fault.step)
            elif fault.kind == "thermal":
                heat[ranks] = 90.0
            elif fault.kind == "power_cap":
                power[ranks] = 450.0
            elif fault.kind == "lower_limit":
                power[ranks], limit[ranks] = 500.0, 500.0
            elif fault.kind == "pcie":
                lanes[ranks] = LANES / 2
        ranks = np.arange(c.ranks)
        hosts = writer.codes(c._host(r) for r in range(c.ranks))
        devices = writer.codes(self.device)
        times = simulation.stamp(np.full(c.ranks, second))
        simulation.fabric.sample(writer, step, times)
        about = {"rank": ranks, "host": hosts, "device": devices, "t_ns": times}
        for mask, total in self.throttled.items():
            total += (reasons & mask) != 0
        said = (
            {"gpu.throttle.power.time": self.throttled[0x4], "gpu.throttle.thermal.time": self.throttled[0x40],
             "gpu.throttle.brake.time": self.throttled[0x80]}
            if c.throttle_counters else {"gpu.throttle.reasons": reasons}
        )  # fmt: skip
        for metric, values in {
            "gpu.clock.sm": clock + random.normal(0, 5, c.ranks), **said,
            "hw.temperature": heat + random.normal(0, 1, c.ranks),
            "hw.power": power + random.normal(0, 10, c.ranks),
            "gpu.power.limit": limit,
            "gpu.pcie.link.width": lanes, "gpu.pcie.link.width.max": np.full(c.ranks, LANES),
            "gpu.pcie.link.speed": np.full(c.ranks, PCIE_SPEED),
            "process.cpu.run_delay": simulation.fabric.delayed,
            "process.memory.usage": memory,
        }.items():  # fmt: skip
            writer.add("samples", metric=metric, value=values, **about)
        for kind, values in (("uncorrectable", self.rows), ("pending", np.zeros(c.ranks))):
            writer.add(
                "samples", metric="gpu.rows.remapped", value=values, labels=json.dumps({"kind": kind}), **about
            )
        self._users(simulation, step, about)
        standing = [rank for kind in STALLS for rank in self._within(kind, second)]
        self.cpu += np.where(np.isin(ranks, standing), 0.0, 0.9) * (second - self.cpu_at)
        self.cpu_at = second
        writer.add("samples", metric="process.cpu.time", value=self.cpu, **about)
        simulation.fabric.delayed[self._within("hog", second)] += 1.0
        if c.heartbeats:
            stopped = self._within("stop", second)
            for rank in range(c.ranks):
                if rank in stopped and c.beats_tell == "silence":
                    continue
                state = "stopped" if rank in stopped else "running"
                attrs = writer.code(json.dumps({"state": state, "step": step}))
                writer.add("events", kind="heartbeat", rank=rank, host=hosts[rank], attrs=attrs, t_ns=times[rank])

    def _users(self, simulation: Simulation, step: int, about: dict[str, np.ndarray]) -> None:
        """The trainer's own process on each card, and whoever else is there."""
        seen = [(1000 + rank, rank, 4e10) for rank in range(self.cluster.ranks)]
        seen += [(7, rank, 1e10) for fault in self._active(step, "shared") for rank in fault.ranks]
        for pid, rank, size in seen:
            simulation.writer.add(
                "samples", metric="gpu.process.memory.usage", value=size, labels=json.dumps({"pid": str(pid)}),
                host=about["host"][rank], device=about["device"][rank], t_ns=about["t_ns"][rank],
            )  # fmt: skip
