"""Short names for what the tests of diagnosis do again and again."""

from __future__ import annotations

from typing import Any

import numpy as np
from cluster import START_NS, Cluster

from lens.diagnosis import diagnose
from lens.slots import NULL
from lens.tables import SCHEMA, Tables, TablesBuilder

REPLY_KEYS = {"run", "upto_step", "status", "hypotheses", "coverage"}
HYPOTHESIS_KEYS = {
    "finding", "cause", "severity", "ranks", "groups", "component", "confidence", "onset_step", "detected_step",
    "end_step", "slowdown_pct", "lost_seconds_per_step", "lost_device_hours", "evidence", "against",
    "recommendation", "what_if",
}  # fmt: skip


def verdict(cluster: Cluster, upto_step: int | None = None) -> dict[str, Any]:
    """The reply for a simulated run."""
    return diagnose(cluster.run(), cluster.tables(), upto_step)


def first(reply: dict[str, Any]) -> tuple[str, list[int]]:
    """Cause and ranks of the verdict."""
    assert reply["hypotheses"], reply["status"]
    return reply["hypotheses"][0]["cause"], reply["hypotheses"][0]["ranks"]


def built(*records: dict[str, Any]) -> Tables:
    """Tables of hand-written records."""
    builder = TablesBuilder()
    for record in records:
        builder.add(record)
    return builder.build()


def joined(tables: Tables, *records: dict[str, Any]) -> Tables:
    """The tables and more records."""
    return Tables.concat([tables, built(*records)])


def event(kind: str, t_s: float, rank: int | None = None, **attrs: Any) -> dict[str, Any]:
    """An event t_s seconds after the simulated start."""
    return {
        "type": "event", "kind": kind, "t_ns": START_NS + int(t_s * 1e9), "severity": "info", "text": kind,
        "rank": rank, "attrs": attrs,
    }  # fmt: skip


def collective(
    rank: int, t0_s: float, t1_s: float | None, seq: int, group: str = "world/0", step: int = 0, op: str = "all_reduce",
    **attrs: Any,
) -> dict[str, Any]:  # fmt: skip
    """A collective span."""
    return {
        "type": "span", "kind": "collective", "name": op, "rank": rank, "step": step, "t0_ns": START_NS + int(t0_s * 1e9),
        "t1_ns": None if t1_s is None else START_NS + int(t1_s * 1e9), "attrs": {"group": group, "seq": seq, **attrs},
    }  # fmt: skip


def step_span(rank: int, step: int, t0_s: float, t1_s: float | None) -> dict[str, Any]:
    """A step span."""
    return {
        "type": "span", "kind": "step", "name": "step", "rank": rank, "step": step,
        "t0_ns": START_NS + int(t0_s * 1e9), "t1_ns": None if t1_s is None else START_NS + int(t1_s * 1e9),
    }  # fmt: skip


def end_s(tables: Tables) -> float:
    """Seconds from the simulated start to the end of the last step."""
    return float(tables.steps["t1_ns"].max() - START_NS) * 1e-9


def shuffled(tables: Tables, seed: int, twice: bool = False) -> Tables:
    """The same records in another order, with another order of names, each perhaps twice."""
    random = np.random.default_rng(seed)
    names = random.permutation(len(tables.strings))
    code = np.concatenate([np.argsort(names), [-1]])
    result = Tables(strings=[tables.strings[i] for i in names], vector_values=tables.vector_values)
    for name, schema in SCHEMA.items():
        rows = np.arange(tables.count(name))
        rows = random.permutation(np.concatenate([rows, rows]) if twice else rows)
        columns = tables.select(name, rows)
        for column, kind in schema.items():
            if kind == "s":
                columns[column] = code[columns[column]].astype("<i4")
        setattr(result, name, columns)
    return result


def before_step(tables: Tables, rank: int, step: int) -> Tables:
    """Without what a rank wrote from a step on: it died there."""
    result = Tables(strings=tables.strings, vector_values=tables.vector_values)
    for name in SCHEMA:
        table = tables.table(name)
        late = (table["rank"] == rank) & (table["step"] >= step) & (table["step"] != NULL)
        setattr(result, name, tables.select(name, ~late))
    return result
