"""What every collector gives, whichever vendor or source it reads.

A collector is opened once, read group by group, and closed. What it cannot read it leaves out: a reading that is
not there means "unknown", and no reading ever stands for a zero that was not measured. Units are those of
`lens.catalogue`, converted where the value is read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Values = list[tuple[str, float, Mapping[str, str]]]
"""Metric, value and labels of a point."""


@dataclass(frozen=True)
class Probe:
    """Whether a source exists here."""

    available: bool
    reason: str = ""
    """One sentence that says why not; empty when available."""


@dataclass(frozen=True)
class DeviceInfo:
    """One accelerator, described once."""

    uuid: str
    index: int
    name: str
    """How records call it, such as ``host3/gpu1``."""
    vendor: str
    model: str
    pci: str = ""
    memory_bytes: int | None = None
    peaks: Mapping[str, float] = field(default_factory=dict)
    """Dense peaks known for this model: FLOP/s by number format, ``memory`` in bytes/s."""
    driver: str = ""
    simulated: bool = False


@dataclass(frozen=True)
class Group:
    """Metrics read together."""

    name: str
    period_s: float


@dataclass(frozen=True)
class Reading:
    """One value at one moment (CLOCK_MONOTONIC ns, like everything in a ring)."""

    metric: str
    value: float
    t_ns: int
    labels: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    rank: int | None = None


@dataclass(frozen=True)
class CollectorEvent:
    """Something a device reports on its own, such as an Xid."""

    kind: str
    severity: str
    text: str
    t_ns: int
    device: str | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ProcessUse:
    """One process on one device."""

    pid: int
    device: str
    memory_bytes: int | None = None
    utilisation: float | None = None


class Collector(Protocol):
    """A source of readings. A source that has no devices, events or processes of its own says nothing about them."""

    backend: str
    """Short name of the source: host, process, nvidia."""

    @abstractmethod
    def probe(self) -> Probe:
        """Open the source. Never raises, never prints, takes less than a second."""

    def devices(self) -> Sequence[DeviceInfo]:
        """The devices found; empty for sources that have none."""
        return ()

    @abstractmethod
    def groups(self) -> Sequence[Group]:
        """The groups of metrics and how often each is read."""

    @abstractmethod
    def read(self, group: str) -> Sequence[Reading]:
        """One reading of a group; what cannot be read is absent."""

    def events(self, timeout_s: float) -> Sequence[CollectorEvent]:
        """Events since the last call; waits up to `timeout_s` for the first, in a thread of its own."""
        return ()

    def processes(self) -> Sequence[ProcessUse]:
        """Which processes use which device, as far as the source says."""
        return ()

    def close(self) -> None:
        """Let go of the source."""
        return


def proc_is_there(root: Path) -> Probe:
    """Whether Linux's /proc hangs below `root`."""
    return Probe(True) if (root / "proc/stat").exists() else Probe(False, "there is no /proc here")
