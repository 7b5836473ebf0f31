"""A run that stands still: whether it does, and what each rank was doing last.

`hung` needs somebody inside a collective, or a rank that fell silent, and no progress for longer than is normal for
this run. Whom the waiting leads to is told by `blame`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lens.diagnosis import blame, policy
from lens.diagnosis.arrays import Array, Ints, pack, starts_of
from lens.diagnosis.blame import Hang, Standstill
from lens.diagnosis.calls import Calls, Waiting
from lens.diagnosis.exits import KILLS, End
from lens.diagnosis.topology import Topology, reporting_ranks
from lens.slots import NULL
from lens.tables import Tables

FRAME = re.compile(r"(?P<file>[\w./<>-]+\.py)\W+(?:line )?(?P<line>\d+)\W*(?:in )?(?P<name>[\w.<>]+)?")
SILENT_BEATS = 4
"""Heartbeats that must be missing in a row before a rank counts as silent."""
NOT_THEIRS = ("site-packages/", "dist-packages/", "/lib/python", "<frozen")
"""Parts of a path of code that is not the user's own: the line to look at lies outside of it."""
COMPILING = ("torch/_dynamo", "torch/_inductor", "triton/compiler")
"""Parts of a path in a stack that say a rank compiles."""
WORKING_CPU = 0.2
"""Seconds of processor time a second from which a rank in a slow phase is at work."""


@dataclass(frozen=True)
class Beat:
    """A rank's last heartbeat."""

    t_ns: int
    attrs: Mapping[str, Any]

    @property
    def state(self) -> str:
        """What the rank was doing."""
        return str(self.attrs.get("state") or "")

    def number(self, key: str) -> int | None:
        """A whole number of its attributes."""
        value = self.attrs.get(key)
        return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def find(tables: Tables, topology: Topology, durations: Array, ended: list[End]) -> Hang | None:
    """The hang at the end of these records, None while the run moves or has ended properly."""
    latest, moved = now_ns(tables), _last_progress(tables)
    if latest is None or moved is None:
        return None
    quiet = (latest - moved) * 1e-9
    if quiet < policy.HANG_SECONDS:
        return None
    begun = _last_restart(tables)
    beats = _heartbeats(tables, begun)
    if quiet < _patience(tables, durations, beats, moved, latest):
        return None
    gone = _gone(tables, begun) | {rank for rank, beat in beats.items() if beat.state == "exiting"}
    waiting = {rank: w for rank, w in _waiting(tables, beats, begun).items() if rank not in gone}
    silent = _silent(topology, beats, latest, gone)
    stopped = {rank for rank, beat in beats.items() if beat.state == "stopped" and rank not in gone}
    if not waiting and not silent and not stopped:
        return None
    reporting = set(reporting_ranks(tables).tolist())
    unheard = reporting - set(beats) - gone if 2 * len(beats) > len(reporting) else set()
    return blame.who(
        Standstill(
            topology, waiting, Calls.of(tables, topology, begun),
            dead={end.rank for end in ended if not end.restarted} | silent, stopped=stopped, gone=gone,
            unheard=unheard, reporting=reporting, states={rank: beat.state for rank, beat in beats.items()},
            lines={rank: line for rank, beat in beats.items() if (line := source_line(beat.attrs.get("stack")))},
            quiet_s=quiet,
        )
    )  # fmt: skip


def parted(tables: Tables, topology: Topology, cause: End, ended: set[int]) -> Hang | None:
    """The rank that left its group before this end, where that explains it; else None.

    ended: ranks that ended with an error. A library that finds other bytes than it expects ends its process, and not
    always that of the rank in the wrong; where a rank ends its program early, all others lose their connections. Who
    was killed from outside, or failed by an exception of its own, did not end of that.
    """
    if cause.signal in KILLS:
        return None
    begun = _last_restart(tables)
    none: set[int] = set()
    still = Standstill(
        topology, _waiting(tables, {}, begun), Calls.of(tables, topology, begun), none, none, _gone(tables, begun) - ended,
        none, set(reporting_ranks(tables).tolist()), {}, {}, None,
    )  # fmt: skip
    if not still.waiting:
        return None
    found = blame.out_of_line(still) or (blame.left_early(still) if cause.strength <= 1 else None)
    own = found is not None and cause.rank in found.ranks and cause.error is not None and cause.strength > 1
    return None if own else found


def now_ns(tables: Tables) -> int | None:
    """The largest event time of any record: what "now" is for records that are read later."""
    columns = {
        "samples": ("t_ns",), "vectors": ("t_ns",), "events": ("t_ns",), "steps": ("t0_ns", "t1_ns"),
        "spans": ("t0_ns", "t1_ns"), "collectives": ("t0_ns", "t1_ns"),
    }  # fmt: skip
    latest = max(int(tables.table(n)[c].max(initial=NULL)) for n, names in columns.items() for c in names)
    return None if latest == NULL else latest


