"""Rows on their way to whoever wants them: Arrow, pandas, polars or plain Python."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


class Rows:
    """The rows of one question, read when they are first asked for.

    Anything that takes the Arrow C stream protocol takes these as they are: ``polars.from_arrow(rows)``,
    ``duckdb.sql("SELECT * FROM rows")``.
    """

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts = parts
        self._table: pa.Table | None = None

    def arrow(self) -> pa.Table:
        """As an Arrow table; absent values are null."""
        if self._table is None:
            import pyarrow as pa

            with pa.ipc.open_stream(pa.py_buffer(b"".join(self._parts))) as reader:
                self._table = reader.read_all()
        return self._table

    def pandas(self) -> pd.DataFrame:
        """As a DataFrame; whole numbers stay whole (nullable Int64), absent values are NA, labels are dicts."""
        import pandas as pd
        import pyarrow as pa

        whole = {
            pa.int8(): pd.Int8Dtype(), pa.int16(): pd.Int16Dtype(), pa.int32(): pd.Int32Dtype(),
            pa.int64(): pd.Int64Dtype(), pa.uint8(): pd.UInt8Dtype(), pa.uint16(): pd.UInt16Dtype(),
            pa.uint32(): pd.UInt32Dtype(), pa.uint64(): pd.UInt64Dtype(),
        }  # fmt: skip
        return self.arrow().to_pandas(types_mapper=whole.get, maps_as_pydicts="lossy")

    def dicts(self) -> list[dict[str, Any]]:
        """As plain objects; absent values are None."""
        rows: list[dict[str, Any]] = self.arrow().to_pylist(maps_as_pydicts="lossy")
        return rows

    def __len__(self) -> int:
        return int(self.arrow().num_rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.dicts())

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.arrow().__arrow_c_stream__(requested_schema)

    def __repr__(self) -> str:
        return f"<lens rows: {'not read yet' if self._table is None else repr(self._table.schema.names)}>"
