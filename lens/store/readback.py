"""A run's records back from the database as columns: what diagnosis, export and `GET /steps` work on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lens.slots import NULL
from lens.store.engine import Store
from lens.store.moments import Times
from lens.store.rows import Series
from lens.tables import DTYPES, SCHEMA, STEP_BEARING, TIME_COLUMN, Begin, Column, Table, Tables

Where = Callable[[str], str]
"""A condition on the columns of a table, by its name."""
_PLAIN = ("steps", "spans", "collectives", "events")
_DICTIONARIES = " SETTINGS output_format_arrow_low_cardinality_as_dictionary = 1"
_OPEN_KEYS = {
    "steps": ("rank", "step", "t0_ns"),
    "spans": ("rank", "kind", "name", "t0_ns"),
    "collectives": ("rank", "op", "t0_ns"),
}
"""What names a span: a record with the same values and an end closes an open one."""


def read_tables(
    store: Store,
    run: int,
    series: list[Series],
    where: str | Callable[[str], str] = "1",
    only: tuple[str, ...] | None = None,
) -> Tables:
    """The records of a run for which `where` holds: a condition on columns that every table read has, or one by table.

    Open spans that a later record closed are left out.
    """
    reader = _Reader(store, run, where)
    result = Tables()
    for name in SCHEMA if only is None else only:
        if name in _PLAIN:
            setattr(result, name, without_closed(name, reader.plain(name)))
        elif name == "samples":
            result.samples = reader.samples(series)
        else:
            result.vectors, result.vector_values = reader.vectors(series)
    result.strings = list(reader.pool)
    return result


def newest(store: Store, run: int, most: int, fewest_steps: int, upto: int | None) -> tuple[Begin | None, Where]:
    """Where to begin reading a run so that about so many records, but at least so many steps, come up to a step; and the
    condition by table. Nothing is left out of a run with fewer."""
    counts = [store.scalar(f"SELECT count() FROM lens.{name} WHERE run = {run}") for name in SCHEMA]
    total = sum(int(count or 0) for count in counts)
    seen = f"WHERE run = {run} AND step >= 0"
    named = " UNION ALL ".join(
        f"SELECT step, {TIME_COLUMN[name]} AS t FROM lens.{name} {seen}" for name in STEP_BEARING
    )
    if total <= most:
        return None, lambda table: "1"
    low, high = store.query(f"SELECT min(step) AS low, max(step) AS high FROM ({named})").to_pylist()[0].values()
    last = high if upto is None else min(high, upto)
    first = last - max(fewest_steps, (high - low + 1) * most // total) + 1
    if first <= low and upto is None:
        return None, lambda table: "1"
    began = store.scalar(f"SELECT min(t) FROM ({named}) WHERE step >= {first}")
    after = (
        store.scalar(f"SELECT min(t) FROM ({named}) WHERE step > {last + fewest_steps}")
        if last < high - fewest_steps
        else None
    )
    begin = Begin(max(first, low), int(began or 0))

    def where(table: str) -> str:
        time = f"{TIME_COLUMN[table]} >= {begin.t_ns}" + (f" AND {TIME_COLUMN[table]} < {after}" if after else "")
        if table not in STEP_BEARING:
            return time
        until = f" AND step <= {last + fewest_steps}" if after else ""
        return f"if(step = {NULL}, {time}, step >= {begin.step}{until})"

    return (begin if first > low else None), where


class _Reader:
    """Reads tables of one run over one pool of strings."""

    def __init__(self, store: Store, run: int, where: str | Callable[[str], str]) -> None:
        self.pool: dict[str, int] = {}
        self._store, self._run, self._where = store, run, where

    def plain(self, name: str) -> Table:
        columns = SCHEMA[name]
        found = self._select(name, ", ".join(columns))
        return {
            column: self._codes(found.column(column)) if kind == "s" else _numbers(found.column(column), kind)
            for column, kind in columns.items()
        }

    def samples(self, series: list[Series]) -> Table:
        found = self._select("samples", "mid, rank, step, t_ns, value")
        table = {
            name: _numbers(found.column(name), SCHEMA["samples"][name])
            for name in ("rank", "step", "t_ns", "value")
        }
        steps = table["step"][table["step"] >= 0]
        between = (int(steps.min()), int(steps.max())) if len(steps) else (0, 0)
        table["t_ns"] = Times(self._store, self._run, between).of(table["rank"], table["step"], table["t_ns"])
        table |= self._named(found.column("mid").to_numpy(), series, ("metric", "host", "device", "labels"))
        return {name: table[name] for name in SCHEMA["samples"]}

    def vectors(self, series: list[Series]) -> tuple[Table, Column]:
        found = self._select("vectors", "mid, layer, rank, step, t_ns, values")
        table = {
            name: _numbers(found.column(name), SCHEMA["vectors"][name])
            for name in ("rank", "step", "t_ns", "layer")
        }
        table |= self._named(found.column("mid").to_numpy(), series, ("metric", "labels"))
        lists = found.column("values").combine_chunks()
        lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype("<i8")
        table["length"] = lengths
        table["offset"] = np.cumsum(lengths) - lengths
        values = pc.list_flatten(lists).to_numpy(zero_copy_only=False).astype("<f8")
        return {name: table[name] for name in SCHEMA["vectors"]}, values

    def _select(self, table: str, columns: str) -> pa.Table:
        where = self._where if isinstance(self._where, str) else self._where(table)
        return self._store.query(
            f"SELECT {columns} FROM lens.{table} WHERE run = {self._run} AND ({where}){_DICTIONARIES}"
        )

    def _code(self, text: str | None) -> int:
        return self.pool.setdefault(text, len(self.pool)) if text else -1

    def _codes(self, column: pa.ChunkedArray) -> Column:
        parts = []
        for chunk in column.chunks:
            encoded = chunk if pa.types.is_dictionary(chunk.type) else pc.dictionary_encode(chunk)
            codes = np.array([self._code(text) for text in encoded.dictionary.to_pylist()] or [-1], "<i4")
            parts.append(codes[encoded.indices.to_numpy(zero_copy_only=False)])
        return np.concatenate(parts) if parts else np.empty(0, "<i4")

    def _named(self, mids: Column, series: list[Series], texts: tuple[str, ...]) -> Table:
        """Columns of the names that mids stand for."""
        known = sorted(series, key=lambda each: each.mid)
        order = np.searchsorted(np.array([each.mid for each in known], "<u8"), mids)
        result = {}
        for text in texts:
            codes = np.array([self._code(getattr(each, text)) for each in known] or [-1], "<i4")
            result[text] = codes[order] if len(mids) else np.empty(0, "<i4")
        return result


def _numbers(column: pa.ChunkedArray, kind: str) -> Column:
    return np.asarray(column.to_numpy(), DTYPES[kind])


def without_closed(name: str, table: Table) -> Table:
    """The table without the open spans that another row closes."""
    keys = _OPEN_KEYS.get(name)
    if keys is None:
        return table
    is_open = table["t1_ns"] == NULL
    if not is_open.any():
        return table
    closed = {tuple(row) for row in _rows(table, keys, ~is_open & np.isin(table["t0_ns"], table["t0_ns"][is_open]))}
    kept: set[tuple[Any, ...]] = set()
    drop = np.zeros(len(is_open), bool)
    for index, row in zip(np.flatnonzero(is_open).tolist(), _rows(table, keys, is_open), strict=True):
        # Sent open more than once (a collective still waiting a second later), one row of it is enough.
        drop[index] = row in closed or row in kept
        kept.add(row)
    return {column: values[~drop] for column, values in table.items()}


def _rows(table: Table, keys: tuple[str, ...], rows: Column) -> list[tuple[Any, ...]]:
    return list(zip(*(table[key][rows].tolist() for key in keys), strict=True))
