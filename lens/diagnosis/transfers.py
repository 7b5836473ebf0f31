"""X by stream: what the transfers of each group, operation and size class took, step by step.

A stream is the unit in which a link shows: all its collectives take the same way through the fabric, and they carry
about the same bytes. Large messages are held against their bytes, so that longer sequences are no slower link.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from lens.diagnosis import policy
from lens.diagnosis.arrays import Array, Floats, Ints, pack, starts_of
from lens.diagnosis.decompose import APART_PHASES, SECONDS, Frame, add_by_rank, group_kind
from lens.slots import NULL
from lens.tables import Tables

SMALL_BYTES = 65_536
"""Up to here the time of a message is latency, not bandwidth."""
WITHOUT_LOAD = ("barrier",)


@dataclass(frozen=True)
class Stream:
    """What one column of `Transfers` is: rows = places of the ranks that take part."""

    group: str
    op: str
    small: bool
    rows: tuple[int, ...]
    crosses: bool
    """Whether it leaves a host."""

    @property
    def kind(self) -> str:
        """Kind of its group."""
        return self.group.split("/")[0]


@dataclass(frozen=True)
class Transfers:
    """X of every stream. All tables [steps, streams].

    seconds: per step, summed over its collectives, mean over members, for the usual number of bytes. count:
    collectives per step. size: bytes per step that a member sends (NaN unknown). alike: number of the class of
    streams that compare. stream_of: stream of each row of Frame.collectives (-1 none); x: seconds of its transfer.
    """

    streams: list[Stream]
    seconds: Floats
    count: Floats
    size: Floats
    alike: Ints
    member_stream: Ints
    member_row: Ints
    stream_of: Ints
    x: Floats

    def __len__(self) -> int:
        return len(self.streams)

    @classmethod
    def of(cls, frame: Frame, tables: Tables) -> Transfers:
        """Read them from the aligned collectives, or from what large runs send already reduced."""
        spans = _from_spans(frame, tables)
        return spans if len(spans) else _from_vectors(frame, tables)

    def of_rank(self, row: int) -> Ints:
        """Streams that a rank takes part in."""
        streams: Ints = self.member_stream[self.member_row == row]
        return streams

    def totals(self, ranks: int) -> Floats:
        """Seconds of transfer of each rank over all its streams [steps, ranks]."""
        steps = len(self.seconds)
        flat = (np.arange(steps)[:, None] * ranks + self.member_row).reshape(-1)
        weights = np.nan_to_num(self.seconds[:, self.member_stream]).reshape(-1)
        total = np.bincount(flat, weights=weights, minlength=steps * ranks).reshape(steps, ranks)
        known = np.zeros((steps, ranks), bool)
        known[:, np.unique(self.member_row)] = True
        return np.where(known & (total > 0), total, np.nan)


def _from_spans(frame: Frame, tables: Tables) -> Transfers:
    collectives, steps = frame.collectives, frame.shape[0]
    apart = [tables.code(name) for name in APART_PHASES]
    # A buffered send is over before its receiver came; the receiver sees when the data was there.
    rows = np.flatnonzero(~np.isin(collectives.phase, apart) & (collectives.op != tables.code("send")))
    size = collectives.size[rows]
    small = np.isin(collectives.op[rows], [tables.code(name) for name in WITHOUT_LOAD])
    small |= (size != NULL) & (size < SMALL_BYTES)
    first, stream = np.unique(
        pack(collectives.group[rows], collectives.op[rows], small), return_index=True, return_inverse=True
    )[1:]
    ranks = starts_of(np.sort(stream)), collectives.row[rows][np.argsort(stream, kind="stable")]
    streams = [
        _stream(frame, tables, place, bool(small[at]), members)
        for place, at, members in zip(rows[first], first, np.split(ranks[1], ranks[0][1:]), strict=True)
    ] if len(rows) else []  # fmt: skip
    # Of point to point only the receiver is counted.
    share = np.array([1 if stream.op == "recv" else len(stream.rows) for stream in streams])
    x = _transfer(frame)
    cell, shape = collectives.step[rows] * len(streams) + stream, (steps, len(streams))
    known = collectives.complete[rows]
    instances = _sums(cell, None, shape) / share
    whole = _sums(cell[known], None, shape)
    mean = np.where(whole > 0, _sums(cell[known], x[rows][known], shape) / np.maximum(whole, 1), np.nan)
    told = size != NULL
    sizes = np.where(_sums(cell[told], None, shape) > 0, _sums(cell[told], size[told], shape) / share, np.nan)
    stream_of = np.full(len(collectives), -1, np.int64)
    stream_of[rows] = stream
    return Transfers(
        streams, _for_usual_bytes(mean * instances, sizes, np.array([s.small for s in streams], bool)),
        np.where(instances > 0, instances, np.nan), sizes, _classes(frame, streams), *_members(streams), stream_of, x,
    )  # fmt: skip


def _stream(frame: Frame, tables: Tables, place: int, small: bool, seen: Ints) -> Stream:
    """The stream that a row of Collectives belongs to; seen: ranks (places) that took part."""
    collectives, topology = frame.collectives, frame.topology
    group = collectives.groups[int(collectives.group[place])]
    members = topology.row(np.array(topology.members_of(group), np.int64))
    rows = tuple(members[members >= 0].tolist()) or tuple(np.unique(seen).tolist())
    hosts = {topology.host[row] or row for row in rows}
    return Stream(
        group, tables.string(int(collectives.op[place])) or "", small, tuple(sorted(rows)), len(hosts) > 1
    )


def _members(streams: list[Stream]) -> tuple[Ints, Ints]:
    """Pairs of a stream and a rank that takes part in it."""
    numbers = np.repeat(np.arange(len(streams)), [len(stream.rows) for stream in streams])
    return numbers, np.array([row for stream in streams for row in stream.rows], np.int64)


def _sums(cell: Ints, values: Array | None, shape: tuple[int, int]) -> Floats:
    """Sums (or counts) of values by cell, as a table."""
    total: Floats = np.bincount(cell, weights=values, minlength=shape[0] * shape[1]).astype(np.float64)
    return total.reshape(shape)


def _transfer(frame: Frame) -> Floats:
    """Seconds from when the last rank had entered until each rank's data was there [rows of Collectives]."""
    collectives = frame.collectives
    begin, end = collectives.last_entry_ns, collectives.end_ns
    hidden = collectives.is_async & (collectives.done_ns != NULL)
    if hidden.any():
        # Collectives in flight together share the way: each begins when the one before it was done.
        end = np.where(hidden, collectives.done_ns, end)
        rows = np.flatnonzero(hidden)
        rows = rows[np.lexsort((collectives.entry_ns[rows], collectives.group[rows], collectives.row[rows]))]
        chain = pack(collectives.row[rows], collectives.group[rows])
        before = np.r_[NULL, end[rows][:-1]]
        before[starts_of(chain)] = NULL
        begin = begin.copy()
        begin[rows] = np.maximum(begin[rows], before)
    # Nobody knows when it was done: what its wait shows of it.
    begin = np.where(collectives.is_async & ~hidden, np.maximum(begin, collectives.start_ns), begin)
    result: Floats = np.maximum(end - begin, 0) * np.float64(SECONDS)
    return result


