"""Records as columns: the form in which wire, store and diagnosis hand them to each other.

A `Tables` holds one dict of equally long numpy arrays for each kind of record. Text columns are int32 codes into
the pool `strings` (-1 = null); an absent int64 is `NULL`, an absent rank, layer or peer is -1. An open span has
``t1_ns == NULL``. `TablesBuilder` is the one place that decides what a valid record is.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lens.records import number
from lens.slots import NULL, SEVERITIES, canonical

Column = NDArray[Any]
Table = dict[str, Column]

METRIC_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_./-]{0,127}")

# kind of column: i8 int64 (NULL), i4 int32 (-1), s text code (-1), f8 float, i1 small int
SCHEMA: dict[str, dict[str, str]] = {
    "samples": {
        "t_ns": "i8", "metric": "s", "value": "f8", "rank": "i4", "host": "s", "device": "s", "step": "i8",
        "labels": "s",
    },
    "steps": {
        "rank": "i4", "step": "i8", "t0_ns": "i8", "t1_ns": "i8", "tokens": "i8", "micro_batches": "i8",
        "seq_sq": "i8", "recompiles": "i8", "gc_ns": "i8", "log_ns": "i8", "attrs": "s",
    },
    "spans": {
        "t0_ns": "i8", "t1_ns": "i8", "kind": "s", "name": "s", "rank": "i4", "step": "i8", "attrs": "s",
    },
    "collectives": {
        "t0_ns": "i8", "t1_ns": "i8", "t_wait_ns": "i8", "t_done_ns": "i8", "op": "s", "group": "s", "seq": "i8",
        "bytes": "i8", "rank": "i4", "step": "i8", "layer": "i4", "phase": "s", "micro_batch": "i4", "peer": "i4",
        "is_async": "i1", "dtype": "s", "attrs": "s",
    },
    "vectors": {
        "t_ns": "i8", "metric": "s", "rank": "i4", "step": "i8", "layer": "i4", "labels": "s", "offset": "i8",
        "length": "i8",
    },
    "events": {
        "t_ns": "i8", "kind": "s", "severity": "i1", "text": "s", "rank": "i4", "host": "s", "device": "s",
        "step": "i8", "attrs": "s",
    },
}  # fmt: skip
TIME_COLUMN = {
    name: next(column for column in schema if column in ("t_ns", "t0_ns")) for name, schema in SCHEMA.items()
}
"""The time at which a record of a table is, or begins."""
STEP_BEARING = ("steps", "spans", "collectives", "vectors")
"""Tables whose steps are steps of the loop; a sample's step may be any count its author liked."""
DTYPES: dict[str, np.dtype[Any]] = {
    "i8": np.dtype("<i8"),
    "i4": np.dtype("<i4"),
    "s": np.dtype("<i4"),
    "f8": np.dtype("<f8"),
    "i1": np.dtype("i1"),
}
STEP_ATTRIBUTES = ("tokens", "micro_batches", "seq_sq", "recompiles", "gc_ns", "log_ns")
COLLECTIVE_TEXTS = ("group", "phase", "dtype")
COLLECTIVE_NUMBERS = ("seq", "bytes", "t_wait_ns", "t_done_ns")
COLLECTIVE_SMALL = ("layer", "micro_batch", "peer")
SPAN_KEYS = frozenset({"type", "t0_ns", "t1_ns", "kind", "name", "rank", "step", "attrs"})
EVENT_KEYS = frozenset({"type", "t_ns", "kind", "severity", "text", "rank", "host", "device", "step", "attrs"})
_INT64 = range(-(2**63), 2**63)
_INT32 = range(-1, 2**31)


@dataclass(frozen=True)
class Begin:
    """From where on records are taken: a step, and when it began."""

    step: int
    t_ns: int


