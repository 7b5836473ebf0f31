"""What is exported, under which name, and its bytes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from lens.store.decode import ARROW
from lens.store.engine import Store
from lens.store.errors import BadQueryError, StoreFullError
from lens.store.export.files import WRITERS, archive, arrow
from lens.store.export.perfetto import trace
from lens.store.export.rows import BY_METRIC, ORDER, Rows, Steps
from lens.store.registry import Registry
from lens.store.runs import Run

_MEDIA = {"parquet": "application/vnd.apache.parquet", "csv": "text/csv; charset=utf-8", "arrow": ARROW}


@dataclass(frozen=True)
class Wanted:
    """What somebody wants of a run."""

    format: str = "parquet"
    """parquet, csv, arrow or perfetto."""
    table: str = "samples"
    """A view of `rows.ORDER`, or all."""
    steps: Steps = field(default_factory=Steps)
    metric: str | None = None
    """Only this one, of samples or vectors."""
    compression: str | None = None
    """Of the buffers of an Arrow stream: lz4, zstd, or none."""


@dataclass(frozen=True)
class Export:
    """A file to be: the parts are read from the database as they are asked for."""

    name: str
    media_type: str
    parts: Iterator[bytes]


class _Places:
    """How many files are made at the same time."""

    def __init__(self, count: int) -> None:
        self._free = threading.BoundedSemaphore(count)

    def hold(self, parts: Iterator[bytes]) -> Iterator[bytes]:
        """The same parts; a place is taken now and given back when they are read, or dropped.

        Raises:
            StoreFullError: there is none.
        """
        if not self._free.acquire(blocking=False):
            raise StoreFullError("enough exports are running", "ask again in a moment")
        return _Parts(parts, self._free.release)


class _Parts(Iterator[bytes]):
    """Parts that say once when they are read to the end, have failed, or were dropped."""

    def __init__(self, parts: Iterator[bytes], release: Callable[[], None]) -> None:
        self._parts = parts
        self._end = weakref.finalize(self, release)

    def __next__(self) -> bytes:
        try:
            return next(self._parts)
        except BaseException:
            self._end()
            raise


_PLACES = _Places(2)


def export_of(store: Store, registry: Registry, run: Run, wanted: Wanted) -> Export:
    """The file that is wanted.

    Raises:
        BadQueryError: an unknown format or table, or a range upside down.
        StoreFullError: enough are being made.
    """
    found = _export_of(store, registry, run, wanted)
    return replace(found, parts=_PLACES.hold(found.parts))


def _export_of(store: Store, registry: Registry, run: Run, wanted: Wanted) -> Export:
    steps = wanted.steps
    if steps.first is not None and steps.last is not None and steps.first > steps.last:
        raise BadQueryError(f"from={steps.first} lies after to={steps.last}", "give the earlier step as from")
    rows = Rows(store, registry, run, steps, wanted.metric)
    if wanted.compression is not None and wanted.format != "arrow":
        raise BadQueryError(f"{wanted.format} has no compression to choose", "compression goes with format=arrow")
    if wanted.format == "perfetto":
        t0_ns = registry.progress(run.number).first_t_ns or 0
        return Export(f"{run.id}.json.gz", "application/gzip", trace(rows, run, t0_ns))
    if wanted.format not in WRITERS:
        raise BadQueryError(f"format: {wanted.format!r} is unknown", f"use {', '.join(WRITERS)} or perfetto")
    if wanted.table == "all":
        return Export(f"{run.id}.zip", "application/zip", archive(rows, wanted.format, run.described))
    if wanted.metric is not None and wanted.table not in BY_METRIC:
        raise BadQueryError(f"{wanted.table} has no metrics", f"metric goes with {' and '.join(BY_METRIC)}")
    if wanted.table not in ORDER:
        raise BadQueryError(f"table: {wanted.table!r} is unknown", f"use {', '.join(ORDER)} or all")
    write = WRITERS[wanted.format] if wanted.compression is None else partial(arrow, compression=wanted.compression)
    parts = write(rows, wanted.table)
    return Export(f"{run.id}.{wanted.table}.{wanted.format}", _MEDIA[wanted.format], parts)
