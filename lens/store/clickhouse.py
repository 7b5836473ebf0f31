"""ClickHouse over its HTTP interface, as the sessions that `engine.Store` asks: no package, columns as Arrow streams.

A session here is a connection and the settings that go with each of its statements: nothing is kept in the server, so
any replica may answer.
"""

from __future__ import annotations

import http.client
import os
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from urllib.parse import unquote, urlencode, urlsplit

import pyarrow as pa

from lens.store.errors import StoreError

SCHEMES = ("http", "https")
TIMEOUT_S = 300.0
_SET = re.compile(r"SET (.*)", re.S)
_USE = re.compile(r"USE (\w+)")
_ASSIGNMENT = re.compile(r"\s*(\w+)\s*=\s*('[^']*'|[^,]+?)\s*(?:,|$)")
_ALWAYS = {
    "default_format": "ArrowStream",
    "output_format_arrow_string_as_string": "1",
    # A subquery over a table of several shards is asked once, and its answer sent to all.
    "distributed_product_mode": "global",
}
_INSERT = {
    # Acknowledged once every shard and the replica that took it have it.
    "distributed_foreground_insert": "1",
    "input_format_parallel_parsing": "0",
}


class HttpSession:
    """A connection to a ClickHouse server. Not for two threads at a time.

    Args:
        url: ``http://host:8123``, user and password in it or in CLICKHOUSE_USER and CLICKHOUSE_PASSWORD.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._url = f"{parts.scheme}://{parts.hostname}:{parts.port or 8123}"
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname or "", parts.port or 8123, timeout=TIMEOUT_S)
        user = unquote(parts.username or "") or os.environ.get("CLICKHOUSE_USER", "default")
        password = unquote(parts.password or "") or os.environ.get("CLICKHOUSE_PASSWORD", "")
        self._headers = {"Authorization": "Basic " + b64encode(f"{user}:{password}".encode()).decode()}
        self._settings: dict[str, str] = {}

    def query(self, sql: str, output: str = "ArrowTable") -> pa.Table:
        """The rows of a statement, no columns if it gives none. ``SET`` and ``USE`` hold for this session.

        Raises:
            StoreError: the server refuses or is not there.
        """
        if self._is_ours(sql):
            return pa.table({})
        content = self._post(sql.encode(), {"wait_end_of_query": "1"}).read()
        if output == "Null" or not content:
            return pa.table({})
        try:
            with pa.ipc.open_stream(content) as reader:
                return reader.read_all()
        except pa.ArrowException as error:
            raise StoreError(f"{self._url} answers in no Arrow: {content[:200]!r}") from error

    def insert(self, sql: str, rows: pa.Table, settings: Mapping[str, str]) -> None:
        """Insert columns by ``INSERT INTO table (columns)``.

        Raises:
            StoreError: the server refuses or is not there; the rows may be there or not.
        """
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
            writer.write_table(rows.combine_chunks())
        given = {"query": f"{sql} FORMAT ArrowStream", "wait_end_of_query": "1", **_INSERT, **settings}
        self._post(sink.getvalue().to_pybytes(), given).read()

    def stream(self, sql: str, rows: int) -> Iterator[pa.RecordBatch]:
        """The rows of a SELECT in batches of about so many, read as they are asked for.

        Raises:
            StoreError: the server refuses, is not there, or fails in between.
        """
        response = self._post(sql.encode(), {"max_block_size": str(rows)})
        try:
            with pa.ipc.open_stream(response) as reader:
                yield from (batch for batch in reader if batch.num_rows)
        except (pa.ArrowException, OSError, http.client.HTTPException) as error:
            raise StoreError(f"the database refused: {str(error)[:500]}") from error

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def _is_ours(self, sql: str) -> bool:
        if found := _SET.fullmatch(sql):
            self._settings |= {name: value.strip("'") for name, value in _ASSIGNMENT.findall(found[1])}
        elif found := _USE.fullmatch(sql):
            self._settings["database"] = found[1]
        return found is not None

    def _post(self, body: bytes, given: Mapping[str, str]) -> http.client.HTTPResponse:
        path = "/?" + urlencode({**_ALWAYS, **self._settings, **given})
        try:
            self._connection.request("POST", path, body, self._headers)
            response = self._connection.getresponse()
            if response.status == 200:
                return response
            said = response.read().decode("utf-8", "replace").strip()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()  # the next statement connects anew
            raise StoreError(
                f"{self._url} does not answer: {error or type(error).__name__}",
                "is ClickHouse's HTTP port named? http://host:8123",
            ) from error
        raise StoreError(f"the database refused: {said[:500]}")