@dataclass
class Tables:
    """Columns of every kind of record; `vector_values` is flat, a row of `vectors` says where its part lies."""

    strings: list[str] = field(default_factory=list)
    samples: Table = field(default_factory=lambda: empty("samples"))
    steps: Table = field(default_factory=lambda: empty("steps"))
    spans: Table = field(default_factory=lambda: empty("spans"))
    collectives: Table = field(default_factory=lambda: empty("collectives"))
    vectors: Table = field(default_factory=lambda: empty("vectors"))
    events: Table = field(default_factory=lambda: empty("events"))
    vector_values: Column = field(default_factory=lambda: np.empty(0, "<f8"))

    def table(self, name: str) -> Table:
        """The table of this name (a key of SCHEMA)."""
        result: Table = getattr(self, name)
        return result

    def count(self, name: str) -> int:
        """Rows of a table."""
        return len(next(iter(self.table(name).values())))

    @property
    def total(self) -> int:
        """Rows of all tables."""
        return sum(self.count(name) for name in SCHEMA)

    def string(self, code: int) -> str | None:
        """The text of a code, None for -1."""
        return self.strings[code] if code >= 0 else None

    def code(self, text: str) -> int:
        """The code of a text, -2 when no record holds it (so that it equals no row, not even null)."""
        return self._codes().get(text, -2)

    def _codes(self) -> dict[str, int]:
        cached: tuple[int, dict[str, int]] | None = self.__dict__.get("_code_cache")
        if cached is None or cached[0] != len(self.strings):
            cached = len(self.strings), {text: code for code, text in enumerate(self.strings)}
            self.__dict__["_code_cache"] = cached
        return cached[1]

    def select(self, name: str, rows: Column) -> Table:
        """The rows (mask or indices) of a table."""
        return {column: values[rows] for column, values in self.table(name).items()}

    def since(self, begin: Begin) -> Tables:
        """The records from a step on; values that no row of `vectors` has any more are left out."""
        result = Tables(strings=self.strings)
        for name in SCHEMA:
            table = self.table(name)
            later = table[TIME_COLUMN[name]] >= begin.t_ns
            if name in STEP_BEARING:
                later = np.where(table["step"] == NULL, later, table["step"] >= begin.step)
            setattr(result, name, self.select(name, later))
        length = result.vectors["length"]
        begins = np.cumsum(length) - length
        inside = np.arange(int(length.sum())) - np.repeat(begins, length)
        result.vector_values = self.vector_values[np.repeat(result.vectors["offset"], length) + inside]
        result.vectors["offset"] = begins
        return result

    def texts(self, codes: Column) -> list[str | None]:
        """The texts of a column of codes."""
        return [self.strings[code] if code >= 0 else None for code in codes.tolist()]

    def values_of(self, row: int) -> Column:
        """The values of one row of `vectors`."""
        start = int(self.vectors["offset"][row])
        return self.vector_values[start : start + int(self.vectors["length"][row])]

    @classmethod
    def concat(cls, parts: Sequence[Tables]) -> Tables:
        """All rows of all parts, in that order, over one pool of strings."""
        pool: dict[str, int] = {}
        columns: dict[str, dict[str, list[Column]]] = {n: {c: [] for c in s} for n, s in SCHEMA.items()}
        values: list[Column] = []
        shift = 0
        for part in parts:
            mapping = np.array([pool.setdefault(text, len(pool)) for text in part.strings] + [-1], "<i4")
            for name, schema in SCHEMA.items():
                table = part.table(name)
                for column, kind in schema.items():
                    data = table[column]
                    if kind == "s":
                        data = mapping[data]
                    elif column == "offset":
                        data = data + shift
                    columns[name][column].append(data)
            values.append(part.vector_values)
            shift += len(part.vector_values)
        result = cls(strings=list(pool))
        for name, schema in SCHEMA.items():
            if parts:
                setattr(result, name, {column: np.concatenate(columns[name][column]) for column in schema})
        if values:
            result.vector_values = np.concatenate(values)
        return result

    @classmethod
    def read_ndjson(cls, path: Path) -> tuple[dict[str, Any], Tables, list[dict[str, Any]]]:
        """A file of records, plain or gzip: the merged `run` lines, the columns, and the lines refused.

        Raises:
            OSError: the file cannot be read.
            ValueError: no line of it is a record.
        """
        builder, run, rejected = TablesBuilder(), {}, []
        with path.open("rb") as probe:
            packed = probe.read(2) == b"\x1f\x8b"
        accepted = 0
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            for line_number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    if isinstance(record, dict) and record.get("type") == "run":
                        run.update({key: value for key, value in record.items() if key != "type"})
                    else:
                        builder.add(record)
                    accepted += 1
                except (ValueError, RecursionError) as error:
                    rejected.append({"line": line_number, "reason": str(error)[:200]})
        if rejected and not accepted:
            raise ValueError(f"{path} holds no record: line {rejected[0]['line']}: {rejected[0]['reason']}")
        return run, builder.build(), rejected


