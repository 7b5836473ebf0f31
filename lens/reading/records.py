"""A stored run's records in the form in which they were sent, for whoever computes on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lens.reading import StoredRun

Row = Mapping[str, Any]


def records_of(run: StoredRun, metrics: Iterable[str] = ()) -> Iterator[dict[str, Any]]:
    """Steps, phases, collectives and vectors of a run, and the samples of these metrics, as they once were sent.

    Raises:
        ReadingError: nobody answers, or the answer broke off.
    """
    for table, record_of in _RECORD_OF.items():
        yield from map(record_of, run.table(table))
    known = set(run.metrics())
    for metric in metrics:
        if metric in known:
            yield from ({"type": "sample", **row} for row in run.series(metric))


def _span(kind: str, name: str, row: Row, attrs: Row) -> dict[str, Any]:
    times = {key: row[key] for key in ("t0_ns", "t1_ns", "rank", "step")}
    return {"type": "span", "kind": kind, "name": name, **times, "attrs": {**_object(row["attrs"]), **attrs}}


def _step(row: Row) -> dict[str, Any]:
    names = ("tokens", "micro_batches", "seq_sq", "recompiles", "gc_ns", "log_ns")
    return _span("step", "step", row, {name: row[name] for name in names})


def _collective(row: Row) -> dict[str, Any]:
    names = ("group", "seq", "bytes", "t_wait_ns", "t_done_ns", "layer", "phase", "micro_batch", "peer", "dtype")
    return _span("collective", row["op"], row, {**{name: row[name] for name in names}, "async": row["is_async"]})


def _vector(row: Row) -> dict[str, Any]:
    keys = ("metric", "rank", "labels", "layer", "step", "t_ns", "values")
    return {"type": "vector", **{key: row[key] for key in keys}}


_RECORD_OF: dict[str, Callable[[Row], dict[str, Any]]] = {
    "steps": _step,
    "spans": lambda row: _span(row["kind"], row["name"], row, {}),
    "collectives": _collective,
    "vectors": _vector,
}


def _object(attrs: Any) -> dict[str, Any]:
    """Attributes come as JSON, or as nothing."""
    found = json.loads(attrs) if isinstance(attrs, str) and attrs else attrs
    return dict(found or {})
