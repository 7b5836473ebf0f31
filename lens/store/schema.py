"""The database: its tables, and how they came to be.

Migrations only go forward: each is a list of statements, run in order when a store is opened, its number noted in
`migrations` of the store itself. A process may be killed between any two statements and then begins that migration
again: each statement must do no harm when it is run twice.

Nulls are as in `lens.tables` (int64 `NULL`, rank, layer and peer -1, text ''): no Nullable columns, and a filter
such as ``step >= 0`` leaves the unknown out by itself.

`samples` are sorted by series (run, mid, rank): one series stays milliseconds away however many there are. mid is a
64-bit hash of metric, host, device and labels, so nobody needs to hand out numbers.
"""

from __future__ import annotations

STEP_BUCKET = 100
"""Steps in one bucket of the roll-up."""
FINE_BUCKET = 10
"""Steps in one bucket of the fine roll-up."""
FINE_EACH = STEP_BUCKET // FINE_BUCKET
"""Buckets of the fine roll-up in one of the roll-up."""
TIME_BUCKET_NS = 10_000_000_000
"""Time in one bucket of the roll-up, for samples without a step."""
STEP_AXIS, TIME_AXIS = 0, 1

# The log keeps a group until its parts are on disk, so the database has to say truthfully when they are.
_DURABLE = "fsync_after_insert = 1, fsync_part_directory = 1"

_ID = "CODEC(Delta, ZSTD(1))"
_TIME = "CODEC(DoubleDelta, ZSTD(1))"
_VALUE = "CODEC(Gorilla, ZSTD(1))"
_TEXT = "LowCardinality(String)"
_LONG = "String CODEC(ZSTD(1))"


def _table(name: str, columns: str, order: str, engine: str = "MergeTree", extra: str = "") -> str:
    return (
        f"CREATE TABLE IF NOT EXISTS lens.{name} ({columns}{extra}) "
        f"ENGINE = {engine} ORDER BY ({order}) SETTINGS {_DURABLE}"
    )


_FIRST = [
    _table("runs", f"run UInt32, id String, json {_LONG}, version UInt64", "run", "ReplacingMergeTree(version)"),
    _table(
        "ranks",
        f"run UInt32, rank Int32, host {_TEXT}, device {_TEXT}, vendor {_TEXT}, model {_TEXT}, local_rank Int32, "
        "version UInt64",
        "run, rank",
        "ReplacingMergeTree(version)",
    ),
    _table(
        "progress",
        "run UInt32, rank Int32, last_step Int64, first_t_ns Int64, last_t_ns Int64, exit_t_ns Int64, "
        "version UInt64",
        "run, rank",
        "ReplacingMergeTree(version)",
    ),
    _table(
        "batches",
        f"run UInt32, source {_TEXT}, sequence Int64 {_ID}, position UInt64 {_ID}, received_ns Int64 {_TIME}, "
        "accepted UInt32, rejected UInt32, lost UInt64",
        "run, source, sequence",
    ),
    _table(
        "series",
        f"run UInt32, mid UInt64, metric {_TEXT}, host {_TEXT}, device {_TEXT}, labels {_LONG}",
        "run, mid",
        "ReplacingMergeTree",
    ),
    _table(
        "samples",
        f"run UInt32, mid UInt64, rank Int32 {_ID}, step Int64 {_ID}, t_ns Int64 {_TIME}, value Float64 {_VALUE}",
        "run, mid, rank, step, t_ns",
    ),
    _table(
        "rollup",
        f"run UInt32, mid UInt64, rank Int32 {_ID}, axis UInt8, bucket Int64 {_ID}, "
        "min SimpleAggregateFunction(min, Float64), max SimpleAggregateFunction(max, Float64), "
        "sum SimpleAggregateFunction(sum, Float64), count SimpleAggregateFunction(sum, UInt64), "
        "odd SimpleAggregateFunction(sum, UInt64)",
        "run, mid, rank, axis, bucket",
        "AggregatingMergeTree",
    ),
    _table(
        "latest",
        "run UInt32, mid UInt64, rank Int32, t_ns Int64, step Int64, value Float64",
        "run, mid, rank",
        "ReplacingMergeTree(t_ns)",
    ),
    _table(
        "steps",
        f"run UInt32, rank Int32 {_ID}, step Int64 {_ID}, t0_ns Int64 {_TIME}, t1_ns Int64 {_TIME}, "
        f"tokens Int64 {_ID}, micro_batches Int64 {_ID}, seq_sq Int64 {_ID}, recompiles Int64 {_ID}, "
        f"gc_ns Int64 {_ID}, log_ns Int64 {_ID}, attrs {_LONG}",
        "run, step, rank",
    ),
    _table(
        "spans",
        f"run UInt32, t0_ns Int64 {_TIME}, t1_ns Int64 {_TIME}, kind {_TEXT}, name {_TEXT}, rank Int32 {_ID}, "
        f"step Int64 {_ID}, attrs {_LONG}",
        "run, kind, step, rank, t0_ns",
    ),
    _table(
        "collectives",
        f"run UInt32, t0_ns Int64 {_TIME}, t1_ns Int64 {_TIME}, t_wait_ns Int64 {_TIME}, t_done_ns Int64 {_TIME}, "
        f"op {_TEXT}, group {_TEXT}, seq Int64 {_ID}, bytes Int64 {_ID}, rank Int32 {_ID}, step Int64 {_ID}, "
        f"layer Int32 {_ID}, phase {_TEXT}, micro_batch Int32 {_ID}, peer Int32 {_ID}, is_async Int8, "
        f"dtype {_TEXT}, attrs {_LONG}",
        "run, group, seq, rank",
        # seq grows with step within a group: the index makes "every collective of one step" a short read.
        extra=", INDEX by_step step TYPE minmax GRANULARITY 1",
    ),
    _table(
        "vectors",
        f"run UInt32, mid UInt64, layer Int32 {_ID}, rank Int32 {_ID}, step Int64 {_ID}, t_ns Int64 {_TIME}, "
        f"values Array(Float64) {_VALUE}",
        "run, mid, layer, rank, step, t_ns",
    ),
    _table(
        "events",
        f"run UInt32, t_ns Int64 {_TIME}, kind {_TEXT}, severity Int8, text {_LONG}, rank Int32 {_ID}, "
        f"host {_TEXT}, device {_TEXT}, step Int64 {_ID}, attrs {_LONG}",
        "run, kind, t_ns",
    ),
]