def empty(name: str) -> Table:
    """A table without rows."""
    return {column: np.empty(0, DTYPES[kind]) for column, kind in SCHEMA[name].items()}


class TablesBuilder:
    """Takes records as JSON objects and gives columns; refuses what is not a record and says why."""

    def __init__(self) -> None:
        self._pool: dict[str, int] = {}
        self._rows: dict[str, list[tuple[Any, ...]]] = {name: [] for name in SCHEMA}
        self._values: list[float] = []
        self._adders: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "sample": self._sample,
            "span": self._span,
            "vector": self._vector,
            "event": self._event,
        }

    def add(self, record: Any) -> None:
        """Take one record.

        Raises:
            ValueError: it is not a record; the reason names the field. Nothing of it was taken.
        """
        if not isinstance(record, Mapping):
            raise ValueError("a record is a JSON object")
        kind = record.get("type")
        adder = self._adders.get(kind) if isinstance(kind, str) else None
        if adder is None:
            raise ValueError(f"type: {str(kind)[:40]!r} is none of {', '.join(self._adders)}")
        adder(record)

    def build(self) -> Tables:
        """The columns of everything taken so far."""
        result = Tables(strings=list(self._pool), vector_values=np.array(self._values, "<f8"))
        for name, schema in SCHEMA.items():
            rows = self._rows[name]
            columns: list[Any] = list(zip(*rows, strict=True)) if rows else [()] * len(schema)
            table = {
                column: np.array(values, DTYPES[kind])
                for (column, kind), values in zip(schema.items(), columns, strict=True)
            }
            setattr(result, name, table)
        return result

    def _code(self, text: str | None) -> int:
        return -1 if text is None else self._pool.setdefault(text, len(self._pool))

    def _sample(self, record: Mapping[str, Any]) -> None:
        value = number(_needed(record, "value"))
        row = (
            _time(record, "t_ns"),
            _metric(record),
            value,
            _small(record, "rank"),
            _text(record, "host"),
            _text(record, "device"),
            _integer(record, "step"),
            _labels(record),
        )
        self._rows["samples"].append(self._coded("samples", row))

    def _span(self, record: Mapping[str, Any]) -> None:
        t0 = _time(record, "t0_ns")
        t1 = _integer(record, "t1_ns")
        if t1 != NULL and t1 < t0:
            raise ValueError("t1_ns: the span ends before it begins")
        kind, name = _name(record, "kind"), _name(record, "name")
        rank, step = _small(record, "rank"), _integer(record, "step")
        attrs = _with_unknown(record, SPAN_KEYS)
        if kind == "step":
            if step == NULL:
                raise ValueError("step: a step span needs its number")
            known = [_integer(attrs, key) for key in STEP_ATTRIBUTES]
            row: tuple[Any, ...] = (rank, step, t0, t1, *known, _rest(attrs, STEP_ATTRIBUTES))
            self._rows["steps"].append(self._coded("steps", row))
        elif kind == "collective":
            self._collective(t0, t1, name, rank, step, attrs)
        else:
            row = (t0, t1, kind, name, rank, step, _rest(attrs, ()))
            self._rows["spans"].append(self._coded("spans", row))

    def _collective(self, t0: int, t1: int, name: str, rank: int, step: int, attrs: Mapping[str, Any]) -> None:
        group, phase, dtype = (_text(attrs, key) for key in COLLECTIVE_TEXTS)
        seq, size, t_wait, t_done = (_integer(attrs, key) for key in COLLECTIVE_NUMBERS)
        layer, micro_batch, peer = (_small(attrs, key) for key in COLLECTIVE_SMALL)
        rest = _rest(attrs, (*COLLECTIVE_TEXTS, *COLLECTIVE_NUMBERS, *COLLECTIVE_SMALL, "async"))
        is_async = int(bool(attrs.get("async")))
        row = (
            t0, t1, t_wait, t_done, name, group, seq, size, rank, step, layer, phase, micro_batch, peer, is_async,
            dtype, rest,
        )  # fmt: skip
        self._rows["collectives"].append(self._coded("collectives", row))

    def _vector(self, record: Mapping[str, Any]) -> None:
        given = _needed(record, "values")
        if not isinstance(given, (list, tuple)):
            raise ValueError("values: a list of numbers is needed")
        values = [number(item) for item in given]
        row = (
            _time(record, "t_ns"),
            _metric(record),
            _small(record, "rank"),
            _integer(record, "step"),
            _small(record, "layer"),
            _labels(record),
            len(self._values),
            len(values),
        )
        self._rows["vectors"].append(self._coded("vectors", row))
        self._values.extend(values)

    def _event(self, record: Mapping[str, Any]) -> None:
        severity = record.get("severity", "info")
        if severity not in SEVERITIES:
            raise ValueError(f"severity: {severity!r} is none of {', '.join(SEVERITIES)}")
        row = (
            _time(record, "t_ns"),
            _name(record, "kind"),
            SEVERITIES.index(severity),
            _text(record, "text"),
            _small(record, "rank"),
            _text(record, "host"),
            _text(record, "device"),
            _integer(record, "step"),
            _rest(_with_unknown(record, EVENT_KEYS), ()),
        )
        self._rows["events"].append(self._coded("events", row))

    def _coded(self, table: str, row: tuple[Any, ...]) -> tuple[Any, ...]:
        kinds = SCHEMA[table].values()
        return tuple(self._code(v) if kind == "s" else v for v, kind in zip(row, kinds, strict=True))


