"""Samples of a run with the names of their series, read as they lie: sorted by series, so the database sorts nothing.

The engine gives numbers (mid, rank, step, t_ns, value); names are put to them here, as dictionaries, a whole batch at a
time. That is several times faster than joining and sorting text row by row, and what goes over the wire is half as large.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from lens.slots import NULL
from lens.store.engine import Store
from lens.store.moments import Times
from lens.store.rows import Series
from lens.store.runs import Run
from lens.tables import Column

BATCH_ROWS = 250_000
_TEXT = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema([
    pa.field("run", _TEXT, nullable=False), pa.field("metric", _TEXT, nullable=False), pa.field("rank", pa.int32()),
    pa.field("host", _TEXT), pa.field("device", _TEXT),
    pa.field("labels", pa.map_(pa.string(), pa.string()), nullable=False), pa.field("step", pa.int64()),
    pa.field("t_ns", pa.int64(), nullable=False), pa.field("value", pa.float64(), nullable=False),
])  # fmt: skip
"""The columns of the view ``samples``; text is a dictionary."""
_FEW_RANKS = 16
_NUMBERS = ("mid", "rank", "step", "t_ns", "value")
_SETTINGS = " SETTINGS max_memory_usage = 2147483648, max_threads = 2, optimize_read_in_order = 1"


def sample_batches(
    store: Store,
    run: Run,
    series: Sequence[Series],
    where: str,
    rows_of: Callable[[], dict[int, int]],
    rows_at_once: int,
) -> Iterator[pa.RecordBatch]:
    """The samples of these series, sorted by metric, host, device, labels, rank, step and time, absent first.

    Args:
        where: a condition of SQL on rank, step and t_ns.
        rows_of: how many rows each series has, by its mid; asked only if there are more than `rows_at_once`.
        rows_at_once: how many rows may be held in memory.
    """
    ordered = sorted(series, key=lambda each: (each.metric, each.host or "", each.device or "", each.labels or ""))
    named = _Names(run.id, ordered)
    held: list[pa.RecordBatch] = []
    for batch in _read(store, run, ordered, where):
        held.append(batch)
        if sum(each.num_rows for each in held) > rows_at_once:
            break
    else:
        yield from _sorted(held, ordered, named)
        return
    held.clear()
    for some in _groups(ordered, rows_of(), rows_at_once):
        batches = _read(store, run, some, where)
        # A series alone comes as it lies, however long it is.
        yield from map(named.batch, batches) if len(some) == 1 else _sorted(list(batches), some, named)


def _groups(ordered: Sequence[Series], rows: dict[int, int], most: int) -> Iterator[list[Series]]:
    """The series in their order, as many at a time as have so many rows."""
    some: list[Series] = []
    held = 0
    for each in ordered:
        own = rows.get(each.mid, 0)
        if some and held + own > most:
            yield some
            some, held = [], 0
        some.append(each)
        held += own
    if some:
        yield some


def _read(store: Store, run: Run, series: Sequence[Series], where: str) -> Iterator[pa.RecordBatch]:
    mids = ", ".join(str(each.mid) for each in series)
    if not series:
        return
    times = Times(store, run.number)
    for batch in store.stream(
        f"SELECT {', '.join(_NUMBERS)} FROM lens.samples WHERE run = {run.number} AND mid IN ({mids}) AND {where} "
        f"ORDER BY run, mid, rank, step, t_ns{_SETTINGS}",
        BATCH_ROWS,
    ):
        yield _timed(batch, times)


def _timed(batch: pa.RecordBatch, times: Times) -> pa.RecordBatch:
    """The batch with the times of its samples. Where it has many ranks, series by series: each has few of them."""
    mid, rank, step, t_ns = (batch.column(name).to_numpy() for name in ("mid", "rank", "step", "t_ns"))
    is_wide = int(rank.max()) - int(rank.min()) > _FEW_RANKS
    ends = [*((np.flatnonzero(mid[1:] != mid[:-1]) + 1).tolist() if is_wide else ()), len(mid)]
    found = [
        times.of(rank[start:stop], step[start:stop], t_ns[start:stop])
        for start, stop in itertools.pairwise([0, *ends])
    ]
    return batch.set_column(_NUMBERS.index("t_ns"), "t_ns", pa.array(np.concatenate(found)))


def _sorted(held: list[pa.RecordBatch], ordered: Sequence[Series], named: _Names) -> Iterator[pa.RecordBatch]:
    """All rows of some series, from the order of their mids into that of their names."""
    if not held:
        return
    table = pa.Table.from_batches(held)
    mids = table.column("mid").to_numpy()
    wanted = np.array([each.mid for each in ordered], "<u8")
    first, end = np.searchsorted(mids, wanted), np.searchsorted(mids, wanted, "right")
    lengths = end - first
    rows = np.repeat(first - (np.cumsum(lengths) - lengths), lengths) + np.arange(len(mids))
    yield named.named({name: table.column(name).to_numpy()[rows] for name in _NUMBERS})


class _Names:
    """What the mids of some series stand for, as columns."""

    def __init__(self, run_id: str, series: Sequence[Series]) -> None:
        known = sorted(series, key=lambda each: each.mid)
        self._mids = np.array([each.mid for each in known], "<u8")
        self._run = pa.array([run_id])
        self._texts = {
            name: _dictionary([getattr(each, name) for each in known]) for name in ("metric", "host", "device")
        }
        labels = [list(json.loads(each.labels).items()) if each.labels else [] for each in known]
        self._labels = pa.array(labels, SCHEMA.field("labels").type)
        self._labelled = any(labels)

    def batch(self, found: pa.RecordBatch) -> pa.RecordBatch:
        """Rows of the database with their names."""
        return self.named({name: found.column(name).to_numpy() for name in _NUMBERS})

    def named(self, numbers: dict[str, Column]) -> pa.RecordBatch:
        """The same of columns."""
        place, rank, step = np.searchsorted(self._mids, numbers["mid"]), numbers["rank"], numbers["step"]
        count = len(place)
        labels = self._labels.take(pa.array(place)) if self._labelled else _no_labels(count)
        columns = {
            "run": pa.DictionaryArray.from_arrays(np.zeros(count, "<i4"), self._run),
            **{name: _coded(codes[place], texts) for name, (codes, texts) in self._texts.items()},
            "rank": pa.array(rank, mask=rank < 0 if (rank < 0).any() else None),
            "labels": labels,
            "step": pa.array(step, mask=step == NULL if (step == NULL).any() else None),
            "t_ns": pa.array(numbers["t_ns"]),
            "value": pa.array(numbers["value"], from_pandas=False),
        }
        return pa.record_batch([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same rows with text as text and labels as JSON, for files that know neither dictionaries nor maps."""
    columns = {
        field.name: column.dictionary_decode() if pa.types.is_dictionary(field.type) else column
        for field, column in zip(batch.schema, batch.columns, strict=True)
    }
    labels = [
        json.dumps(dict(each), separators=(",", ":"), ensure_ascii=False) for each in columns["labels"].to_pylist()
    ]
    return pa.record_batch({**columns, "labels": pa.array(labels, pa.string())})


