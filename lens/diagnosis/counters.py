"""Counters and gauges of devices (network ports, card links), all devices of a metric at once.

A device may count in several series (ports, links, kinds of error): they add up. Growth is taken series by series;
a decrease is a reset and counts as nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lens.diagnosis.arrays import Array, Floats, Ints, median, pack, starts_of
from lens.diagnosis.select import Timeline
from lens.diagnosis.topology import Topology
from lens.tables import Tables

LEAST_NS = 500_000_000
PORT_METRICS = ("hw.network.", "net.ib.", "net.roce.", "net.rdma.")


@dataclass(frozen=True)
class _Readings:
    """Samples of one metric ordered by series and time; device: place in `Counters.devices`."""

    device: Ints
    series: Ints
    step: Ints
    t_ns: Ints
    value: Floats


class Counters:
    """What devices of one kind count. devices: full names, "host3/mlx5_0", ascending."""

    def __init__(self, tables: Tables, timeline: Timeline, devices: Iterable[str]) -> None:
        self._tables, self._timeline = tables, timeline
        self.devices = sorted(set(devices))
        self._place = {name: place for place, name in enumerate(self.devices)}
        self._read: dict[tuple[str, str], _Readings | None] = {}

    def place(self, device: str | None) -> int:
        """Place of a device, -1 when it sends nothing."""
        return -1 if device is None else self._place.get(device, -1)

    def known(self, metric: str, label: str = "") -> bool:
        """Whether any device sends the metric."""
        return self._readings(metric, label) is not None

    def growth(self, metric: str, low: int, high: int, label: str = "") -> tuple[Floats, Floats]:
        """What each device counted between its first and last sample of the steps low … high, and in how many
        seconds; NaN where it has fewer than two samples half a second apart. label: part of the labels' text."""
        unknown = np.full(len(self.devices), np.nan)
        readings = self._readings(metric, label)
        if readings is None:
            return unknown, unknown
        inside = np.flatnonzero((readings.step >= low) & (readings.step <= high))
        if not len(inside):
            return unknown, unknown
        series, t_ns = readings.series[inside], readings.t_ns[inside]
        first = starts_of(series)
        last = np.r_[first[1:], len(inside)] - 1
        gained = np.r_[0.0, np.maximum(np.diff(readings.value[inside]), 0)]
        gained[first] = 0.0
        device = readings.device[inside][first]
        lasted = np.zeros(len(self.devices))
        np.maximum.at(lasted, device, (t_ns[last] - t_ns[first]) * 1e-9)
        total = np.bincount(device, weights=np.add.reduceat(gained, first), minlength=len(self.devices))
        enough = lasted * 1e9 >= LEAST_NS
        return np.where(enough, total, np.nan), np.where(enough, lasted, np.nan)

    def rate(self, metric: str, low: int, high: int, label: str = "") -> Floats:
        """Growth per second [devices]."""
        total, seconds = self.growth(metric, low, high, label)
        result: Floats = total / seconds
        return result

    def level(self, metric: str, low: int, high: int, label: str = "") -> Floats:
        """Median of a gauge over the steps low … high [devices]; NaN = no sample."""
        result = np.full(len(self.devices), np.nan)
        readings = self._readings(metric, label)
        if readings is None:
            return result
        inside = np.flatnonzero((readings.step >= low) & (readings.step <= high))
        inside = inside[np.lexsort((readings.value[inside], readings.device[inside]))]
        device, value = readings.device[inside], readings.value[inside]
        first = starts_of(device)
        count = np.diff(np.r_[first, len(inside)])
        if len(first):
            result[device[first]] = (value[first + (count - 1) // 2] + value[first + count // 2]) / 2
        return result

    def _readings(self, metric: str, label: str) -> _Readings | None:
        key = metric, label
        if key not in self._read:
            self._read[key] = self._from_tables(metric, label)
        return self._read[key]

    def _from_tables(self, metric: str, label: str) -> _Readings | None:
        table = self._tables.samples
        rows = np.flatnonzero((table["metric"] == self._tables.code(metric)) & np.isfinite(table["value"]))
        if len(self._timeline):
            rows = rows[table["t_ns"][rows] <= self._timeline.ended_ns[-1]]
        if label:
            wanted = [code for code in np.unique(table["labels"][rows]).tolist() if self._says(code, label)]
            rows = rows[np.isin(table["labels"][rows], wanted)]
        device = self._devices_of(table["device"][rows], table["host"][rows])
        rows, device = rows[device >= 0], device[device >= 0]
        if not len(rows):
            return None
        series = pack(device, table["labels"][rows])
        t_ns, value = table["t_ns"][rows], table["value"][rows]
        order = np.lexsort((value, t_ns, series))
        again = np.r_[(np.diff(series[order]) == 0) & (np.diff(t_ns[order]) == 0), False]
        order = order[~again]
        step = self._timeline.visible_from(table["step"][rows], t_ns)[order]
        return _Readings(device[order], series[order], step, t_ns[order], value[order])

    def _says(self, code: int, label: str) -> bool:
        return code >= 0 and label in self._tables.strings[code]

    def _devices_of(self, device: Array, host: Array) -> Ints:
        pairs, inverse = np.unique(pack(device, host), return_index=True, return_inverse=True)[1:]
        places = [
            self.place(full_name(self._tables.string(int(device[at])), self._tables.string(int(host[at]))))
            for at in pairs.tolist()
        ]
        return np.array([*places, -1], np.int64)[inverse]


def full_name(device: str | None, host: str | None) -> str | None:
    """A device's name with its host before it."""
    return device if device is None or "/" in device or host is None else f"{host}/{device}"


class Ports:
    """The network ports of a run and the ranks that send through each.

    of_row: place in counters.devices by place of the rank (-1 unknown). Where the run object names no port, a host
    with one port sends through it; with as many ports as ranks each has its own, in order.
    """

    def __init__(self, tables: Tables, timeline: Timeline, topology: Topology) -> None:
        self.counters = Counters(tables, timeline, _port_names(tables))
        own = [self.counters.place(name) for name in topology.nic]
        by_host: dict[str, list[int]] = {}
        for place, name in enumerate(self.counters.devices):
            by_host.setdefault(name.split("/")[0], []).append(place)
        rows_of_host: dict[str, list[int]] = {}
        for row, name_of in enumerate(topology.host):
            if name_of is not None:
                rows_of_host.setdefault(name_of, []).append(row)
        for host, rows in rows_of_host.items():
            ports = by_host.get(host, [])
            for position, row in enumerate(rows):
                if own[row] < 0 and topology.nic[row] is None and len(ports) in (1, len(rows)):
                    own[row] = ports[position % len(ports)]
        self.of_row: Ints = np.array(own, np.int64)

    def of_rows(self, rows: Iterable[int]) -> Ints:
        """Ports of these ranks, each once."""
        places = np.unique(self.of_row[np.array(sorted(rows), np.int64)])
        return places[places >= 0]


def _port_names(tables: Tables) -> set[str]:
    table = tables.samples
    codes = [code for code, text in enumerate(tables.strings) if text.startswith(PORT_METRICS)]
    rows = np.flatnonzero(np.isin(table["metric"], codes) & (table["device"] >= 0))
    pairs = np.unique(np.stack([table["device"][rows], table["host"][rows]], axis=1), axis=0)
    names = (full_name(tables.string(device), tables.string(host)) for device, host in pairs.tolist())
    return {name for name in names if name}


def risen(before: Floats, after: Floats, least: float) -> Floats:
    """How surely each rate rose above what it was, or above its peers' where it has no past [devices], 0 … 1.

    before, after: per second. least: a rate below this is nothing.
    """
    usual = np.where(np.isfinite(before), before, float(np.nan_to_num(median(after))))
    ratio = np.where(after > least, after / np.maximum(usual, least / 2), 1.0)
    with np.errstate(invalid="ignore"):
        level = np.log(np.maximum(ratio, 1.0)) / np.log(6.0)
    result: Floats = np.where(np.isfinite(after), np.clip(level, 0, 1), np.nan)
    return result
