"""Values for charts: envelopes of lines and pooled heat maps. Nothing is averaged away: a spike of one step in a
million stays the maximum of its bucket."""

from __future__ import annotations

import itertools
import json
import struct
from typing import Any

import numpy as np

from lens.records import word
from lens.store.engine import Store
from lens.store.errors import BadQueryError
from lens.store.grids import AXIS_COLUMN, BUCKET, Grid, Window, bucket_for, grid_of, may_be_one_each
from lens.store.maps import MOST_COLUMNS, dense, is_rolled
from lens.store.pooling import envelope, pooled
from lens.store.registry import Registry
from lens.store.relations import NOT_OVER_RANKS, Relation, Selection, natural_axis, relation_of
from lens.store.runs import Run
from lens.tables import Column, Table

MOST_CELLS = 4_000_000
"""Largest answer: series × points, or rows × columns."""
POOLS = ("max", "mean", "min")
MOST_DENSE_CELLS = MOST_CELLS
"""As many places a map may have that the database works out as arrays."""
MOST_ROWS = 2_000_000
"""As many rows are read and grouped here; more are grouped by the database."""


class Charts:
    """Answers for one data folder."""

    def __init__(self, store: Store, registry: Registry) -> None:
        self._store, self._registry = store, registry

    def series(self, run: Run, selection: Selection, window: Window, axis: str | None) -> dict[str, Any]:
        """Envelope of every selected series.

        Returns:
            metric, unit, axis, from, to, width and series: [{rank, host, device, labels, x, min, max, mean,
            count}], sorted by rank. x is the first step (or time) of a bucket. `odd` counts values that are no
            finite number, in series that have such.
        Raises:
            BadQueryError: an answer too large.
        """
        _check(window)
        relation = relation_of(self._store, self._registry, run.number, selection, axis)
        axis = axis or self._axis(run, selection, relation)
        reply: dict[str, Any] = {"metric": selection.metric, "unit": unit_of(selection.metric), "axis": axis}
        found = None if relation is None else self._lines(relation, window, axis)
        if relation is None or found is None:
            return {**reply, "from": window.start, "to": window.stop, "width": 1, "series": []}
        grid, columns = found
        if len(columns["key"]) > MOST_CELLS:
            raise _too_large(len(columns["key"]))
        series = _split(columns.pop("key").tolist(), columns, grid, relation)
        return {**reply, "from": grid.low, "to": grid.high, "width": grid.width, "series": series}

    def heatmap(
        self, run: Run, selection: Selection, window: Window, rows: str, pool: str
    ) -> tuple[dict[str, Any], Column]:
        """Map of a metric over steps (or time): its header, and its values [rows, columns] as float32.

        NaN in the values means that nothing was reported, infinity that what was reported is no finite number.

        Raises:
            BadQueryError: unknown kind of rows or pool, or an answer too large.
        """
        _check(window)
        if pool not in POOLS:
            raise BadQueryError(f"pool: {pool!r} is unknown", f"use one of {', '.join(POOLS)}")
        relation = self._rows_relation(run, selection, rows)
        axis = self._axis(run, selection, relation)
        grid = None if relation is None else self._grid(relation, window, axis, pool)
        header: dict[str, Any] = {
            "metric": selection.metric, "unit": unit_of(selection.metric), "row_kind": rows, "axis": axis,
        }  # fmt: skip
        if relation is None or grid is None:
            empty: dict[str, Any] = {"rows": [], "from": window.start, "to": window.stop, "width": 1, "columns": 0}
            return {**header, **empty}, np.empty((0, 0), "<f4")
        most = _most_keys(rows, relation, run)
        if most is not None and grid.count <= MOST_COLUMNS and most * grid.count <= MOST_DENSE_CELLS:
            found = dense(self._store, relation, grid, axis, "rank" if rows == "rank" else "key", pool, most)
            names, places = _row_names(rows, found.keys, relation, run, selection)
            values = found.on(places, len(names), pool)
            grid, values = _trimmed(grid, window, values)
        else:
            cells = self._cells(relation, grid, axis, "rank" if rows == "rank" else "key", pool)
            grid, cells["bucket"] = _tightened(grid, window, cells["bucket"])
            names, places = _row_names(rows, cells["row"], relation, run, selection)
            if len(names) * grid.count > MOST_CELLS:
                raise _too_large(len(names) * grid.count)
            flat = places * grid.count + cells["bucket"]
            values = pooled(flat, cells["value"], cells["finite"], pool, len(names) * grid.count)
            values = values.reshape(len(names), grid.count)
        bounds = {"from": grid.low, "to": grid.high, "width": grid.width, "columns": grid.count}
        return {**header, "rows": names, **bounds}, values

    def _lines(self, relation: Relation, window: Window, axis: str) -> tuple[Grid, Table] | None:
        """Smallest, largest, sum and counts of each bucket of each series; None if there is nothing in the window."""
        if relation.rows is not None and relation.rows <= MOST_ROWS and not _may_roll(relation, window, axis):
            return self._lines_of_rows(relation, window, axis)
        grid = self._grid(relation, window, axis)
        if grid is None:
            return None
        columns = self._columns(_envelope_sql(relation, grid, axis))
        grid, columns["bucket"] = _tightened(grid, window, columns["bucket"])
        return grid, columns

    def _lines_of_rows(self, relation: Relation, window: Window, axis: str) -> tuple[Grid, Table] | None:
        """The same of few rows, which are read once and tell themselves where they begin and end."""
        place = AXIS_COLUMN[axis]
        bounds = [f"{place} >= {window.start}"] if window.start is not None else []
        bounds += [f"{place} <= {window.stop}"] if window.stop is not None else []
        rows = self._columns(
            f"SELECT key, rank, {place} AS place, value FROM ({relation.sql}) WHERE {' AND '.join(bounds) or '1'} "
            "ORDER BY key, rank, place"
        )
        if not len(rows["key"]):
            return None
        low = int(rows["place"].min()) if window.start is None else window.start
        high = int(rows["place"].max()) if window.stop is None else window.stop
        grid = grid_of(window, low, high, 1)
        return grid, envelope(rows["key"], rows["rank"], grid.places(rows["place"]), rows["value"])

    def _cells(self, relation: Relation, grid: Grid, axis: str, row: str, pool: str) -> Table:
        """What a map of very many rows is pooled from, or one whose rows are not known before: row, bucket, value and of
        how many finite numbers that is."""
        if is_rolled(relation, grid, axis):
            value = {"max": "max", "min": "min", "mean": "sum"}[pool]
            return self._columns(
                _rollup_sql(relation, grid, axis, f"{row} AS row", f"r.{value} AS value, r.count AS finite")
            )
        if relation.rows is not None and relation.rows <= MOST_ROWS:
            found = self._columns(_rows_sql(relation, grid, axis, f"{row} AS row"))
            return {**found, "finite": np.isfinite(found["value"]).astype("<i8")}
        function = {"max": "max", "min": "min", "mean": "sum"}[pool]
        return self._columns(
            f"SELECT row, bucket, {function}If(given, isFinite(given)) AS value, countIf(isFinite(given)) AS finite "
            f"FROM ({_rows_sql(relation, grid, axis, f'{row} AS row', 'given')}) GROUP BY row, bucket"
        )

    def _columns(self, sql: str) -> Table:
        found = self._store.query(sql)
        return {name: found.column(name).to_numpy() for name in found.column_names}

    def _axis(self, run: Run, selection: Selection, relation: Relation | None) -> str:
        if relation is not None:
            return relation.axis
        return natural_axis(self._store, self._registry, run.number, selection.metric)

    def _rows_relation(self, run: Run, selection: Selection, rows: str) -> Relation | None:
        if rows == "expert":
            return self._experts(run, selection)
        if rows in ("rank", "device"):
            return relation_of(self._store, self._registry, run.number, selection)
        raise BadQueryError(f"rows: {rows!r} is unknown", "use rank, device or expert")

    def _experts(self, run: Run, selection: Selection) -> Relation | None:
        """Vectors over experts, summed over the ranks that report; key is layer and expert."""
        if not selection.metric.startswith(NOT_OVER_RANKS):
            raise BadQueryError(f"{selection.metric} has no experts", "rows=expert is for moe.* vectors")
        labels = {key: value for key, value in selection.labels.items() if key != "layer"}
        bare = Selection(selection.metric, selection.ranks, selection.device, selection.host, labels)
        mids = [s.mid for s in self._registry.series(run.number, selection.metric) if bare.takes(s)]
        if not mids:
            return None
        layer = selection.labels.get("layer")
        if layer is not None and not layer.isdigit():
            raise BadQueryError(f"label.layer: {layer!r} is no layer", "give a whole number")
        where = f"run = {run.number} AND mid IN ({', '.join(map(str, mids))}) AND step >= 0"
        where += f" AND layer = {layer}" if layer is not None else ""
        # Sent summed over ranks (rank -1), or by every rank: never both added up.
        summed = self._store.scalar(f"SELECT count() FROM lens.vectors WHERE {where} AND rank = -1")
        where += f" AND {'rank = -1' if summed else selection.rank_filter()}"
        sql = (
            "SELECT concat(toString(layer), ' ', toString(place - 1)) AS key, toInt32(-1) AS rank, step, "
            "max(t_ns) AS t_ns, sum(value) AS value FROM lens.vectors "
            f"ARRAY JOIN values AS value, arrayEnumerate(values) AS place WHERE {where} GROUP BY layer, place, step"
        )
        return Relation(sql, {})

    def _grid(self, relation: Relation, window: Window, axis: str, pool: str | None = None) -> Grid | None:
        """The buckets for a window over what there is; None if there is nothing in it. `pool` is None for lines."""
        low, high = window.start, window.stop
        if low is None or high is None:
            extent = relation.extent
            if extent is not None and may_be_one_each(relation, window):
                return Grid(extent[0] if low is None else low, extent[1] if high is None else high, 1)
            if extent is None or self._is_exact(relation, window, extent, axis, pool):
                column = AXIS_COLUMN[axis]
                row = self._store.query(
                    f"SELECT min({column}) AS low, max({column}) AS high, count() AS rows FROM ({relation.sql})"
                ).to_pylist()[0]
                if not row["rows"]:
                    return None
                extent = (row["low"], row["high"])
            low = extent[0] if low is None else low
            high = extent[1] if high is None else high
        if low > high:
            return None
        return grid_of(window, low, high, bucket_for(window, low, high, relation, axis, pool))

    def _is_exact(
        self, relation: Relation, window: Window, extent: tuple[int, int], axis: str, pool: str | None
    ) -> bool:
        """Whether first and last step are looked up before the rest is: not of a roll-up, which tells them in whole
        buckets, and not of a map of many rows, which is trimmed when it is there."""
        if pool is not None and relation.rows is not None and relation.rows > MOST_ROWS:
            return False
        return bucket_for(window, *extent, relation, axis, pool) == 1


