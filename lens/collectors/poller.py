"""When each group of each collector is read; every reading is timed, and a costly one is read less often."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from lens.collectors.protocol import Collector, CollectorEvent, Group, Reading

BUDGET = 0.01
"""Share of its period that reading a group may take."""
SLOWEST = 16
_JUDGED = 5
_EVENT_WAIT_S = 5.0


@dataclass
class _Entry:
    collector: Collector
    group: Group
    due: float = 0.0
    factor: int = 1
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=_JUDGED))


class Poller:
    """Reads the groups of some collectors when they are due.

    Args:
        collectors: opened collectors.
    """

    def __init__(self, collectors: Sequence[Collector]) -> None:
        self._entries = [_Entry(collector, group) for collector in collectors for group in collector.groups()]

    def next_due(self) -> float:
        """When the next group is due, by ``time.monotonic()``."""
        return min((entry.due for entry in self._entries), default=float("inf"))

    def period_of(self, backend: str, group: str) -> float:
        """How often a group is read now, in seconds.

        Raises:
            KeyError: no such group.
        """
        for entry in self._entries:
            if (entry.collector.backend, entry.group.name) == (backend, group):
                return entry.group.period_s * entry.factor
        raise KeyError(f"{backend}/{group}")

    def poll(self, now: float) -> list[Reading]:
        """What is due by now, and how long each group took."""
        readings: list[Reading] = []
        for entry in self._entries:
            if entry.due <= now:
                readings += self._read(entry)
                entry.due = now + entry.group.period_s * entry.factor
        return readings

    def _read(self, entry: _Entry) -> list[Reading]:
        started = time.perf_counter()
        readings = list(entry.collector.read(entry.group.name))
        took = time.perf_counter() - started
        entry.durations.append(took)
        self._pace(entry)
        labels = {"backend": entry.collector.backend, "group": entry.group.name}
        readings.append(Reading("lens.collector.read.duration", took, time.monotonic_ns(), labels))
        return readings

    def _pace(self, entry: _Entry) -> None:
        """Judge by the best of the last few: on a busy host one reading may simply have lost its processor."""
        if len(entry.durations) < _JUDGED:
            return
        best, allowed = min(entry.durations), BUDGET * entry.group.period_s * entry.factor
        if best > allowed and entry.factor < SLOWEST:
            entry.factor *= 2
            entry.durations.clear()
        elif entry.factor > 1 and best < allowed / 4:
            entry.factor //= 2
            entry.durations.clear()


class EventPump:
    """Waits for a collector's events in a thread of its own and keeps them until they are fetched."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._found: queue.SimpleQueue[CollectorEvent] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"lens-events-{collector.backend}", daemon=True)
        self._thread.start()

    def fetch(self) -> list[CollectorEvent]:
        """Events since the last call."""
        found = []
        while not self._found.empty():
            found.append(self._found.get())
        return found

    def stop(self) -> None:
        """Wait no longer; the thread ends with its current wait."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            for event in self._collector.events(_EVENT_WAIT_S):
                self._found.put(event)
