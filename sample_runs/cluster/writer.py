"""Takes columns of records and gives `lens.tables.Tables`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lens.slots import NULL
from lens.tables import DTYPES, SCHEMA, Tables

Column = NDArray[Any]


class Writer:
    """Collects the records of a run, many at a time."""

    def __init__(self) -> None:
        self._pool: dict[str, int] = {}
        self._parts: dict[str, list[dict[str, Column]]] = {name: [] for name in SCHEMA}
        self._values: list[Column] = []
        self._used = 0

    def code(self, text: str) -> int:
        """The code of a text."""
        return self._pool.setdefault(text, len(self._pool))

    def codes(self, texts: Iterable[str]) -> Column:
        """Codes of texts."""
        return np.array([self.code(text) for text in texts], np.int32)

    def add(self, table: str, count: int, **columns: Any) -> None:
        """`count` rows of a table; a column is an array, one value for all rows, or a text. Left out is unknown."""
        if not count:
            return
        rows: dict[str, Column] = {}
        for column, kind in SCHEMA[table].items():
            absent: Any = NULL if kind == "i8" else 0 if kind in ("f8", "i1") else -1
            value = columns.get(column, absent)
            value = self.code(value) if isinstance(value, str) else value
            rows[column] = np.full(count, value, DTYPES[kind])
        self._parts[table].append(rows)

    def vectors(
        self, metric: str, values: NDArray[np.float64], labels: Mapping[str, str] | None = None, **columns: Any
    ) -> None:
        """One vector a row of `values` [vectors, length]."""
        count, length = values.shape
        text = {"labels": _text(labels)} if labels else {}
        offset = self._used + length * np.arange(count)
        self.add("vectors", count, metric=metric, offset=offset, length=length, **text, **columns)
        self._values.append(values.reshape(-1))
        self._used += values.size

    def samples(self, metric: str, values: Column, labels: Mapping[str, str] | None = None, **columns: Any) -> None:
        """Samples of one metric, all with the same labels."""
        text = {"labels": _text(labels)} if labels else {}
        self.add("samples", len(values), metric=metric, value=values, **text, **columns)

    def event(
        self,
        kind: str,
        t_ns: int,
        severity: int = 0,
        text: str = "",
        attrs: Mapping[str, Any] | None = None,
        **columns: Any,
    ) -> None:
        """One event; severity 0 info, 1 warning, 2 error."""
        self.add(
            "events", 1, kind=kind, t_ns=t_ns, severity=severity, text=text or kind, attrs=_text(attrs or {}), **columns,
        )  # fmt: skip

    def tables(self) -> Tables:
        """Everything taken so far."""
        result = Tables(strings=list(self._pool))
        for name, parts in self._parts.items():
            if parts:
                joined = {column: np.concatenate([part[column] for part in parts]) for column in SCHEMA[name]}
                setattr(result, name, joined)
        if self._values:
            result.vector_values = np.concatenate(self._values)
        return result


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(dict(content), sort_keys=True, separators=(",", ":"))