def _check(window: Window) -> None:
    if window.pieces < 1:
        raise BadQueryError("points and columns: at least 1", "leave them out for 1000")


def _may_roll(relation: Relation, window: Window, axis: str) -> bool:
    """Whether lines of a window may come from the roll-up."""
    if relation.extent is None:
        return False
    low = relation.extent[0] if window.start is None else window.start
    high = relation.extent[1] if window.stop is None else window.stop
    return bucket_for(window, low, high, relation, axis) != 1


def _most_keys(rows: str, relation: Relation, run: Run) -> int | None:
    """How many keys a map may find, about; None if that is not known."""
    if rows == "rank":
        known = max(run.world_size or 0, relation.top or 0)
        return known + 1 if known else None
    return len(relation.names) or None


def _trimmed(grid: Grid, window: Window, values: Column) -> tuple[Grid, Column]:
    """Grid and map from the first to the last column that has anything, where nobody said from or to."""
    found = np.flatnonzero(~np.isnan(values).all(0))
    if not len(found) or (window.start is not None and window.stop is not None):
        return grid, values
    first = int(found[0]) if window.start is None else 0
    last = int(found[-1]) if window.stop is None else grid.count - 1
    return grid.cut(first, last), values[:, first : last + 1]


def _tightened(grid: Grid, window: Window, buckets: Column) -> tuple[Grid, Column]:
    """The grid from the first to the last bucket that was found, where nobody said from or to."""
    if grid.width != 1 or not len(buckets):
        return grid, buckets
    first = int(buckets.min()) if window.start is None else 0
    last = int(buckets.max()) if window.stop is None else grid.count - 1
    return grid.cut(first, last), buckets - first


