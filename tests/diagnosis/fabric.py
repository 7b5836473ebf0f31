"""The way between the ranks of a simulated cluster: ports, switches, what faults do to them, and what ports count.

A collective's nominal seconds are mostly bytes over bandwidth and a little latency. A fault lengthens the part it
touches, of those collectives alone that cross its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cluster import Cluster, Writer

RATE = 50e9
LATENCY_SHARE = 0.02
"""Of a large collective's nominal seconds."""
TRANSMIT = json.dumps({"network.io.direction": "transmit", "port": "1"}, sort_keys=True)
PORT = json.dumps({"port": "1"})


class Fabric:
    """Transfers and counters of a cluster. Strengths of faults are factors on the seconds they touch."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.random = np.random.default_rng([cluster.seed, 13])
        self.host = np.arange(cluster.ranks) // max(1, cluster.ranks // cluster.hosts)
        self.names = sorted({name for name in map(self.port, range(cluster.ranks)) if name})
        self.of_rank = np.array(
            [self.names.index(self.port(r) or self.names[0]) for r in range(cluster.ranks)] if self.names else []
        )
        zero = np.zeros(len(self.names))
        self.sent, self.waited, self.told, self.again = zero.copy(), zero.copy(), zero.copy(), zero.copy()
        self.card_errors, self.throttled = np.zeros(cluster.ranks), np.zeros(cluster.ranks)
        # Share of the time that each process is kept off the processors; some always lose more than others.
        self.kept_off = np.random.default_rng([cluster.seed, 19]).uniform(0.1, 0.25, cluster.ranks)
        self.delayed = np.zeros(cluster.ranks)

    def port(self, rank: int) -> str | None:
        """The port a rank sends through: its own, or its host's only one."""
        host, local = divmod(rank, max(1, self.cluster.ranks // self.cluster.hosts))
        return {"rank": f"host{host}/mlx5_{local}", "host": f"host{host}/mlx5_0"}.get(self.cluster.ports)

    def switch(self, rank: int) -> str | None:
        """The leaf switch of a rank's host."""
        per = self.cluster.hosts_per_switch
        return f"leaf{self.host[rank] // per}" if per else None

    def seconds(self, step: int, members: np.ndarray, op: str, nominal: float, small: bool) -> np.ndarray:
        """What a transfer takes each member, from the last entry on."""
        crosses = len(set(self.host[members].tolist())) > 1
        bandwidth = 0.0 if small else nominal * (1 - LATENCY_SHARE)
        weather = WEATHER[self.cluster.weather](self, step)
        extra = np.zeros(len(members)) + (weather - 1) * nominal
        for fault in self.cluster.faults:
            if fault.kind in LENGTHENS and fault.active(step):
                # A fault that names nobody is behind everybody.
                touched = np.isin(members, fault.ranks) if fault.ranks else np.ones(len(members), bool)
                more = bandwidth * (fault.strength - 1)
                extra = extra + LENGTHENS[fault.kind](self, fault.strength, more, crosses, touched, op)
        if crosses and not small and self.names:
            fast = not any(f.kind == "fallback" and f.active(step) for f in self.cluster.faults)
            np.add.at(self.sent, self.of_rank[members], float(fast) * RATE * nominal / 2)
        return nominal + extra

    def passed(self, step: int, seconds: float) -> None:
        """Let the counters grow over a step."""
        self.waited += 0.002 * seconds
        self.delayed += self.kept_off * seconds
        self.told += self.random.poisson(0.2, len(self.names))
        for fault in self.cluster.faults:
            if not fault.active(step):
                continue
            ports = (
                np.unique(self.of_rank[list(fault.ranks)])
                if self.names and fault.ranks
                else np.arange(len(self.names))
            )
            if fault.kind == "crowded":
                self.waited[ports] += 0.3 * seconds
                self.told[ports] += self.random.poisson(5 + 100 * seconds, len(ports))
            elif fault.kind == "link":
                self.waited[ports] += 0.3 * seconds
            elif fault.kind == "loss":
                self.again[ports] += self.random.poisson(20, len(ports))
            elif fault.kind == "card_link":
                self.card_errors[list(fault.ranks)] += self.random.poisson(5)
            elif fault.kind == "quota":
                self.throttled[list(fault.ranks)] += 0.3 * seconds

    def sample(self, writer: Writer, step: int, times: np.ndarray) -> None:
        """What the agents read of ports and of the cards' links; times: by rank."""
        c = self.cluster
        cards = writer.codes(c._device(r) for r in range(c.ranks))
        writer.add(
            "samples", metric="gpu.link.errors", value=self.card_errors, rank=np.arange(c.ranks), device=cards,
            t_ns=times, labels=json.dumps({"error.type": "crc", "link": "0"}, sort_keys=True),
        )  # fmt: skip
        writer.add(
            "samples",
            metric="container.cpu.throttled.time",
            value=self.throttled,
            rank=np.arange(c.ranks),
            t_ns=times,
        )
        if not self.names:
            return
        rate = np.full(len(self.names), RATE)
        for fault in c.faults:
            if fault.kind == "link" and fault.active(step) and c.rate_known:
                rate[np.unique(self.of_rank[list(fault.ranks)])] /= 4
        first = [int(np.flatnonzero(self.of_rank == place)[0]) for place in range(len(self.names))]
        hosts = writer.codes(name.split("/")[0] for name in self.names)
        for metric, values, labels in (
            ("hw.network.io", self.sent, TRANSMIT), ("hw.network.bandwidth.limit", rate, PORT),
            ("net.ib.xmit_wait.time", self.waited, PORT), ("net.roce.cnp_sent", self.told, PORT),
            ("net.rdma.retransmits", self.again, PORT),
        ):  # fmt: skip
            writer.add(
                "samples", metric=metric, value=values, host=hosts, device=writer.codes(self.names), labels=labels,
                t_ns=times[first],
            )  # fmt: skip


Seconds = np.ndarray | float


def _link(fabric: Fabric, strength: float, more: float, crosses: bool, touched: np.ndarray, op: str) -> Seconds:
    """Out of a slow port all-to-all reaches the others late; the sender itself is done sooner."""
    if not crosses or not touched.any():
        return 0.0
    return np.where(touched, 0.4, 1.0) * more if op == "all_to_all" else more


def _queue(fabric: Fabric, strength: float, more: float, crosses: bool, touched: np.ndarray, op: str) -> Seconds:
    """Sums wait in a queue on their way out; of two ranks the sender has what it needs sooner, in a ring nobody."""
    if not crosses or not touched.any() or op == "all_to_all":
        return 0.0
    return np.where(touched, 0.5, 1.0) * more if len(touched) == 2 else more


def _loss(fabric: Fabric, strength: float, more: float, crosses: bool, touched: np.ndarray, op: str) -> Seconds:
    hit = crosses and touched.any() and fabric.random.random() < 0.4
    return more * fabric.random.exponential(2.0) if hit else 0.0


def _crowded(fabric: Fabric, strength: float, more: float, crosses: bool, touched: np.ndarray, op: str) -> Seconds:
    return more * float(np.exp(0.3 * fabric.random.standard_normal())) if crosses and touched.any() else 0.0


def _latency(fabric: Fabric, strength: float, more: float, crosses: bool, touched: np.ndarray, op: str) -> Seconds:
    return strength * 0.01 * fabric.cluster.step_s if crosses else 0.0


def _fallback(fabric: Fabric, strength: float, more: float, crosses: bool, touched: np.ndarray, op: str) -> Seconds:
    return more if crosses else 0.0


def _card_link(
    fabric: Fabric, strength: float, more: float, crosses: bool, touched: np.ndarray, op: str
) -> Seconds:
    return more if not crosses and touched.any() else 0.0


def _quota(fabric: Fabric, strength: float, more: float, crosses: bool, touched: np.ndarray, op: str) -> Seconds:
    return 0.5 * more * float(fabric.random.random()) if touched.any() else 0.0


LENGTHENS: dict[str, Callable[[Fabric, float, float, bool, np.ndarray, str], Seconds]] = {
    "link": _link, "queue": _queue, "loss": _loss, "crowded": _crowded, "latency": _latency, "fallback": _fallback,
    "card_link": _card_link, "quota": _quota,
}  # fmt: skip
"""Seconds that a fault adds to a transfer: strength, bandwidth seconds × (strength - 1), whether the group leaves a
host, which members sit behind the fault, operation."""


def _blocks(fabric: Fabric, step: int) -> float:
    """Other users of the fabric: for 5 to 40 steps everything takes up to 30 % longer."""
    random = np.random.default_rng([fabric.cluster.seed, 17, step // 23])
    return 1 + 0.3 * float(random.random()) * float(random.random() < 0.5)


def _bursts(fabric: Fabric, step: int) -> float:
    return 1 + 10 * float(fabric.random.random()) if fabric.random.random() < 0.01 else 1.0


WEATHER: dict[str, Callable[[Fabric, int], float]] = {
    "calm": lambda fabric, step: 1.0,
    "uneven": lambda fabric, step: float(np.exp(0.3 * fabric.random.standard_normal())),
    "blocks": _blocks,
    "bursts": _bursts,
}
"""What healthy fabrics do: a factor on every transfer."""
