"""Columns of records to rows of the database's tables."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lens.store.aggregates import SERIES
from lens.store.groups import Groups, grouped
from lens.tables import SCHEMA, Column, Tables

RowGroup = dict[str, pa.Table]
"""Rows for tables of the database, by the name of the rows (see `schema.TARGETS`)."""

_PLAIN = ("steps", "spans", "collectives", "events")
_SERIES_COLUMNS = ("metric", "host", "device", "labels")


@dataclass(frozen=True)
class Series:
    """What a mid stands for; text that is absent is None. `labels` is canonical JSON."""

    mid: int
    metric: str
    host: str | None = None
    device: str | None = None
    labels: str | None = None


def mid_of(metric: str, host: str | None, device: str | None, labels: str | None) -> int:
    """The 64-bit number of a series: a hash of its names, the same on every server."""
    text = "\x1f".join((metric, host or "", device or "", labels or ""))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class RowMaker:
    """Makes rows of records; remembers the numbers of series already met."""

    def __init__(self) -> None:
        self._mids: dict[tuple[str | None, ...], int] = {}
        self._numbers: dict[tuple[int, int], int] = {}

    def rows(self, run: int, tables: Tables) -> tuple[RowGroup, dict[int, Series]]:
        """Rows of all records of one run, and every series among them."""
        dictionary = _Dictionary(tables.strings)
        group: RowGroup = {}
        for name in _PLAIN:
            count = tables.count(name)
            if count:
                group[name] = _arrow(run, count, _columns(name, tables, dictionary))
        series: dict[int, Series] = {}
        if tables.count("samples"):
            mids, numbers = self._numbered(run, tables, series)
            columns = {k: v for k, v in tables.samples.items() if k not in _SERIES_COLUMNS}
            group["samples"] = _arrow(run, len(mids), {"mid": mids, SERIES: numbers, **columns})
        if tables.count("vectors"):
            mids = self.series("vectors", tables, series)
            columns = {k: tables.vectors[k] for k in ("layer", "rank", "step", "t_ns")}
            group["vectors"] = _arrow(run, len(mids), {"mid": mids, **columns, "values": _lists(tables)})
        return group, series

    def series(self, name: str, tables: Tables, found: dict[int, Series]) -> Column:
        """The mid of every row of a table; what they stand for is added to `found`."""
        mids, groups = self._series(name, tables, found)
        return mids[groups.member]

    def _numbered(self, run: int, tables: Tables, found: dict[int, Series]) -> tuple[Column, Column]:
        """The mid of every sample, and a small number for its series among those of all runs."""
        mids, groups = self._series("samples", tables, found)
        numbers = [self._numbers.setdefault((run, mid), len(self._numbers)) for mid in mids.tolist()]
        return mids[groups.member], np.array(numbers, "<i4")[groups.member]

    def _series(self, name: str, tables: Tables, found: dict[int, Series]) -> tuple[Column, Groups]:
        table = tables.table(name)
        absent = np.full(tables.count(name), -1, "<i4")
        codes = [table.get(column, absent) for column in _SERIES_COLUMNS]
        groups = grouped(codes, [len(tables.strings)] * len(codes))
        mids = np.empty(groups.count, "<u8")
        for index, row in enumerate(groups.first.tolist()):
            metric, host, device, labels = (tables.string(int(column[row])) for column in codes)
            key = (metric, host, device, labels)
            mid = self._mids.get(key)
            if mid is None:
                mid = self._mids[key] = mid_of(metric or "", host, device, labels)
            mids[index] = mid
            found[mid] = Series(mid, metric or "", host, device, labels)
        return mids, groups


def join_rows(groups: list[RowGroup]) -> RowGroup:
    """The rows of all groups, one table a name."""
    names = dict.fromkeys(name for group in groups for name in group)
    joined = {}
    for name in names:
        parts = [group[name] for group in groups if name in group]
        table = parts[0] if len(parts) == 1 else pa.concat_tables(parts).unify_dictionaries()
        joined[name] = table.combine_chunks()
    return joined


def table_of(schema: pa.Schema, rows: list[dict[str, Any]]) -> pa.Table:
    """Rows given one by one, for the small tables."""
    return pa.Table.from_pylist(rows, schema)


class _Dictionary:
    """The pool of a `Tables` for Arrow: the empty text, which stands for null, once among them."""

    def __init__(self, strings: list[str]) -> None:
        known = strings if "" in strings else [*strings, ""]
        self._null = known.index("")
        self._texts = pa.array(known, pa.string())

    def column(self, codes: Column) -> pa.Array:
        """Codes as text."""
        indices = np.where(codes < 0, self._null, codes).astype("<i4")
        return pa.DictionaryArray.from_arrays(pa.array(indices), self._texts)


def _columns(name: str, tables: Tables, dictionary: _Dictionary) -> dict[str, Any]:
    return {
        column: dictionary.column(values) if SCHEMA[name][column] == "s" else values
        for column, values in tables.table(name).items()
    }


def _lists(tables: Tables) -> pa.Array:
    """The value lists of `vectors`, which need not lie one after the other."""
    offsets, lengths = tables.vectors["offset"], tables.vectors["length"]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    source = np.repeat(offsets - starts, lengths) + np.arange(int(ends[-1]))
    return pa.LargeListArray.from_arrays(np.append(0, ends), tables.vector_values[source])


def _arrow(run: int, count: int, columns: dict[str, Any]) -> pa.Table:
    return pa.table({"run": np.full(count, run, "<u4"), **columns})
