"""Processes that ended, and the one that ended first for a reason of its own.

When a rank dies, its peers fail in their collectives and the launcher sends SIGTERM to who is left: their ends are
consequences. The cause is the earliest end by event time that was not asked for by the launcher nor reported as a
broken connection.
"""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass
from typing import Any

import numpy as np

from lens.diagnosis.arrays import Array
from lens.diagnosis.select import Timeline
from lens.slots import NULL
from lens.tables import Tables

TERMINATION = {int(signal.SIGTERM), int(signal.SIGINT), int(signal.SIGHUP)}
KILLS = {int(signal.SIGKILL), int(signal.SIGSEGV), int(signal.SIGBUS), int(signal.SIGFPE), int(signal.SIGILL)}
BROKEN_CONNECTION = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|closed by peer|broken pipe|reset by peer|socket (timeout|closed)"
    r"|remote process exited|ncclremoteerror|nccl.{0,40}(error|abort)|timed out|timeout|heartbeat monitor"
    r"|distbackenderror|gloo.{0,60}(fail|error|abort)|peer .{0,30}(gone|left|dead)|store.{0,40}(fail|error)"
    r"|unhandled system error|signalexception",
    re.IGNORECASE,
)
MEMORY = re.compile(r"out of memory|outofmemory|cannot allocate memory|oom", re.IGNORECASE)
WORKER = re.compile(r"dataloader worker .*(exited|killed)|worker .*(killed|exited) unexpectedly", re.IGNORECASE)
TOGETHER_NS = 20_000_000
"""Ends closer than this (clock offsets, one poll of the agent) are ordered by kind of end, not by time."""
AFTERMATH_NS = 60_000_000_000
"""A broken connection points to a rank that died within this time before or after it."""


@dataclass(frozen=True)
class End:
    """How and when a rank's process ended with an error.

    strength: 3 killed or failed by itself, 2 ended without a reason known, 1 told of a broken connection, 0 asked
    to end. visible: index of the step from which it is known.
    """

    rank: int
    t_ns: int
    strength: int
    exit_code: int | None
    signal: int | None
    error: str | None
    visible: int
    memory: bool = False
    worker: bool = False
    restarted: bool = False

    @property
    def manner(self) -> str:
        """How it ended, for a sentence: "killed by SIGKILL"."""
        if self.signal is not None:
            try:
                return f"killed by {signal.Signals(self.signal).name}"
            except ValueError:
                return f"killed by signal {self.signal}"
        if self.error:
            return f"failed with {self.error}"
        if self.exit_code is not None:
            return f"ended with exit code {self.exit_code}"
        return "ended without closing its recorder"


def ends(tables: Tables, timeline: Timeline, upto: int) -> list[End]:
    """Every rank's end by an error that is known at a step index, the likeliest cause first; no clean ends."""
    table = tables.events
    kinds = {tables.code(kind): kind for kind in ("process.exit", "process.error", "run.restart")}
    rows = np.flatnonzero(np.isin(table["kind"], list(kinds)))
    visible = timeline.visible_from(table["step"][rows], table["t_ns"][rows])
    rows, visible = rows[visible <= upto], visible[visible <= upto]
    restarts = [int(table["t_ns"][r]) for r in rows if kinds[int(table["kind"][r])] == "run.restart"]
    by_rank: dict[tuple[int, int], list[tuple[int, str, dict[str, Any], str, int]]] = {}
    for row, seen in sorted(
        zip(rows.tolist(), visible.tolist(), strict=True), key=lambda x: int(table["t_ns"][x[0]])
    ):
        kind, rank, t_ns = kinds[int(table["kind"][row])], int(table["rank"][row]), int(table["t_ns"][row])
        if kind == "run.restart" or rank < 0:
            continue
        attempt = sum(t <= t_ns for t in restarts)
        text = tables.string(int(table["text"][row])) or ""
        by_rank.setdefault((rank, attempt), []).append((t_ns, kind, _attrs(tables, table, row), text, seen))
    found = [
        end
        for (rank, attempt), events in by_rank.items()
        if (end := _end(rank, events, attempt < len(restarts))) is not None
    ]
    return cause_first(found)


