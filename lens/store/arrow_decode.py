"""Arrow IPC streams to columns: one record type a stream.

Columns are the fields of the record (``lens.records``); the type is the schema's metadata ``lens.type``, or follows
from the columns: ``value`` makes samples, ``values`` vectors, ``t0_ns`` spans, ``severity`` or ``text`` events.
``labels`` and ``attrs`` are JSON text, a map or a struct. Samples and vectors stay columns all the way; spans and
events, which carry attributes, go row by row, and so does a table of which a value has no place in its column: the
records beside it are kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lens.slots import NULL, canonical
from lens.store.decode import RECORD_ERRORS, Decoded, Rejections
from lens.store.errors import UndecodableError
from lens.tables import DTYPES, METRIC_NAME, SCHEMA, Column, Tables, TablesBuilder

_TYPE_BY_COLUMN = {"value": "sample", "values": "vector", "t0_ns": "span", "severity": "event", "text": "event"}
_READ_ERRORS = (pa.ArrowException, LookupError, *RECORD_ERRORS)
"""What Arrow and Python can raise for a value of one that is none of the other."""
_ROWS_AT_ONCE = 4096


def decode_arrow(body: bytes) -> Decoded:
    """The records of an Arrow IPC stream.

    Raises:
        UndecodableError: not a stream, or of no record type.
    """
    try:
        with pa.ipc.open_stream(body) as reader:
            table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UndecodableError(
            f"not an Arrow IPC stream: {error}", "write it with pyarrow.ipc.new_stream"
        ) from error
    kind = _record_type(table.schema)
    if kind in ("sample", "vector"):
        try:
            return _Columns(table).decode(kind)
        except KeyError as error:
            raise UndecodableError(f"the columns are not those of a {kind}: {error}", "see docs/api.md") from error
        except _READ_ERRORS:
            return _row_by_row(table, kind)
    return _row_by_row(table, kind)


def _record_type(schema: pa.Schema) -> str:
    named: str = (schema.metadata or {}).get(b"lens.type", b"").decode("utf-8", "replace")
    if named:
        if named not in _TYPE_BY_COLUMN.values():
            raise UndecodableError(f"lens.type {named!r} is no record type", "use sample, span, vector or event")
        return named
    for column, kind in _TYPE_BY_COLUMN.items():
        if column in schema.names:
            return kind
    raise UndecodableError("the columns are those of no record type", "add the schema metadata lens.type")


def _row_by_row(table: pa.Table, kind: str) -> Decoded:
    builder, rejected = TablesBuilder(), Rejections()
    nested = "labels" if kind in ("sample", "vector") else "attrs"
    for row, record in enumerate(_records(table)):
        try:
            if isinstance(record, Exception):
                raise record
            record[nested] = _as_object(record.get(nested))
            builder.add({**record, "type": kind})
        except _READ_ERRORS as error:
            rejected.add(row, str(error))
    return Decoded(builder.build(), rejected)


def _records(table: pa.Table) -> Iterator[dict[str, Any] | Exception]:
    """Every row as an object, or why it cannot be one: a time that Python has no date for, for example."""
    for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
        try:
            rows = batch.to_pylist()
        except _READ_ERRORS:
            rows = [_record(batch.slice(row, 1)) for row in range(batch.num_rows)]
        yield from rows


def _record(row: pa.RecordBatch) -> dict[str, Any] | Exception:
    try:
        record: dict[str, Any] = row.to_pylist()[0]
    except _READ_ERRORS as error:
        return error
    return record


def _as_object(value: Any) -> Any:
    """Attributes or labels as an object, whether they came as JSON text, a map or a struct."""
    if isinstance(value, str):
        value = json.loads(value) if value else None
    elif isinstance(value, list):
        value = dict(value)
    if isinstance(value, Mapping):
        return {key: item for key, item in value.items() if item is not None}
    return value


class _Columns:
    """Samples or vectors of an Arrow table on their way into `Tables`."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()
        self.rows = table.num_rows
        self.pool: dict[str, int] = {}
        self.rejected = Rejections()
        self.good = np.ones(self.rows, bool)

    def decode(self, kind: str) -> Decoded:
        columns: dict[str, Column] = {
            "t_ns": self._integers("t_ns", "<i8", NULL),
            "metric": self._texts("metric"),
            "rank": self._integers("rank", "<i4", -1),
            "step": self._integers("step", "<i8", NULL),
            "labels": self._labels(),
        }
        self._refuse(columns["t_ns"] == NULL, "t_ns: missing")
        named = np.array([METRIC_NAME.fullmatch(text) is not None for text in [*self.pool, ""]], bool)
        self._refuse(~named[columns["metric"]], "metric: missing or no name")
        result = Tables()
        if kind == "sample":
            columns["value"] = self._values()
            columns["host"], columns["device"] = self._texts("host"), self._texts("device")
            result.samples = self._kept("samples", columns)
        else:
            columns["layer"] = self._integers("layer", "<i4", -1)
            columns["offset"], columns["length"], result.vector_values = self._vector_values()
            result.vectors = self._kept("vectors", columns)
        result.strings = list(self.pool)
        return Decoded(result, self.rejected)

    def _kept(self, table: str, columns: dict[str, Column]) -> dict[str, Column]:
        return {name: columns[name][self.good].astype(DTYPES[kind]) for name, kind in SCHEMA[table].items()}

    def _refuse(self, bad: Column, reason: str) -> None:
        for row in np.flatnonzero(bad & self.good).tolist():
            self.rejected.add(row, reason)
        self.good &= ~bad

    def _column(self, name: str) -> pa.Array | None:
        if name not in self.table.schema.names:
            return None
        column = self.table.column(name)
        return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks) if self.rows else None

    def _integers(self, name: str, dtype: str, absent: int) -> Column:
        column = self._column(name)
        if column is None:
            return np.full(self.rows, absent, dtype)
        filled = pc.fill_null(pc.cast(column, pa.int64()), absent).to_numpy(zero_copy_only=False)
        if dtype == "<i4":
            # A number too large would wrap around to somebody else's.
            self._refuse((filled < absent) | (filled >= 2**31), f"{name}: not a whole number from 0 on")
        return np.asarray(filled, dtype)

    def _texts(self, name: str) -> Column:
        column = self._column(name)
        if column is None:
            return np.full(self.rows, -1, "<i4")
        return self._codes(column, lambda text: text)

    def _labels(self) -> Column:
        column = self._column("labels")
        if column is None:
            return np.full(self.rows, -1, "<i4")
        if not (pa.types.is_string(column.type) or pa.types.is_dictionary(column.type)):
            column = pa.array([None if v is None else json.dumps(_as_object(v)) for v in column.to_pylist()])
        return self._codes(column, _canonical_labels)

    def _codes(self, column: pa.Array, convert: Any) -> Column:
        encoded = column if pa.types.is_dictionary(column.type) else pc.dictionary_encode(column)
        texts = [None if text is None else convert(text) for text in encoded.dictionary.to_pylist()]
        if not all(text is None or isinstance(text, str) for text in texts):
            raise ValueError("text is needed")
        codes = [-1 if text is None else self.pool.setdefault(text, len(self.pool)) for text in texts]
        indices = pc.fill_null(pc.cast(encoded.indices, pa.int64()), -1).to_numpy(zero_copy_only=False)
        return np.asarray(np.array([*codes, -1], "<i4")[indices])

    def _values(self) -> Column:
        column = self._column("value")
        if column is None:
            raise KeyError("value")
        self._refuse(pc.is_null(column).to_numpy(zero_copy_only=False), "value: missing")
        filled = pc.fill_null(pc.cast(column, pa.float64(), safe=False), np.nan)
        return np.asarray(filled.to_numpy(zero_copy_only=False))

    def _vector_values(self) -> tuple[Column, Column, Column]:
        column = self._column("values")
        if column is None:
            raise KeyError("values")
        column = pc.cast(column, pa.large_list(pa.float64()))
        self._refuse(pc.is_null(column).to_numpy(zero_copy_only=False), "values: missing")
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        flat = pc.list_flatten(column)
        values = pc.fill_null(flat, np.nan).to_numpy(zero_copy_only=False).astype("<f8")
        return np.concatenate(([0], np.cumsum(lengths)[:-1])) if len(lengths) else lengths, lengths, values


def _canonical_labels(text: str) -> str | None:
    labels = _as_object(text)
    if labels is None or labels == {}:
        return None
    if not isinstance(labels, dict) or not all(isinstance(item, str) for item in labels.values()):
        raise ValueError("labels: an object of text is needed")
    return canonical(labels)
