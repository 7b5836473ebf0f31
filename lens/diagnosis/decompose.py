"""Where each rank's time goes, step by step: S self, W waiting for others, X transfer.

S is the time outside every blocking collective; of the blocked time, W lasts until the last rank entered and X is
the rest. Overlapping collectives of a rank count once, so S + W + X is the step. All tables are [steps, ranks] in
seconds; NaN where a rank sent nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np

from lens.diagnosis.align import Collectives, align
from lens.diagnosis.arrays import Array, Floats, Ints, pack, starts_of
from lens.diagnosis.select import Timeline
from lens.diagnosis.topology import Topology
from lens.slots import NULL
from lens.tables import STEP_ATTRIBUTES, Tables

COMPUTE_PHASES = ("forward", "backward", "optimizer")
LOADING_PHASES = ("data",)
COPY_PHASES = ("h2d",)
APART_PHASES = ("checkpoint", "eval")
"""Phases with a schedule of their own: never part of what a step is judged by."""
SECONDS = 1e-9


@dataclass(frozen=True)
class Pieces:
    """The blocked time of each rank as intervals that do not overlap, in order; one for each row of Collectives."""

    start_ns: Ints
    end_ns: Ints
    wait: Floats
    """Seconds of the piece until the last rank entered; the rest is transfer."""

    @classmethod
    def of(cls, collectives: Collectives) -> Pieces:
        """Cut what overlaps: each moment belongs to the collective that blocked the rank first."""
        if not len(collectives):
            return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
        start, end = collectives.start_ns, collectives.end_ns
        first = starts_of(collectives.row)
        # A running maximum of ends that starts afresh at each rank: ranks are lifted out of each other's reach.
        low, reach = int(start.min()), int(end.max() - start.min()) + 1
        if reach * (int(collectives.row.max()) + 1) < 2**62:
            lift = collectives.row * reach - low
            latest = np.maximum.accumulate(end + lift) - lift
        else:
            latest = np.concatenate([np.maximum.accumulate(part) for part in np.split(end, first[1:])])
        before = np.r_[NULL, latest[:-1]]
        before[first] = NULL
        begun = np.minimum(np.maximum(start, before), np.maximum(end, before))
        ended = np.maximum(end, begun)
        wait: Floats = np.clip(collectives.last_entry_ns - begun, 0, ended - begun) * np.float64(SECONDS)
        return cls(begun, ended, wait)

    @property
    def length(self) -> Floats:
        """Seconds blocked in each piece."""
        result: Floats = (self.end_ns - self.start_ns) * np.float64(SECONDS)
        return result


class Blocked:
    """Answers how long a rank was blocked before any moment."""

    def __init__(self, row: Ints, pieces: Pieces) -> None:
        self._row, self._start = row, pieces.start_ns
        self._length = pieces.end_ns - pieces.start_ns
        self._total = np.cumsum(self._length)
        self._low = int(self._start.min()) if len(row) else 0
        width = int(pieces.end_ns.max() - self._low) + 2 if len(row) else 1
        ranks = int(row.max(initial=0)) + 2
        # Coarser keys where ranks × nanoseconds would not fit; the error is one key's width.
        self._shift = max(0, (width * ranks).bit_length() - 62)
        self._width = (width >> self._shift) + 2
        self._keys = row * self._width + ((self._start - self._low) >> self._shift)

    def before(self, row: Ints, t_ns: Ints) -> Ints:
        """Nanoseconds for which the rank in this row was blocked before the moment (0-based, all ranks in turn)."""
        if not len(self._keys):
            return np.zeros(len(row), np.int64)
        moment = np.clip((t_ns - self._low) >> self._shift, -1, self._width - 2)
        at = np.searchsorted(self._keys, row * self._width + moment, "right") - 1
        place = np.maximum(at, 0)
        within = np.clip(t_ns - self._start[place], 0, self._length[place])
        total = np.where(
            self._row[place] == row, self._total[place] - self._length[place] + within, self._total[place]
        )
        return np.where(at >= 0, total, 0)

    def seconds(self, row: Ints, t0_ns: Ints, t1_ns: Ints) -> Floats:
        """Seconds blocked between two moments of one rank."""
        result: Floats = (self.before(row, t1_ns) - self.before(row, t0_ns)) * np.float64(SECONDS)
        return result


@dataclass(frozen=True)
class Frame:
    """A run as dense tables [steps, ranks] in seconds, NaN = absent.

    start_ns, end_ns: of the step span by the rank's clock (NULL = absent). phase: wall time of each phase, own: the
    same without blocked time. wait, transfer: by kind of group. count: step attributes. restarts: (rows of
    Timeline) steps begun anew.
    """

    topology: Topology
    timeline: Timeline
    start_ns: Ints
    end_ns: Ints
    duration: Floats
    blocked: Floats
    phase: dict[str, Floats]
    own: dict[str, Floats]
    wait: dict[str, Floats]
    transfer: dict[str, Floats]
    count: dict[str, Floats]
    collectives: Collectives
    pieces: Pieces
    restarts: tuple[int, ...] = field(default=())

    @property
    def shape(self) -> tuple[int, int]:
        """(steps, ranks)."""
        return self.duration.shape[0], self.duration.shape[1]

    @property
    def self_time(self) -> Floats:
        """S of the whole step."""
        return self.duration - np.nan_to_num(self.blocked)

    def own_sum(self, names: tuple[str, ...]) -> Floats | None:
        """S summed over phases; None where no rank sent any of them."""
        found = [self.own[name] for name in names if name in self.own]
        if not found:
            return None
        known = np.any([np.isfinite(part) for part in found], axis=0)
        return np.where(known, np.sum([np.nan_to_num(part) for part in found], axis=0), np.nan)

    @classmethod
    def of(cls, tables: Tables, timeline: Timeline, topology: Topology) -> Frame:
        """Build the tables from the records of a run."""
        shape = (len(timeline), len(topology))
        start, end, count, restarts = _steps(tables, timeline, topology)
        collectives = align(_of_last_attempt(tables, timeline, topology, start), timeline, topology)
        pieces = Pieces.of(collectives)
        blocked = Blocked(collectives.row, pieces)
        there = (start != NULL) & (end != NULL)
        at_rank = np.nonzero(there)[1]
        duration = np.full(shape, np.nan)
        duration[there] = (end[there] - start[there]) * SECONDS
        blocked_step = np.full(shape, np.nan)
        blocked_step[there] = blocked.seconds(at_rank, start[there], end[there])
        phase, own = _phases(tables, timeline, topology, blocked, start)
        wait, transfer = _by_kind(collectives, pieces, shape)
        frame = cls(
            topology, timeline, start, end, duration, blocked_step, phase, own, wait, transfer, count, collectives,
            pieces, restarts,
        )  # fmt: skip
        fill_from_vectors(frame, tables)
        return frame


def _steps(
    tables: Tables, timeline: Timeline, topology: Topology
) -> tuple[Ints, Ints, dict[str, Floats], tuple[int, ...]]:
    """Start, end and attributes of each step's last attempt, and the steps that had several."""
    shape = (len(timeline), len(topology))
    table = tables.steps
    mine = np.flatnonzero(table["rank"] >= 0)
    # Later attempts and closed spans last: assignment keeps the last.
    mine = mine[np.lexsort((table["t1_ns"][mine], table["t0_ns"][mine]))]
    at = np.searchsorted(timeline.steps, table["step"][mine]), topology.row(table["rank"][mine])
    start, end = np.full(shape, NULL, np.int64), np.full(shape, NULL, np.int64)
    first = np.full(shape, np.iinfo(np.int64).max)
    np.minimum.at(first, at, table["t0_ns"][mine])
    start[at], end[at] = table["t0_ns"][mine], table["t1_ns"][mine]
    count = {}
    for name in STEP_ATTRIBUTES:
        values = table[name][mine].astype(np.float64)
        values[table[name][mine] == NULL] = np.nan
        if np.isfinite(values).any():
            count[name] = np.full(shape, np.nan)
            count[name][at] = values
    again = (start != NULL) & (first < start)
    return start, end, count, tuple(np.flatnonzero(again.any(axis=1)).tolist())


