"""Who is who in a simulated cluster: cards, hosts, ports, switches, and the groups in which ranks meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CARDS_PER_HOST = 8


@dataclass(frozen=True)
class Card:
    """A make of card. speed: of an H200; clock_mhz, power_w, heat_c: under full load; memory: bytes."""

    vendor: str
    speed: float
    clock_mhz: float
    power_w: float
    heat_c: float
    memory: float


CARDS = {
    "H200": Card("nvidia", 1.0, 1980.0, 690.0, 64.0, 141e9),
    "H100": Card("nvidia", 0.97, 1980.0, 680.0, 66.0, 80e9),
    "MI300X": Card("amd", 0.72, 2100.0, 740.0, 70.0, 192e9),
    "MI355X": Card("amd", 1.35, 2400.0, 1350.0, 72.0, 288e9),
}
"""Speeds are those of a mixture-of-experts step, not of data sheets; all that a verdict sees of them is their ratio."""


@dataclass(frozen=True)
class Layout:
    """How ranks are cut into groups: tensor parallel fastest, then expert and data parallel, pipeline stages slowest.

    ranks: in all, a multiple of tp × pp × ep. cards: makes by host, repeated. hosts_per_switch: hosts below a leaf.
    """

    ranks: int = 16
    tp: int = 1
    pp: int = 1
    ep: int = 8
    cards: tuple[str, ...] = ("H200",)
    hosts_per_switch: int = 4

    def __post_init__(self) -> None:
        if self.ranks < 2 or self.ranks % (self.tp * self.pp * self.ep):
            raise ValueError(f"{self.ranks} ranks are no multiple of tp {self.tp} × pp {self.pp} × ep {self.ep}")
        unknown = sorted(set(self.cards) - set(CARDS))
        if unknown:
            raise ValueError(f"unknown card {unknown[0]!r}; known: {', '.join(CARDS)}")

    @property
    def per_host(self) -> int:
        """Ranks of a host."""
        return min(CARDS_PER_HOST, self.ranks)

    @property
    def hosts(self) -> int:
        """Hosts of the cluster."""
        return -(-self.ranks // self.per_host)

    @property
    def host(self) -> NDArray[np.int64]:
        """Number of each rank's host [ranks]."""
        return np.arange(self.ranks) // self.per_host

    @property
    def stage(self) -> NDArray[np.int64]:
        """Pipeline stage of each rank [ranks]."""
        return np.arange(self.ranks) // (self.ranks // self.pp)

    @property
    def owner(self) -> NDArray[np.int64]:
        """Position of each rank in its expert-parallel group [ranks]."""
        return (np.arange(self.ranks) // self.tp) % self.ep

    def card(self, rank: int) -> str:
        """Make of a rank's card."""
        return self.cards[int(self.host[rank]) % len(self.cards)]

    def host_name(self, rank: int) -> str:
        """Name of a rank's host."""
        return f"host{rank // self.per_host}"

    def device_name(self, rank: int) -> str:
        """Name of a rank's card."""
        return f"{self.host_name(rank)}/gpu{rank % self.per_host}"

    def port_name(self, rank: int) -> str:
        """Name of the network port that a rank sends through."""
        return f"{self.host_name(rank)}/mlx5_{rank % self.per_host}"

    def switch_of_host(self, host: int) -> int:
        """Number of the leaf switch of a host."""
        return host // self.hosts_per_switch

    def groups(self) -> dict[str, NDArray[np.int64]]:
        """Global ranks of all groups of each kind [groups, members]; kinds of one member each are left out."""
        grid = np.arange(self.ranks).reshape(self.pp, -1, self.ep, self.tp)
        kinds = {
            "world": grid.reshape(1, -1),
            "tp": grid.reshape(-1, self.tp),
            "ep": np.moveaxis(grid, 2, 3).reshape(-1, self.ep),
            "dp": np.moveaxis(grid, 1, 3).reshape(-1, grid.shape[1]),
            "pp": np.moveaxis(grid, 0, 3).reshape(-1, self.pp),
        }
        return {kind: members for kind, members in kinds.items() if members.shape[1] > 1}

    def run(self, name: str, layers: int, experts: int, top_k: int) -> dict[str, Any]:
        """The run object, as it is posted to a server."""
        return {
            "run": name, "name": "simulated cluster", "world_size": self.ranks, "tags": ["simulated"],
            "groups": {kind: members.tolist() for kind, members in self.groups().items()},
            "ranks": [
                {
                    "rank": rank, "host": self.host_name(rank), "device": self.device_name(rank),
                    "vendor": CARDS[self.card(rank)].vendor, "model": self.card(rank),
                    "local_rank": rank % self.per_host, "nic": self.port_name(rank),
                    "switch": f"leaf{self.switch_of_host(int(self.host[rank]))}",
                }
                for rank in range(self.ranks)
            ],
            "experts": {"layers": layers, "experts": experts, "top_k": top_k},
        }  # fmt: skip
