"""Prometheus remote write (version 1) to samples: a snappy block of a protobuf WriteRequest."""

from __future__ import annotations

import struct
from typing import Any

import pyarrow as pa

from lens.store.bridges import protobuf
from lens.store.bridges.samples import Gathered, named_run
from lens.store.errors import TooLargeError, UndecodableError

_MESSAGES: dict[str, protobuf.Fields] = {
    "WriteRequest": {1: ("timeseries", "TimeSeries*")},
    "TimeSeries": {1: ("labels", "Label*"), 2: ("samples", "Sample*")},
    "Label": {1: ("name", "string"), 2: ("value", "string")},
    "Sample": {1: ("value", "double"), 2: ("timestamp", "int")},
}
_STALE = struct.unpack("<Q", bytes.fromhex("020000000000f07f"))[0]
"""The NaN by which Prometheus says that a series has ended: that is no value."""


def gather(body: bytes, run: str | None, limit: int) -> Gathered:
    """The samples of a request; `run` is where those go that name none, `limit` the most bytes it may unpack to.

    Raises:
        UndecodableError: the body is no WriteRequest.
        TooLargeError: it unpacks to more than the limit.
    """
    request = protobuf.read(unpack_snappy(body, limit), "WriteRequest", _MESSAGES)
    gathered = Gathered()
    for series in request.get("timeseries", ()):
        labels = {each.get("name", ""): each.get("value", "") for each in series.get("labels", ())}
        metric = labels.pop("__name__", "")
        samples: list[dict[str, Any]] = series.get("samples", [])
        if not metric:
            gathered.refuse("a series without __name__", len(samples))
            continue
        into = named_run(labels, run, (labels.get("job"),))
        for each in samples:
            value, t_ms = each.get("value", 0.0), each.get("timestamp", 0)
            if struct.unpack("<Q", struct.pack("<d", value))[0] == _STALE:
                continue
            if not 0 < t_ms < 2**63 // 1_000_000:
                gathered.refuse(f"{metric[:80]}: timestamp {t_ms}")
                continue
            gathered.add(into, metric, t_ms * 1_000_000, value, labels)
    return gathered


def unpack_snappy(body: bytes, limit: int) -> bytes:
    """The bytes of a snappy block; it says itself how many they are.

    Raises:
        UndecodableError: no snappy block.
        TooLargeError: more than the limit.
    """
    try:
        size = 0
        for index in range(5):
            size |= (body[index] & 0x7F) << (7 * index)
            if body[index] < 0x80:
                break
        if size > limit:
            raise TooLargeError(f"the body unpacks to more than {limit >> 20} MiB", "send it in smaller batches")
        return pa.Codec("snappy").decompress(body, size, asbytes=True) if size else b""
    except (IndexError, OSError, pa.ArrowException) as error:
        raise UndecodableError(
            f"the body is not a snappy block: {error}", "send Content-Encoding: snappy"
        ) from error
