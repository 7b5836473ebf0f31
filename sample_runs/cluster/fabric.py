"""What a collective's bytes take from the last entry on, and what the ports count of it.

Seconds are latency plus bytes on the wire over the bandwidth of the slowest way that the operation needs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sample_runs.cluster.condition import Condition, Floats
from sample_runs.cluster.layout import Layout

PORT_RATE, CARD_LINK_RATE, COPY_RATE = 50e9, 400e9, 25e9
"""Bytes per second: of a network port, of a card's links within its host, from host to card."""
PORT_LATENCY_S, CARD_LATENCY_S = 12e-6, 5e-6
JITTER = 0.05

WIRE: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n, "reduce_scatter": lambda n: (n - 1) / n, "all_gather": lambda n: n - 1,
    "all_to_all": lambda n: (n - 1) / n, "recv": lambda n: 1.0,
}  # fmt: skip
"""Bytes that cross a rank's link for each byte of its input, in a group of n."""


class Fabric:
    """The links of a cluster. sent: bytes that each rank's port has transmitted [ranks]."""

    def __init__(self, layout: Layout, random: np.random.Generator, faulty: np.random.Generator) -> None:
        self._host = layout.host
        self._random, self._faulty = random, faulty
        self.sent = np.zeros(layout.ranks)

    def seconds(self, op: str, members: NDArray[np.int64], size: Floats, now: Condition) -> Floats:
        """What the operation takes each group [groups].

        members: ranks [groups, n]. size: bytes that each sends or receives, whichever is more, of its own [groups, n].
        """
        n = members.shape[1]
        hosts = self._host[members]
        crosses = (hosts != hosts[:, :1]).any(axis=1)
        rate = np.where(crosses[:, None], PORT_RATE * now.port[members], CARD_LINK_RATE * now.inside[members])
        wire = size * WIRE[op](n)
        rounds = max(1.0, np.log2(n))
        # Rings and trees go at the pace of their slowest link; of an all-to-all the slowest pair is waited for.
        seconds: Floats = (wire / rate).max(axis=1) * np.exp(JITTER * self._random.standard_normal(len(members)))
        lossy = now.loss[members].max(axis=1)
        if (lossy > 1).any():
            hit = self._faulty.random(len(members)) < 0.5
            seconds *= np.where(crosses & hit, 1 + (lossy - 1) * self._faulty.exponential(1.0, len(members)), 1.0)
        far = PORT_LATENCY_S + now.latency_s[members].max(axis=1) / rounds
        seconds += rounds * np.where(crosses, far, CARD_LATENCY_S)
        # A process without a processor drives its transfers late too.
        seconds /= 1 - np.minimum(0.9, now.quota[members].max(axis=1))
        np.add.at(self.sent, members[crosses], (wire * now.fast[members])[crosses])
        return seconds
