"""Rows that a SELECT found, as JSON: columns with their types, rows as lists; null is absent, never zero."""

from __future__ import annotations

import datetime
import decimal
from typing import Any

import pyarrow as pa

from lens.store.replies import worded
from lens.store.sql.guest import SqlAnswer


def reply_of(answer: SqlAnswer) -> dict[str, Any]:
    """{columns: [{name, type}], rows: [[…]], truncated, elapsed_s}; NaN and infinities are words."""
    table = answer.table
    columns = [_plain(column) for column in table.columns]
    return {
        "columns": [{"name": field.name, "type": _type(field.type)} for field in table.schema],
        "rows": [list(row) for row in zip(*columns, strict=True)],
        "truncated": answer.truncated,
        "elapsed_s": round(answer.elapsed_s, 4),
    }


def arrow_of(answer: SqlAnswer) -> bytes:
    """The rows as an Arrow IPC stream."""
    sink: Any = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, answer.table.schema) as writer:
        writer.write_table(answer.table)
    found: bytes = sink.getvalue().to_pybytes()
    return found


def _type(kind: pa.DataType) -> str:
    """Arrow's own name, with the two kinds of text as one."""
    name = str(kind)
    return "string" if name in ("binary", "large_string", "large_binary") else name


def _plain(column: pa.ChunkedArray) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pa.binary()).to_pylist()
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_string(kind):
        return values
    if pa.types.is_floating(kind):
        return [worded(value) for value in values]
    return [_value(value, kind) for value in values]


def _value(value: Any, kind: pa.DataType) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, (datetime.date, datetime.datetime, datetime.time)):
        return value.isoformat()
    if isinstance(value, (decimal.Decimal, datetime.timedelta)):
        return str(value)
    if isinstance(value, list) and pa.types.is_map(kind):
        return {str(key): _value(item, kind.item_type) for key, item in value}
    if isinstance(value, list):
        return [_value(item, kind.value_type) for item in value]
    if isinstance(value, dict):
        return {key: _value(item, kind.field(key).type) for key, item in value.items()}
    return worded(value)
