"""A run as a trace that ui.perfetto.dev and chrome://tracing open: Chrome's JSON, gzip, one process a rank.

Tracks of a rank: steps, phases, every other kind of span, one for each group's collectives, and a few of its numbers.
Times are microseconds since the first record; `otherData.t0_ns` is that moment.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from lens.store.export.rows import Rows
from lens.store.runs import Run

NO_RANK = 1_000_000
"""Process of records that belong to no rank."""
COUNTERS = frozenset(
    {"train.loss", "train.loss.local", "hw.power", "gpu.clock.sm", "hw.gpu.utilization", "hw.gpu.memory.usage",
     "torch.memory.allocated", "process.memory.usage"}
)  # fmt: skip
"""Metrics drawn below the spans of their rank."""
_STEPS, _PHASES, _FIRST_FREE = 1, 2, 10


def trace(rows: Rows, run: Run, t0_ns: int) -> Iterator[bytes]:
    """The bytes of the file."""
    packer = zlib.compressobj(6, wbits=31)
    head = {"displayTimeUnit": "ms", "otherData": {"run": run.id, "t0_ns": t0_ns, "lens": "1"}}
    opening = msgspec.json.encode(head)[:-1] + b',"traceEvents":[\n'
    yield packer.compress(opening)
    separator = b""
    for events in _events(rows, run, t0_ns):
        encoded = b",\n".join(map(msgspec.json.encode, events))
        if encoded:
            yield packer.compress(separator + encoded)
            separator = b",\n"
    yield packer.compress(b"\n]}\n") + packer.flush()


def _events(rows: Rows, run: Run, t0_ns: int) -> Iterator[list[dict[str, Any]]]:
    tracks = _Tracks(t0_ns)
    yield [event for entry in run.described.get("ranks") or () for event in _process(entry)]
    for table, make in (
        ("steps", tracks.step), ("spans", tracks.span), ("collectives", tracks.collective), ("events", tracks.event),
    ):  # fmt: skip
        for batch in rows.batches(table):
            yield [event for row in batch.to_pylist() for event in make(row)]
    for batch in rows.batches("samples", only=COUNTERS):
        yield [tracks.counter(row) for row in batch.to_pylist() if _finite(row["value"])]
    yield list(tracks.names())


def _process(entry: dict[str, Any]) -> Iterable[dict[str, Any]]:
    rank = entry["rank"]
    about = [str(entry[key]) for key in ("host", "device", "model") if entry.get(key)]
    name = " · ".join([f"rank {rank}", *about])
    yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}


class _Tracks:
    """Makes events, and remembers which tracks they are on."""

    def __init__(self, t0_ns: int) -> None:
        self._t0_ns = t0_ns
        self._numbers: dict[str, int] = {"steps": _STEPS, "phases": _PHASES}
        self._used: dict[tuple[int, int], str] = {}
        self._async = 0

    def step(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        known = {
            key: row[key] for key in ("tokens", "micro_batches", "recompiles", "gc_ns") if row[key] is not None
        }
        return [self._slice(row, "steps", f"step {row['step']}", "step", known)]

    def span(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        track = "phases" if row["kind"] == "phase" else row["kind"]
        return [self._slice(row, track, row["name"], row["kind"], _step(row))]

    def collective(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        group = row["group"] or "no group"
        known = {key: row[key] for key in ("seq", "bytes", "layer", "phase", "peer") if row[key] is not None}
        whole = self._slice(row, group, row["op"], "collective", {**_step(row), **known})
        if not row["is_async"] or row["t1_ns"] is None:
            return [whole]
        # These may overlap on one track, so they are asynchronous events: a pair with a number of its own.
        self._async += 1
        both = {key: whole[key] for key in ("name", "cat", "pid", "tid")} | {"id": self._async}
        begin = {**both, "ph": "b", "ts": whole["ts"], "args": whole["args"]}
        return [begin, {**both, "ph": "e", "ts": self._at(row["t_done_ns"] or row["t1_ns"])}]

    def event(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        if row["kind"] == "heartbeat":
            return []
        args = {key: row[key] for key in ("severity", "text", "attrs") if row[key]}
        place = self._place(row, "events")
        return [
            {
                "ph": "i",
                "s": "p",
                "name": row["kind"],
                "cat": "event",
                **place,
                "ts": self._at(row["t_ns"]),
                "args": args,
            }
        ]

    def counter(self, row: dict[str, Any]) -> dict[str, Any]:
        where = [row["device"] or row["host"]] if row["rank"] is None else []
        name = " ".join(filter(None, [row["metric"], *where, *(value for _, value in row["labels"] or ())]))
        process = NO_RANK if row["rank"] is None else row["rank"]
        return {
            "ph": "C",
            "name": name,
            "pid": process,
            "ts": self._at(row["t_ns"]),
            "args": {"value": row["value"]},
        }

    def names(self) -> Iterator[dict[str, Any]]:
        for (process, track), name in sorted(self._used.items()):
            yield {"ph": "M", "name": "thread_name", "pid": process, "tid": track, "args": {"name": name}}
            yield {
                "ph": "M",
                "name": "thread_sort_index",
                "pid": process,
                "tid": track,
                "args": {"sort_index": track},
            }

    def _slice(self, row: dict[str, Any], track: str, name: str, kind: str, args: dict[str, Any]) -> dict[str, Any]:
        event = {
            "ph": "X",
            "name": name,
            "cat": kind,
            **self._place(row, track),
            "ts": self._at(row["t0_ns"]),
            "args": args,
        }
        if row["t1_ns"] is None:
            return {**event, "ph": "B"}  # never left
        return {**event, "dur": (row["t1_ns"] - row["t0_ns"]) / 1000}

    def _place(self, row: dict[str, Any], track: str) -> dict[str, int]:
        process = NO_RANK if row["rank"] is None else row["rank"]
        number = self._numbers.setdefault(track, _FIRST_FREE + len(self._numbers))
        self._used[process, number] = track
        return {"pid": process, "tid": number}

    def _at(self, t_ns: int) -> float:
        return (t_ns - self._t0_ns) / 1000


def _step(row: dict[str, Any]) -> dict[str, Any]:
    return {} if row["step"] is None else {"step": row["step"]}


def _finite(value: float) -> bool:
    return abs(value) < float("inf")
