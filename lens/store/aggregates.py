"""What a group of samples adds to the roll-up and to the newest values, worked out from columns.

The database could do it (GROUP BY, argMax), at more than the cost of storing the samples themselves. Here the rows are
brought into the order of the table once, which spares the database its own sort, and each result is one pass over them.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from lens.store.groups import grouped
from lens.store.schema import STEP_BUCKET, TIME_AXIS, TIME_BUCKET_NS
from lens.tables import Column

SERIES = "series"
"""A column of samples on their way: a small number for each (run, mid), so that rows of a series are found quickly."""


def aggregated(samples: pa.Table) -> dict[str, pa.Table]:
    """Rows of `samples` (sorted), `rollup` and `latest` from these samples: run, mid, rank, step, t_ns, value, series."""
    rows = {name: samples.column(name).to_numpy() for name in samples.column_names}
    series = _in_order(rows)
    groups = grouped([series, rows["rank"]], [int(series.max()) + 1, int(rows["rank"].max()) + 1])
    order, ends = groups.sorted_rows()
    group = np.repeat(np.arange(groups.count), np.diff(ends, prepend=0))
    step, t_ns = rows["step"][order], rows["t_ns"][order]
    inside = group[1:] == group[:-1]
    ascending = (step[1:] > step[:-1]) | ((step[1:] == step[:-1]) & (t_ns[1:] >= t_ns[:-1]))
    if not ascending[inside].all():
        again = np.lexsort((t_ns, step, group))
        order, step, t_ns = order[again], step[again], t_ns[again]
    names = {name: rows[name][groups.first] for name in ("run", "mid", "rank")}
    value = rows["value"][order]
    return {
        "samples": pa.table({**{name: values[group] for name, values in names.items()},
                             "step": step, "t_ns": t_ns, "value": value}),
        "rollup": _rollup(names, group, step, t_ns, value),
        "latest": _latest(names, group, step, t_ns, value),
    }  # fmt: skip


def _in_order(rows: dict[str, Column]) -> Column:
    """The series of every row, numbered in the order of the table: by run and mid."""
    series = rows[SERIES]
    first = np.full(int(series.max()) + 1, -1, "<i8")
    first[series[::-1]] = np.arange(len(series) - 1, -1, -1)
    found = np.flatnonzero(first >= 0)
    at = first[found]
    number = np.zeros(len(first), "<i4")
    number[found[np.lexsort((rows["mid"][at], rows["run"][at]))]] = np.arange(len(found))
    return number[series]


def _rollup(names: dict[str, Column], group: Column, step: Column, t_ns: Column, value: Column) -> pa.Table:
    axis = (step < 0).astype("u1")
    bucket = step // STEP_BUCKET
    if axis.any():
        # Towards zero, as the database divides.
        bucket = np.where(axis == TIME_AXIS, np.sign(t_ns) * (np.abs(t_ns) // TIME_BUCKET_NS), bucket)
    starts = np.flatnonzero(
        np.concatenate(([True], (group[1:] != group[:-1]) | (bucket[1:] != bucket[:-1]) | (axis[1:] != axis[:-1])))
    )
    finite = np.isfinite(value)
    low = high = total = value
    if not finite.all():
        low, high = np.where(finite, value, np.inf), np.where(finite, value, -np.inf)
        total = np.where(finite, value, 0.0)
    odd = np.add.reduceat(~finite, starts, dtype="<u8")
    return pa.table({
        **{name: values[group[starts]] for name, values in names.items()},
        "axis": axis[starts], "bucket": bucket[starts], "min": np.minimum.reduceat(low, starts),
        "max": np.maximum.reduceat(high, starts), "sum": np.add.reduceat(total, starts),
        "count": np.diff(starts, append=len(value)).astype("<u8") - odd, "odd": odd,
    })  # fmt: skip


def _latest(names: dict[str, Column], group: Column, step: Column, t_ns: Column, value: Column) -> pa.Table:
    starts = np.flatnonzero(np.concatenate(([True], group[1:] != group[:-1])))
    newest = np.maximum.reduceat(t_ns, starts)
    rows = np.flatnonzero(t_ns == newest[group])
    at = np.empty(len(starts), "<i8")
    at[group[rows]] = rows  # of several at the same time the last one stays
    return pa.table({**names, "t_ns": newest, "step": step[at], "value": value[at]})
