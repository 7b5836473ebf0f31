"""Requests of a run that serves: when each arrived, was begun, gave its first token and ended.

Read from spans of kind ``request``, or, where a server sends none, from the observations of `infer.request.*` that each
request leaves as it ends. Times are seconds since the run's first request; requests of one rank share its clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from lens.diagnosis.arrays import Array, Floats, Ints, median
from lens.diagnosis.notices import Evidence, begins
from lens.diagnosis.select import Timeline
from lens.diagnosis.topology import Topology
from lens.slots import NULL
from lens.tables import Tables

TIMES = ("infer.request.ttft", "infer.request.tpot", "infer.request.duration", "infer.request.queue_time")
ONE_FOR_ONE = 0.5
"""Of each second in the queue, so much must be within the time to the first token for a span to begin at the arrival."""


@dataclass(frozen=True)
class Sign:
    """A cause as one server shows it, which is a rank or several that compute together.

    rows: places of its ranks, -1 where no rank is told. began: seconds at which it began. over: when it ended, None while it
    lasts. ratio: time of requests over what it would be without. said: the beginning of a sentence.
    """

    cause: str
    rows: tuple[int, ...]
    began: float
    confidence: float
    said: str
    evidence: tuple[Evidence, ...]
    ratio: float | None = None
    rivals: tuple[tuple[str, str], ...] = ()
    over: float | None = None


@dataclass(frozen=True)
class Requests:
    """Columns over requests in the order in which work on them began; NaN is unknown.

    row: place of the rank (-1 unknown). visible: step place from which each is seen, 0 in a run without steps.
    arrived, begun, first, ended: seconds. prompt, output: tokens, output of one sequence. preempted: times put back.
    """

    row: Ints
    visible: Ints
    arrived: Floats
    begun: Floats
    first: Floats
    ended: Floats
    prompt: Floats
    output: Floats
    preempted: Floats

    def __len__(self) -> int:
        return len(self.row)

    def only(self, chosen: Array) -> Requests:
        """Those of a mask or of places."""
        return replace(self, **{column.name: getattr(self, column.name)[chosen] for column in fields(self)})

    @property
    def waited(self) -> Floats:
        """Seconds in the queue."""
        return self.begun - self.arrived

    @property
    def worked(self) -> Floats:
        """Seconds from the begin of the work to its end."""
        return self.ended - self.begun

    @property
    def to_first(self) -> Floats:
        """Seconds of work until the first token."""
        return self.first - self.begun

    @property
    def per_token(self) -> Floats:
        """Seconds per further token (TPOT)."""
        result: Floats = np.where(
            self.output > 1, (self.ended - self.first) / np.maximum(self.output - 1, 1), np.nan
        )
        return result

    def at_work(self, moments: Floats) -> Floats:
        """How many were being worked on at these moments."""
        begun, ended = np.sort(self.begun), np.sort(self.ended)
        result: Floats = (
            np.searchsorted(begun, moments, "right") - np.searchsorted(ended, moments, "right")
        ).astype(np.float64)
        return result

    @classmethod
    def of(cls, tables: Tables, timeline: Timeline, topology: Topology) -> tuple[Requests, int] | None:
        """The requests of a run and the moment (ns) from which their seconds count; None where it serves none."""
        told = _from_spans(tables) or _from_observations(tables)
        if not told:
            return None
        origin = min(item["begun"] for item in told)
        seconds = {
            name: np.array([_seconds(item.get(name), origin) for item in told])
            for name in ("begun", "first", "ended")
        }
        queued = np.array([item["queue"] for item in told])
        counts = {name: np.array([item[name] for item in told]) for name in ("prompt", "output", "preempted")}
        step = np.array([item["step"] for item in told], np.int64)
        ended_ns = np.array([item["ended"] for item in told], np.int64)
        visible = timeline.visible_from(step, ended_ns) if paced(timeline) else np.zeros(len(told), np.int64)
        arrived, begun = _arrivals(seconds["begun"], seconds["first"], queued)
        row = topology.row(np.array([item["rank"] for item in told], np.int64))
        found = cls(row, visible, arrived, begun, seconds["first"], seconds["ended"], **counts)
        order = np.lexsort([np.nan_to_num(getattr(found, column.name), nan=-1.0) for column in fields(cls)][::-1])
        order = order[np.argsort(found.begun[order], kind="stable")]
        return found.only(order), origin


def paced(timeline: Timeline) -> bool:
    """Whether any step ended, so that records without a step become visible one after another."""
    return bool(len(timeline)) and bool(timeline.ended_ns[-1] != NULL)


def rolling(values: Floats, width: int) -> Floats:
    """Median of each entry and the width - 1 before it; fewer at the beginning."""
    padded = np.concatenate([np.full(width - 1, np.nan), values])
    return median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1)


def risen(share: Floats, least: int, much: float, standing: float) -> tuple[int, float, float] | None:
    """Where what requests or iterations lose rose to stay: its place, and the mean before and since; None where it did not.

    It rose by `much` and half as much again as before, and since then no stretch of a quarter of that time shows less than
    any as long before: what comes and goes, as bursts do, is no rise. What always was as high as `standing` has no past.
    """
    onset, before, now = begins(share, least)
    if onset and now - before >= much and now >= 1.5 * before:
        length = max(least, (len(share) - onset) // 4)
        if _stretches(share[onset:], length).min() > _stretches(share[:onset], length).max():
            return onset, before, now
    level = float(share.mean()) if len(share) else 0.0
    if len(share) < 3 * least or level < standing or _stretches(share, len(share) // 4).min() < standing / 2:
        return None
    return 0, 0.0, level


def _stretches(values: Floats, length: int) -> Floats:
    """Means of all stretches of so many entries, of all of them where there are fewer."""
    length = min(length, len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    result: Floats = (total[length:] - total[:-length]) / length
    return result


def _from_spans(tables: Tables) -> list[dict[str, Any]]:
    """What spans of requests tell, each once."""
    table = tables.spans
    mine = np.flatnonzero((table["kind"] == tables.code("request")) & (table["t1_ns"] != NULL))
    names = ("rank", "step", "t0_ns", "t1_ns", "name", "attrs")
    rows = dict.fromkeys(zip(*(table[name][mine].tolist() for name in names), strict=True))
    first_after: dict[tuple[int, int], float] | None = None
    told = []
    for rank, step, begun, ended, _, code in rows:
        attrs = json.loads(tables.strings[code]) if code >= 0 else {}
        first = _number(attrs, "t_first_token_ns")
        if not np.isfinite(first):
            # A server on a device tells the time to the first token once it has passed there.
            if first_after is None:
                first_after = {key[:2]: value for key, value in _observed(tables, TIMES[0]).items()}
            first = begun + 1e9 * first_after.get((rank, ended), np.nan)
        told.append({
            "rank": rank, "step": step, "begun": begun, "first": first, "ended": ended,
            "queue": _number(attrs, "queue_ns") * 1e-9, "prompt": _number(attrs, "prompt_tokens"),
            "output": _number(attrs, "output_tokens"), "preempted": _number(attrs, "preemptions"),
        })  # fmt: skip
    return told


def _from_observations(tables: Tables) -> list[dict[str, Any]]:
    """The same from the samples that a request leaves at its end."""
    ttft, tpot, lasted, queued = (_observed(tables, name) for name in TIMES)
    told = []
    for key, seconds in lasted.items():
        rank, ended = key[:2]
        first, each = ttft.get(key, np.nan), tpot.get(key, np.nan)
        begun = ended - round(1e9 * seconds)
        told.append({
            "rank": rank, "step": key[3], "begun": begun, "first": begun + 1e9 * first, "ended": ended,
            "queue": queued.get(key, np.nan), "prompt": np.nan, "preempted": np.nan,
            "output": 1 + round((seconds - first) / each) if each > 0 and np.isfinite(first) else np.nan,
        })  # fmt: skip
    return told


def _observed(tables: Tables, metric: str) -> dict[tuple[int, int, int, int], float]:
    """Values of a metric by rank, time, labels and step; of several at once the largest."""
    table = tables.samples
    mine = np.flatnonzero((table["metric"] == tables.code(metric)) & np.isfinite(table["value"]))
    mine = mine[np.argsort(table["value"][mine], kind="stable")]
    keys = zip(*(table[name][mine].tolist() for name in ("rank", "t_ns", "labels", "step")), strict=True)
    return dict(zip(keys, table["value"][mine].tolist(), strict=True))


def _arrivals(begun: Floats, first: Floats, queued: Floats) -> tuple[Floats, Floats]:
    """When requests arrived and were begun: a span begins with the work, or, with some servers, at the arrival."""
    known = np.isfinite(queued) & np.isfinite(first)
    to_first, wait = (first - begun)[known], queued[known]
    within = bool(known.any()) and bool((wait <= to_first + 1e-6).all()) and float(np.ptp(wait)) > 0
    if within:
        slope = float(np.polyfit(wait, to_first, 1)[0])
        if slope >= ONE_FOR_ONE:
            return begun, begun + np.nan_to_num(queued)
    return begun - queued, begun


def _seconds(t_ns: float | None, origin: int) -> float:
    if t_ns is None or not np.isfinite(t_ns):
        return np.nan
    return (int(t_ns) - origin) * 1e-9


def _number(attrs: dict[str, Any], key: str) -> float:
    value = attrs.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else np.nan


def usual(values: Iterable[float] | Floats) -> float:
    """Median of what is known; NaN without any."""
    return float(median(np.asarray(values, np.float64)))


def count(tables: Tables) -> int:
    """Requests that have ended."""
    spans = tables.spans
    return int(((spans["kind"] == tables.code("request")) & (spans["t1_ns"] != NULL)).sum())
