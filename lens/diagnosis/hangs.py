"""A run that stands still: who waits in which collective, and for whom.

Every rank that waits points at the members of its group that have not entered the same collective. Followed to the
end, the pointing stops at ranks that wait for nobody: dead, stuck outside of a collective, or in another collective
than their group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lens.diagnosis import policy
from lens.diagnosis.arrays import Array
from lens.diagnosis.exits import End
from lens.diagnosis.topology import Topology
from lens.slots import NULL
from lens.tables import Tables

SILENT_BEATS = 4
"""Heartbeats that must be missing in a row before a rank counts as silent."""


@dataclass(frozen=True)
class Waiting:
    """A collective that a rank entered and did not leave."""

    rank: int
    group: str
    seq: int
    op: str
    size: int
    t0_ns: int


@dataclass(frozen=True)
class Hang:
    """Why nothing moves. cause: rank_dead, rank_stuck, collective_mismatch, process_stopped or unexplained."""

    cause: str
    ranks: tuple[int, ...]
    group: str | None
    seq: int | None
    op: str | None
    waiting: tuple[int, ...]
    quiet_s: float
    state: str | None


def find(tables: Tables, topology: Topology, durations: Array, ended: list[End]) -> Hang | None:
    """The hang at the end of these records, None while the run moves or has ended properly."""
    latest = now_ns(tables)
    moved = _last_progress(tables)
    if latest is None or moved is None:
        return None
    waiting = _waiting(tables)
    quiet = (latest - moved) * 1e-9
    if quiet < _patience(tables, durations):
        return None
    beats = _heartbeats(tables)
    gone = _gone(tables)
    silent = _silent(tables, topology, latest, gone)
    alive_waiting = [w for w in waiting.values() if w.rank not in gone]
    states = {rank: str(beat[1].get("state", "")) for rank, beat in beats.items()}
    if not alive_waiting and not silent and not any(s == "stopped" for s in states.values()):
        return None
    dead = {end.rank for end in ended if not end.restarted} | silent
    return _blame(topology, {w.rank: w for w in alive_waiting}, dead, states, quiet, gone)


def now_ns(tables: Tables) -> int | None:
    """The largest event time of any record: what "now" is for records that are read later."""
    columns = {
        "samples": ("t_ns",), "vectors": ("t_ns",), "events": ("t_ns",), "steps": ("t0_ns", "t1_ns"),
        "spans": ("t0_ns", "t1_ns"), "collectives": ("t0_ns", "t1_ns"),
    }  # fmt: skip
    latest = max(int(tables.table(n)[c].max(initial=NULL)) for n, names in columns.items() for c in names)
    return None if latest == NULL else latest


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


def _patience(tables: Tables, durations: Array) -> float:
    """Seconds without progress that are still normal."""
    known = durations[np.isfinite(durations)]
    seconds = policy.HANG_SECONDS
    if len(known):
        seconds = max(seconds, policy.HANG_STEPS * float(np.quantile(known, 0.99)))
    spans = tables.spans
    slow = [tables.code(name) for name in policy.SLOW_PHASES]
    inside = (spans["t1_ns"] == NULL) & (np.isin(spans["name"], slow) | np.isin(spans["kind"], slow))
    return seconds * (2 if inside.any() else 1)


def _waiting(tables: Tables) -> dict[int, Waiting]:
    """The collective each rank is in: its latest one without an end (a later record with the end closes it)."""
    table = tables.collectives
    rows = np.flatnonzero((table["t1_ns"] == NULL) & (table["rank"] >= 0))
    # What was enqueued and never waited for blocks nobody.
    rows = rows[(table["is_async"][rows] == 0) | (table["t_wait_ns"][rows] != NULL)]
    found: dict[int, Waiting] = {}
    for row in rows[np.argsort(table["t0_ns"][rows], kind="stable")].tolist():
        rank, t0 = int(table["rank"][row]), int(table["t0_ns"][row])
        if _moved_on(table, rank, t0):
            continue
        group = tables.string(int(table["group"][row])) or "world/0"
        op = tables.string(int(table["op"][row])) or ""
        found[rank] = Waiting(rank, group, int(table["seq"][row]), op, int(table["bytes"][row]), t0)
    for rank, (t_ns, attrs) in _heartbeats(tables).items():
        # Spans shorter than a second are not sent open: the heartbeat knows of them first.
        if rank not in found and attrs.get("state") == "collective" and attrs.get("group"):
            seq, begun = attrs.get("seq"), attrs.get("since_ns")
            found[rank] = Waiting(
                rank, str(attrs["group"]), int(seq) if isinstance(seq, int) else NULL, str(attrs.get("op", "")),
                NULL, int(begun) if isinstance(begun, int) else t_ns,
            )  # fmt: skip
    return found


def _moved_on(table: dict[str, Array], rank: int, t0_ns: int) -> bool:
    """Whether a rank ended this very collective, or one that it began later: then the open record is outdated."""
    ended = (table["rank"] == rank) & (table["t1_ns"] != NULL)
    return bool((table["t0_ns"][ended] >= t0_ns).any())


def _heartbeats(tables: Tables) -> dict[int, tuple[int, Mapping[str, Any]]]:
    """Time and content of each rank's last heartbeat."""
    table = tables.events
    rows = np.flatnonzero((table["kind"] == tables.code("heartbeat")) & (table["rank"] >= 0))
    last: dict[int, tuple[int, Mapping[str, Any]]] = {}
    order = rows[np.lexsort((table["t_ns"][rows], table["rank"][rows]))]
    newest = order[np.r_[np.diff(table["rank"][order]) != 0, True]] if len(order) else order
    for row in newest.tolist():
        text = tables.string(int(table["attrs"][row]))
        last[int(table["rank"][row])] = int(table["t_ns"][row]), json.loads(text) if text else {}
    return last