def source_line(stack: Any) -> str | None:
    """The innermost line of a stack (text, or a list of frames) that is the user's own, else of all, as short as it can
    be read: "train.py:41 in load"."""
    frames = stack.strip().splitlines() if isinstance(stack, str) else stack
    if not isinstance(frames, list) or not frames:
        return None
    own = [frame for frame in frames if not any(part in json.dumps(frame) for part in NOT_THEIRS)]
    for frame in reversed([*frames, *own]):
        if isinstance(frame, Mapping):
            file, line, name = (frame.get(key) for key in ("file", "line", "name"))
            return f"{str(file).rsplit('/', 1)[-1]}:{line} in {name}"
        found = FRAME.search(str(frame))
        if found:
            return f"{found['file'].rsplit('/', 1)[-1]}:{found['line']} in {found['name'] or '?'}"
    return str(frames[-1]).strip()[:200] or None


def _last_restart(tables: Tables) -> int:
    """When the last attempt began; the smallest int64 without restarts."""
    events = tables.events
    return int(events["t_ns"][events["kind"] == tables.code("run.restart")].max(initial=NULL))


def _last_progress(tables: Tables) -> int | None:
    """When anything that moves training last began or ended on any rank."""
    times = [NULL]
    for name in ("steps", "collectives"):
        table = tables.table(name)
        times += [int(table["t0_ns"].max(initial=NULL)), int(table["t1_ns"].max(initial=NULL))]
    phases = tables.spans["kind"] == tables.code("phase")
    times += [int(tables.spans[c][phases].max(initial=NULL)) for c in ("t0_ns", "t1_ns")]
    latest = max(times)
    return None if latest == NULL else latest


def _patience(tables: Tables, durations: Array, beats: Mapping[int, Beat], moved: int, latest: int) -> float:
    """Seconds without progress that are still normal."""
    finished = np.isfinite(durations).any(axis=1)
    # What the first steps take says nothing about the later ones.
    known = durations[np.flatnonzero(finished)[policy.WARM_UP_STEPS :]]
    known = known[np.isfinite(known)] if len(known) else durations[np.isfinite(durations)]
    seconds = policy.HANG_SECONDS if finished.sum() > policy.WARM_UP_STEPS else policy.HANG_SECONDS_AT_START
    if len(known):
        seconds = max(seconds, policy.HANG_STEPS * float(np.quantile(known, 0.99)))
    inside, longest = _slow_phases(tables)
    inside |= {rank for rank, beat in beats.items() if _is_slow(beat)}
    if not inside:
        return seconds
    works = any(_works(tables, rank, moved, latest) for rank in inside)
    return max(2 * seconds, policy.HANG_SLOW_PHASES * longest) * (policy.HANG_AT_WORK if works else 1)


def _slow_phases(tables: Tables) -> tuple[set[int], float]:
    """Ranks inside a checkpoint, an evaluation or a compilation, and the longest such span so far in seconds."""
    spans = tables.spans
    slow = [tables.code(name) for name in policy.SLOW_PHASES]
    rows = np.flatnonzero(np.isin(spans["name"], slow) | np.isin(spans["kind"], slow))
    begun, ended = spans["t0_ns"][rows], spans["t1_ns"][rows]
    closed = ended != NULL
    key = pack(spans["rank"][rows], spans["kind"][rows], spans["name"][rows], begun)
    inside = rows[~closed & ~np.isin(key, key[closed])]
    longest = float((ended[closed] - begun[closed]).max(initial=0)) * 1e-9
    last = _last_end(tables)
    return {
        rank for rank, t0 in zip(spans["rank"][inside].tolist(), spans["t0_ns"][inside].tolist(), strict=True)
        if last.get(rank, NULL) <= t0
    }, longest  # fmt: skip


def _is_slow(beat: Beat) -> bool:
    """Whether a heartbeat tells of a slow phase."""
    compiling = any(part in json.dumps(beat.attrs.get("stack") or "") for part in COMPILING)
    return beat.state != "collective" and (beat.attrs.get("phase") in policy.SLOW_PHASES or compiling)


def _works(tables: Tables, rank: int, since: int, until: int) -> bool:
    """Whether a rank's process used a processor since the run stands still."""
    samples = tables.samples
    mine = (samples["metric"] == tables.code("process.cpu.time")) & (samples["rank"] == rank)
    mine &= (samples["t_ns"] >= since) & (samples["t_ns"] <= until)
    used = samples["value"][mine]
    return len(used) > 1 and float(used.max() - used.min()) > WORKING_CPU * (until - since) * 1e-9


