"""Maps worked out by the database: of each row an array with a place for each column.

Each row of the table then finds its place by its column's number. A GROUP BY of row and column would look each pair up
among a million others, and reading the rows into this process would move them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lens.store.engine import Store
from lens.store.grids import AXIS_COLUMN, BUCKET, FINE_POOLS, Grid
from lens.store.relations import Relation
from lens.store.schema import FINE_BUCKET
from lens.tables import Column


@dataclass(frozen=True)
class DenseMap:
    """What was found, a line for each key.

    `values` [keys, columns] is the largest or smallest value, or the sum; for largest and smallest NaN where there is
    nothing and infinite where nothing is a finite number. For sums `finite` says how many finite numbers each is of, and
    `rows` how many values there are.
    """

    keys: Column
    values: Column
    finite: Column | None = None
    rows: Column | None = None

    def on(self, places: Column, count: int, pool: str) -> Column:
        """One value for each place and column, float32 [count, columns]: NaN where there is nothing, infinity where
        there is no finite number. Keys at the same place are pooled."""
        if self.finite is None or self.rows is None:
            found = np.full((count, self.values.shape[1]), np.nan, "<f4")
            (np.fmax if pool == "max" else np.fmin).at(found, places, self.values.astype("<f4"))
            return np.where(np.isinf(found), np.float32(np.inf), found)
        total, finite, rows = (_added(each, places, count) for each in (self.values, self.finite, self.rows))
        means = np.where(finite > 0, total / np.maximum(finite, 1), np.where(rows > 0, np.inf, np.nan))
        return means.astype("<f4")


MOST_COLUMNS = 1 << 20
"""The database makes no longer arrays."""
_WORTH_A_THREAD = 4
"""From so many rows a place on, several threads pay off: they all have a map of their own, which must be put together."""


def dense(store: Store, relation: Relation, grid: Grid, axis: str, row: str, pool: str, keys: int) -> DenseMap:
    """The map of a relation, from its roll-ups where the grid lets them answer; `row` is a column, such as rank, of which
    there are about so many `keys`.

    Raises:
        StoreError: the database refuses or fails.
    """
    source, place, bucket, words = _source(relation, grid, axis, pool)
    low, high, width = grid.low // bucket, grid.high // bucket, grid.width // bucket
    end = low + grid.count * width

    def array(function: str, what: str) -> str:
        return f"{function}Resample({low}, {end}, {width})({what}, {place})"

    if pool == "mean":
        wanted = f"{array('sum', words['sum'])} AS pooled, {array('sum', words['count'])} AS numbers, "
        wanted += f"{array('sum', words['rows'])} AS given"
    else:
        wanted = f"{array(f'{pool}OrNull', words[pool])} AS pooled"
    alone = (relation.rows or 0) / bucket < _WORTH_A_THREAD * keys * grid.count
    found = store.query(
        f"SELECT {row} AS key, {wanted} FROM ({source}) WHERE {place} BETWEEN {low} AND {high} GROUP BY key"
        f"{' SETTINGS max_threads = 1' if alone else ''}"
    )
    return DenseMap(
        found.column("key").to_numpy(),
        *(_matrix(found.column(name), grid.count) for name in found.column_names if name != "key"),
    )


def is_rolled(relation: Relation, grid: Grid, axis: str) -> bool:
    """Whether the roll-up answers: its buckets fit into the grid's."""
    return relation.rollup is not None and grid.is_whole(BUCKET[axis])


def _source(relation: Relation, grid: Grid, axis: str, pool: str) -> tuple[str, str, int, dict[str, str]]:
    """A SELECT, its column that says where a row belongs, how much of the axis one of that is, and its values."""
    if is_rolled(relation, grid, axis):
        words = {"max": "max", "min": "min", "sum": "sum", "count": "count", "rows": "count + odd"}
        return str(relation.rollup), "bucket", BUCKET[axis], words
    if relation.fine is not None and pool in FINE_POOLS and grid.is_whole(FINE_BUCKET):
        return relation.fine, "bucket", FINE_BUCKET, {"max": "max", "min": "min"}
    # What float32 cannot hold is infinite in the answer too.
    value, finite = "toFloat32(value)", "isFinite(toFloat32(value))"
    words = {
        "max": f"if({finite}, {value}, toFloat32(-inf))", "min": f"if({finite}, {value}, toFloat32(inf))",
        "sum": f"if({finite}, value, 0.)", "count": finite, "rows": "toUInt8(1)",
    }  # fmt: skip
    return relation.sql, AXIS_COLUMN[axis], 1, words


def _matrix(column: pa.ChunkedArray, width: int) -> Column:
    flat = column.combine_chunks().flatten()
    values: Column = flat.to_numpy(zero_copy_only=False)
    return values.reshape(len(column), width)


def _added(values: Column, places: Column, count: int) -> Column:
    found = np.zeros((count, values.shape[1]))
    np.add.at(found, places, values)
    return found