def _needed(record: Mapping[str, Any], key: str) -> Any:
    if record.get(key) is None:
        raise ValueError(f"{key}: missing")
    return record[key]


def _integer(record: Mapping[str, Any], key: str) -> int:
    value = record.get(key)
    if value is None:
        return NULL
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value not in _INT64 or value == NULL:
        raise ValueError(f"{key}: {str(value)[:40]!r} is not a whole number of 64 bits")
    return value


def _time(record: Mapping[str, Any], key: str) -> int:
    _needed(record, key)
    return _integer(record, key)


def _small(record: Mapping[str, Any], key: str) -> int:
    value = record.get(key)
    if value is None:
        return -1
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value not in _INT32 or value < 0:
        raise ValueError(f"{key}: {str(value)[:40]!r} is not a whole number from 0 on")
    return value


def _text(record: Mapping[str, Any], key: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key}: text is needed, not {type(value).__name__}")
    return value


def _name(record: Mapping[str, Any], key: str) -> str:
    value = _text(record, key)
    if not value:
        raise ValueError(f"{key}: missing")
    return value


def _metric(record: Mapping[str, Any]) -> str:
    value = _name(record, "metric")
    if not METRIC_NAME.fullmatch(value):
        raise ValueError(f"metric: {value[:40]!r} is not a name (letters, digits, _ . / -, at most 128)")
    return value


def _object(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = record.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{key}: an object is needed")
    return value


def _with_unknown(record: Mapping[str, Any], known: frozenset[str]) -> Mapping[str, Any]:
    """The attributes, with the record's unknown keys among them: what a newer sender says is kept."""
    unknown = {key: value for key, value in record.items() if key not in known}
    return {**unknown, **_object(record, "attrs")} if unknown else _object(record, "attrs")


def _labels(record: Mapping[str, Any]) -> str | None:
    labels = _object(record, "labels")
    if not all(isinstance(value, str) for value in labels.values()):
        raise ValueError("labels: every value is text")
    return canonical(dict(labels)) if labels else None


def _rest(attrs: Mapping[str, Any], known: Sequence[str]) -> str | None:
    """What has no column of its own, as JSON: unknown keys are kept."""
    rest = {key: value for key, value in attrs.items() if key not in known and value is not None}
    return json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False) if rest else None