def _for_usual_bytes(seconds: Floats, size: Floats, small: Array) -> Floats:
    """Large messages as if each step sent what the first judged steps did."""
    first = slice(policy.WARM_UP_STEPS, policy.WARM_UP_STEPS + policy.FIRST_JUDGED_STEPS)
    begun = size[first]
    known = np.isfinite(begun).any(axis=0) & ~small if len(begun) else np.zeros(size.shape[1], bool)
    result = seconds.copy()
    for column in np.flatnonzero(known).tolist():
        usual = float(np.nanmedian(begun[:, column]))
        factor = usual / np.where(size[:, column] > 0, size[:, column], np.nan)
        result[:, column] *= np.where(np.isfinite(factor), factor, 1.0)
    return result


def _classes(frame: Frame, streams: list[Stream]) -> Ints:
    """A number for each class of streams that take the same kind of way between the same kinds of cards."""
    topology = frame.topology
    numbers: dict[tuple[object, ...], int] = {}
    result = np.zeros(len(streams), np.int64)
    for place, stream in enumerate(streams):
        makes = frozenset((topology.vendor[row], topology.model[row]) for row in stream.rows)
        far = len({topology.switch[row] for row in stream.rows}) > 1
        key = (stream.kind, stream.op, stream.small, len(stream.rows), stream.crosses, far, makes)
        result[place] = numbers.setdefault(key, len(numbers))
    return result


