"""Where the values of a metric lie: samples, vectors over ranks, or the spans of steps and phases.

A `Relation` is a SELECT that gives (key, rank, step, t_ns, value) whatever it is made from, so charts need to know
one shape only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from lens.slots import NULL
from lens.store.engine import Store, quote
from lens.store.errors import BadQueryError
from lens.store.held import HELD_FROM
from lens.store.moments import timed
from lens.store.registry import Registry
from lens.store.rows import Series
from lens.store.schema import STEP_AXIS, STEP_BUCKET, TIME_AXIS, TIME_BUCKET_NS

PHASE_DURATION = "phase.duration"
OWN_TIME = "step.self"
"""A rank's own time in a step: what collectives leave of it."""
PRE_REDUCED = "comm.self"
"""Large runs send own time themselves, a vector over ranks for each kind of group, operation and phase."""
FROM_STEPS = {
    "step.duration": ("(t1_ns - t0_ns) / 1e9", f"t1_ns != {NULL}"),
    "step.tokens": ("toFloat64(tokens)", f"tokens != {NULL}"),
}
"""Metrics that the steps themselves hold: the value, and which rows have one."""
NOT_OVER_RANKS = "moe."
"""Vectors of these metrics without a rank are values of experts, not of ranks."""


@dataclass(frozen=True)
class Selection:
    """Which series of a metric are meant; None or empty means all. `ranks` -1 is "no rank"."""

    metric: str
    ranks: tuple[int, ...] = ()
    device: str | None = None
    host: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def takes(self, series: Series) -> bool:
        """Whether a series is among them, whatever its rank."""
        if self.device is not None and series.device != self.device:
            return False
        if self.host is not None and series.host != self.host:
            return False
        known = json.loads(series.labels) if series.labels and self.labels else {}
        return all(known.get(name) == value for name, value in self.labels.items())

    def rank_filter(self) -> str:
        """The ranks as a condition of SQL."""
        return f"rank IN ({', '.join(map(str, self.ranks))})" if self.ranks else "1"


@dataclass(frozen=True)
class Name:
    """What a key of a relation stands for."""

    host: str | None = None
    device: str | None = None
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Relation:
    """A SELECT over (key, rank, step, t_ns, value), what its keys mean, and its roll-up if it has one."""

    sql: str
    names: Mapping[int | str, Name]
    rollup: str | None = None
    """A SELECT over (key, rank, axis, bucket, min, max, sum, count, odd)."""
    fine: str | None = None
    """A SELECT over (key, rank, bucket, min, max) of the fine roll-up, over steps."""
    extent: tuple[int, int] | None = None
    """First and last step (or time) there may be, from the roll-up."""
    axis: str = "step"
    """What it is drawn over: step or time."""
    rows: int | None = None
    """How many rows it has, at most; None if that is not known."""
    top: int | None = None
    """The largest rank among them; None if that is not known."""


def relation_of(
    store: Store, registry: Registry, run: int, selection: Selection, axis: str | None = None
) -> Relation | None:
    """Where the selected values are; None if the run has none.

    `axis` is "step" or "time", or None for the metric's own (see `natural_axis`); over steps, samples without a step
    are placed at the step that was going on at their time.
    """
    every = registry.series(run, selection.metric)
    chosen = [series for series in every if selection.takes(series)]
    if chosen:
        extents, rows, top = _extents(store, run, selection, chosen)
        if axis is None:
            # Only where what is chosen has no step can others of the metric decide.
            is_time = extents and STEP_AXIS not in extents
            axis = natural_axis(store, registry, run, selection.metric) if is_time else "step"
        found = (
            replace(_from_samples(store, run, selection, chosen, axis, extents), axis=axis, rows=rows, top=top)
            if extents
            else _from_vectors(store, run, selection, chosen)
        )
        if found is not None:
            return found
    if selection.metric in FROM_STEPS and not selection.labels:
        return _from_steps(store, run, selection)
    if selection.metric == PHASE_DURATION:
        return _from_phases(store, run, selection)
    if selection.metric == OWN_TIME and not selection.labels:
        return _from_collectives(store, run, selection) or _summed(store, registry, run, selection, PRE_REDUCED)
    return None


def has_own_time(store: Store, registry: Registry, run: int) -> bool:
    """Whether `OWN_TIME` can be told of a run."""
    if registry.series(run, PRE_REDUCED):
        return True
    return bool(store.scalar(f"SELECT count() FROM (SELECT 1 FROM lens.collectives WHERE run = {run} LIMIT 1)"))


