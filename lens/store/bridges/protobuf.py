"""Reads protobuf by a table of fields, into plain objects named as in protobuf's JSON form.

Enough of the format for metrics, and strict: whatever is cut short or too deep is refused, unknown fields are skipped.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

from lens.store.errors import UndecodableError

Fields = dict[int, tuple[str, str]]
"""Of one message: name and kind by number. A kind is one of `_SCALARS` or a message; with * it is repeated."""
MOST_DEPTH = 16
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_TWO_63, _TWO_64 = 1 << 63, 1 << 64


def read(body: bytes, message: str, messages: dict[str, Fields]) -> dict[str, Any]:
    """The message in these bytes.

    Raises:
        UndecodableError: they are no such message.
    """
    try:
        return _message(memoryview(body), message, messages, MOST_DEPTH)
    except (struct.error, IndexError, UnicodeDecodeError, ValueError) as error:
        raise UndecodableError(
            f"the body is no {message}: {error}", "send protobuf as the protocol says"
        ) from error


def _message(data: memoryview, name: str, messages: dict[str, Fields], depth: int) -> dict[str, Any]:
    if depth == 0:
        raise ValueError("nested too deep")
    fields, found = messages[name], dict[str, Any]()
    for number, wire, raw in _parts(data):
        known = fields.get(number)
        if known is None:
            continue
        key, kind = known
        many = kind.endswith("*")
        kind = kind.rstrip("*")
        if kind in messages:
            if wire != _BYTES:
                raise ValueError(f"{key} is no message")
            value = _message(raw, kind, messages, depth - 1)
            found.setdefault(key, []).append(value) if many else found.__setitem__(key, value)
        elif many:
            found.setdefault(key, []).extend(_scalars(raw, wire, kind))
        else:
            found[key] = _SCALARS[kind][1](raw, wire)
    return found


def _parts(data: memoryview) -> Iterator[tuple[int, int, Any]]:
    """Number, wire type and raw value of every field."""
    position, end = 0, len(data)
    while position < end:
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, position = _varint(data, position)
            yield number, wire, value
            continue
        if wire == _BYTES:
            length, position = _varint(data, position)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire} is unknown")
        if number == 0 or position + length > end:
            raise ValueError("cut short")
        yield number, wire, data[position : position + length]
        position += length


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value % _TWO_64, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _scalars(raw: Any, wire: int, kind: str) -> list[Any]:
    """Values of a repeated field, packed or not."""
    own, convert = _SCALARS[kind]
    if wire != _BYTES or own == _BYTES:
        return [convert(raw, wire)]
    if own == _VARINT:
        values, position = [], 0
        while position < len(raw):
            value, position = _varint(raw, position)
            values.append(convert(value, own))
        return values
    width = 8 if own == _FIXED64 else 4
    if len(raw) % width:
        raise ValueError("packed numbers cut short")
    return [convert(raw[start : start + width], own) for start in range(0, len(raw), width)]


def _of(wire: int, convert: Callable[[Any], Any]) -> tuple[int, Callable[[Any, int], Any]]:
    def checked(raw: Any, given: int) -> Any:
        if given != wire:
            raise ValueError("a field of another wire type")
        return convert(raw)

    return wire, checked


def _signed(value: int) -> int:
    return value - _TWO_64 if value >= _TWO_63 else value


_SCALARS: dict[str, tuple[int, Callable[[Any, int], Any]]] = {
    "string": _of(_BYTES, lambda raw: str(raw, "utf-8")),
    "bytes": _of(_BYTES, bytes),
    "double": _of(_FIXED64, lambda raw: struct.unpack("<d", raw)[0]),
    "fixed64": _of(_FIXED64, lambda raw: struct.unpack("<Q", raw)[0]),
    "sfixed64": _of(_FIXED64, lambda raw: struct.unpack("<q", raw)[0]),
    "fixed32": _of(_FIXED32, lambda raw: struct.unpack("<I", raw)[0]),
    "uint": _of(_VARINT, int),
    "int": _of(_VARINT, _signed),
    "sint": _of(_VARINT, lambda value: (value >> 1) ^ -(value & 1)),
    "bool": _of(_VARINT, bool),
}
