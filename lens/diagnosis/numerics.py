"""Where the first number that is not finite arose.

A rank's own loss, before any reduction, shows the origin; one reduction later all ranks have it. A gradient norm
that is not finite for a step or two while the loss stays finite is a loss scaler at work.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lens.diagnosis.arrays import Array
from lens.diagnosis.select import Timeline
from lens.diagnosis.topology import Topology
from lens.slots import NULL
from lens.tables import Tables

LOCAL = ("train.loss.local", "train.grad_norm.local")
SHARED = ("train.loss", "train.grad_norm")
LASTING_STEPS = 3
"""A gradient norm alone counts when it is not finite for so many steps in a row."""


@dataclass(frozen=True)
class Origin:
    """The first non-finite value: where, when and in which metric.

    rows: the ranks that had it first ([] when only a reduced value is known). visible: index of the step from which
    it is known. last_finite: the last finite value of the same metric before it, by rank or overall.
    """

    metric: str
    step: int
    rows: tuple[int, ...]
    visible: int
    last_finite: float | None
    reporting: int


@dataclass(frozen=True)
class _Bad:
    metric: str
    index: int
    row: int


def origin(tables: Tables, timeline: Timeline, topology: Topology, upto: int) -> Origin | None:
    """The origin of non-finite numbers among the records visible up to this step index; None while all is finite."""
    table = tables.samples
    codes = {tables.code(name): name for name in (*LOCAL, *SHARED)}
    rows = np.flatnonzero(np.isin(table["metric"], list(codes)) & (table["step"] != NULL))
    rows = rows[timeline.visible_from(table["step"][rows], table["t_ns"][rows]) <= upto]
    bad = rows[~np.isfinite(table["value"][rows])]
    if not len(bad):
        return None
    losses = [tables.code("train.loss.local"), tables.code("train.loss")]
    lost = bad[np.isin(table["metric"][bad], losses)]
    if len(lost):
        # Gradients of the step before the loss was lost may show the origin; earlier ones healed.
        candidates = bad[table["step"][bad] >= int(table["step"][lost].min()) - 1]
    else:
        candidates = _lasting(table, bad, rows)
    if not len(candidates):
        return None
    step = int(table["step"][candidates].min())
    at_step = candidates[table["step"][candidates] == step]
    metrics = {codes[int(code)] for code in np.unique(table["metric"][at_step])}
    metric = next(name for name in ("train.loss.local", "train.grad_norm.local", *SHARED) if name in metrics)
    first = at_step[table["metric"][at_step] == tables.code(metric)]
    places = np.unique(topology.row(table["rank"][first]))
    same = rows[(table["metric"][rows] == tables.code(metric)) & (table["step"][rows] == step)]
    reporting = len(np.unique(table["rank"][same]))
    places = places[places >= 0]
    if metric in SHARED and (len(places) >= reporting or len(places) == 0):
        places = places[:0]
    known_from = timeline.visible_from(table["step"][first], table["t_ns"][first])
    return Origin(
        metric, step, tuple(places.tolist()), int(known_from.min()),
        _last_finite(tables, rows, metric, step, topology.ranks[places]), reporting,
    )  # fmt: skip


def _lasting(table: dict[str, Array], bad: Array, rows: Array) -> Array:
    """Non-finite gradient norms of ranks that never became finite again, for at least LASTING_STEPS steps."""
    kept = []
    for code in np.unique(table["metric"][bad]):
        for rank in np.unique(table["rank"][bad]):
            mine = rows[(table["metric"][rows] == code) & (table["rank"][rows] == rank)]
            finite = np.isfinite(table["value"][mine])
            healthy_until = table["step"][mine][finite].max(initial=NULL)
            tail = mine[table["step"][mine] > healthy_until]
            if len(np.unique(table["step"][tail])) >= LASTING_STEPS:
                kept.append(tail)
    return np.concatenate(kept) if kept else bad[:0]


def _last_finite(tables: Tables, rows: Array, metric: str, step: int, ranks: Array) -> float | None:
    table = tables.samples
    before = rows[(table["metric"][rows] == tables.code(metric)) & (table["step"][rows] < step)]
    if len(ranks):
        before = before[np.isin(table["rank"][before], ranks)]
    before = before[np.isfinite(table["value"][before])]
    if not len(before):
        return None
    newest = before[np.lexsort((table["value"][before], table["rank"][before], table["step"][before]))[-1]]
    return float(table["value"][newest])
