"""Samples of devices, processes and hosts, laid beside the steps: gauges, bit masks and counters of a rank."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from lens.diagnosis.arrays import Array, Floats, Ints
from lens.diagnosis.select import Timeline
from lens.diagnosis.topology import Topology
from lens.tables import Tables

LABELLED = {
    "process.context_switches": "involuntary",
    "hw.temperature": "core",
    "system.paging.operations": "in",
    "process.paging.faults": "major",
    "system.memory.usage": "used",
    "host.pressure.some": "memory",
    "hw.errors": "uncorrected",
}
"""Metrics of several kinds of which one is wanted; a sample without labels counts as it."""
HOST_WIDE = ("system.paging.operations", "system.memory.usage", "system.memory.limit", "host.pressure.some")
"""Metrics that a host gives once for all of its ranks."""
STRICT = ("hw.errors", "process.paging.faults")
"""Metrics of which other kinds are common and harmless: where the wanted one is not labelled, there is none."""
CORE_NAMES = ("core", "edge", "junction", "hotspot", "gpu")


@dataclass(frozen=True)
class Series:
    """Samples of one metric, ordered by rank and time. step: index of the step from which each is visible."""

    row: Ints
    step: Ints
    t_ns: Ints
    value: Floats

    def of(self, row: int, low: int, high: int) -> slice:
        """The samples of a rank from step index low to high, both included."""
        begin, end = self._begins.get(row, (0, 0))
        steps = self.step[begin:end]
        return slice(begin + int(steps.searchsorted(low, "left")), begin + int(steps.searchsorted(high, "right")))

    @cached_property
    def _begins(self) -> dict[int, tuple[int, int]]:
        """Where the samples of each rank begin and end."""
        rows, begins = np.unique(self.row, return_index=True)
        return dict(zip(rows.tolist(), pairwise([*begins.tolist(), len(self.row)]), strict=True))


class Signals:
    """Series by metric, read from the tables when first asked for."""

    def __init__(self, tables: Tables, timeline: Timeline, topology: Topology) -> None:
        self._tables, self._timeline, self._topology = tables, timeline, topology
        self._series: dict[str, Series | None] = {}
        self._parts: dict[str, list[tuple[dict[str, str], Series]]] = {}
        devices = {name: row for row, name in enumerate(topology.device) if name}
        self._row_of_device = np.array([devices.get(text, -1) for text in tables.strings] + [-1], np.int64)
        self._xids = self._read_xids()

    def series(self, metric: str) -> Series | None:
        """The samples of a metric that belong to a rank (by itself or by its card); None without any."""
        if metric not in self._series:
            self._series[metric] = self._read(metric)
        return self._series[metric]

    def parts(self, metric: str) -> list[tuple[dict[str, str], Series]]:
        """The samples of a metric that counts several things (processes, kinds of rows), by their labels."""
        if metric not in self._parts:
            mine = self._judged(metric)
            labels = self._tables.samples["labels"][mine]
            found = [(code, self._series_of(mine[labels == code])) for code in np.unique(labels).tolist()]
            self._parts[metric] = [
                (json.loads(self._tables.strings[code]) if code >= 0 else {}, series)
                for code, series in found if series is not None
            ]  # fmt: skip
        return self._parts[metric]

    def xids(self, row: int) -> list[tuple[int, int]]:
        """Errors that a rank's card reported: the step from which each is visible, and its number, in order of time."""
        return self._xids.get(row, [])

    def xid_rows(self) -> list[int]:
        """Ranks whose cards reported any."""
        return sorted(self._xids)

    def gauge(self, metric: str, row: int, low: int, high: int) -> Floats:
        """Values seen from step index low to high."""
        series = self.series(metric)
        return np.zeros(0) if series is None else series.value[series.of(row, low, high)]

    def rate(self, metric: str, row: int, low: int, high: int) -> float | None:
        """Growth per second of a counter between its first and last sample in these steps; resets count as zero.

        None with fewer than two samples half a second apart.
        """
        series = self.series(metric)
        if series is None:
            return None
        part = series.of(row, low, high)
        t_ns, value = series.t_ns[part], series.value[part]
        if len(value) < 2 or t_ns[-1] - t_ns[0] < 500_000_000:
            return None
        return float(np.maximum(np.diff(value), 0).sum() / ((t_ns[-1] - t_ns[0]) * 1e-9))

    def _read(self, metric: str) -> Series | None:
        mine = self._judged(metric)
        if metric in LABELLED and len(mine):
            mine = mine[self._wanted(self._tables.samples["labels"][mine], LABELLED[metric], metric in STRICT)]
        return self._series_of(mine, metric in HOST_WIDE)

    def _judged(self, metric: str) -> Ints:
        """Rows of the table of samples with finite values of a metric."""
        table = self._tables.samples
        mine: Ints = np.flatnonzero(table["metric"] == self._tables.code(metric))
        mine = mine[np.isfinite(table["value"][mine])]
        if len(self._timeline):
            # Once the last step is over, idle cards and processes say nothing about it.
            mine = mine[table["t_ns"][mine] <= self._timeline.ended_ns[-1]]
        return mine

    def _series_of(self, mine: Ints, host_wide: bool = False) -> Series | None:
        table = self._tables.samples
        row = self._topology.row(table["rank"][mine])
        row = np.where(table["rank"][mine] >= 0, row, self._row_of_device[table["device"][mine]])
        if host_wide:
            mine, row = self._to_ranks(mine, row)
        mine, row = mine[row >= 0], row[row >= 0]
        if not len(mine):
            return None
        value, t_ns = table["value"][mine], table["t_ns"][mine]
        order = np.lexsort((value, t_ns, row))
        again = np.r_[(np.diff(row[order]) == 0) & (np.diff(t_ns[order]) == 0), False]
        order = order[~again]
        visible = self._timeline.visible_from(table["step"][mine], t_ns)
        step = visible[order]
        # A late sample must not break the order of steps that the search relies on.
        ordered = np.lexsort((t_ns[order], step, row[order]))
        order, step = order[ordered], step[ordered]
        return Series(row[order], step, t_ns[order], value[order])

    def _read_xids(self) -> dict[int, list[tuple[int, int]]]:
        table = self._tables.events
        mine = np.flatnonzero(table["kind"] == self._tables.code("gpu.xid"))
        mine = mine[np.lexsort((table["attrs"][mine], table["t_ns"][mine]))]
        row = self._topology.row(table["rank"][mine])
        row = np.where(table["rank"][mine] >= 0, row, self._row_of_device[table["device"][mine]])
        step = self._timeline.visible_from(table["step"][mine], table["t_ns"][mine])
        found: dict[int, list[tuple[int, int]]] = {}
        # What is told of is how often the card reported: a record that arrived twice is one report.
        reports = zip(
            row.tolist(), step.tolist(), table["t_ns"][mine].tolist(), table["attrs"][mine].tolist(), strict=True
        )
        for place, at, _, code in dict.fromkeys(reports):
            xid = json.loads(self._tables.strings[code]).get("xid") if code >= 0 else None
            if place >= 0 and isinstance(xid, (int, float)):
                found.setdefault(place, []).append((at, int(xid)))
        return found

    def _to_ranks(self, mine: Ints, row: Ints) -> tuple[Ints, Ints]:
        """Samples of a host stand once for each of its ranks."""
        hosts: dict[str, list[int]] = {}
        for place, name in enumerate(self._topology.host):
            if name:
                hosts.setdefault(name, []).append(place)
        bearing = np.flatnonzero(row < 0)
        names = self._tables.texts(self._tables.samples["host"][mine[bearing]])
        at = [
            (number, place)
            for number, name in zip(bearing.tolist(), names, strict=True)
            for place in hosts.get(name or "", ())
        ]
        number = np.array([pair[0] for pair in at], np.int64)
        places = np.array([pair[1] for pair in at], np.int64)
        known = np.flatnonzero(row >= 0)
        return np.concatenate([mine[known], mine[number]]), np.concatenate([row[known], places])

    def _wanted(self, labels: Array, name: str, strict: bool) -> Array:
        names = CORE_NAMES if name == "core" else (name,)
        accepted = {
            code: code < 0 or bool(set(json.loads(self._tables.strings[code]).values()) & set(names))
            for code in np.unique(labels).tolist()
        }
        if not any(accepted.values()) and not strict:
            return np.ones(len(labels), bool)
        return np.array([accepted[code] for code in labels.tolist()])
