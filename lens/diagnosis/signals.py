"""Samples of devices, processes and hosts, laid beside the steps: gauges, bit masks and counters of a rank."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from lens.diagnosis.arrays import Array, Floats, Ints, pack
from lens.diagnosis.select import Timeline
from lens.diagnosis.topology import Topology
from lens.tables import Tables

LABELLED = {
    "process.context_switches": "involuntary",
    "hw.temperature": "core",
}
"""Metrics of several kinds of which one is wanted; a sample without labels counts as it."""
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
        begin, end = np.searchsorted(self.row, [row, row + 1])
        steps = self.step[begin:end]
        return slice(
            int(begin + np.searchsorted(steps, low, "left")), int(begin + np.searchsorted(steps, high, "right"))
        )


class Signals:
    """Series by metric, read from the tables when first asked for."""

    def __init__(self, tables: Tables, timeline: Timeline, topology: Topology) -> None:
        self._tables, self._timeline, self._topology = tables, timeline, topology
        self._series: dict[str, Series | None] = {}
        devices = {name: row for row, name in enumerate(topology.device) if name}
        self._row_of_device = np.array([devices.get(text, -1) for text in tables.strings] + [-1], np.int64)

    def series(self, metric: str) -> Series | None:
        """The samples of a metric that belong to a rank (by itself or by its card); None without any."""
        if metric not in self._series:
            self._series[metric] = self._read(metric)
        return self._series[metric]

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
        table = self._tables.samples
        mine = np.flatnonzero(table["metric"] == self._tables.code(metric))
        mine = mine[np.isfinite(table["value"][mine])]
        if len(self._timeline):
            # Once the last step is over, idle cards and processes say nothing about it.
            mine = mine[table["t_ns"][mine] <= self._timeline.ended_ns[-1]]
        if metric in LABELLED and len(mine):
            mine = mine[self._wanted(table["labels"][mine], LABELLED[metric])]
        row = self._topology.row(table["rank"][mine])
        row = np.where(table["rank"][mine] >= 0, row, self._row_of_device[table["device"][mine]])
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

    def _wanted(self, labels: Array, name: str) -> Array:
        names = CORE_NAMES if name == "core" else (name,)
        accepted = {
            code: code < 0 or bool(set(json.loads(self._tables.strings[code]).values()) & set(names))
            for code in np.unique(labels).tolist()
        }
        if not any(accepted.values()):
            return np.ones(len(labels), bool)
        return np.array([accepted[code] for code in labels.tolist()])


@dataclass(frozen=True)
class ExpertLoad:
    """Tokens that arrive at each rank's experts, summed over layers: [steps, ranks], NaN = unknown."""

    tokens: Floats

    @classmethod
    def of(cls, tables: Tables, timeline: Timeline, topology: Topology) -> ExpertLoad | None:
        """Sum what the routers of each expert-parallel group send to the experts each rank owns."""
        table = tables.vectors
        rows = np.flatnonzero((table["metric"] == tables.code("moe.expert.tokens")) & (table["length"] > 0))
        groups = {name: members for name, members in topology.members.items() if name.split("/")[0] == "ep"}
        if not len(rows) or not groups or not len(timeline):
            return None
        experts = int(np.bincount(table["length"][rows]).argmax())
        rows = rows[(table["length"][rows] == experts) & (table["step"][rows] >= 0)]
        position = np.array(
            topology.experts.get("owner")
            or [e // max(1, experts // len(next(iter(groups.values())))) for e in range(experts)],
            np.int64,
        )
        if len(position) != experts:
            return None
        key = pack(*(table[name][rows] for name in ("step", "rank", "layer", "t_ns")))
        rows = rows[np.unique(key, return_index=True)[1]]
        flat = tables.vector_values[table["offset"][rows][:, None] + np.arange(experts)]
        step = np.searchsorted(timeline.steps, table["step"][rows])
        inside = step < len(timeline)
        rows, flat, step = rows[inside], flat[inside], step[inside]
        group, place = np.full((2, len(topology) + 1), -1, np.int64)
        for number, members in enumerate(groups.values()):
            at = topology.row(np.array(members, np.int64))
            group[at], place[at] = number, np.arange(len(members))
        sender = np.where(table["rank"][rows] < 0, -1, topology.row(table["rank"][rows]))
        cell = np.where(sender >= 0, group[sender] * len(timeline) + step, -1)
        tokens = np.full((len(timeline), len(topology)), np.nan)
        for owner in range(int(position.max()) + 1):
            owned = flat[:, position == owner].sum(axis=1)
            known, total = _sums(cell, owned, len(groups) * len(timeline))
            # A vector without rank is summed over all ranks: it reaches every group's owner.
            everywhere, summed = _sums(np.where(sender < 0, step, -1), owned, len(timeline))
            for row in np.flatnonzero(place[:-1] == owner).tolist():
                part = slice(group[row] * len(timeline), (group[row] + 1) * len(timeline))
                tokens[:, row] = np.where(known[part] | everywhere, total[part] + summed, np.nan)
        return cls(tokens)


def _sums(cell: Ints, values: Floats, cells: int) -> tuple[Array, Floats]:
    """Sums by cell and which cells have any; cell -1 counts nowhere."""
    counted = cell >= 0
    known = np.bincount(cell[counted], minlength=cells) > 0
    total: Floats = np.bincount(cell[counted], weights=values[counted], minlength=cells).astype(np.float64)
    return known, total
