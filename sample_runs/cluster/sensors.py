"""What the agents of a simulated cluster read once a second: cards, processes, ports and hosts.

Cards, ports and their links are simulated, so every number read off them says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sample_runs.cluster.condition import Condition, Floats
from sample_runs.cluster.fabric import PORT_RATE
from sample_runs.cluster.layout import CARDS, Layout
from sample_runs.cluster.writer import Writer

PERIOD_S, PERIOD_OF_MANY_S = 1.0, 10.0
HOST_MEMORY, DEVICE_MEMORY, RESERVE = 4e9, 45e9, 1.08
QUEUE = 4.0
XID_REMAPPED = 63
SIMULATED = {"simulated": "true"}
PORT = {"port": "1", **SIMULATED}
Stamp = Callable[..., NDArray[np.int64]]


class Sensors:
    """Counters that grow with the steps, and the readings of them. few: only what tells causes of slow ranks apart."""

    def __init__(self, layout: Layout, writer: Writer, random: np.random.Generator, few: bool) -> None:
        ranks = layout.ranks
        self._layout, self._writer, self._random, self._few = layout, writer, random, few
        self._period = PERIOD_OF_MANY_S if few else PERIOD_S
        self._next_s = 0.0
        self._ranks = np.arange(ranks)
        self._hosts = writer.codes(layout.host_name(rank) for rank in range(ranks))
        self._devices = writer.codes(layout.device_name(rank) for rank in range(ranks))
        self._ports = writer.codes(layout.port_name(rank) for rank in range(ranks))
        self._first_of_host = np.arange(0, ranks, layout.per_host)
        cards = [CARDS[layout.card(rank)] for rank in range(ranks)]
        self._clock, self._power, self._heat = (
            np.array([getattr(card, name) for card in cards]) for name in ("clock_mhz", "power_w", "heat_c")
        )
        zero = np.zeros(ranks)
        self._delayed, self._throttled, self._worked = zero.copy(), zero.copy(), zero.copy()
        self._waited, self._told, self._resent = zero.copy(), zero.copy(), zero.copy()
        self._errors, self._retries, self._swapped, self._remapped = (zero.copy() for _ in range(4))
        self._late = zero > 0

    def passed(self, step: int, begun: Floats, ended: Floats, now: Condition, sent: Floats, stamp: Stamp) -> None:
        """A step is over: counters grow, and what came due is read."""
        lasted = ended - begun
        self._delayed += now.off_cpu * lasted
        self._throttled += now.quota * lasted
        self._worked += 0.9 * (1 - now.off_cpu - now.quota) * lasted
        self._waited += (0.002 + now.pressed) * lasted
        self._told += self._random.poisson(0.1, len(lasted)) + np.rint(now.told * lasted)
        self._resent += now.resent
        self._errors += now.card_errors
        self._retries += now.retries
        self._swapped += now.swapped
        self._late = now.data_s > 0
        self._failing(now, stamp(ended))
        while self._next_s <= float(ended.min()):
            self._read(step, now, sent, stamp(np.full(len(lasted), self._next_s)))
            self._next_s += self._period

    def _failing(self, now: Condition, when: NDArray[np.int64]) -> None:
        """The driver's word on rows of memory that it replaces."""
        for row in np.flatnonzero(now.remapped > self._remapped).tolist():
            self._writer.event(
                "gpu.xid", int(when[row]), 1, f"Xid {XID_REMAPPED}: a row of memory is replaced", {"xid": XID_REMAPPED, **SIMULATED},
                rank=row, host=self._layout.host_name(row), device=self._layout.device_name(row),
            )  # fmt: skip
        self._remapped = np.maximum(self._remapped, now.remapped)

    def _read(self, step: int, now: Condition, sent: Floats, when: NDArray[np.int64]) -> None:
        count, draw = len(when), self._random.standard_normal
        card: dict[str, Any] = {"rank": self._ranks, "host": self._hosts, "device": self._devices, "t_ns": when}
        process: dict[str, Any] = {"rank": self._ranks, "host": self._hosts, "t_ns": when}
        sample = self._writer.samples
        sample("gpu.clock.sm", self._clock * now.clock + 5 * draw(count), SIMULATED, **card)
        sample("gpu.throttle.reasons", now.bits, SIMULATED, **card)
        sample("hw.temperature", self._heat + now.heat_c + draw(count), SIMULATED, **card)
        sample("process.cpu.run_delay", self._delayed, **process)
        if self._few:
            return
        allocated = DEVICE_MEMORY + now.device_bytes + 1e8 * draw(count)
        sample("hw.power", self._power * now.power + 8 * draw(count), SIMULATED, **card)
        sample("gpu.rows.remapped", self._remapped, {"kind": "uncorrectable", **SIMULATED}, **card)
        sample("gpu.link.errors", self._errors, {"error.type": "crc", "link": "0", **SIMULATED}, **card)
        sample("gpu.pcie.link.width", np.maximum(1, np.rint(16 * now.lanes)), SIMULATED, **card)
        sample("gpu.pcie.link.width.max", np.full(count, 16.0), SIMULATED, **card)
        sample("gpu.process.memory.usage", allocated, {"pid": "1000", **SIMULATED}, **card)
        foreign = np.flatnonzero(now.foreign_bytes > 0)
        others: dict[str, Any] = {name: values[foreign] for name, values in card.items()}
        sample("gpu.process.memory.usage", now.foreign_bytes[foreign], {"pid": "7777", **SIMULATED}, **others)
        sample("torch.memory.allocated", allocated, SIMULATED, **card)
        sample(
            "torch.memory.reserved",
            RESERVE * DEVICE_MEMORY + now.device_bytes + now.reserved_bytes,
            SIMULATED,
            **card,
        )
        sample("torch.memory.alloc_retries", self._retries, SIMULATED, **card)
        settling = 1e8 * (1 - np.exp(-step / 20))
        sample("process.memory.usage", HOST_MEMORY + settling + now.host_bytes + 2e6 * draw(count), **process)
        sample("process.cpu.time", self._worked, **process)
        sample("container.cpu.throttled.time", self._throttled, **process)
        sample("train.data.queue_depth", np.where(self._late, 0.0, QUEUE), **process)
        self._read_ports(now, sent, when)
        first = self._first_of_host
        sample(
            "system.paging.operations", self._swapped[first], {"system.paging.direction": "in"}, host=self._hosts[first],
            t_ns=when[first],
        )  # fmt: skip
        attrs = self._writer.code(f'{{"state":"running","step":{step}}}')
        self._writer.add("events", count, kind="heartbeat", text="heartbeat", attrs=attrs, **process)

    def _read_ports(self, now: Condition, sent: Floats, when: NDArray[np.int64]) -> None:
        port: dict[str, Any] = {"host": self._hosts, "device": self._ports, "t_ns": when}
        sample = self._writer.samples
        sample("hw.network.io", sent, {"network.io.direction": "transmit", **PORT}, **port)
        sample("hw.network.bandwidth.limit", PORT_RATE * now.rate, PORT, **port)
        sample("net.ib.xmit_wait.time", self._waited, PORT, **port)
        sample("net.roce.cnp_sent", self._told, PORT, **port)
        sample("net.rdma.retransmits", self._resent, PORT, **port)
