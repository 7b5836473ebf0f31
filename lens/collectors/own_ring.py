"""The agent's own ring for a run: what collectors read and what the agent itself says, in the ranks' form."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lens.collectors.protocol import CollectorEvent, Reading
from lens.collectors.spool import directory_name
from lens.recorder import Recorder
from lens.ring_files import host_directory, private_directory, start_ticks
from lens.settings import Settings
from lens.slots import COLUMN_SEPARATOR, NULL, rank_field, series_key

OWN_RING_MIB = 2
MOST_COLUMN_SETS = 512
"""Sets of columns seen together that get a string of their own; more would fill the string table."""


class OwnRing:
    """Writes readings and events of one run.

    Args:
        settings: host and place of the rings.
        run: run id.

    Raises:
        RecorderError: no room or no permission.
    """

    def __init__(self, settings: Settings, run: str) -> None:
        pid, ticks = os.getpid(), start_ticks(os.getpid())
        private_directory(settings.rings)
        host = private_directory(host_directory(settings))
        self.directory = private_directory(host / f"agent-{pid}-{ticks}-{directory_name(run)[:80]}")
        about = {
            "run": run,
            "rank": None,
            "host": settings.host,
            "role": "agent",
            "pid": pid,
            "start_ticks": ticks,
        }
        small = dataclasses.replace(settings, ring_mib=min(settings.ring_mib, OWN_RING_MIB))
        self._recorder = Recorder(self.directory / "main.ring", small, about)
        self._recorder.describe()
        self._column_sets: dict[tuple[str, ...], int] = {}

    def write(self, readings: Iterable[Reading], device_ranks: Mapping[str, int]) -> None:
        """Record readings, one row for what was read together; `device_ranks` says whose card a device is."""
        together: dict[tuple[str | None, int | None, int], dict[str, float]] = {}
        for reading in readings:
            rank = device_ranks.get(reading.device) if reading.device else reading.rank
            row = together.setdefault((reading.device, rank, reading.t_ns), {})
            row[series_key(reading.metric, dict(reading.labels))] = reading.value
        for (device, rank, t_ns), values in together.items():
            device_id = self._recorder.intern(device) if device else 0
            for columns, numbers in self._rows(values):
                self._recorder.row(columns, numbers, t_ns, NULL, device_id, rank_field(rank))

    def event(
        self,
        kind: str,
        text: str,
        severity: str = "info",
        rank: int | None = None,
        step: int | None = None,
        attrs: Mapping[str, Any] | None = None,
        device: str | None = None,
        t_ns: int | None = None,
    ) -> None:
        """Record an event; `t_ns` is CLOCK_MONOTONIC, now by default."""
        number = NULL if step is None else step
        moment = time.monotonic_ns() if t_ns is None else t_ns
        self._recorder.event(kind, text, severity, moment, number, attrs, device, rank_field(rank))

    def report(self, event: CollectorEvent, device_ranks: Mapping[str, int]) -> None:
        """Record what a device reported."""
        rank = device_ranks.get(event.device) if event.device else None
        self.event(event.kind, event.text, event.severity, rank, None, event.attrs, event.device, event.t_ns)

    def close(self) -> None:
        """Nothing more will be written."""
        self._recorder.close()

    def _rows(self, values: Mapping[str, float]) -> Iterable[tuple[int, Sequence[float]]]:
        keys = tuple(values)
        known = self._column_sets.get(keys)
        if known is None and len(self._column_sets) < MOST_COLUMN_SETS:
            known = self._column_sets[keys] = self._recorder.intern(COLUMN_SEPARATOR.join(keys))
        if known:
            return [(known, list(values.values()))]
        singles = [(self._recorder.intern(key), [value]) for key, value in values.items()]
        return [(column, value) for column, value in singles if column]
