"""Where the wall time of a run went, in the parts that every page, report and verdict uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lens.diagnosis import policy
from lens.diagnosis.arrays import Floats, Ints
from lens.diagnosis.decompose import APART_PHASES, COMPUTE_PHASES, COPY_PHASES, LOADING_PHASES, SECONDS, Frame
from lens.diagnosis.pipeline import bubble
from lens.diagnosis.select import Timeline, through
from lens.diagnosis.topology import Topology
from lens.slots import NULL
from lens.tables import Tables

PARTS = (
    "compute", "exposed_communication", "straggler_wait", "data", "checkpoint", "gc", "bubble", "restart", "other",
)  # fmt: skip


def ledger(run: Mapping[str, Any], tables: Tables, upto_step: int | None = None) -> dict[str, Any]:
    """The mean rank's wall time from its first step's start to its last step's end, in seconds, by part.

    A checkpoint or an evaluation after that end belongs to it, and one between two steps is what it is, not `other`.

    The parts sum to wall_s; a part nobody recorded is None (and its time, if any, lies in `other` or `compute`).
    Without a finished step all numbers are None. `pipeline` lays the bubble beside the schedule's theory, as shares of the
    passes (`pipeline.Bubble`); None without a pipeline.
    """
    timeline = Timeline.of(tables)
    seen = through(tables, timeline, upto_step)
    timeline = timeline if seen is tables else Timeline.of(seen)
    frame = Frame.of(seen, timeline, Topology.of(run, seen))
    done = np.isfinite(frame.duration)
    if not done.any():
        return {"from_step": None, "to_step": None, "wall_s": None, "parts": dict.fromkeys(PARTS), "pipeline": None}
    rows = np.flatnonzero(done.any(axis=0))
    judged = np.flatnonzero(done.any(axis=1))
    wall, restart, saving = _wall(frame, seen, rows, _of_no_step(frame, seen, timeline, done))
    parts: dict[str, float | None] = {
        name: _total(values, done, rows) for name, values in _recorded(frame, done).items()
    }
    if restart is not None:
        parts["restart"] = restart
    if saving is not None:
        parts["checkpoint"] = (parts["checkpoint"] or 0.0) + saving
    _take_collection_out(parts)
    idle = bubble(frame, seen, judged[judged >= min(policy.WARM_UP_STEPS, len(judged) - 1)])
    parts["other"] = max(0.0, wall - sum(value for value in parts.values() if value is not None))
    return {
        "from_step": int(timeline.steps[judged[0]]),
        "to_step": int(timeline.steps[judged[-1]]),
        "wall_s": round(wall, 6),
        "parts": {name: None if parts.get(name) is None else round(float(parts[name] or 0.0), 6) for name in PARTS},
        "pipeline": None if idle is None else idle.shown(),
    }


def _recorded(frame: Frame, done: np.ndarray[Any, np.dtype[np.bool_]]) -> dict[str, Floats | None]:
    compute = frame.own_sum(COMPUTE_PHASES)
    if compute is None:
        named = sum((np.nan_to_num(own) for own in frame.own.values()), np.zeros(frame.shape))
        compute = np.maximum(frame.self_time - named, 0)
    pipeline = [frame.wait["pp"]] if "pp" in frame.wait else []
    waits = [values for kind, values in frame.wait.items() if kind != "pp"]
    gc = frame.count.get("gc_ns")
    return {
        "compute": compute,
        "data": frame.own_sum((*LOADING_PHASES, *COPY_PHASES)),
        "checkpoint": frame.own_sum(("checkpoint",)),
        "gc": None if gc is None else gc * SECONDS,
        "straggler_wait": _sum(waits),
        "bubble": _sum(pipeline),
        "exposed_communication": _sum(list(frame.transfer.values())),
    }


def _sum(parts: list[Floats]) -> Floats | None:
    return np.sum([np.nan_to_num(part) for part in parts], axis=0) if parts else None


def _total(
    values: Floats | None, done: np.ndarray[Any, np.dtype[np.bool_]], rows: np.ndarray[Any, Any]
) -> float | None:
    """Seconds of the mean rank over all finished steps."""
    if values is None:
        return None
    return float(np.nansum(np.where(done, np.nan_to_num(values), 0.0)[:, rows]) / len(rows))


def _take_collection_out(parts: dict[str, float | None]) -> None:
    """Garbage is collected inside other parts, mostly compute: what is listed as gc is not counted there again."""
    gc, compute = parts.get("gc"), parts.get("compute")
    if gc is not None and compute is not None:
        parts["gc"] = min(gc, compute)
        parts["compute"] = compute - min(gc, compute)


def _of_no_step(
    frame: Frame, tables: Tables, timeline: Timeline, done: np.ndarray[Any, np.dtype[np.bool_]]
) -> Ints:
    """Rows of `spans`: checkpoints and evaluations that are over and bear no step, or one that their rank never ended."""
    table = tables.spans
    apart = np.isin(table["name"], [tables.code(name) for name in APART_PHASES]) & (table["name"] >= 0)
    apart &= (table["kind"] == tables.code("phase")) & (table["t1_ns"] != NULL) & (table["rank"] >= 0)
    rows = np.flatnonzero(apart)
    step = np.minimum(np.searchsorted(timeline.steps, table["step"][rows]), len(timeline) - 1)
    ended = (timeline.steps[step] == table["step"][rows]) & done[step, frame.topology.row(table["rank"][rows])]
    unended: Ints = rows[~ended]
    return unended


def _wall(frame: Frame, tables: Tables, rows: Ints, apart: Ints) -> tuple[float, float | None, float | None]:
    """Mean wall seconds of the ranks; of them, those between a failure and the step it was taken up at; and those of
    checkpoints outside of steps."""
    walls, restarts, saving = [], [], []
    table, spans = tables.steps, tables.spans
    checkpoint = tables.code("checkpoint")
    for row in rows.tolist():
        rank = frame.topology.ranks[row]
        mine = np.flatnonzero((table["rank"] == rank) & (table["t1_ns"] != NULL))
        if not len(mine):
            walls.append(float(np.nansum(frame.duration[:, row])))
            restarts.append(0.0)
            continue
        order = mine[np.argsort(table["t0_ns"][mine], kind="stable")]
        begun, ended = table["t0_ns"][order], table["t1_ns"][order]
        kept = np.isin(begun, frame.start_ns[:, row])
        restarts.append(_repeated(begun, ended, kept))
        outside = apart[spans["rank"][apart] == rank]
        t0, once = np.unique(spans["t0_ns"][outside], return_index=True)
        outside = outside[once]
        t1 = spans["t1_ns"][outside]
        before = np.searchsorted(begun, t0, "right") - 1
        # What follows a step that was done again belongs to the restart.
        alone = (before >= 0) & (t0 >= ended[before]) & kept[before]
        walls.append((max(int(ended.max()), *t1[alone].tolist(), 0) - int(begun[0])) * SECONDS)
        saved = alone & (spans["name"][outside] == checkpoint)
        saving.append(float((t1 - t0)[saved].sum()) * SECONDS)
    again = bool(frame.restarts) or bool((tables.events["kind"] == tables.code("run.restart")).any())
    return (
        float(np.mean(walls)),
        float(np.mean(restarts)) if again else None,
        sum(saving) / len(walls) if any(saving) else None,
    )


def _repeated(begun: Ints, ended: Ints, kept: np.ndarray[Any, np.dtype[np.bool_]]) -> float:
    """Seconds a rank lost to restarts: steps done twice, and the time until the next attempt's first step."""
    lost = float((ended[~kept] - begun[~kept]).sum()) * SECONDS
    after_lost = np.flatnonzero(~kept[:-1] & kept[1:]) if len(kept) > 1 else np.zeros(0, int)
    return lost + float(np.maximum(begun[after_lost + 1] - ended[after_lost], 0).sum()) * SECONDS
