"""Collectives side by side: the same (group, seq) on every rank, with the clocks of the hosts laid over each other.

Ranks leave a synchronous collective together, so what their exits differ by, host against host, is the offset of
their clocks (plus little). Offsets are estimated from each step's exits and smoothed over the steps before it: no
later record changes an earlier step, and a clock that drifts is followed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lens.diagnosis.arrays import Array, Floats, Ints, median, pack, starts_of
from lens.diagnosis.select import Timeline
from lens.diagnosis.topology import Topology
from lens.slots import NULL
from lens.tables import Tables

SMOOTHED_STEPS = 16
SOLVER_SWEEPS = 4
ONE_SIDED = ("send", "recv", "broadcast", "reduce")
"""Operations that some ranks may leave before others: their exits say nothing about clocks."""
UNEVEN = ("all_to_all",)
"""Operations whose slowest pair makes its receiver leave late, step after step: asked only where no other spans hosts."""


@dataclass(frozen=True)
class Collectives:
    """Finished collectives, ordered by rank and start of blocking; one row a rank and collective.

    row, step: places in Topology.ranks and Timeline.steps. kind: code of the group's kind in `kinds`; group: place
    in `groups`. op, phase: codes of the tables. size: bytes, NULL where unknown. layer: its number, -1 where unknown.
    start_ns, end_ns: the blocking interval by the rank's own clock. instance: equal for rows of one collective.
    last_entry_ns: when the last rank known entered, by this rank's clock. complete: all members of it are known.
    offset_ns: this rank's clock minus the common one. done_ns: when an asynchronous one was done (NULL: unknown, or
    not asynchronous).
    """

    row: Ints
    step: Ints
    kind: Ints
    kinds: list[str]
    start_ns: Ints
    end_ns: Ints
    entry_ns: Ints
    last_entry_ns: Ints
    offset_ns: Ints
    instance: Ints
    complete: Array
    phase: Ints
    group: Ints
    groups: list[str]
    op: Ints
    size: Ints
    is_async: Array
    done_ns: Ints
    layer: Ints

    def __len__(self) -> int:
        return len(self.row)


def align(tables: Tables, timeline: Timeline, topology: Topology) -> Collectives:
    """Pair the finished collectives of all ranks."""
    table = tables.collectives
    # Never waited for: no interval in which the rank stood still, and no exit. Of a send the entry tells all the same
    # from when on its receiver could go on.
    unwaited = (table["is_async"] == 1) & (table["t_wait_ns"] == NULL)
    sent = unwaited & (table["op"] == tables.code("send"))
    usable = (table["rank"] >= 0) & (table["step"] != NULL) & (sent | (~unwaited & (table["t1_ns"] != NULL)))
    columns = {name: values[usable] for name, values in table.items()}
    for name in ("t_wait_ns", "t1_ns"):
        columns[name] = np.where(sent[usable], columns["t0_ns"], columns[name])
    start = np.where(columns["is_async"] == 1, columns["t_wait_ns"], columns["t0_ns"])
    keep = _in_order_once(columns, start)
    columns = {name: values[keep] for name, values in columns.items()}
    start = start[keep]
    row = topology.row(columns["rank"])
    step = np.searchsorted(timeline.steps, columns["step"])
    group, names = _groups(tables, columns["group"])
    instance = _instances(columns, group, step)
    entry = columns["t0_ns"]
    offset = _offsets(columns, instance, row, step, tables, topology, len(timeline))
    common = entry - offset
    last = _largest(common, instance)
    sizes = np.bincount(instance, minlength=int(instance.max(initial=-1)) + 1)[instance]
    expected = np.array([len(topology.members_of(name)) for name in names] + [0], np.int64)[group]
    kinds = sorted({name.split("/")[0] for name in names})
    kind_of = np.array([kinds.index(name.split("/")[0]) for name in names] + [0], np.int64)
    return Collectives(
        row, step, kind_of[group], kinds, start, columns["t1_ns"], entry, last + offset, offset, instance,
        sizes >= expected, columns["phase"].astype(np.int64), group, names, columns["op"].astype(np.int64),
        columns["bytes"], columns["is_async"] == 1,
        np.where(columns["is_async"] == 1, columns["t_done_ns"], NULL), columns["layer"].astype(np.int64),
    )  # fmt: skip


def _in_order_once(columns: dict[str, Array], start: Ints) -> Ints:
    """Row numbers ordered by rank and start; what was sent twice stands once."""
    key = pack(columns["rank"], start)
    order = np.argsort(key, kind="stable")
    if len(order) and (np.diff(key[order]) == 0).any():
        # A record sent again differs in nothing; two collectives that begin together differ in seq or group.
        order = np.lexsort((columns["t1_ns"], columns["seq"], columns["group"], columns["t0_ns"], key))
        identity = np.stack([key[order], columns["t0_ns"][order], columns["group"][order], columns["seq"][order]])
        again = np.r_[(identity[:, 1:] == identity[:, :-1]).all(axis=0), False]
        order = order[~again]
        # Order of ties must not hang on the order in which names arrived.
        order = order[np.lexsort((columns["seq"][order], columns["t1_ns"][order], key[order]))]
    return order


def _groups(tables: Tables, codes: Array) -> tuple[Ints, list[str]]:
    """Group of each row as a place in the sorted list of names; no group counts as the whole world."""
    used = np.unique(codes)
    text = {code: tables.strings[code] if code >= 0 else "world/0" for code in used.tolist()}
    names = sorted(set(text.values()))
    place = np.array([names.index(text[code]) for code in used.tolist()] + [0], np.int64)
    return place[np.searchsorted(used, codes)], names


def _instances(columns: dict[str, Array], group: Ints, step: Ints) -> Ints:
    """A number for each collective, equal on all its ranks.

    Steps belong to the name: numbers start again after a restart. Where a record has no seq, its place among the
    rank's collectives of that group and step stands for it.
    """
    seq = columns["seq"].copy()
    lacking = np.flatnonzero(seq == NULL)
    if len(lacking):
        key = pack(columns["rank"][lacking], group[lacking], step[lacking])
        order = np.argsort(key, kind="stable")
        first = starts_of(key[order])
        place = np.arange(len(order)) - np.repeat(first, np.diff(np.r_[first, len(order)]))
        seq[lacking[order]] = -2 - place
    key = pack(step, group, seq)
    order = np.argsort(key, kind="stable")
    number = np.zeros(len(key), np.int64)
    boundary = np.zeros(len(key), np.int64)
    boundary[starts_of(key[order])] = 1
    number[order] = np.cumsum(boundary) - 1
    return number


def _largest(values: Ints, instance: Ints) -> Ints:
    largest = np.full(int(instance.max(initial=-1)) + 1, NULL, np.int64)
    np.maximum.at(largest, instance, values)
    return largest[instance]


def _offsets(
    columns: dict[str, Array],
    instance: Ints,
    row: Ints,
    step: Ints,
    tables: Tables,
    topology: Topology,
    step_count: int,
) -> Ints:
    """Offset of each row's clock against the common one, in ns."""
    host = topology.host_index()
    host_count = int(host.max(initial=-1)) + 1
    if host_count < 2 or not len(row):
        return np.zeros(len(row), np.int64)
    chosen, sweeps = np.zeros(0, np.int64), 0
    for apart in ((*ONE_SIDED, *UNEVEN), ONE_SIDED):
        left_out = np.isin(columns["op"], [tables.code(name) for name in apart])
        chosen, sweeps = _widest(~left_out & (columns["is_async"] == 0), instance, host[row])
        if sweeps == 1:
            break
    if not len(chosen):
        return np.zeros(len(row), np.int64)
    cell = step[chosen] * host_count + host[row[chosen]]
    numbers, inverse = np.unique(instance[chosen], return_inverse=True)
    exits = columns["t1_ns"][chosen]
    base = np.full(len(numbers), np.iinfo(np.int64).max)
    np.minimum.at(base, inverse, exits)
    late = (exits - base[inverse]).astype(np.float64)
    offset = np.zeros(step_count * host_count)
    count = np.bincount(inverse)
    for _ in range(sweeps):
        rest = late - offset[cell]
        rest -= (np.bincount(inverse, weights=rest) / count)[inverse]
        offset += _median_by(cell, rest, step_count * host_count)
    seen = np.bincount(cell, minlength=step_count * host_count).reshape(step_count, host_count) > 0
    smooth = _trailing_median(np.where(seen, offset.reshape(step_count, host_count), np.nan))
    return np.rint(smooth[step, host[row]]).astype(np.int64)


