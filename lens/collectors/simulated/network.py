"""The simulated network of one host: a network card beside each accelerator, fed with what the run sends abroad.

Bytes are the run's real ones: of each collective, the share that leaves the host. The counters stand in a tree of
files that the real InfiniBand collector reads.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens.collectors.simulated.device import SimDevice
from lens.collectors.simulated.fake_sysfs import NICS, NicPort, Tree, write_infiniband

NOTICES_A_SECOND = 1000.0
"""Congestion notices of a port that is congested all the time."""


def crossing_share(operation: str, members: int, local: int) -> tuple[float, float]:
    """Bytes (sent, received) over this rank's network card for each byte of its input buffer.

    Rings visit each host once and are spread over the network cards of its ranks; in an exchange of all with all
    each rank sends what is for other hosts over its own card.

    Args:
        operation: name of the collective.
        members: ranks in the group.
        local: those of them on this host.
    """
    away = members - local
    if away <= 0 or local <= 0:
        return 0.0, 0.0
    ring = (members - 1) / members
    shares = {
        "all_reduce": (2 * ring / local, 2 * ring / local),
        "reduce_scatter": (ring / local, ring / local),
        "all_gather": ((members - 1) / local, (members - 1) / local),
        "all_to_all": (away / members, away / members),
        "broadcast": (1 / local, 1 / local),
        "reduce": (1 / local, 1 / local),
        "send": (1.0, 0.0),
        "recv": (0.0, 1.0),
    }
    return shares.get(operation, (0.0, 0.0))


@dataclass(frozen=True)
class NicFaults:
    """What is wrong with a network card, as written into its fault file."""

    down: bool = False
    congested: float = 0.0
    """Share of the time in which there is data to send and no credit."""
    retransmits: int = 0
    symbol_errors: int = 0

    @classmethod
    def from_file(cls, content: Mapping[str, Any]) -> NicFaults:
        """Faults from the JSON of a fault file; unknown keys are passed over."""
        return cls(**{key: value for key, value in content.items() if key in cls.__dataclass_fields__})


class SimulatedNetwork:
    """Network cards of one host, one beside each of its simulated accelerators.

    Args:
        cards: the accelerators by name, such as ``host1/gpu0``; their totals say what they sent abroad.
        folder: where fault files are read; the tree hangs under ``<host>.root`` in it.
    """

    def __init__(self, cards: Mapping[str, SimDevice], folder: Path) -> None:
        self._cards = list(cards.values())
        self._host = next(iter(cards)).partition("/")[0]
        self._folder = folder
        self.root = folder / f"{self._host}.root"
        self._tree = Tree(self.root)
        self.ports = [NicPort(NICS[card.profile.vendor], card.index, guid=_guid(card.uuid)) for card in self._cards]
        self._faults = [NicFaults() for _ in self.ports]
        self._before = [(0.0, 0.0) for _ in self.ports]
        self._now_ns: int | None = None
        write_infiniband(self._tree, self.ports)

    def advance(self, now_ns: int) -> None:
        """Let time go on to `now_ns` (CLOCK_MONOTONIC) and show the counters as they are then."""
        before, self._now_ns = self._now_ns, now_ns
        seconds = 0.0 if before is None else max(0.0, (now_ns - before) * 1e-9)
        for place, port in enumerate(self.ports):
            self._read_faults(place, port)
            sent = self._carry(place, port)
            faults = self._faults[place]
            port.wait_s += max(0.0, sent / port.model.speed - seconds) + faults.congested * seconds
            port.congestion_notices += faults.congested * seconds * NOTICES_A_SECOND
        write_infiniband(self._tree, self.ports)

    def _carry(self, place: int, port: NicPort) -> float:
        """Take over what the accelerator sent and received since; the bytes sent."""
        totals, before = self._cards[place].totals, self._before[place]
        sent, received = totals.network_transmit - before[0], totals.network_receive - before[1]
        self._before[place] = (totals.network_transmit, totals.network_receive)
        port.transmit += sent
        port.receive += received
        return sent

    def _read_faults(self, place: int, port: NicPort) -> None:
        file = self._folder / f"{self._host}_{port.name}.fault.json"
        try:
            faults = NicFaults.from_file(json.loads(file.read_text()))
        except FileNotFoundError:
            faults = NicFaults()
        except (OSError, ValueError, TypeError):
            # Seen half written: what was known stays until the next look.
            return
        if faults.down and port.up:
            port.link_downed += 1
        port.up = not faults.down
        port.retransmits, port.symbol_errors = faults.retransmits, faults.symbol_errors
        self._faults[place] = faults


def _guid(identity: str) -> str:
    """A node GUID in the kernel's spelling, the same for the same card."""
    digits = uuid.uuid5(uuid.NAMESPACE_URL, f"lens-nic:{identity}").hex
    return ":".join(digits[start : start + 4] for start in range(0, 16, 4))
