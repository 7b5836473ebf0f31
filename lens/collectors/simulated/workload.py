"""From a rank's ring slots to work for its simulated card.

Forward, backward and optimizer phases are computing, h2d is copying, collectives are communication (and count as
busy, as on a real card), `train.flops` counts the FLOPs done. Slots come late, when a phase has ended; a phase that
is still open counts up to now, so that no work is counted twice and a long phase does not look idle.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lens.collectors.simulated.device import SimDevice
from lens.collectors.simulated.network import crossing_share
from lens.slots import (
    COLLECTIVE,
    LABEL_SEPARATOR,
    NULL,
    PHASE,
    ROW,
    SLOT_BYTES,
    RingPart,
    iter_records,
)

_HEAD = struct.Struct("<16q")
_LOW = (1 << 32) - 1
_PHASE_KINDS = {"forward": "compute", "backward": "compute", "optimizer": "compute", "h2d": "copy"}
_FLOPS_METRIC = "train.flops"


def sent_share(operation: str, ranks: int) -> tuple[float, float]:
    """Bytes (sent, received) of a ring algorithm for each byte of this rank's input buffer."""
    if ranks < 2:
        return 0.0, 0.0
    part = (ranks - 1) / ranks
    shares = {
        "all_reduce": (2 * part, 2 * part),
        "reduce_scatter": (part, part),
        "all_gather": (ranks - 1.0, ranks - 1.0),
        "all_to_all": (part, part),
        "broadcast": (1.0, 1.0),
        "reduce": (1.0, 1.0),
        "send": (1.0, 0.0),
        "recv": (0.0, 1.0),
    }
    return shares.get(operation, (0.0, 0.0))


@dataclass
class RankWorkload:
    """What one rank gives its card; keeps how far each kind of work has been counted."""

    device: SimDevice
    about: Mapping[str, Any]
    local_ranks: frozenset[int] = frozenset()
    """Ranks on this host: their transfers go over the scale-up link, others over PCIe to the network card."""
    _counted_to: dict[str, int] = field(default_factory=dict)
    _flops_before: float | None = None
    _comm: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=4096))
    """Communication counted so far that a phase still to come may contain."""

    def add_slots(self, part: RingPart) -> None:
        """Take over the work in these slots."""
        strings, slots = part.strings, part.slots
        index, total = 0, part.count
        while index < total:
            words = _HEAD.unpack_from(slots, index * SLOT_BYTES)
            kind, more = words[1] & 0xFF, words[1] >> 8 & 0xFFFFFF
            if kind == PHASE:
                self._phase(_text(strings, words[5]), words[2], words[3])
            elif kind == COLLECTIVE:
                self._collective(strings, words)
            elif kind == ROW and _FLOPS_METRIC in (_text(strings, words[5]) or ""):
                end = (index + 1 + more) * SLOT_BYTES
                self._flops(RingPart({}, strings, slots[index * SLOT_BYTES : end], words[0]))
            index += 1 + more

    def add_open(self, spans: Sequence[Mapping[str, Any]], now_ns: int) -> None:
        """Count spans that are still open up to now."""
        for span in sorted(spans, key=lambda span: span["kind"] != "collective"):
            if span["kind"] == "phase":
                self._phase(span["name"], span["t0"], now_ns)
            elif span["kind"] == "collective" and span["t0"] and (not span.get("async") or span.get("t_wait")):
                self._count("comm", span["t0"], now_ns)

    def _phase(self, name: str | None, t0: int, t1: int) -> None:
        kind = _PHASE_KINDS.get(name or "")
        if kind is not None and t1 != NULL:
            self._count(kind, t0, t1)

    def _collective(self, strings: list[str], words: tuple[int, ...]) -> None:
        if words[3] != NULL:
            self._count("comm", words[2], words[3])
        size = words[7]
        if size == NULL or size <= 0:
            return
        members = self._members(_text(strings, words[5] >> 32))
        operation = _text(strings, words[5]) or ""
        sent, received = sent_share(operation, len(members))
        link = "nvlink" if members <= self.local_ranks else "pcie"
        self.device.transfer(link, size * sent, size * received)
        here = max(1, len(members & self.local_ranks))
        sent, received = crossing_share(operation, len(members), here)
        self.device.transfer("network", size * sent, size * received)

    def _members(self, group: str | None) -> frozenset[int]:
        """Global ranks of a group named ``kind/index``; all ranks when the run did not describe it.

        Point to point is ``pp/<index>:<source>-<destination>``.
        """
        kind, _, index = (group or "").partition("/")
        pair = index.partition(":")[2].split("-")
        if len(pair) == 2 and all(rank.isdigit() for rank in pair):
            return frozenset(int(rank) for rank in pair)
        groups = (self.about.get("groups") or {}).get(kind)
        if groups and index.isdigit() and int(index) < len(groups):
            return frozenset(groups[int(index)])
        return frozenset(range(int(self.about.get("world_size") or 0)))

    def _count(self, kind: str, t0: int, t1: int) -> None:
        """Count busy time not counted before; what a phase spent in collectives is not computing."""
        start = max(t0, self._counted_to.get(kind, 0))
        if t1 <= start:
            return
        self._counted_to[kind] = t1
        if kind == "comm":
            self._comm.append((start, t1))
            inside = 0
        else:
            while self._comm and self._comm[0][1] <= start:
                self._comm.popleft()
            inside = sum(max(0, min(t1, end) - max(start, begin)) for begin, end in self._comm)
        self.device.work(kind, (t1 - start - inside) * 1e-9)

    def _flops(self, part: RingPart) -> None:
        for record in iter_records(part):
            for key, value in record["values"].items():
                if key.split(LABEL_SEPARATOR, 1)[0] != _FLOPS_METRIC:
                    continue
                before, self._flops_before = self._flops_before, value
                if before is not None and value >= before:
                    self.device.work("compute", 0.0, flops=value - before)


def _text(strings: list[str], word: int) -> str | None:
    index = word & _LOW
    return strings[index] if 0 < index < len(strings) else None