def _attrs(tables: Tables, table: dict[str, Array], row: int) -> dict[str, Any]:
    text = tables.string(int(table["attrs"][row]))
    attrs = json.loads(text) if text else {}
    return attrs if isinstance(attrs, dict) else {}


def _end(rank: int, events: list[tuple[int, str, dict[str, Any], str, int]], restarted: bool) -> End | None:
    errors = [event for event in events if event[1] == "process.error"]
    exits = [event for event in events if event[1] == "process.exit"]
    code, number = (
        (_whole(exits[0][2].get("exit_code")), _signal(exits[0][2].get("signal"))) if exits else (None, None)
    )
    clean = exits[0][2].get("clean") if exits else None
    if code is not None and number is None and (code < 0 or 128 < code <= 192):
        number = -code if code < 0 else code - 128
    if exits and not errors and number is None and (code == 0 or (code is None and clean is not False)):
        return None
    if exits and code == 0 and number is None:
        return None
    message = " ".join(f"{e[2].get('type', '')} {e[2].get('message', '')} {e[3]}" for e in errors)
    named = next((str(e[2]["type"]) for e in errors if e[2].get("type")), "an exception" if errors else None)
    text = message + " ".join(event[3] for event in exits)
    if number in TERMINATION:
        strength = 0
    elif number in KILLS:
        strength = 3
    elif BROKEN_CONNECTION.search(message):
        strength = 1
    elif number is not None or errors:
        strength = 3
    else:
        # A non-zero code or an unclean end without a word: a peer whose connection broke looks the same.
        strength = 2
    first = min(errors + exits, key=lambda event: event[0])
    return End(
        rank, first[0], strength, code, number, named, first[4], bool(MEMORY.search(text)),
        bool(WORKER.search(text)), restarted,
    )  # fmt: skip


def cause_first(found: list[End]) -> list[End]:
    """Earliest first; an end that points at others comes after those it may point at."""
    if not found:
        return []
    ordered = sorted(found, key=lambda end: (end.t_ns, end.rank))
    strong = [end for end in ordered if end.strength >= 2]
    if strong:
        first = strong[0]
        near = [end for end in strong if end.t_ns - first.t_ns <= TOGETHER_NS]
        cause = min(near, key=lambda end: (-end.strength, end.t_ns, end.rank))
        killed = [end for end in strong if end.strength == 3 and end.signal in KILLS]
        # A process that vanished without a word while another was killed within the same failure is its victim.
        if cause.strength == 2 and killed and killed[0].t_ns - cause.t_ns <= 1_000_000_000:
            cause = killed[0]
        asked = [end for end in ordered if end.strength == 0 and cause.t_ns - end.t_ns > AFTERMATH_NS]
        cause = asked[0] if asked else cause
    else:
        told = [end for end in ordered if end.strength == 0]
        broken = [end for end in ordered if end.strength == 1]
        # Somebody was asked to end before anyone's connection broke: its end broke them.
        cause = told[0] if told and (not broken or told[0].t_ns <= broken[0].t_ns) else ordered[0]
    return [cause, *(end for end in ordered if end is not cause)]


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _signal(value: Any) -> int | None:
    if isinstance(value, str):
        name = value.upper() if value.upper().startswith("SIG") else f"SIG{value.upper()}"
        return int(getattr(signal, name, 0)) or _whole(int(value) if value.isdigit() else None)
    number = _whole(value)
    return number if number else None


def last_seen(tables: Tables, rank: int) -> int | None:
    """Latest time in any record that the rank itself wrote (spans, collectives, its heartbeats)."""
    times = []
    for name in ("steps", "spans", "collectives"):
        table = tables.table(name)
        mine = table["rank"] == rank
        times += [int(table[c][mine].max(initial=NULL)) for c in ("t0_ns", "t1_ns")]
    events = tables.events
    beats = (events["rank"] == rank) & (events["kind"] == tables.code("heartbeat"))
    times.append(int(events["t_ns"][beats].max(initial=NULL)))
    latest = max(times)
    return None if latest == NULL else latest