def _last_end(tables: Tables) -> dict[int, int]:
    """When each rank last ended a step or a collective that blocked it."""
    found: dict[int, int] = {}
    steps, collectives = tables.steps, tables.collectives
    blocking = (collectives["is_async"] == 0) | (collectives["t_wait_ns"] != NULL)
    for rank, end in (
        *_largest(steps["rank"], steps["t1_ns"]),
        *_largest(collectives["rank"][blocking], collectives["t1_ns"][blocking]),
    ):
        found[rank] = max(end, found.get(rank, NULL))
    return found


def _largest(rank: Array, values: Array) -> Iterable[tuple[int, int]]:
    """The largest value of each rank."""
    known = (rank >= 0) & (values != NULL)
    order = np.lexsort((values[known], rank[known]))
    ranks, ordered = rank[known][order], values[known][order]
    last = np.r_[starts_of(ranks)[1:], len(ranks)] - 1 if len(ranks) else np.zeros(0, np.int64)
    return zip(ranks[last].tolist(), ordered[last].tolist(), strict=True)


def _waiting(tables: Tables, beats: Mapping[int, Beat], begun: int) -> dict[int, Waiting]:
    """The collective each rank is in: its latest one without an end, unless it ended something later."""
    table = tables.collectives
    since = np.where(table["t_wait_ns"] != NULL, table["t_wait_ns"], table["t0_ns"])
    rows = np.flatnonzero((table["t1_ns"] == NULL) & (table["rank"] >= 0) & (since >= begun))
    # What was enqueued and never waited for blocks nobody.
    rows = rows[(table["is_async"][rows] == 0) | (table["t_wait_ns"][rows] != NULL)]
    last = _last_end(tables)
    found: dict[int, Waiting] = {}
    for row in rows[np.argsort(since[rows], kind="stable")].tolist():
        rank, t0 = int(table["rank"][row]), int(since[row])
        if last.get(rank, NULL) < t0 or (last[rank] == t0 and not _closed(table, row)):
            found[rank] = Waiting(
                rank, tables.string(int(table["group"][row])) or "world/0", int(table["seq"][row]),
                tables.string(int(table["op"][row])) or "", int(table["bytes"][row]), t0,
                int(table["step"][row]),
            )  # fmt: skip
    for rank, beat in beats.items():
        # Spans shorter than a second are not sent open: the heartbeat knows of them first.
        if rank in found or beat.state != "collective" or not beat.attrs.get("group"):
            continue
        seq, since_ns = beat.number("seq"), beat.number("since_ns")
        t0 = beat.t_ns if since_ns is None else since_ns
        if last.get(rank, NULL) <= t0:
            group, op = str(beat.attrs["group"]), str(beat.attrs.get("op") or "")
            number, step = (NULL if value is None else value for value in (seq, beat.number("step")))
            found[rank] = Waiting(rank, group, number, op, NULL, t0, step)
    return found


def _closed(table: Mapping[str, Array], row: int) -> bool:
    """Whether a later record ended this very collective."""
    same = (table["rank"] == table["rank"][row]) & (table["t0_ns"] == table["t0_ns"][row])
    return bool((table["t1_ns"][same & (table["op"] == table["op"][row])] != NULL).any())


def _heartbeats(tables: Tables, begun: int) -> dict[int, Beat]:
    """Each rank's last heartbeat of this attempt."""
    table = tables.events
    rows = np.flatnonzero(
        (table["kind"] == tables.code("heartbeat")) & (table["rank"] >= 0) & (table["t_ns"] >= begun)
    )
    order: Ints = rows[np.lexsort((table["attrs"][rows], table["t_ns"][rows], table["rank"][rows]))]
    newest = order[np.r_[np.diff(table["rank"][order]) != 0, True]] if len(order) else order
    found = {}
    for row in newest.tolist():
        text = tables.string(int(table["attrs"][row]))
        attrs = json.loads(text) if text else {}
        found[int(table["rank"][row])] = Beat(int(table["t_ns"][row]), attrs)
    return found


def _gone(tables: Tables, begun: int) -> set[int]:
    """Ranks whose process has ended in this attempt, in whatever way."""
    table = tables.events
    ended = (table["kind"] == tables.code("process.exit")) & (table["t_ns"] >= begun) & (table["rank"] >= 0)
    return set(table["rank"][ended].tolist())


def _silent(topology: Topology, beats: Mapping[int, Beat], latest: int, gone: set[int]) -> set[int]:
    """Ranks whose heartbeats stopped while those of others go on."""
    times = {rank: beat.t_ns for rank, beat in beats.items() if rank not in gone}
    if len(times) < 2:
        return set()
    period = topology.config.get("heartbeat_s")
    period = float(period) if isinstance(period, (int, float)) and period > 0 else 1.0
    limit = max(policy.HANG_SECONDS, SILENT_BEATS * period)
    newest = max(times.values())
    if (latest - newest) * 1e-9 > limit:
        return set()
    return {rank for rank, t_ns in times.items() if (newest - t_ns) * 1e-9 > limit}