def _of_last_attempt(tables: Tables, timeline: Timeline, topology: Topology, start: Ints) -> Tables:
    """Without collectives of a step's earlier attempts, where a run was restarted."""
    table = tables.collectives
    keep = _in_last_attempt(table, timeline, topology, start)
    if keep.all():
        return tables
    result = Tables(strings=tables.strings)
    result.collectives = tables.select("collectives", keep)
    return result


def _in_last_attempt(table: dict[str, Array], timeline: Timeline, topology: Topology, start: Ints) -> Array:
    """Rows that began after the step they bear began for the last time, or bear no known step.

    A collective or phase may begin shortly before its step's span does (a prefetch): half a second is allowed.
    """
    if not len(timeline) or not len(table["rank"]):
        return np.ones(len(table["rank"]), bool)
    step = np.minimum(np.searchsorted(timeline.steps, table["step"]), len(timeline) - 1)
    known = (table["rank"] >= 0) & (timeline.steps[step] == table["step"])
    begun = start[step, np.maximum(topology.row(table["rank"]), 0)]
    known &= begun != NULL
    kept: Array = ~known | (table["t0_ns"] >= begun - 500_000_000)
    return kept


def _phases(
    tables: Tables, timeline: Timeline, topology: Topology, blocked: Blocked, start: Ints
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Wall and self time of each named phase."""
    table = tables.spans
    usable = (table["kind"] == tables.code("phase")) & (table["rank"] >= 0)
    usable &= (table["t1_ns"] != NULL) & (table["step"] != NULL)
    usable &= _in_last_attempt(table, timeline, topology, start)
    rows = np.flatnonzero(usable)
    if not len(rows):
        return {}, {}
    rank, t0, name = table["rank"][rows], table["t0_ns"][rows], table["name"][rows]
    key = pack(rank, name, t0)
    order = np.argsort(key, kind="stable")
    rows = rows[order[starts_of(key[order])]]
    row, step = topology.row(table["rank"][rows]), np.searchsorted(timeline.steps, table["step"][rows])
    t0, t1 = table["t0_ns"][rows], table["t1_ns"][rows]
    wall = (t1 - t0) * SECONDS
    own = wall - blocked.seconds(row, t0, t1)
    codes, number = np.unique(table["name"][rows], return_inverse=True)
    walls = _summed(number, step, row, wall, len(codes), start.shape)
    owns = _summed(number, step, row, own, len(codes), start.shape)
    names = [tables.strings[code] for code in codes.tolist()]
    return dict(sorted(zip(names, walls, strict=True))), dict(sorted(zip(names, owns, strict=True)))


def _by_kind(
    collectives: Collectives, pieces: Pieces, shape: tuple[int, ...]
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Waiting and transfer by kind of group. Where a member's records lack, the rest of the wait is not known."""
    if not len(collectives):
        return {}, {}
    here = collectives.kind, collectives.step, collectives.row
    kinds = len(collectives.kinds)
    wait = _summed(*here, pieces.wait, kinds, shape)
    transfer = _summed(*here, pieces.length - pieces.wait, kinds, shape)
    return (
        dict(zip(collectives.kinds, wait, strict=True)),
        dict(zip(collectives.kinds, transfer, strict=True)),
    )


def _summed(
    number: Ints, step: Ints, row: Ints, values: Floats, numbers: int, shape: tuple[int, ...]
) -> list[Floats]:
    """Sums of values by (number, step, rank), as one table a number; NaN where nothing was summed."""
    flat = (number * shape[0] + step) * shape[1] + row
    cells = numbers * shape[0] * shape[1]
    total = np.bincount(flat, weights=values, minlength=cells)
    total[np.bincount(flat, minlength=cells) == 0] = np.nan
    return list(total.reshape(numbers, *shape))


PRE_REDUCED_TARGETS: dict[str, str] = {
    "step.duration": "duration",
    "phase.duration": "phase",
    "comm.self": "own",
    "comm.wait": "wait",
    "comm.transfer": "transfer",
}


def fill_from_vectors(frame: Frame, tables: Tables) -> None:
    """Fill in what large runs send already reduced: one vector over ranks and step instead of spans.

    Vectors of one step and target (several operations, several kinds of group) add up. Spans win over vectors.
    """
    table = tables.vectors
    metric = {tables.code(name): name for name in PRE_REDUCED_TARGETS}
    rows = np.flatnonzero(np.isin(table["metric"], list(metric)) & (table["rank"] < 0) & (table["step"] != NULL))
    if not len(rows):
        return
    labels = [tables.string(code) or "" for code in table["labels"][rows].tolist()]
    names = [metric[code] for code in table["metric"][rows].tolist()]
    sent = zip(
        names, table["step"][rows].tolist(), labels, table["t_ns"][rows].tolist(), rows.tolist(), strict=True
    )
    unique = {key[:4]: key[4] for key in sorted(sent)}
    by_spans = np.isfinite(frame.duration)
    summed: dict[tuple[str, str], Floats] = {}
    for (name, step, label, _), row in sorted(unique.items()):
        place = PRE_REDUCED_TARGETS[name], _part(name, json.loads(label) if label else {})
        if place not in summed:
            summed[place] = np.full(frame.shape, np.nan)
        line = summed[place][int(np.searchsorted(frame.timeline.steps, step))]
        add_by_rank(frame.topology, line, tables.values_of(row), name != "step.duration")
    for (target, part), total in summed.items():
        if target == "duration":
            np.copyto(frame.duration, total, where=~by_spans)
        else:
            into: dict[str, Floats] = getattr(frame, target)
            np.copyto(into.setdefault(part, np.full(frame.shape, np.nan)), total, where=~by_spans)
    for part, wall in frame.phase.items():
        frame.own.setdefault(part, wall)
    communicated = [total for (target, _), total in summed.items() if target in ("wait", "transfer")]
    if communicated:
        np.copyto(frame.blocked, np.sum([np.nan_to_num(t) for t in communicated], axis=0), where=~by_spans)


def add_by_rank(topology: Topology, line: Floats, values: Floats, onto: bool = True) -> None:
    """Put a vector over global ranks into a line over places of ranks, onto what is there already (NaN is nothing)."""
    ranks, count = topology.ranks, len(values)
    dense = 0 < count <= len(ranks) and ranks[0] == 0 and ranks[count - 1] == count - 1
    at = slice(0, count) if dense else topology.row(np.arange(count))
    line[at] = values + np.where(np.isfinite(line[at]), line[at], 0.0) if onto else values


def _part(name: str, labels: dict[str, str]) -> str:
    """Which table of its kind a vector belongs to: its phase, or its kind of group."""
    if name in ("phase.duration", "comm.self"):
        return labels.get("phase", "other")
    return group_kind(labels)


def group_kind(labels: dict[str, str]) -> str:
    """Kind of group that a pre-reduced vector is about."""
    group = labels.get("group kind") or labels.get("group_kind") or labels.get("kind") or labels.get("group")
    return (group or "world").split("/")[0]
