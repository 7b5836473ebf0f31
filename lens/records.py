"""The four record types and their JSON form. Standard library only.

Times are int64 Unix nanoseconds of the event, by the sending host's clock. None means unknown or not applicable; it
is never zero. Keys that are not known are kept in `extra` and written back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar


@dataclass(frozen=True)
class Sample:
    """One number at one time."""

    type: ClassVar[str] = "sample"
    t_ns: int
    metric: str
    value: float
    rank: int | None = None
    host: str | None = None
    device: str | None = None
    step: int | None = None
    labels: Mapping[str, str] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """Something that took time; `t1_ns` is None while it has not ended."""

    type: ClassVar[str] = "span"
    t0_ns: int
    t1_ns: int | None
    kind: str
    name: str
    rank: int | None = None
    step: int | None = None
    attrs: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Vector:
    """Many numbers of one moment, such as the tokens of each expert."""

    type: ClassVar[str] = "vector"
    t_ns: int
    metric: str
    values: tuple[float, ...]
    rank: int | None = None
    step: int | None = None
    layer: int | None = None
    labels: Mapping[str, str] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """Something that happened."""

    type: ClassVar[str] = "event"
    t_ns: int
    kind: str
    severity: str
    text: str
    rank: int | None = None
    host: str | None = None
    device: str | None = None
    step: int | None = None
    attrs: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


Record = Sample | Span | Vector | Event
TYPES: dict[str, type[Any]] = {kind.type: kind for kind in (Sample, Span, Vector, Event)}
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def number(value: Any) -> float:
    """A value of a record as a float; the words NaN, Infinity and -Infinity count.

    Raises:
        ValueError: it is not a number.
    """
    if isinstance(value, str):
        if value not in _NON_FINITE:
            raise ValueError(f"{value[:40]!r} is not a number")
        return _NON_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"a {type(value).__name__} is not a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("a whole number too large for 64-bit floating point") from None


def word(value: float) -> float | str:
    """The JSON form of a number: itself, or its name where JSON has no number for it."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def to_dict(record: Record) -> dict[str, Any]:
    """The record's JSON object, without the fields that are None."""
    result: dict[str, Any] = {"type": record.type}
    for item in fields(record):
        value = getattr(record, item.name)
        if item.name == "extra":
            result.update(value)
        elif value is not None or item.name == "t1_ns":
            result[item.name] = _plain(value)
    return result


def to_json(record: Record) -> str:
    """One NDJSON line, without its line end."""
    return json.dumps(to_dict(record), separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def from_dict(value: Mapping[str, Any]) -> Record:
    """The record that a JSON object stands for.

    Raises:
        ValueError: not a record; the message names the field.
    """
    kind = TYPES.get(str(value.get("type")))
    if kind is None:
        raise ValueError(f"type {value.get('type')!r} is none of {', '.join(TYPES)}")
    names = {item.name for item in fields(kind)} - {"extra"}
    known = {name: value[name] for name in names if name in value}
    known.setdefault("t1_ns", None) if kind is Span else None
    if "value" in known:
        known["value"] = number(known["value"])
    if "values" in known:
        known["values"] = tuple(number(item) for item in known["values"])
    extra = {key: item for key, item in value.items() if key not in names and key != "type"}
    try:
        result: Record = kind(**known, extra=extra)
    except TypeError as error:
        raise ValueError(f"{kind.type}: {error}") from error
    return result


def from_json(line: str) -> Record:
    """The record in one NDJSON line.

    Raises:
        ValueError: not JSON, or not a record.
    """
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError("a record is a JSON object")
    return from_dict(value)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return word(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