def unit_of(metric: str) -> str | None:
    """Unit of a metric of the catalogue; None for a user's own."""
    from lens import catalogue

    known = catalogue.get(metric)
    return known.unit if known is not None else None


def heatmap_json(header: dict[str, Any], values: Column) -> dict[str, Any]:
    """The map as a JSON object; absent is null."""
    lists = [[None if np.isnan(v) else word(float(v)) if np.isfinite(v) else "NaN" for v in row] for row in values]
    return {**header, "values": lists}


def heatmap_binary(header: dict[str, Any], values: Column) -> bytes:
    """The map as bytes: u32 length of the header, JSON header padded to 8 bytes, float32 row by row."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 4) % 8)
    return b"".join((struct.pack("<I", len(text)), text, np.ascontiguousarray(values, "<f4").tobytes()))


def _rollup_sql(relation: Relation, grid: Grid, axis: str, keys: str, values: str) -> str:
    bucket = BUCKET[axis]
    low, high, width = grid.low // bucket, grid.high // bucket, grid.width // bucket
    return (
        f"SELECT {keys}, intDiv(r.bucket - {low}, {width}) AS bucket, {values} "
        f"FROM ({relation.rollup}) AS r WHERE r.bucket BETWEEN {low} AND {high}"
    )


def _rows_sql(relation: Relation, grid: Grid, axis: str, keys: str, value: str = "value") -> str:
    column = AXIS_COLUMN[axis]
    return (
        f"SELECT {keys}, intDiv({column} - {grid.low}, {grid.width}) AS bucket, value AS {value} "
        f"FROM ({relation.sql}) WHERE {column} BETWEEN {grid.low} AND {grid.high}"
    )


def _envelope_sql(relation: Relation, grid: Grid, axis: str) -> str:
    tail = "GROUP BY key, rank, bucket ORDER BY rank, key, bucket"
    if is_rolled(relation, grid, axis):
        sums = (
            "min(r.min) AS low, max(r.max) AS high, sum(r.sum) AS total, sum(r.count) AS finite, sum(r.odd) AS odd, "
            "toFloat64(nan) AS odd_value"
        )
        return f"{_rollup_sql(relation, grid, axis, 'key, rank', sums)} {tail}"
    return (
        "SELECT key, rank, bucket, "
        "min(if(isFinite(value), value, inf)) AS low, max(if(isFinite(value), value, -inf)) AS high, "
        "sumIf(value, isFinite(value)) AS total, countIf(isFinite(value)) AS finite, "
        "countIf(NOT isFinite(value)) AS odd, anyLastIf(value, NOT isFinite(value)) AS odd_value "
        f"FROM ({_rows_sql(relation, grid, axis, 'key, rank')}) {tail}"
    )


def _row_names(
    kind: str, keys: Column, relation: Relation, run: Run, selection: Selection
) -> tuple[list[Any], Column]:
    """Names of the map's rows, and the row of each key found."""
    distinct, inverse = np.unique(keys, return_inverse=True)
    found: list[Any] = distinct.tolist()
    if kind == "rank":
        expected = selection.ranks or range(run.world_size or 0)
        named: list[Any] = sorted({*found, *expected})
        labels = {rank: rank for rank in named}
    elif kind == "device":
        labels = {key: relation.names[key].device for key in found}
        named = sorted(set(labels.values()), key=lambda device: device or "")
    else:
        pairs = sorted({tuple(map(int, key.split())) for key in found})
        labels = {f"{layer} {expert}": f"layer{layer}/expert{expert}" for layer, expert in pairs}
        named = list(labels.values())
    places = {name: index for index, name in enumerate(named)}
    return named, np.array([places[labels[key]] for key in found], np.intp)[inverse]