def _widest(candidates: Array, instance: Ints, host: Ints) -> tuple[Ints, int]:
    """Rows of the collectives that span nearly all hosts, which settle the offsets in one sweep.

    Without such, rows of all that span at least two: neighbours then tell each other over several sweeps.
    """
    rows = np.flatnonzero(candidates)
    if not len(rows):
        return rows, 0
    pairs = np.unique(pack(instance[rows], host[rows]), return_index=True)[1]
    hosts = np.bincount(instance[rows][pairs], minlength=int(instance.max()) + 1)
    widest = int(hosts.max())
    if widest < 2:
        return rows[:0], 0
    if widest >= 0.9 * len(np.unique(host)):
        return rows[hosts[instance[rows]] == widest], 1
    return rows[hosts[instance[rows]] >= 2], SOLVER_SWEEPS


def _median_by(cell: Ints, values: Floats, cells: int) -> Floats:
    """Median of the values of each cell; 0 where it has none."""
    order = np.lexsort((values, cell))
    first = starts_of(cell[order])
    count = np.diff(np.r_[first, len(order)])
    low, high = values[order[first + (count - 1) // 2]], values[order[first + count // 2]]
    result = np.zeros(cells)
    result[cell[order[first]]] = (low + high) / 2
    return result


def _trailing_median(values: Floats) -> Floats:
    """Median of each entry and those up to SMOOTHED_STEPS - 1 steps before it; before the first known: 0."""
    padding = np.full((SMOOTHED_STEPS - 1, values.shape[1]), np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate([padding, values]), SMOOTHED_STEPS, axis=0)
    return np.nan_to_num(median(windows, axis=2))
