"""A run at this moment, rank by rank: how fast it goes, how much of that is waiting, where it is, how its card does.

Made for programs that ask every second (``lens top``): a few short reads, whatever the length of the run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from lens.diagnosis.arrays import Floats
from lens.diagnosis.decompose import Frame
from lens.diagnosis.select import Timeline
from lens.diagnosis.topology import PRE_REDUCED, Topology
from lens.records import word
from lens.slots import NULL
from lens.store.engine import Store
from lens.store.progress import STALE_S, Progress
from lens.store.readback import read_tables
from lens.store.registry import Registry
from lens.store.rows import Series
from lens.store.runs import Run
from lens.tables import Tables

RECENT_STEPS = 10
"""Steps over which duration, waiting and rate are taken."""
CARD_METRICS: dict[str, dict[str, str]] = {
    "hw.gpu.utilization": {},
    "gpu.clock.sm": {},
    "hw.power": {"hw.type": "gpu"},
    "hw.gpu.memory.usage": {},
    "hw.gpu.memory.limit": {},
}
"""Newest values of a rank's card: the metric, and labels that a series must have unless it lacks the label."""
PROCESS_METRICS: dict[str, dict[str, str]] = {"process.memory.usage": {}, "process.cpu.utilization": {}}
HOST_METRICS: dict[str, dict[str, str]] = {
    "system.memory.usage": {"system.memory.state": "used"},
    "system.memory.limit": {},
    "system.cpu.utilization": {},
}
_INSIDE = ("running", "data", "collective", "stopped")


def now_of(store: Store, registry: Registry, run: Run) -> dict[str, Any]:
    """The present of a run.

    Returns:
        steps_per_s (over the last `RECENT_STEPS` steps), ranks [{rank, host, device, pid, vendor, model, step (newest
        finished), step_s and wait_share (mean of those steps), state, phase, collective (which, and for how long), exit, age_s (seconds
        that its newest record lies behind the run's newest), values}] and hosts [{host, values}]. What is not
        known is None; a value that was not read lately is left out of `values`.
    """
    progress = registry.progress(run.number)
    tables = _recent(store, registry, run)
    topology = Topology.of(run.described, tables)
    pace = _Pace.of(tables, topology)
    beats = _newest_events(store, run, "heartbeat", progress)
    exits = _newest_events(store, run, "process.exit", progress)
    values = _Values(store, registry, run, progress.last_t_ns)
    pids = {item.get("rank"): item.get("pid") for item in run.described.get("ranks") or ()}
    ranks = []
    for row, rank in enumerate(topology.ranks.tolist()):
        host, device = topology.host[row], topology.device[row]
        known = progress.ranks.get(rank)
        entry: dict[str, Any] = {
            "rank": rank,
            "host": host,
            "device": device,
            "pid": pids.get(rank),
            "vendor": topology.vendor[row],
            "model": topology.model[row],
            "step": None if known is None or known.last_step == NULL else known.last_step,
            "step_s": _number(pace.duration[row]),
            "wait_share": _number(pace.wait_share[row]),
            **_whereabouts(beats.get(rank), _open_phase(tables, rank)),
            "exit": None,
            "age_s": _behind(progress, rank),
            "values": {**values.of_card(device), **values.of_rank(rank)},
        }
        if known is not None and known.ended:
            ended = exits.get(rank, {})
            entry |= {"state": "ended", "phase": None, "collective": None}
            entry["exit"] = {key: ended.get(key) for key in ("exit_code", "signal")}
        ranks.append(entry)
    hosts = sorted({host for host in topology.host if host})
    return {
        "steps_per_s": pace.steps_per_s,
        "ranks": ranks,
        "hosts": [{"host": host, "values": values.of_host(host)} for host in hosts],
    }


class _Pace:
    """Means over the recent steps; arrays are in the order of the topology's ranks, NaN where nothing is known."""

    def __init__(self, duration: Floats, wait_share: Floats, steps_per_s: float | None) -> None:
        self.duration, self.wait_share, self.steps_per_s = duration, wait_share, steps_per_s

    @classmethod
    def of(cls, tables: Tables, topology: Topology) -> _Pace:
        timeline = Timeline.of(tables)
        nothing = np.full(len(topology), np.nan)
        if not len(timeline):
            return cls(nothing, nothing, None)
        frame = Frame.of(tables, timeline, topology)
        known = np.isfinite(frame.duration)
        count, spent = known.sum(axis=0), np.where(known, frame.duration, 0.0).sum(axis=0)
        waited = np.zeros(len(topology))
        told = np.zeros(len(topology), bool)
        for part in frame.wait.values():
            waited += np.where(known, np.nan_to_num(part), 0.0).sum(axis=0)
            told |= np.isfinite(part).any(axis=0)
        duration = np.where(count > 0, spent / np.maximum(count, 1), np.nan)
        share = np.where(told & (spent > 0), waited / np.maximum(spent, 1e-12), np.nan)
        return cls(duration, share, _rate(frame, duration))


def _rate(frame: Frame, duration: Floats) -> float | None:
    """Steps a second, from the ends of the recent steps; of a single step, from its duration."""
    ends = np.where(frame.end_ns == NULL, np.iinfo(np.int64).min, frame.end_ns).max(axis=1)
    ends = np.sort(ends[ends != NULL])
    if len(ends) > 1 and ends[-1] > ends[0]:
        return float((len(ends) - 1) / ((ends[-1] - ends[0]) / 1e9))
    longest = np.nanmax(duration) if np.isfinite(duration).any() else 0.0
    return float(1 / longest) if longest > 0 else None