def natural_axis(store: Store, registry: Registry, run: int, metric: str) -> str:
    """The axis a metric is drawn over when nobody says: steps if it has any, else time."""
    mids = [series.mid for series in registry.series(run, metric)]
    if not mids:
        return "step"
    stepped = store.scalar(
        f"SELECT count() FROM lens.rollup WHERE run = {run} AND mid IN ({_numbers(mids)}) AND axis = {STEP_AXIS}"
    )
    sampled = store.scalar(f"SELECT count() FROM lens.rollup WHERE run = {run} AND mid IN ({_numbers(mids)})")
    return "time" if sampled and not stepped else "step"


def _extents(
    store: Store, run: int, selection: Selection, chosen: list[Series]
) -> tuple[dict[int, tuple[int, int]], int, int]:
    """First and last bucket of the roll-up on each axis that the samples have, how many there are, the largest rank."""
    found = store.query(
        "SELECT axis, min(bucket) AS low, max(bucket) AS high, toInt64(sum(count + odd)) AS rows, max(rank) AS top FROM lens.rollup "
        f"WHERE {_of_chosen(run, selection, chosen)} GROUP BY axis"
    ).to_pylist()
    extents = {row["axis"]: (row["low"], row["high"]) for row in found}
    return extents, sum(row["rows"] for row in found), max((row["top"] for row in found), default=-1)


def _of_chosen(run: int, selection: Selection, chosen: list[Series]) -> str:
    return f"run = {run} AND mid IN ({_numbers(s.mid for s in chosen)}) AND {selection.rank_filter()}"


def _from_samples(
    store: Store,
    run: int,
    selection: Selection,
    chosen: list[Series],
    axis: str,
    extents: dict[int, tuple[int, int]],
) -> Relation:
    where = _of_chosen(run, selection, chosen)
    names = _names(chosen)
    plain = f"SELECT mid AS key, rank, step, t_ns, value FROM lens.samples WHERE {where}"
    if axis == "time":
        if STEP_AXIS in extents:
            every = timed(where, f"run = {run} AND {selection.rank_filter()}")
            plain = f"SELECT mid AS key, rank, step, t_ns, value FROM ({every})"
        only_times = set(extents) == {TIME_AXIS}
        extent = tuple(b * TIME_BUCKET_NS for b in extents[TIME_AXIS]) if only_times else None
        rolled = _rollup(where, TIME_AXIS) if only_times else None
        return Relation(
            plain, names, rolled, extent=(extent[0], extent[1] + TIME_BUCKET_NS - 1) if extent else None
        )
    if TIME_AXIS not in extents:
        low, high = extents[STEP_AXIS]
        bounds = (low * STEP_BUCKET, (high + 1) * STEP_BUCKET - 1)
        fine = f"SELECT mid AS key, rank, bucket, min, max FROM lens.rollup_fine WHERE {where}"
        return Relation(
            f"{plain} AND step >= 0",
            names,
            _rollup(where, STEP_AXIS),
            fine if run > store.early_runs else None,
            bounds,
        )
    return Relation(f"{plain} AND step >= 0 UNION ALL {_placed_by_time(run, where)}", names)


def _rollup(where: str, axis: int) -> str:
    return (
        "SELECT mid AS key, rank, bucket, min, max, sum, count, odd "
        f"FROM lens.rollup WHERE {where} AND axis = {axis}"
    )


def _placed_by_time(run: int, where: str) -> str:
    """Samples without a step, at the step that their rank (or, without a rank, any) had begun last."""
    samples = f"SELECT mid, rank, t_ns, value FROM lens.samples WHERE {where} AND step < 0"
    begun = f"SELECT rank, step, t0_ns FROM lens.steps WHERE run = {run}"
    anywhere = (
        f"SELECT toInt32(-1) AS rank, step, min(t0_ns) AS t0_ns FROM lens.steps WHERE run = {run} GROUP BY step"
    )
    return (
        "SELECT s.mid AS key, s.rank AS rank, b.step AS step, s.t_ns AS t_ns, s.value AS value "
        f"FROM ({samples}) AS s ASOF INNER JOIN ({begun} UNION ALL {anywhere}) AS b "
        "ON s.rank = b.rank AND s.t_ns >= b.t0_ns"
    )


