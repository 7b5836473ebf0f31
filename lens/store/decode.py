"""Bodies of records to columns: one function a content type, the same `Decoded` from each.

A bad record never costs a good one: it is reported with its line (or sequence, or row) and the reason. Only a body
that cannot be read at all is refused as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lens.slots import CONTENT_TYPE as SLOTS
from lens.tables import Tables, TablesBuilder

NDJSON = "application/x-ndjson"
ARROW = "application/vnd.apache.arrow.stream"
_BLOCK = 1 << 19
MOST_REASONS = 1000
"""How many refused records a reply names; all are counted."""


@dataclass
class Rejections:
    """Records refused: the first ones with their reasons, and how many in all."""

    listed: list[dict[str, Any]] = field(default_factory=list)
    count: int = 0

    def add(self, line: int, reason: str, records: int = 1) -> None:
        """Note refused records; `line` is the line, slot sequence or row of the first."""
        self.count += records
        if len(self.listed) < MOST_REASONS:
            self.listed.append({"line": line, "reason": reason[:200]})


@dataclass
class Decoded:
    """What a body holds."""

    tables: Tables
    rejected: Rejections
    runs: list[dict[str, Any]] = field(default_factory=list)
    """`run` lines, in order: they describe the run and are no records."""
    lost: int = 0
    """Slots that the sender says were overwritten before it could read them."""

    @property
    def accepted(self) -> int:
        """Records taken, `run` lines included."""
        return self.tables.total + len(self.runs)


RECORD_ERRORS = (ValueError, TypeError, OverflowError, RecursionError)
"""What `TablesBuilder.add` can raise for JSON that is no record."""


def decode(body: bytes, content_type: str) -> Decoded:
    """The records of an unpacked body.

    Raises:
        KeyError: a content type that is none of `CONTENT_TYPES`.
        UndecodableError: the body cannot be read at all.
    """
    decoded = CONTENT_TYPES[content_type](body)
    decoded.tables.strings[:] = [_speakable(text) for text in decoded.tables.strings]
    return decoded


def decode_ndjson(body: bytes) -> Decoded:
    """One record a line; empty lines are skipped."""
    rejected = Rejections()
    runs: list[dict[str, Any]] = []
    parts: list[Tables] = []
    line_number = 1
    for block in _blocks(body):
        lines = block.split(b"\n")
        parts.append(_decode_lines(lines, line_number, rejected, runs))
        line_number += len(lines)
    return Decoded(parts[0] if len(parts) == 1 else Tables.concat(parts), rejected, runs)


def _blocks(body: bytes) -> Iterator[bytes]:
    """The body in pieces that end with a line: no single step of decoding keeps other threads waiting for long."""
    start = 0
    while start + _BLOCK < len(body):
        end = body.find(b"\n", start + _BLOCK)
        if end < 0:
            break
        yield body[start:end]
        start = end + 1
    yield body[start:]


def _decode_lines(
    lines: list[bytes], first_number: int, rejected: Rejections, runs: list[dict[str, Any]]
) -> Tables:
    builder, decoder = TablesBuilder(), msgspec.json.Decoder()
    for line_number, line in enumerate(lines, first_number):
        if not line or line.isspace():
            continue
        try:
            record = _json_object(line, decoder)
            if isinstance(record, dict) and record.get("type") == "run":
                runs.append({key: value for key, value in record.items() if key != "type"})
            else:
                builder.add(record)
        except RECORD_ERRORS as error:
            rejected.add(line_number, str(error))
    return builder.build()


def _json_object(line: bytes, decoder: msgspec.json.Decoder[Any]) -> Any:
    try:
        return decoder.decode(line)
    except msgspec.DecodeError:
        # The bare tokens NaN and Infinity are no JSON, but Python and many others write them.
        return json.loads(line)


def _speakable(text: str) -> str:
    """The text with unpaired surrogates replaced: JSON can spell them, UTF-8 and the database cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _decode_arrow(body: bytes) -> Decoded:
    from lens.store.arrow_decode import decode_arrow

    return decode_arrow(body)


def _decode_slots(body: bytes) -> Decoded:
    from lens.store.slots_decode import decode_slots

    return decode_slots(body)


CONTENT_TYPES: dict[str, Callable[[bytes], Decoded]] = {
    NDJSON: decode_ndjson,
    ARROW: _decode_arrow,
    SLOTS: _decode_slots,
}
