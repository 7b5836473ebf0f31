"""Records for tests, and a form of `Tables` that can be compared whatever the order."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from hypothesis import strategies as st

from lens.records import word
from lens.store.decode import NDJSON, Decoded, decode
from lens.store.folder import DataFolder, Receipt
from lens.tables import SCHEMA, Tables

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND


def ndjson(records: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def send(
    folder: DataFolder,
    run: str,
    records: Iterable[Mapping[str, Any]],
    source: str | None = None,
    sequence: int | None = None,
) -> Receipt:
    body = ndjson(records)
    return folder.ingest(run, body, NDJSON, "", decode(body, NDJSON), source, sequence)


def sample(metric: str, value: Any, step: int | None = None, **more: Any) -> dict[str, Any]:
    t_ns = more.pop("t_ns", START + (step or 0) * SECOND)
    return {"type": "sample", "t_ns": t_ns, "metric": metric, "value": value, "step": step, **more}


def step_span(rank: int, step: int, seconds: float = 0.5, **more: Any) -> dict[str, Any]:
    t0 = more.pop("t0_ns", START + step * SECOND)
    t1 = more.pop("t1_ns", t0 + int(seconds * SECOND))
    return {
        "type": "span",
        "kind": "step",
        "name": "step",
        "t0_ns": t0,
        "t1_ns": t1,
        "rank": rank,
        "step": step,
        **more,
    }


def rows_of(tables: Tables) -> dict[str, Counter[tuple[Any, ...]]]:
    """Every row as plain values, as a multiset for each table."""
    result: dict[str, Counter[tuple[Any, ...]]] = {}
    for name, schema in SCHEMA.items():
        columns: list[list[Any]] = []
        for column, kind in schema.items():
            values = tables.table(name)[column]
            if column in ("offset", "length"):
                continue
            columns.append(
                tables.texts(values) if kind == "s" else [word(v) if kind == "f8" else v for v in values.tolist()]
            )
        if name == "vectors":
            columns.append(
                [tuple(word(v) for v in tables.values_of(row).tolist()) for row in range(tables.count(name))]
            )
        result[name] = Counter(zip(*columns, strict=True))
    return result


def decoded(records: Iterable[Mapping[str, Any]]) -> Decoded:
    return decode(ndjson(records), NDJSON)


names = st.text("abcxyz_", min_size=1, max_size=6)
texts = st.text(max_size=8).filter(lambda text: text != "")
times = st.integers(0, 2**62)
maybe_rank = st.none() | st.integers(0, 5)
maybe_step = st.none() | st.integers(0, 2**40)
values = st.floats(allow_nan=True, allow_infinity=True).map(lambda v: v if math.isfinite(v) else word(v))
labels = st.none() | st.dictionaries(names, texts, max_size=2)
attrs = st.none() | st.dictionaries(names, st.integers(0, 9) | texts, max_size=2)
durations = st.integers(0, 10**9)


def _span(kind: st.SearchStrategy[str], more: st.SearchStrategy[Any], step: st.SearchStrategy[Any]) -> Any:
    return st.builds(
        lambda t0, d, kind, name, rank, step, attrs: {
            "type": "span", "t0_ns": t0, "t1_ns": t0 + d, "kind": kind, "name": name, "rank": rank, "step": step,
            "attrs": attrs,
        },
        times, durations, kind, names, maybe_rank, step, more,
    )  # fmt: skip


samples = st.fixed_dictionaries(
    {"type": st.just("sample"), "t_ns": times, "metric": names, "value": values},
    optional={"rank": maybe_rank, "step": maybe_step, "host": texts, "device": texts, "labels": labels},
)
vectors = st.fixed_dictionaries(
    {"type": st.just("vector"), "t_ns": times, "metric": names, "values": st.lists(values, max_size=20)},
    optional={"rank": maybe_rank, "step": maybe_step, "layer": maybe_rank, "labels": labels},
)
events = st.fixed_dictionaries(
    {
        "type": st.just("event"),
        "t_ns": times,
        "kind": names,
        "severity": st.sampled_from(["info", "warning", "error"]),
    },
    optional={
        "text": texts,
        "rank": maybe_rank,
        "step": maybe_step,
        "host": texts,
        "device": texts,
        "attrs": attrs,
    },
)
steps = _span(
    st.just("step"),
    st.fixed_dictionaries({}, optional={"tokens": st.integers(0, 99), "odd": texts}),
    st.integers(0, 99),
)
phases = _span(st.just("phase"), attrs, maybe_step)
collectives = _span(
    st.just("collective"),
    st.fixed_dictionaries(
        {}, optional={"group": texts, "seq": st.integers(0, 99), "bytes": st.integers(0, 2**40),
                      "async": st.booleans(), "layer": st.integers(0, 9), "peer": st.integers(0, 9),
                      "t_done_ns": times, "other": texts}
    ),
    maybe_step,
)  # fmt: skip
record_lists = st.lists(st.one_of(samples, vectors, events, steps, phases, collectives), max_size=40)

DIE_AT = """
import os, signal, sys
from lens.store.engine import Store
left, command = int(sys.argv[2]), Store.command
def counted(store, sql):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    command(store, sql)
Store.command = counted
"""
"""Start of a script that is killed by its own statement number argv[2] (from 0)."""