def _from_vectors(store: Store, run: int, selection: Selection, chosen: list[Series]) -> Relation | None:
    if selection.metric.startswith(NOT_OVER_RANKS):
        raise BadQueryError(
            f"{selection.metric} is a vector over experts, not one value", "ask for heatmap?rows=expert"
        )
    where = f"run = {run} AND mid IN ({_numbers(s.mid for s in chosen)}) AND rank = -1 AND layer = -1"
    if not store.scalar(f"SELECT count() FROM lens.vectors WHERE {where}"):
        return None
    sql = (
        "SELECT mid AS key, toInt32(place - 1) AS rank, step, t_ns, value FROM lens.vectors "
        "ARRAY JOIN values AS value, arrayEnumerate(values) AS place "
        f"WHERE {where.replace('rank = -1', 'lens.vectors.rank = -1')}"
    )
    return Relation(f"SELECT * FROM ({sql}) WHERE {selection.rank_filter()}", _names(chosen))


def _from_steps(store: Store, run: int, selection: Selection) -> Relation | None:
    value, known = FROM_STEPS[selection.metric]
    where = f"run = {run} AND {known} AND {selection.rank_filter()}"
    extent = store.query(
        f"SELECT min(step) AS low, max(step) AS high, count() AS rows FROM lens.steps WHERE {where}"
    )
    row = extent.to_pylist()[0]
    if not row["rows"]:
        return None
    sql = f"SELECT '' AS key, rank, step, t0_ns AS t_ns, {value} AS value FROM lens.steps WHERE {where}"
    return Relation(sql, {"": Name()}, extent=(row["low"], row["high"]), rows=row["rows"])


def _from_phases(store: Store, run: int, selection: Selection) -> Relation | None:
    where = f"run = {run} AND kind = 'phase' AND t1_ns != {NULL} AND step >= 0 AND {selection.rank_filter()}"
    if set(selection.labels) - {"phase"}:
        return None
    if "phase" in selection.labels:
        where += f" AND name = {quote(selection.labels['phase'])}"
    names = store.query(f"SELECT DISTINCT name FROM lens.spans WHERE {where}").column("name").to_pylist()
    if not names:
        return None
    # A phase may come several times in a step (micro-batches): its duration is their sum.
    sql = (
        "SELECT name AS key, rank, step, min(t0_ns) AS t_ns, sum(t1_ns - t0_ns) / 1e9 AS value "
        f"FROM lens.spans WHERE {where} GROUP BY name, rank, step"
    )
    return Relation(sql, {name: Name(labels={"phase": name}) for name in names})


def _from_collectives(store: Store, run: int, selection: Selection) -> Relation | None:
    """Each step less the union of what holds its rank up; a rank without a recorded collective has no value."""
    where = f"run = {run} AND {selection.rank_filter()}"
    extent = store.query(
        f"SELECT min(step) AS low, max(step) AS high, count() AS rows FROM lens.collectives WHERE {where} AND step >= 0"
    ).to_pylist()[0]
    if not extent["rows"]:
        return None
    # One interval after the other: how far the union reaches, and its length so far.
    union = (
        "arrayFold((sum, call) -> (greatest(sum.1, call.2), sum.2 + greatest(0, call.2 - greatest(call.1, sum.1))), "
        "arraySort(groupArray((begin, end))), (toInt64(0), toInt64(0))).2"
    )
    calls = (
        f"SELECT rank, step, {HELD_FROM} AS begin, t1_ns AS end FROM lens.collectives "
        f"WHERE {where} AND step >= 0 AND t1_ns != {NULL} AND begin != {NULL}"
    )
    held = f"SELECT rank, step, {union} AS held FROM ({calls}) GROUP BY rank, step"
    steps = f"SELECT rank, step, t0_ns, t1_ns FROM lens.steps WHERE {where} AND t1_ns != {NULL}"
    sql = (
        "SELECT '' AS key, s.rank AS rank, s.step AS step, s.t0_ns AS t_ns, "
        "greatest(0, s.t1_ns - s.t0_ns - h.held) / 1e9 AS value "
        f"FROM ({steps}) AS s INNER JOIN ({held}) AS h ON s.rank = h.rank AND s.step = h.step"
    )
    return Relation(sql, {"": Name()}, extent=(extent["low"], extent["high"]))


def _summed(store: Store, registry: Registry, run: int, selection: Selection, metric: str) -> Relation | None:
    """The sum of all vectors over ranks of another metric, rank by rank and step by step."""
    chosen = registry.series(run, metric)
    whole = Selection(metric, selection.ranks)
    found = _from_vectors(store, run, whole, chosen) if chosen else None
    if found is None:
        return None
    sql = f"SELECT '' AS key, rank, step, min(t_ns) AS t_ns, sum(value) AS value FROM ({found.sql}) GROUP BY rank, step"
    return Relation(sql, {"": Name()})


def _names(chosen: list[Series]) -> dict[int | str, Name]:
    return {
        series.mid: Name(series.host, series.device, json.loads(series.labels) if series.labels else {})
        for series in chosen
    }


def _numbers(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