def _from_vectors(frame: Frame, tables: Tables) -> Transfers:
    """Streams by kind of group and operation; each group's value is the mean of its members'."""
    streams: list[Stream] = []
    columns = [np.zeros((frame.shape[0], 0))]
    host = frame.topology.host_index()
    for (kind, op), values in sorted(_reduced(frame, tables).items()):
        groups = _groups_of(frame, kind)
        rows = [frame.topology.row(np.array(members, np.int64)) for members in groups.values()]
        flat, starts = np.concatenate(rows), np.cumsum([0, *(len(part) for part in rows[:-1])])
        there = np.add.reduceat(np.isfinite(values[:, flat]), starts, axis=1)
        total = np.add.reduceat(np.nan_to_num(values[:, flat]), starts, axis=1)
        columns.append(np.where(there > 0, total / np.maximum(there, 1), np.nan))
        for name, part in zip(groups, rows, strict=True):
            crosses = len(part) == 1 or len(np.unique(host[part])) > 1
            streams.append(Stream(name, op, op in WITHOUT_LOAD, tuple(part.tolist()), crosses))
    seconds = np.concatenate(columns, axis=1)
    return Transfers(
        streams, seconds, np.ones(seconds.shape), np.full(seconds.shape, np.nan), _classes(frame, streams),
        *_members(streams), np.full(len(frame.collectives), -1, np.int64), np.zeros(len(frame.collectives)),
    )  # fmt: skip


def _groups_of(frame: Frame, kind: str) -> dict[str, tuple[int, ...]]:
    """The groups of a kind; where they were not said, each rank stands for its own."""
    topology = frame.topology
    everyone = tuple(topology.ranks.tolist())
    known = {name: members for name, members in topology.members.items() if name.split("/")[0] == kind}
    if known or kind == "world":
        return known or {"world/0": everyone}
    return {f"{kind}/of rank {rank}": (rank,) for rank in everyone}


def _reduced(frame: Frame, tables: Tables) -> dict[tuple[str, str], Floats]:
    """Pre-reduced transfer by kind of group and operation [steps, ranks]."""
    table = tables.vectors
    rows = np.flatnonzero(
        (table["metric"] == tables.code("comm.transfer")) & (table["rank"] < 0) & (table["step"] != NULL)
    )
    texts = [tables.string(code) or "" for code in table["labels"][rows].tolist()]
    sent = sorted(
        zip(table["step"][rows].tolist(), texts, table["t_ns"][rows].tolist(), rows.tolist(), strict=True)
    )
    result: dict[tuple[str, str], Floats] = {}
    for (step, text, _), row in {key[:3]: key[3] for key in sent}.items():
        labels = json.loads(text) if text else {}
        if labels.get("phase") in APART_PHASES:
            continue
        key = group_kind(labels), str(labels.get("op", ""))
        if key not in result:
            result[key] = np.full(frame.shape, np.nan)
        add_by_rank(frame.topology, result[key][np.searchsorted(frame.timeline.steps, step)], tables.values_of(row))
    return result