def encoded(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The rows of another view that has the columns of ``samples``, in their types."""
    columns = [
        column.dictionary_encode() if pa.types.is_dictionary(field.type) and not pa.types.is_dictionary(column.type)
        else column.cast(field.type)
        for field, column in ((field, batch.column(field.name)) for field in SCHEMA)
    ]  # fmt: skip
    return pa.record_batch(columns, schema=SCHEMA)


def nothing() -> pa.RecordBatch:
    """No rows."""
    return pa.RecordBatch.from_pylist([], SCHEMA)


def _dictionary(texts: list[str | None]) -> tuple[Column, pa.Array]:
    """A code for each text, -1 for none, and what the codes stand for."""
    pool: dict[str, int] = {}
    codes = [-1 if text is None else pool.setdefault(text, len(pool)) for text in texts]
    return np.array(codes, "<i4"), pa.array(list(pool), pa.string())


def _coded(codes: Column, texts: pa.Array) -> pa.DictionaryArray:
    absent = codes < 0
    return pa.DictionaryArray.from_arrays(pa.array(codes, mask=absent if absent.any() else None), texts)


def _no_labels(count: int) -> pa.Array:
    empty = pa.array([], pa.string())
    return pa.MapArray.from_arrays(pa.array(np.zeros(count + 1, "<i4")), empty, empty)