def _split(keys: list[Any], columns: dict[str, Column], grid: Grid, relation: Relation) -> list[dict[str, Any]]:
    """One entry a series; the rows come sorted by rank and key."""
    codes = np.unique(keys, return_inverse=True)[1] if keys else np.empty(0, int)
    changes = np.flatnonzero((np.diff(codes) != 0) | (np.diff(columns["rank"]) != 0)) + 1
    bounds = [0, *changes.tolist(), len(keys)] if keys else [0]
    result = []
    for start, stop in itertools.pairwise(bounds):
        part = {name: values[start:stop] for name, values in columns.items()}
        name, rank = relation.names[keys[start]], int(part["rank"][0])
        finite = part["finite"]
        means = part["total"] / np.maximum(finite, 1)
        entry: dict[str, Any] = {
            "rank": None if rank < 0 else rank,
            "host": name.host,
            "device": name.device,
            "labels": name.labels,
            "x": grid.starts(part["bucket"]),
        }
        for label, values in (("min", part["low"]), ("max", part["high"]), ("mean", means)):
            entry[label] = _words(np.where(finite > 0, values, part["odd_value"]))
        entry["count"] = (finite + part["odd"]).tolist()
        if part["odd"].any():
            entry["odd"] = part["odd"].tolist()
        result.append(entry)
    return result


def _words(values: Column) -> list[Any]:
    listed = values.tolist()
    return listed if np.isfinite(values).all() else [word(value) for value in listed]


def _too_large(cells: int) -> BadQueryError:
    return BadQueryError(
        f"the answer would hold {cells} values, more than {MOST_CELLS}", "ask for fewer ranks, points or columns"
    )