_UPKEEP = [
    # Run 0 stands for every run without a row of its own; keep_s is one of `retention`'s words where it is negative.
    _table("retention", "run UInt32, keep_s Int64, version UInt64", "run", "ReplacingMergeTree(version)"),
    # Runs that are gone. Kept for good: their numbers are never given again, and a log taken again leaves them out.
    _table("deleted", "run UInt32, id String, deleted_ns Int64", "run"),
]

# Steps and ranks that go up by one are constant differences. At its first level ZSTD makes 0.39 bytes a row of them and
# takes seven times as long to read them as at its third, where they take 0.01.
_COUNTED_UP = "CODEC(Delta, ZSTD(3))"
# Of eleven kinds of values (losses, decimals, percents, bytes, counters, seconds) 2.8 bytes each on average; Gorilla makes
# 3.1 of them, and 6.5 of decimals.
_DIFFERENCE = "CODEC(Delta, ZSTD(1))"
_COUNTERS = {
    "samples": {"rank": "Int32", "step": "Int64"},
    "rollup": {"rank": "Int32", "bucket": "Int64"},
    "steps": {"rank": "Int32", "step": "Int64"},
    "spans": {"rank": "Int32", "step": "Int64"},
    "collectives": {"rank": "Int32", "step": "Int64", "seq": "Int64"},
    "vectors": {"rank": "Int32", "step": "Int64"},
}

_FINE = [
    # Infinite where nothing was a finite number.
    _table(
        "rollup_fine",
        f"run UInt32, mid UInt64, rank Int32 {_COUNTED_UP}, bucket Int64 {_COUNTED_UP}, "
        f"min SimpleAggregateFunction(min, Float32) {_DIFFERENCE}, "
        f"max SimpleAggregateFunction(max, Float32) {_DIFFERENCE}",
        "run, mid, rank, bucket",
        "AggregatingMergeTree",
    ),
    # The time of a step of a rank, once for all its samples: see `moments`.
    _table(
        "moments",
        f"run UInt32, rank Int32 {_COUNTED_UP}, step Int64 {_COUNTED_UP}, t_ns Int64 {_DIFFERENCE}",
        "run, rank, step",
    ),
    # One row: runs up to this number began before there were moments and a fine roll-up, and do without them.
    _table("early_runs", "run UInt32", "run"),
    "INSERT INTO lens.early_runs SELECT max(run) FROM lens.runs HAVING (SELECT count() FROM lens.early_runs) = 0",
    *(
        f"ALTER TABLE lens.{table} "
        + ", ".join(f"MODIFY COLUMN {name} {kind} {_COUNTED_UP}" for name, kind in columns.items())
        for table, columns in _COUNTERS.items()
    ),
    f"ALTER TABLE lens.samples MODIFY COLUMN value Float64 {_DIFFERENCE}",
    "ALTER TABLE lens.rollup "
    + ", ".join(
        f"MODIFY COLUMN {name} SimpleAggregateFunction({name}, Float64) {_DIFFERENCE}"
        for name in ("min", "max", "sum")
    ),
]

MIGRATIONS: list[list[str]] = [_FIRST, _UPKEEP, _FINE]
"""Migration n (from 1) is MIGRATIONS[n - 1]. A released one never changes; a new one is added at the end."""


TARGETS: dict[str, str] = {
    "runs": "run, id, json, version",
    "ranks": "run, rank, host, device, vendor, model, local_rank, version",
    "series": "run, mid, metric, host, device, labels",
    "moments": "run, rank, step, t_ns",
    "samples": "run, mid, rank, step, t_ns, value",
    "rollup": "run, mid, rank, axis, bucket, min, max, sum, count, odd",
    "rollup_fine": "run, mid, rank, bucket, min, max",
    "latest": "run, mid, rank, t_ns, step, value",
    "steps": ("run, rank, step, t0_ns, t1_ns, tokens, micro_batches, seq_sq, recompiles, gc_ns, log_ns, attrs"),
    "spans": "run, t0_ns, t1_ns, kind, name, rank, step, attrs",
    "collectives": (
        "run, t0_ns, t1_ns, t_wait_ns, t_done_ns, op, group, seq, bytes, rank, step, layer, phase, micro_batch, "
        "peer, is_async, dtype, attrs"
    ),
    "vectors": "run, mid, layer, rank, step, t_ns, values",
    "events": "run, t_ns, kind, severity, text, rank, host, device, step, attrs",
    "progress": "run, rank, last_step, first_t_ns, last_t_ns, exit_t_ns, version",
    "batches": "run, source, sequence, position, received_ns, accepted, rejected, lost",
}
"""Every table that a group of records fills, and its columns.

In the order in which they are filled: runs first, since the others refer to them, and moments before samples; batches
last, so that a batch found there is in every table. Roll-ups and latest values are worked out beside the samples
(`aggregates`) and not by materialised views: each insert then is one part in one table, which after a crash can be asked
whether it is there (see `applier`).
"""
OF_SAMPLES = ("samples", "moments", "rollup", "rollup_fine", "latest")
"""What samples take room in."""
