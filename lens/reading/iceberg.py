"""Stored runs as Apache Iceberg tables in a local warehouse, written by pyiceberg.

The warehouse is a folder: ``catalog.db`` (pyiceberg's SQL catalog) and the tables ``lens.samples``, ``lens.steps``, …,
each with the columns of docs/sql.md and the runs side by side in the column ``run``. A run written again takes the place
of what was there of it, one table at a time and each as a whole.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from lens.reading.connection import ReadingError

NAMESPACE = "lens"
TABLES = ("samples", "steps", "spans", "collectives", "vectors", "events")
ROWS_AT_ONCE = 1_000_000
"""Rows of one data file, about; as many are held in memory."""


def write_iceberg(exported: Callable[[str], Iterator[bytes]], run: str, folder: Path) -> dict[str, int]:
    """Write tables of a run; the rows of each.

    Args:
        exported: the parts of an Arrow IPC stream of a table, by its name.

    Raises:
        ReadingError: pyiceberg is not installed, or the warehouse cannot be used.
    """
    try:
        from pyiceberg.catalog.sql import SqlCatalog
        from pyiceberg.exceptions import RESTError, ValidationError
        from pyiceberg.expressions import EqualTo
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise ReadingError(f"{error.name} is not installed", "pip install 'mistrallens[iceberg]'") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = folder.resolve()
        catalog = SqlCatalog(NAMESPACE, uri=f"sqlite:///{place / 'catalog.db'}", warehouse=place.as_uri())
        catalog.create_namespace_if_not_exists(NAMESPACE)
        return {name: _write(catalog, name, exported(name), EqualTo("run", run)) for name in TABLES}
    except (OSError, SQLAlchemyError, RESTError, ValidationError) as error:
        raise ReadingError(f"the warehouse {folder} cannot be written: {error}", "name another folder") from error


def _write(catalog: Any, name: str, parts: Iterator[bytes], of_run: Any) -> int:
    with pa.ipc.open_stream(io.BufferedReader(_Stream(parts), 1 << 20)) as reader:
        schema = _plain(reader.schema)
        table = catalog.create_table_if_not_exists((NAMESPACE, name), schema)
        rows = 0
        with table.transaction() as transaction:
            if table.scan(row_filter=of_run, selected_fields=("run",), limit=1).to_arrow().num_rows:
                transaction.delete(of_run)
            for some in _gathered(reader):
                transaction.append(some.cast(schema))
                rows += some.num_rows
    # The stream says itself where it ends; whoever makes the parts learns it only when they are read out.
    for _ in parts:
        pass
    return rows


def _gathered(reader: Any) -> Iterator[pa.Table]:
    """The batches of a stream, many at a time: each append is a file and a snapshot."""
    batches: list[pa.RecordBatch] = []
    for batch in reader:
        batches.append(batch)
        if sum(each.num_rows for each in batches) >= ROWS_AT_ONCE:
            yield pa.Table.from_batches(batches)
            batches = []
    if any(each.num_rows for each in batches):
        yield pa.Table.from_batches(batches)


def _plain(schema: pa.Schema) -> pa.Schema:
    """The same columns in types that Iceberg has: no dictionaries, no unsigned or short numbers."""
    return pa.schema([pa.field(column.name, _type(column.type)) for column in schema])


def _type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _type(kind.value_type)
    if pa.types.is_integer(kind):
        return pa.int64()
    if pa.types.is_binary(kind) or pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_map(kind):
        return pa.map_(_type(kind.key_type), _type(kind.item_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_type(kind.value_type))
    return kind


class _Stream(io.RawIOBase):
    """Parts of a body as a file."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts, self._rest = parts, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._rest:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._rest = memoryview(part)
        size = min(len(target), len(self._rest))
        target[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size
