"""The rows of one view of a run, batch by batch, sorted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from lens.store.engine import Store
from lens.store.registry import Registry
from lens.store.runs import Run
from lens.store.sql.views import with_clause


def _of_steps(metric: str, value: str) -> str:
    return (
        f"(SELECT run, '{metric}' AS metric, rank, CAST(NULL, 'Nullable(String)') AS host, CAST(NULL, "
        "'Nullable(String)') AS device, CAST(map(), 'Map(String, String)') AS labels, step, t0_ns AS t_ns, "
        f"{value} AS value FROM steps WHERE {value} IS NOT NULL)"
    )


ORDER = {
    "samples": "metric, host, device, rank, step, t_ns",
    "steps": "step, rank, t0_ns",
    "spans": "t0_ns, rank, kind, name",
    "collectives": "t0_ns, rank, group, seq",
    "vectors": "metric, layer, rank, step, t_ns",
    "events": "t_ns, rank, kind",
}
"""What can be exported, and how its rows are sorted."""
BATCH_ROWS = 100_000
ROWS_AT_ONCE = 1_000_000
"""Metrics are read together up to so many rows, about: a query each would take longer than the rows of a small run."""
DERIVED = {
    "step.duration": (_of_steps("step.duration", "duration_s"), "steps"),
    "step.tokens": (_of_steps("step.tokens", "toFloat64(tokens)"), "steps"),
    "phase.duration": (
        "(SELECT run, 'phase.duration' AS metric, rank, CAST(NULL, 'Nullable(String)') AS host, "
        "CAST(NULL, 'Nullable(String)') AS device, map('phase', toString(name)) AS labels, step, min(t0_ns) AS t_ns, "
        "sum(duration_s) AS value FROM spans WHERE kind = 'phase' AND t1_ns IS NOT NULL GROUP BY run, rank, step, name)",
        "spans",
    ),
}
"""Metrics that no sample holds: they are asked for as if it did, and come from the view named second."""
_COUNTED = {"samples": ("rollup", "sum(count + odd)"), "vectors": ("vectors", "count()")}
"""Where it can be seen how many rows a series has."""
_TIME = {"samples": "t_ns", "vectors": "t_ns", "events": "t_ns"}
BY_METRIC = ("samples", "vectors")
_NESTED = {"samples": ("labels",), "vectors": ("labels", "values")}
# A sort larger than this goes to the disk, so that an export of any size fits beside ingest.
_SETTINGS = (
    " SETTINGS max_bytes_before_external_sort = 268435456, max_memory_usage = 2147483648, max_threads = 2,"
    " output_format_json_quote_denormals = 1"
)


@dataclass(frozen=True)
class Steps:
    """The steps asked for, the last included; None is open. Records without a step count by their time."""

    first: int | None = None
    last: int | None = None

    @property
    def is_all(self) -> bool:
        """Whether nothing is left out."""
        return self.first is None and self.last is None


class Rows:
    """Reads the views of one run."""

    def __init__(self, store: Store, registry: Registry, run: Run, steps: Steps, metric: str | None = None) -> None:
        self._store, self._registry, self._run, self._steps = store, registry, run, steps
        self._metric = metric
        self._between = _condition("step", steps.first, steps.last)
        self._times = (None, None) if steps.is_all else self._bounds()

    def _bounds(self) -> tuple[int | None, int | None]:
        """When the steps asked for began and ended."""
        where = f"run = {self._run.number} AND {self._between}"
        row = self._store.query(
            f"SELECT min(t0_ns) AS t0, max(t1_ns) AS t1 FROM lens.steps WHERE {where}"
        ).to_pylist()[0]
        low, high = self._steps.first is not None, self._steps.last is not None
        return row["t0"] if low else None, row["t1"] if high else None

    def batches(
        self, table: str, flat: bool = False, only: frozenset[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """The rows of a view of `ORDER`, at least one batch (it may be empty).

        `flat` gives maps and lists as JSON; `only` are the metrics wanted of samples or vectors.
        """
        empty = True
        for metrics in self._together(table, only) if table in BY_METRIC else (None,):
            for batch in self._store.stream(self._sql(table, metrics, flat) + _SETTINGS, BATCH_ROWS):
                empty = False
                yield batch
        if empty:
            found = self._store.query(f"{self._sql(table, None, flat)} LIMIT 0")
            yield pa.RecordBatch.from_pylist([], found.schema)

    def _together(self, table: str, only: frozenset[str] | None) -> Iterator[list[str]]:
        """The metrics wanted, in their order, as many at a time as are worth a query."""
        if self._metric is not None:
            yield [self._metric]
            return
        rows = self._rows_of_metrics(table)
        some: list[str] = []
        for metric in sorted(rows if only is None else rows.keys() & only):
            if some and sum(rows[each] for each in some) + rows[metric] > ROWS_AT_ONCE:
                yield some
                some = []
            some.append(metric)
        if some:
            yield some

    def _rows_of_metrics(self, table: str) -> dict[str, int]:
        source, count = _COUNTED[table]
        known = {series.mid: series.metric for series in self._registry.series(self._run.number)}
        found = self._store.query(
            f"SELECT mid, {count} AS rows FROM lens.{source} WHERE run = {self._run.number} GROUP BY mid"
        )
        rows: dict[str, int] = {}
        for mid, number in zip(found.column("mid").to_pylist(), found.column("rows").to_pylist(), strict=True):
            if mid in known:
                rows[known[mid]] = rows.get(known[mid], 0) + number
        return rows

    def _sql(self, table: str, metrics: list[str] | None, flat: bool) -> str:
        chosen = {} if metrics is None else {table: metrics}
        derived = DERIVED.get(metrics[0]) if metrics and table == "samples" else None
        source, view = derived or ("", table)
        views = with_clause([view], {self._run.number: self._run.id}, chosen)
        nested = [f"toJSONString({name}) AS {name}" for name in _NESTED.get(table, ()) if flat]
        columns = f"* REPLACE ({', '.join(nested)})" if nested else "*"
        where = self._between
        if table in _TIME:
            during = _condition(_TIME[table], *self._times)
            where = f"if(step IS NULL, {during}, {where})"
        return f"{views}SELECT {columns} FROM {source or table} WHERE {where} ORDER BY {ORDER[table]}"


def _condition(column: str, low: int | None, high: int | None) -> str:
    parts = [f"{column} >= {low}"] if low is not None else []
    parts += [f"{column} <= {high}"] if high is not None else []
    return " AND ".join(parts) or "1"