def _gone(tables: Tables) -> set[int]:
    """Ranks whose process has ended, in whatever way, after everything else they wrote."""
    table = tables.events
    return set(table["rank"][table["kind"] == tables.code("process.exit")].tolist())


def _silent(tables: Tables, topology: Topology, latest: int, gone: set[int]) -> set[int]:
    """Ranks whose heartbeats stopped while those of others go on."""
    beats = {rank: t_ns for rank, (t_ns, _) in _heartbeats(tables).items() if rank not in gone}
    if len(beats) < 2:
        return set()
    period = topology.config.get("heartbeat_s")
    period = float(period) if isinstance(period, (int, float)) and period > 0 else 1.0
    newest = max(beats.values())
    if (latest - newest) * 1e-9 > max(policy.HANG_SECONDS, SILENT_BEATS * period):
        return set()
    limit = max(policy.HANG_SECONDS, SILENT_BEATS * period)
    return {rank for rank, t_ns in beats.items() if (newest - t_ns) * 1e-9 > limit}


def _blame(
    topology: Topology,
    waiting: dict[int, Waiting],
    dead: set[int],
    states: dict[int, str],
    quiet: float,
    gone: set[int],
) -> Hang:
    stopped = {rank for rank, state in states.items() if state == "stopped" and rank not in gone}
    victims = tuple(sorted(set(waiting) - dead - stopped))
    first = min(waiting.values(), key=lambda w: (w.t0_ns, w.rank), default=None)
    group, op = (first.group, first.op) if first else (None, None)
    seq = first.seq if first and first.seq != NULL else None
    if dead:
        return Hang("rank_dead", tuple(sorted(dead)), group, seq, op, victims, quiet, None)
    if stopped:
        return Hang("process_stopped", tuple(sorted(stopped)), group, seq, op, victims, quiet, "stopped")
    odd = _mismatched(waiting)
    if odd:
        item = waiting[odd[0]]
        seq = None if item.seq == NULL else item.seq
        rest = tuple(rank for rank in victims if rank not in odd)
        return Hang("collective_mismatch", odd, item.group, seq, item.op, rest, quiet, None)
    absent = _awaited(topology, waiting) - set(waiting) - gone
    if absent:
        state = next((states[rank] for rank in sorted(absent) if rank in states), None)
        return Hang("rank_stuck", tuple(sorted(absent)), group, seq, op, victims, quiet, state)
    behind = _behind(topology, waiting)
    if behind:
        item = waiting[behind[0]]
        seq = None if item.seq == NULL else item.seq
        rest = tuple(rank for rank in victims if rank not in behind)
        return Hang("collective_mismatch", behind, item.group, seq, item.op, rest, quiet, None)
    return Hang("unexplained", (), group, seq, op, victims, quiet, None)


def _mismatched(waiting: dict[int, Waiting]) -> tuple[int, ...]:
    """Ranks that entered another operation, size or number than most of their group."""
    by_group: dict[str, list[Waiting]] = {}
    for item in waiting.values():
        by_group.setdefault(item.group, []).append(item)
    for group in sorted(by_group):
        for part in (lambda w: (w.op, w.size), lambda w: (w.seq,)):
            votes: dict[Any, list[int]] = {}
            for item in by_group[group]:
                votes.setdefault(part(item), []).append(item.rank)
            if len(votes) > 1:
                most = max(len(ranks) for ranks in votes.values())
                fewer = [ranks for ranks in votes.values() if len(ranks) < most]
                # Two against two: nobody can say which half is wrong; all of them are named.
                chosen = fewer or list(votes.values())
                return tuple(sorted(rank for ranks in chosen for rank in ranks))
    return ()


def _awaited(topology: Topology, waiting: dict[int, Waiting]) -> set[int]:
    """Members of waiting ranks' groups that are not in the same collective."""
    missing: set[int] = set()
    for item in waiting.values():
        members = set(topology.members.get(item.group, topology.ranks.tolist() if "world" in item.group else ()))
        inside = {w.rank for w in waiting.values() if (w.group, w.seq) == (item.group, item.seq)}
        missing |= members - inside
    return missing


def _behind(topology: Topology, waiting: dict[int, Waiting]) -> tuple[int, ...]:
    """Ranks that everybody else's waiting leads to although they wait themselves: in a group out of turn."""
    counts = dict.fromkeys(waiting, 0)
    for item in waiting.values():
        members = set(topology.members.get(item.group, topology.ranks.tolist() if "world" in item.group else ()))
        inside = {w.rank for w in waiting.values() if (w.group, w.seq) == (item.group, item.seq)}
        for rank in (members - inside) & set(counts):
            counts[rank] += 1
    most = max(counts.values(), default=0)
    return tuple(sorted(rank for rank, count in counts.items() if count == most)) if most else ()
