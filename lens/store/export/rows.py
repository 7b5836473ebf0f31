"""The rows of one view of a run, batch by batch, sorted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from lens.slots import NULL
from lens.store.engine import Store
from lens.store.export.samples import encoded, nothing, plain, sample_batches
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
    "samples": "metric, host, device, labels, rank, step, t_ns",
    "steps": "step, rank, t0_ns",
    "spans": "t0_ns, rank, kind, name",
    "collectives": "t0_ns, rank, group, seq",
    "vectors": "metric, layer, rank, step, t_ns",
    "events": "t_ns, rank, kind",
}
"""What can be exported, and how its rows are sorted. Samples are read and named in `samples`."""
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
_NESTED = {"vectors": ("labels", "values")}
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

        `flat` gives dictionaries as text, maps and lists as JSON; `only` are the metrics wanted of samples or vectors.
        """
        batches = self._samples(only) if table == "samples" else self._others(table, flat, only)
        empty = True
        for batch in batches:
            empty = False
            yield plain(batch) if flat and table == "samples" else batch
        if not empty:
            return
        if table == "samples":
            yield plain(nothing()) if flat else nothing()
        else:
            yield pa.RecordBatch.from_pylist(
                [], self._store.query(f"{self._sql(table, None, flat)} LIMIT 0").schema
            )

    def _samples(self, only: frozenset[str] | None) -> Iterator[pa.RecordBatch]:
        if self._metric in DERIVED:
            source, view = DERIVED[self._metric]
            views = with_clause([view], {self._run.number: self._run.id}, {})
            sql = f"{views}SELECT * FROM {source} WHERE {self._where('samples')} ORDER BY {ORDER['samples']}{_SETTINGS}"
            yield from map(encoded, self._store.stream(sql, BATCH_ROWS))
            return
        known = self._registry.series(self._run.number, self._metric)
        chosen = [each for each in known if only is None or each.metric in only]
        where = self._where("samples", f"step = {NULL}")
        yield from sample_batches(
            self._store, self._run, chosen, where, lambda: self._rows_of_series("samples"), ROWS_AT_ONCE
        )

    def _others(self, table: str, flat: bool, only: frozenset[str] | None) -> Iterator[pa.RecordBatch]:
        for metrics in self._together(table, only) if table in BY_METRIC else (None,):
            yield from self._store.stream(self._sql(table, metrics, flat) + _SETTINGS, BATCH_ROWS)

    def _together(self, table: str, only: frozenset[str] | None) -> Iterator[list[str]]:
        """The metrics wanted, in their order, as many at a time as are worth a query."""
        if self._metric is not None:
            yield [self._metric]
            return
        rows: Counter[str] = Counter()
        known = {series.mid: series.metric for series in self._registry.series(self._run.number)}
        for mid, number in self._rows_of_series(table).items():
            if mid in known:
                rows[known[mid]] += number
        some: list[str] = []
        for metric in sorted(rows if only is None else rows.keys() & only):
            if some and sum(rows[each] for each in some) + rows[metric] > ROWS_AT_ONCE:
                yield some
                some = []
            some.append(metric)
        if some:
            yield some

    def _rows_of_series(self, table: str) -> dict[int, int]:
        source, count = _COUNTED[table]
        found = self._store.query(
            f"SELECT mid, {count} AS rows FROM lens.{source} WHERE run = {self._run.number} GROUP BY mid"
        )
        return dict(zip(found.column("mid").to_pylist(), found.column("rows").to_pylist(), strict=True))

    def _where(self, table: str, no_step: str = "step IS NULL") -> str:
        """The condition of the steps asked for; `no_step` says that a row has none."""
        if table not in _TIME or self._steps.is_all:
            return self._between
        return f"if({no_step}, {_condition(_TIME[table], *self._times)}, {self._between})"

    def _sql(self, table: str, metrics: list[str] | None, flat: bool) -> str:
        chosen = {} if metrics is None else {table: metrics}
        views = with_clause([table], {self._run.number: self._run.id}, chosen)
        nested = [f"toJSONString({name}) AS {name}" for name in _NESTED.get(table, ()) if flat]
        columns = f"* REPLACE ({', '.join(nested)})" if nested else "*"
        return f"{views}SELECT {columns} FROM {table} WHERE {self._where(table)} ORDER BY {ORDER[table]}"


def _condition(column: str, low: int | None, high: int | None) -> str:
    parts = [f"{column} >= {low}"] if low is not None else []
    parts += [f"{column} <= {high}"] if high is not None else []
    return " AND ".join(parts) or "1"
