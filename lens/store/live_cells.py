"""What the live feed sends of a batch of records: cells of (metric, step, rank, value), as columns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lens.slots import NULL
from lens.store.groups import grouped
from lens.store.held import held_seconds
from lens.tables import Tables

Key = tuple[str, str | None]
"""Metric and canonical JSON of its labels."""
Columns = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]
"""Steps, ranks (-1 = none) and values, equally long."""
OpenPhases = dict[tuple[str, int], tuple[int, float]]
"""For each (phase, rank): its newest step, and the seconds of it seen so far."""
Held = dict[int, tuple[int, float]]
"""For each rank: its newest step with a collective, and the seconds that collectives have held it up in it."""


@dataclass
class Carry:
    """What a batch must know of those before it: a step may come in several."""

    phases: OpenPhases = field(default_factory=dict)
    held: Held = field(default_factory=dict)


def cells_of(tables: Tables, carry: Carry) -> dict[Key, Columns]:
    """The cells of a batch: duration, own time and tokens of steps, time in each phase, samples and vectors."""
    cells: dict[Key, Columns] = {}
    steps = tables.steps
    finished = steps["t1_ns"] != NULL
    if finished.any():
        step, rank = steps["step"][finished], steps["rank"][finished]
        seconds = (steps["t1_ns"][finished] - steps["t0_ns"][finished]) / 1e9
        cells["step.duration", None] = _columns(step, rank, seconds)
        tokens = steps["tokens"][finished]
        if (known := tokens != NULL).any():
            cells["step.tokens", None] = _columns(step[known], rank[known], tokens[known])
    cells.update(_own_cells(tables, carry.held))
    cells.update(_phase_cells(tables, carry.phases))
    _sample_cells(tables, cells)
    _vector_cells(tables, cells)
    return cells


def _own_cells(tables: Tables, held: Held) -> Iterator[tuple[Key, Columns]]:
    """Each finished step less what collectives held its rank up; none for a rank that has recorded no collective.

    A rank's collectives come before the end of their step, in the same batch or in one before.
    """
    rows = tables.select("collectives", (tables.collectives["step"] != NULL) & (tables.collectives["rank"] >= 0))
    steps = tables.select("steps", tables.steps["t1_ns"] != NULL)
    keys, member = np.unique(np.stack([rows["rank"], rows["step"]], axis=1), axis=0, return_inverse=True)
    seconds = held_seconds(rows, member.ravel())
    known = {(rank, step): total for (rank, step), total in zip(keys.tolist(), seconds.tolist(), strict=True)}
    known |= {(rank, step): known.get((rank, step), 0.0) + total for rank, (step, total) in held.items()}
    held.update(
        {rank: (step, known[rank, step]) for rank, step in keys.tolist() if step >= held.get(rank, (step,))[0]}
    )
    own = [
        known.get((rank, step)) for rank, step in zip(steps["rank"].tolist(), steps["step"].tolist(), strict=True)
    ]
    told = np.array([each is not None for each in own], bool)
    if told.any():
        spent = (steps["t1_ns"] - steps["t0_ns"])[told] / 1e9
        left = np.maximum(spent - np.array([each for each in own if each is not None]), 0)
        yield ("step.self", None), _columns(steps["step"][told], steps["rank"][told], left)


def _phase_cells(tables: Tables, open_phases: OpenPhases) -> Iterator[tuple[Key, Columns]]:
    """Seconds of each (phase, rank, step). A phase may repeat within a step and its parts may come in several
    batches: `open_phases` carries the sum so far of the newest step of each phase and rank."""
    spans = tables.spans
    rows = (spans["kind"] == tables.code("phase")) & (spans["t1_ns"] != NULL) & (spans["step"] != NULL)
    if not rows.any():
        return
    keys = np.stack([spans["name"][rows], spans["rank"][rows], spans["step"][rows]], axis=1)
    groups, member = np.unique(keys, axis=0, return_inverse=True)
    seconds = np.bincount(member.ravel(), (spans["t1_ns"][rows] - spans["t0_ns"][rows]) / 1e9, len(groups))
    # Rows are sorted by name, rank, step: only the first and last step of a (name, rank) can touch another batch.
    change = np.flatnonzero(np.any(groups[1:, :2] != groups[:-1, :2], axis=1)) + 1
    starts, ends = np.append(0, change), np.append(change, len(groups)) - 1
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        name, rank, first_step = groups[start].tolist()
        carry_key = (tables.strings[name], rank)
        carried = open_phases.get(carry_key)
        if carried is not None and carried[0] == first_step:
            seconds[start] += carried[1]
        open_phases[carry_key] = (int(groups[end, 2]), float(seconds[end]))
    for name in np.unique(groups[:, 0]).tolist():
        of_phase = groups[:, 0] == name
        labels = json.dumps({"phase": tables.strings[name]}, separators=(",", ":"))
        yield ("phase.duration", labels), _columns(groups[of_phase, 2], groups[of_phase, 1], seconds[of_phase])


def _sample_cells(tables: Tables, cells: dict[Key, Columns]) -> None:
    samples = tables.samples
    with_step = np.flatnonzero(samples["step"] != NULL)
    if not len(with_step):
        return
    whole = len(with_step) == len(samples["step"])
    chosen = samples if whole else tables.select("samples", with_step)
    groups = grouped([chosen["metric"], chosen["labels"]], [len(tables.strings)] * 2)
    order, ends = groups.sorted_rows()
    steps, ranks, values = _columns(*(chosen[name][order] for name in ("step", "rank", "value")))
    start = 0
    for row, end in zip(groups.first.tolist(), ends.tolist(), strict=True):
        key = (tables.strings[chosen["metric"][row]], tables.string(int(chosen["labels"][row])))
        cells[key] = steps[start:end], ranks[start:end], values[start:end]
        start = end


def _vector_cells(tables: Tables, cells: dict[Key, Columns]) -> None:
    """Pre-reduced vectors of large runs: no rank, no layer, one value a rank."""
    vectors = tables.vectors
    rows = (vectors["rank"] < 0) & (vectors["layer"] < 0) & (vectors["step"] != NULL)
    for row in np.flatnonzero(rows).tolist():
        metric, values = tables.strings[vectors["metric"][row]], tables.values_of(row)
        if metric.startswith("moe."):  # one value an expert, not a rank
            continue
        key = (metric, tables.string(int(vectors["labels"][row])))
        added = _columns(np.full(len(values), vectors["step"][row]), np.arange(len(values)), values)
        known = cells.get(key)
        if known is not None:
            added = (
                np.concatenate([known[0], added[0]]),
                np.concatenate([known[1], added[1]]),
                np.concatenate([known[2], added[2]]),
            )
        cells[key] = added


def _columns(steps: NDArray[Any], ranks: NDArray[Any], values: NDArray[Any]) -> Columns:
    return steps.astype(np.int32), ranks.astype(np.int32), values.astype(np.float32)
