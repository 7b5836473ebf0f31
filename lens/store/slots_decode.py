"""Recorder slots to columns, by numpy: whole columns at a time, Python only for the few records that carry JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from lens.slots import (
    COLLECTIVE,
    COLUMN_SEPARATOR,
    EVENT,
    FIRST_PAYLOAD_WORDS,
    LABEL_SEPARATOR,
    NEXT_PAYLOAD_WORDS,
    NO_RANK,
    NULL,
    OWN_RANK,
    PHASE,
    ROW,
    SEVERITIES,
    SPAN,
    STEP,
    VECTOR,
    WORDS,
    Anchor,
    RingPart,
    SlotError,
    decode_batch,
)
from lens.store.decode import RECORD_ERRORS, Decoded, Rejections
from lens.store.errors import UndecodableError
from lens.tables import DTYPES, METRIC_NAME, SCHEMA, Column, Tables, TablesBuilder

OVERHEAD_METRIC = "lens.overhead.time"
_LOW = np.int64(0xFFFFFFFF)
_NULL = np.int64(NULL)


def decode_slots(body: bytes) -> Decoded:
    """The records of a batch of slots.

    Raises:
        UndecodableError: not a batch of slots, or truncated.
    """
    try:
        batch = decode_batch(body)
    except SlotError as error:
        raise UndecodableError(str(error), "send what lens.slots.encode_batch gives") from error
    columns, rejected = _Columns(), Rejections()
    for part in batch.rings:
        _Part(part, batch.host, batch.anchor, columns, rejected).decode()
    tables = Tables.concat([columns.build(), columns.odd.build()])
    return Decoded(tables, rejected, lost=sum(max(0, part.lost) for part in batch.rings))


class _Columns:
    """Chunks of columns on their way into one `Tables`."""

    def __init__(self) -> None:
        self._pool: dict[str, int] = {}
        self._chunks: dict[str, list[tuple[int, dict[str, Any]]]] = {name: [] for name in SCHEMA}
        self._values: list[Column] = []
        self._value_count = 0
        self.odd = TablesBuilder()

    def code(self, text: str | None) -> int:
        return -1 if text is None else self._pool.setdefault(text, len(self._pool))

    def add(self, table: str, rows: int, **columns: Any) -> None:
        """Rows of a table; a column left out is null, a scalar holds for every row."""
        if rows:
            self._chunks[table].append((rows, columns))

    def add_values(self, values: Column) -> int:
        """Values of vectors; returns the offset of the first."""
        start = self._value_count
        self._values.append(values)
        self._value_count += len(values)
        return start

    def build(self) -> Tables:
        result = Tables(strings=list(self._pool))
        for name, schema in SCHEMA.items():
            chunks = self._chunks[name]
            if not chunks:
                continue
            table = {}
            for column, kind in schema.items():
                absent = NULL if kind == "i8" else 0 if kind == "i1" else -1
                parts = [np.broadcast_to(c.get(column, absent), rows) for rows, c in chunks]
                table[column] = np.concatenate(parts).astype(DTYPES[kind], copy=False)
            setattr(result, name, table)
        if self._values:
            result.vector_values = np.concatenate(self._values).astype("<f8", copy=False)
        return result


class _Part:
    """One ring's slots on their way into columns."""

    def __init__(self, part: RingPart, host: str, anchor: Anchor, columns: _Columns, rejected: Rejections) -> None:
        self.part, self.columns, self.rejected = part, columns, rejected
        self.words = np.frombuffer(part.slots, "<i8").reshape(-1, WORDS)
        self.floats = self.words.view("<f8")
        self.host = str(part.about.get("host") or host)
        rank = part.about.get("rank")
        self.rank = rank if isinstance(rank, int) and 0 <= rank < 2**31 else -1
        self.shift = np.int64(anchor.unix_ns - anchor.monotonic_ns)
        # Id 0 is "no text"; an id that the table does not hold is no text either.
        self.codes = np.array([-1, *(columns.code(text) for text in part.strings[1:])], "<i4")

    def decode(self) -> None:
        heads = self._heads()
        kinds = self.words[heads, 1] & 0xFF
        known = np.isin(kinds, list(_READERS))
        self._refuse(heads[~known], "a slot of an unknown type")
        for kind, reader in _READERS.items():
            rows = heads[kinds == kind]
            if len(rows):
                reader(self, rows)
        self._open_spans()

    def _heads(self) -> Column:
        """Indices of the slots that begin a whole record."""
        words = self.words
        is_head = (words[:, 15] == words[:, 0]) & (words[:, 0] > 0)
        heads = np.flatnonzero(is_head)
        extra = words[heads, 1] >> 8 & 0xFFFFFF
        following = np.append(heads[1:], len(words))
        last = np.minimum(heads + extra, len(words) - 1)
        whole = (heads + extra < following) & (words[last, 0] == words[heads, 0] + extra)
        self._refuse(heads[~whole], "a record whose slots are not all there")
        first_head = int(heads[0]) if len(heads) else len(words)
        if first_head:
            self.rejected.add(self.part.first, "slots before the beginning of a record", first_head)
        kept: Column = heads[whole]
        return kept

    def _refuse(self, rows: Column, reason: str) -> None:
        for sequence in self.words[rows, 0].tolist():
            self.rejected.add(sequence, reason)

    def _keep(self, rows: Column, good: Column, reason: str) -> Column:
        if good.all():
            return rows
        self._refuse(rows[~good], reason)
        return rows[good]

    def _unix(self, times: Column) -> Column:
        unix: Column = np.where(times == _NULL, _NULL, times + self.shift)
        return unix

    def _text(self, ids: Column) -> Column:
        codes: Column = np.where(ids < len(self.codes), self.codes[np.minimum(ids, len(self.codes) - 1)], -1)
        return codes

    def _low(self, rows: Column, word: int) -> Column:
        values: Column = self.words[rows, word] & _LOW
        return values

    def _high(self, rows: Column, word: int) -> Column:
        values: Column = self.words[rows, word] >> 32 & _LOW
        return values

    def _ranks(self, rows: Column) -> Column:
        field = self.words[rows, 1] >> 32
        ranks = np.where(field == OWN_RANK, self.rank, np.where(field == NO_RANK, -1, field - 2))
        return ranks.astype("<i4")

    def _spans(self, rows: Column, named: bool = True) -> Column:
        """The rows whose times (and name) make a span."""
        t0, t1 = self.words[rows, 2], self.words[rows, 3]
        rows = self._keep(rows, (t1 == _NULL) | (t1 >= t0), "t1_ns: the span ends before it begins")
        if named:
            rows = self._keep(rows, self._text(self._low(rows, 5)) >= 0, "name: missing")
        return rows

    def _timed(self, rows: Column) -> dict[str, Column]:
        return {
            "t0_ns": self._unix(self.words[rows, 2]),
            "t1_ns": self._unix(self.words[rows, 3]),
            "rank": self._ranks(rows),
            "step": self.words[rows, 4],
        }

    def _steps(self, rows: Column) -> None:
        rows = self._spans(rows, named=False)
        rows = self._keep(rows, self.words[rows, 4] != _NULL, "step: a step span needs its number")
        words, timed = self.words[rows], self._timed(rows)
        names = ("tokens", "micro_batches", "seq_sq", "recompiles", "gc_ns", "log_ns")
        known = {name: words[:, 6 + index] for index, name in enumerate(names)}
        self.columns.add("steps", len(rows), **timed, **known)
        measured = words[:, 12] != _NULL
        self.columns.add(
            "samples",
            int(measured.sum()),
            t_ns=timed["t1_ns"][measured],
            metric=self.columns.code(OVERHEAD_METRIC),
            value=words[measured, 12] / 1e9,
            rank=timed["rank"][measured],
            host=self.columns.code(self.host),
            step=timed["step"][measured],
        )

    def _phases(self, rows: Column) -> None:
        rows = self._spans(rows)
        micro_batches, inverse = np.unique(self.words[rows, 6], return_inverse=True)
        texts = [None if m == NULL else f'{{"micro_batch":{m}}}' for m in micro_batches.tolist()]
        codes = np.array([self.columns.code(text) for text in texts], "<i4")
        self.columns.add(
            "spans",
            len(rows),
            **self._timed(rows),
            kind=self.columns.code("phase"),
            name=self._text(self._low(rows, 5)),
            attrs=codes[inverse],
        )

    def _collectives(self, rows: Column) -> None:
        rows = self._spans(rows)
        words = self.words[rows]
        self.columns.add(
            "collectives",
            len(rows),
            **self._timed(rows),
            t_wait_ns=self._unix(words[:, 8]),
            t_done_ns=self._unix(words[:, 9]),
            op=self._text(self._low(rows, 5)),
            group=self._text(self._high(rows, 5)),
            seq=words[:, 6],
            bytes=words[:, 7],
            dtype=self._text(self._low(rows, 10)),
            phase=self._text(self._high(rows, 10)),
            layer=self._low(rows, 11) - 1,
            micro_batch=self._high(rows, 11) - 1,
            peer=self._low(rows, 12) - 1,
            is_async=self._high(rows, 12) & 1,
        )

    def _rows(self, rows: Column) -> None:
        for group in _groups(self.words[rows, 5] & _LOW, self.words[rows, 6]):
            self._rows_alike(rows[group])

    def _rows_alike(self, rows: Column) -> None:
        """Rows of the same columns and the same count."""
        values = self._values(rows, self.words[rows, 6])
        columns_code = int(self._text(self._low(rows[:1], 5))[0])
        if values is None or columns_code < 0:
            self._refuse(rows, "a row whose values or columns are missing")
            return
        keys = self.part.strings[int(self._low(rows[:1], 5)[0])].split(COLUMN_SEPARATOR)
        series = [key.partition(LABEL_SEPARATOR)[::2] for key in keys[: values.shape[1]]]
        good = [index for index, (metric, _) in enumerate(series) if METRIC_NAME.fullmatch(metric)]
        if len(good) < values.shape[1]:
            self._refuse(rows, "a row with more values than named columns, or a name that is no metric")
        count = len(good)
        self.columns.add(
            "samples",
            len(rows) * count,
            t_ns=np.repeat(self._unix(self.words[rows, 2]), count),
            metric=np.tile([self.columns.code(series[index][0]) for index in good], len(rows)),
            labels=np.tile([self.columns.code(series[index][1] or None) for index in good], len(rows)),
            value=values[:, good].ravel(),
            rank=np.repeat(self._ranks(rows), count),
            host=self.columns.code(self.host),
            device=np.repeat(self._text(self._high(rows, 5)), count),
            step=np.repeat(self.words[rows, 4], count),
        )

    def _values(self, rows: Column, counts: Column) -> Column | None:
        """Matrix of the float payloads of rows that all hold the same count; None if they do not hold it."""
        count = int(counts[0])
        extra = int((self.words[rows, 1] >> 8 & 0xFFFFFF).min())
        if not 0 <= count <= FIRST_PAYLOAD_WORDS + NEXT_PAYLOAD_WORDS * extra:
            return None
        parts = [self.floats[rows, 7:15]]
        needed = max(0, -(-(count - FIRST_PAYLOAD_WORDS) // NEXT_PAYLOAD_WORDS))
        parts += [self.floats[rows + 1 + index, 1:15] for index in range(needed)]
        return np.hstack(parts)[:, :count]

    def _vectors(self, rows: Column) -> None:
        names = self._text(self._low(rows, 5))
        valid = np.array([code >= 0 and self._is_metric(code) for code in range(-1, names.max(initial=-1) + 1)])
        rows = self._keep(rows, valid[names + 1], "metric: missing or no name")
        for group in _groups(self._low(rows, 6)):
            self._vectors_alike(rows[group])

    def _is_metric(self, code: int) -> bool:
        found = np.flatnonzero(self.codes == code)
        return bool(len(found)) and METRIC_NAME.fullmatch(self.part.strings[int(found[0])]) is not None

    def _vectors_alike(self, rows: Column) -> None:
        values = self._values(rows, self._low(rows, 6))
        if values is None:
            self._refuse(rows, "a vector whose values are not all there")
            return
        count = values.shape[1]
        start = self.columns.add_values(values.ravel())
        self.columns.add(
            "vectors",
            len(rows),
            t_ns=self._unix(self.words[rows, 2]),
            metric=self._text(self._low(rows, 5)),
            labels=self._text(self._high(rows, 5)),
            rank=self._ranks(rows),
            step=self.words[rows, 4],
            layer=self._high(rows, 6) - 1,
            offset=start + count * np.arange(len(rows)),
            length=count,
        )

    def _other_spans(self, rows: Column) -> None:
        for row in rows.tolist():
            record = self._described(row, {"type": "span", "attrs": self._json(row)})
            record["t0_ns"], record["t1_ns"] = record.pop("t"), self._moment(self.words[row, 3])
            record["name"], record["kind"] = self._string(row, low=True), self._string(row, low=False)
            self._add_odd(record, int(self.words[row, 0]))

    def _events(self, rows: Column) -> None:
        for row in rows.tolist():
            body, severity = self._json(row), int(self.words[row, 3])
            record = self._described(row, {"type": "event", **(body if isinstance(body, dict) else {})})
            record["t_ns"], record["host"] = record.pop("t"), self.host
            record["kind"], record["device"] = self._string(row, low=True), self._string(row, low=False)
            record["severity"] = SEVERITIES[severity] if 0 <= severity < len(SEVERITIES) else "info"
            self._add_odd(record, int(self.words[row, 0]))

    def _described(self, row: int, record: dict[str, Any]) -> dict[str, Any]:
        rank, step = int(self._ranks(np.array([row]))[0]), int(self.words[row, 4])
        record["t"] = self._moment(self.words[row, 2])
        record["rank"] = None if rank < 0 else rank
        record["step"] = None if step == NULL else step
        return record

    def _moment(self, time: Any) -> int | None:
        return None if time == _NULL else int(time) + int(self.shift)

    def _string(self, row: int, low: bool) -> str | None:
        index = int(self.words[row, 5]) >> (0 if low else 32) & 0xFFFFFFFF
        return self.part.strings[index] if 0 < index < len(self.part.strings) else None

    def _json(self, row: int) -> Any:
        length, extra = int(self.words[row, 6]), int(self.words[row, 1]) >> 8 & 0xFFFFFF
        payload = self.words[row, 7:15].tobytes() + self.words[row + 1 : row + 1 + extra, 1:15].tobytes()
        if length <= 0:
            return {}
        try:
            return json.loads(payload[:length])
        except ValueError:
            return {"unreadable": payload[:length].decode("utf-8", "replace")}

    def _add_odd(self, record: dict[str, Any], sequence: int) -> None:
        try:
            self.columns.odd.add(record)
        except RECORD_ERRORS as error:
            self.rejected.add(sequence, str(error))

    def _open_spans(self) -> None:
        for span in self.part.open:
            if not isinstance(span, dict):
                self.rejected.add(self.part.first, "an open span is an object")
                continue
            known = {key: span[key] for key in ("group", "seq", "bytes", "async") if span.get(key) is not None}
            t0, waited_from = span.get("t0"), span.get("t_wait")
            if isinstance(waited_from, int):
                known["t_wait_ns"] = self._moment(waited_from)
            record = {
                "type": "span",
                "t0_ns": self._moment(t0) if isinstance(t0, int) else None,
                "t1_ns": None,
                "kind": span.get("kind"),
                "name": span.get("name") or span.get("kind"),
                "rank": None if self.rank < 0 else self.rank,
                "step": span.get("step"),
                "attrs": known,
            }
            self._add_odd(record, self.part.first)


def _groups(*keys: Column) -> list[Column]:
    """Indices of the rows that agree in all keys, one array a group."""
    if not len(keys[0]):
        return []
    _, inverse = np.unique(np.stack(keys), axis=1, return_inverse=True)
    inverse = inverse.ravel()
    order = np.argsort(inverse, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(inverse[order])) + 1)


_READERS = {
    STEP: _Part._steps,
    PHASE: _Part._phases,
    COLLECTIVE: _Part._collectives,
    SPAN: _Part._other_spans,
    ROW: _Part._rows,
    VECTOR: _Part._vectors,
    EVENT: _Part._events,
}
