"""What a group of samples adds to the roll-up and to the newest values, worked out from columns.

The database could do it (GROUP BY, argMax), at more than the cost of storing the samples themselves. Here the rows are
brought into the order of the table once, which spares the database its own sort, and each result is one pass over them.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from lens.store.groups import grouped
from lens.store.schema import FINE_BUCKET, FINE_EACH, STEP_AXIS, TIME_AXIS, TIME_BUCKET_NS
from lens.tables import Column, Table

SERIES = "series"
"""A column of samples on their way: a small number for each (run, mid), so that rows of a series are found quickly."""
_ROLLED = ("axis", "bucket", "min", "max", "sum", "count", "odd")


def aggregated(samples: pa.Table) -> dict[str, pa.Table]:
    """Rows of `samples` (sorted), `rollup`, `rollup_fine` (if any has a step) and `latest` from these samples: run, mid,
    rank, step, t_ns, value, series."""
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
    rollup, fine = _rollups(names, group, step, t_ns, value)
    return {
        "samples": pa.table({**{name: values[group] for name, values in names.items()},
                             "step": step, "t_ns": t_ns, "value": value}),
        "rollup": rollup,
        **({"rollup_fine": fine} if fine.num_rows else {}),
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


def _rollups(
    names: dict[str, Column], group: Column, step: Column, t_ns: Column, value: Column
) -> tuple[pa.Table, pa.Table]:
    """The roll-up, worked out from the fine one, and that."""
    axis = (step < 0).astype("u1")
    bucket = step // FINE_BUCKET
    timed = axis == TIME_AXIS
    if timed.any():
        # Towards zero, as the database divides.
        bucket = np.where(timed, np.sign(t_ns) * (np.abs(t_ns) // TIME_BUCKET_NS), bucket)
    finite = np.isfinite(value)
    low = high = total = value
    if not finite.all():
        low, high = np.where(finite, value, np.inf), np.where(finite, value, -np.inf)
        total = np.where(finite, value, 0.0)
    fine = _pooled(
        {"group": group, "axis": axis, "bucket": bucket, "min": low, "max": high, "sum": total,
         "count": finite.astype("<u8"), "odd": (~finite).astype("<u8")}
    )  # fmt: skip
    stepped = fine["axis"] == STEP_AXIS
    whole = _pooled({**fine, "bucket": np.where(stepped, fine["bucket"] // FINE_EACH, fine["bucket"])})
    if not stepped.all():
        fine = {name: column[stepped] for name, column in fine.items()}
    return (
        pa.table({**_named(names, whole), **{name: whole[name] for name in _ROLLED}}),
        pa.table({
            **_named(names, fine), "bucket": fine["bucket"], **{name: _float32(fine[name]) for name in ("min", "max")},
        }),
    )  # fmt: skip


def _pooled(rows: Table) -> Table:
    """Neighbours of one group, axis and bucket as one row."""
    group, axis, bucket = rows["group"], rows["axis"], rows["bucket"]
    starts = np.flatnonzero(
        np.concatenate(([True], (group[1:] != group[:-1]) | (bucket[1:] != bucket[:-1]) | (axis[1:] != axis[:-1])))
    )
    return {
        **{name: rows[name][starts] for name in ("group", "axis", "bucket")},
        "min": np.minimum.reduceat(rows["min"], starts), "max": np.maximum.reduceat(rows["max"], starts),
        **{name: np.add.reduceat(rows[name], starts) for name in ("sum", "count", "odd")},
    }  # fmt: skip


def _named(names: dict[str, Column], rows: Table) -> Table:
    return {name: values[rows["group"]] for name, values in names.items()}


def _float32(values: Column) -> Column:
    with np.errstate(over="ignore"):
        return values.astype("<f4")


def _latest(names: dict[str, Column], group: Column, step: Column, t_ns: Column, value: Column) -> pa.Table:
    starts = np.flatnonzero(np.concatenate(([True], group[1:] != group[:-1])))
    newest = np.maximum.reduceat(t_ns, starts)
    rows = np.flatnonzero(t_ns == newest[group])
    at = np.empty(len(starts), "<i8")
    at[group[rows]] = rows  # of several at the same time the last one stays
    return pa.table({**names, "t_ns": newest, "step": step[at], "value": value[at]})