def _recent(store: Store, registry: Registry, run: Run) -> Tables:
    """Records of the newest finished steps and of what came after them."""
    metrics = [s for s in registry.series(run.number) if s.metric in PRE_REDUCED]
    mids = ", ".join(str(series.mid) for series in metrics)
    sources = [f"SELECT step FROM lens.steps WHERE run = {run.number} AND t1_ns != {NULL} AND step >= 0"]
    if mids:
        sources.append(f"SELECT step FROM lens.vectors WHERE run = {run.number} AND mid IN ({mids}) AND step >= 0")
    first = store.scalar(
        f"SELECT min(step) FROM (SELECT DISTINCT step FROM ({' UNION ALL '.join(sources)}) "
        f"ORDER BY step DESC LIMIT {RECENT_STEPS})"
    )
    where = f"step >= {first or 0}"
    tables = read_tables(store, run.number, [], where, ("steps", "spans", "collectives"))
    if not mids:
        return tables
    return Tables.concat(
        [tables, read_tables(store, run.number, metrics, f"{where} AND mid IN ({mids})", ("vectors",))]
    )


def _newest_events(store: Store, run: Run, kind: str, progress: Progress) -> dict[int, dict[str, Any]]:
    """Attributes of the newest event of a kind, and its `t_ns`, by rank."""
    since = 0 if kind == "process.exit" else (progress.last_t_ns or 0) - int(2 * STALE_S * 1e9)
    found = store.query(
        "SELECT rank, max(each.t_ns) AS t_ns, argMax(attrs, each.t_ns) AS attrs FROM lens.events AS each "
        f"WHERE run = {run.number} AND kind = '{kind}' AND each.t_ns >= {since} AND rank >= 0 GROUP BY rank"
    )
    return {row["rank"]: {**json.loads(row["attrs"] or "{}"), "t_ns": row["t_ns"]} for row in found.to_pylist()}


def _whereabouts(beat: Mapping[str, Any] | None, open_phase: str | None) -> dict[str, Any]:
    """state, phase and collective as the rank's newest heartbeat tells them; its open spans where none came."""
    if beat is None:
        return {"state": None, "phase": open_phase, "collective": None}
    state = beat.get("state")
    inside = None
    if state == "collective":
        since = beat.get("since_ns")
        spent = (beat["t_ns"] - since) / 1e9 if isinstance(since, int) else None
        inside = {**{key: beat.get(key) for key in ("op", "group", "seq")}, "for_s": spent}
    phase = beat.get("phase") or ("data" if state == "data" else open_phase)
    return {"state": state, "phase": phase if state in _INSIDE else None, "collective": inside}


def _open_phase(tables: Tables, rank: int) -> str | None:
    """The phase that a rank was last seen to enter and has not left."""
    spans = tables.spans
    mine = (spans["rank"] == rank) & (spans["t1_ns"] == NULL) & (spans["kind"] == tables.code("phase"))
    rows = np.flatnonzero(mine)
    if not len(rows):
        return None
    newest = rows[np.argmax(spans["t0_ns"][rows])]
    return tables.string(int(spans["name"][newest]))


def _behind(progress: Progress, rank: int) -> float | None:
    known, newest = progress.ranks.get(rank), progress.last_t_ns
    if known is None or known.last_t_ns == NULL or newest is None:
        return None
    return round((newest - known.last_t_ns) / 1e9, 3)


class _Values:
    """Newest values of cards, processes and hosts; what lies more than `STALE_S` behind the run is left out."""

    def __init__(self, store: Store, registry: Registry, run: Run, newest_ns: int | None) -> None:
        chosen = {
            series.mid: series
            for metrics in (CARD_METRICS, PROCESS_METRICS, HOST_METRICS)
            for metric, labels in metrics.items()
            for series in registry.series(run.number, metric)
            if _has_labels(series, labels)
        }
        self._found: dict[tuple[str, str | int | None], tuple[int, Any]] = {}
        if not chosen:
            return
        since = (newest_ns or 0) - int(STALE_S * 1e9)
        rows = store.query(
            f"SELECT mid, rank, t_ns, value FROM lens.latest FINAL WHERE run = {run.number} "
            f"AND mid IN ({', '.join(map(str, chosen))}) AND t_ns >= {since}"
        ).to_pylist()
        for row in rows:
            series = chosen[row["mid"]]
            of: str | int | None = row["rank"]
            if series.metric in CARD_METRICS:
                of = series.device
            elif series.metric in HOST_METRICS:
                of = series.host
            known = self._found.get((series.metric, of))
            if known is None or known[0] < row["t_ns"]:
                self._found[series.metric, of] = row["t_ns"], word(row["value"])

    def of_card(self, device: str | None) -> dict[str, Any]:
        """Of the card of this name."""
        return self._of(CARD_METRICS, device)

    def of_rank(self, rank: int) -> dict[str, Any]:
        """Of a rank's process."""
        return self._of(PROCESS_METRICS, rank)

    def of_host(self, host: str) -> dict[str, Any]:
        """Of a host."""
        return self._of(HOST_METRICS, host)

    def _of(self, metrics: Mapping[str, Any], of: str | int | None) -> dict[str, Any]:
        return {metric: self._found[metric, of][1] for metric in metrics if (metric, of) in self._found}


def _has_labels(series: Series, labels: Mapping[str, str]) -> bool:
    known = json.loads(series.labels) if series.labels and labels else {}
    return all(known.get(name, value) == value for name, value in labels.items())


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
