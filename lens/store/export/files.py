"""Batches of rows as the bytes of a Parquet, CSV or ZIP file, piece by piece."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from lens.store.export.rows import ORDER, Rows

Write = Callable[[Rows, str], Iterator[bytes]]


def parquet(rows: Rows, table: str) -> Iterator[bytes]:
    """The view as Parquet (zstd)."""
    sink, writer = _Sink(), None
    for batch in rows.batches(table):
        if writer is None:
            writer = pyarrow.parquet.ParquetWriter(sink.file, batch.schema, compression="zstd")
        if batch.num_rows:
            writer.write_batch(batch)
        yield sink.taken()
    if writer is not None:
        writer.close()
    yield sink.taken()


def csv(rows: Rows, table: str) -> Iterator[bytes]:
    """The view as CSV with a header; absent values are empty, maps and lists JSON."""
    sink, writer = _Sink(), None
    for batch in rows.batches(table, flat=True):
        if writer is None:
            writer = pyarrow.csv.CSVWriter(sink.file, batch.schema)
        writer.write_batch(batch)
        yield sink.taken()
    if writer is not None:
        writer.close()
    yield sink.taken()


def arrow(rows: Rows, table: str, compression: str | None = None) -> Iterator[bytes]:
    """The view as an Arrow IPC stream; `compression` of its buffers: lz4, zstd or None."""
    sink, writer = _Sink(), None
    options = pa.ipc.IpcWriteOptions(compression=compression)
    for batch in rows.batches(table):
        if writer is None:
            writer = pa.ipc.new_stream(sink.file, batch.schema, options=options)
        writer.write_batch(batch)
        yield sink.taken()
    if writer is not None:
        writer.close()
    yield sink.taken()


WRITERS: dict[str, Write] = {"parquet": parquet, "csv": csv, "arrow": arrow}


def archive(rows: Rows, format: str, described: dict[str, Any]) -> Iterator[bytes]:
    """A ZIP file with every view in this format, and ``run.json``."""
    sink = _Sink()
    packing = zipfile.ZIP_DEFLATED if format == "csv" else zipfile.ZIP_STORED
    with zipfile.ZipFile(sink, "w", packing) as packed:
        packed.writestr("run.json", json.dumps(described, indent=1))
        for table in ORDER:
            with packed.open(f"{table}.{format}", "w", force_zip64=True) as entry:
                for part in WRITERS[format](rows, table):
                    entry.write(part)
                    yield sink.taken()
    yield sink.taken()


class _Sink(io.RawIOBase):
    """A file that can only be written, and gives what was written so far."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[bytes] = []
        self.file = pa.PythonFile(self, "w")
        """The same for Arrow's writers."""

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Take bytes."""
        part = bytes(data)
        self._parts.append(part)
        return len(part)

    def taken(self) -> bytes:
        """What was written since the last call."""
        parts, self._parts = self._parts, []
        return b"".join(parts)
