"""The views that a user's SELECT may read: the records under the names of their fields, absent values as NULL.

They exist only in front of a query, as its WITH clause: which runs (and series) they hold is the server's choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lens.slots import NULL, SEVERITIES
from lens.store.engine import quote
from lens.store.moments import timed
from lens.store.rows import Series
from lens.store.sql.functions import words_of


@dataclass(frozen=True)
class View:
    """What a view is made from; {runs} is the condition on runs, {id} the run's id, {series} the chosen series."""

    sql: str
    about: str
    """One sentence for people."""
    timeless: str | None = None
    """The same without its column t_ns, where that is much cheaper."""


_SERIES = (
    "SELECT run AS number, mid, metric, nullIf(toString(host), '') AS host, nullIf(toString(device), '') AS device, "
    "CAST(JSONExtractKeysAndValues(labels, 'String'), 'Map(String, String)') AS labels "
    "FROM lens.series FINAL WHERE {runs}{metrics}"
)
_CHOSEN = "(run, mid) IN (SELECT run, mid FROM lens.series WHERE {runs}{metrics})"


def _int(column: str) -> str:
    return f"nullIf({column}, {NULL}) AS {column}"


def _small(column: str) -> str:
    return f"nullIf({column}, -1) AS {column}"


def _text(column: str) -> str:
    return f"nullIf(toString({column}), '') AS {column}"


def _duration() -> str:
    return f"if(t1_ns = {NULL}, NULL, (t1_ns - t0_ns) / 1e9) AS duration_s"


def _of_series(table: str, columns: str) -> str:
    """Rows of a table with what their series is called."""
    return (
        f"SELECT {{id}} AS run, metric, rank, host, device, labels, {columns} FROM "
        f"(SELECT run AS number, * EXCEPT (run, rank), nullIf(rank, -1) AS rank FROM lens.{table} "
        f"WHERE {{runs}} AND {_CHOSEN}) AS rows INNER JOIN ({_SERIES}) AS series USING (number, mid)"
    )


def _samples(columns: str, rows: str) -> str:
    """The view of samples, from these rows of run, mid, rank, step and others."""
    return (
        f"SELECT {{id}} AS run, metric, rank, host, device, labels, {_int('step')}, {columns} FROM "
        f"(SELECT run AS number, * EXCEPT (run, rank), nullIf(rank, -1) AS rank FROM ({rows})) AS rows "
        f"INNER JOIN ({_SERIES}) AS series USING (number, mid)"
    )


def _spans(table: str, keys: str, columns: str) -> str:
    """Rows of spans without those that were sent open and closed later."""
    return (
        f"SELECT {{id}} AS run, {columns} FROM (SELECT run AS number, * EXCEPT run FROM lens.{table} "
        f"WHERE {{runs}} AND (t1_ns != {NULL} OR (run, {keys}) NOT IN "
        f"(SELECT run, {keys} FROM lens.{table} WHERE {{runs}} AND t1_ns != {NULL} AND t0_ns IN "
        f"(SELECT t0_ns FROM lens.{table} WHERE {{runs}} AND t1_ns = {NULL}))))"
    )


def _described(key: str) -> str:
    return f"JSONExtractRaw(json, 'described', '{key}') AS {key}"


VIEWS: dict[str, View] = {
    "runs": View(
        "SELECT id AS run, JSONExtract(json, 'described', 'name', 'Nullable(String)') AS name, "
        "JSONExtract(json, 'described', 'world_size', 'Nullable(UInt32)') AS world_size, "
        "JSONExtractInt(json, 'created_ns') AS created_ns, "
        "JSONExtract(json, 'described', 'tags', 'Array(String)') AS tags, "
        f"{_described('config')}, {_described('groups')}, {_described('experts')} "
        "FROM (SELECT * EXCEPT run FROM lens.runs FINAL WHERE {runs})",
        "One row a run; config, groups and experts are JSON text.",
    ),
    "ranks": View(
        f"SELECT {{id}} AS run, rank, {_text('host')}, {_text('device')}, {_text('vendor')}, {_text('model')}, "
        f"{_small('local_rank')}, {_int('last_step')}, {_int('first_t_ns')}, {_int('last_t_ns')} "
        "FROM (SELECT run AS number, * EXCEPT (run, version) FROM lens.ranks FINAL WHERE {runs}) AS known FULL JOIN "
        "(SELECT run AS number, rank, last_step, first_t_ns, last_t_ns FROM lens.progress FINAL "
        "WHERE {runs} AND rank >= 0) AS progress USING (number, rank)",
        "One row a rank: where it ran, and how far it came.",
    ),
    "series": View(
        f"SELECT {{id}} AS run, * EXCEPT (number, mid) FROM ({_SERIES})",
        "One row a series: a metric of a host or device with its labels.",
    ),
    "samples": View(
        _samples("t_ns, value", timed(f"{{runs}} AND {_CHOSEN}", "{runs}")),
        "One row a sample; say which metric in WHERE: then only its series are read.",
        _samples("value", f"SELECT run, mid, rank, step, value FROM lens.samples WHERE {{runs}} AND {_CHOSEN}"),
    ),
    "latest": View(
        _of_series("latest FINAL", f"{_int('step')}, t_ns, value"),
        "The newest sample of every series and rank.",
    ),
    "steps": View(
        _spans(
            "steps",
            "rank, step, t0_ns",
            f"{_small('rank')}, step, t0_ns, {_int('t1_ns')}, {_duration()}, {_int('tokens')}, "
            f"{_int('micro_batches')}, {_int('seq_sq')}, {_int('recompiles')}, {_int('gc_ns')}, {_int('log_ns')}, "
            f"{_text('attrs')}",
        ),
        "One row a step and rank.",
    ),
    "spans": View(
        _spans(
            "spans",
            "rank, kind, name, t0_ns",
            f"kind, name, {_small('rank')}, {_int('step')}, t0_ns, {_int('t1_ns')}, {_duration()}, {_text('attrs')}",
        ),
        "Phases, checkpoints, requests: every span that is no step and no collective.",
    ),
    "collectives": View(
        _spans(
            "collectives",
            "rank, op, t0_ns",
            f"op, group, {_int('seq')}, {_int('bytes')}, {_small('rank')}, {_int('step')}, t0_ns, {_int('t1_ns')}, "
            f"{_int('t_wait_ns')}, {_int('t_done_ns')}, {_duration()}, {_small('layer')}, {_text('phase')}, "
            f"{_small('micro_batch')}, {_small('peer')}, is_async = 1 AS is_async, {_text('dtype')}, {_text('attrs')}",
        ),
        "One row a collective and rank; (run, group, seq) names the same collective on every rank.",
    ),
    "vectors": View(
        _of_series("vectors", f"nullIf(layer, -1) AS layer, {_int('step')}, t_ns, values"),
        "One row a vector; ARRAY JOIN values opens it.",
    ),
    "events": View(
        "SELECT {id} AS run, t_ns, kind, "
        f"[{', '.join(map(quote, SEVERITIES))}][severity + 1] AS severity, {_text('text')}, {_small('rank')}, "
        f"{_text('host')}, {_text('device')}, {_int('step')}, {_text('attrs')} "
        "FROM (SELECT run AS number, * EXCEPT run FROM lens.events WHERE {runs})",
        "One row an event; attrs is JSON text.",
    ),
}


def with_clause(
    names: Iterable[str],
    runs: Mapping[int, str],
    metrics: Mapping[str, Iterable[str] | None],
    timeless: bool = False,
    series: Sequence[Series] | None = None,
) -> str:
    """The WITH elements for these views: `runs` by number are all they hold, and of a view that `metrics` names,
    these metrics alone. `timeless` says that nobody asks for t_ns. `series` are all of these runs, where they are few:
    the names then stand in the view of samples, and no table of them is joined to every row."""
    numbers = ", ".join(map(str, runs)) or "0"
    ids = ", ".join(map(quote, runs.values())) or "''"
    name_of_run = f"transform(number, [{numbers}], [{ids}], '')" if len(runs) != 1 else ids
    parts = []
    for name in sorted(set(names) & set(VIEWS)):
        wanted = metrics.get(name)
        chosen = "" if wanted is None else f" AND metric IN ({', '.join(map(quote, sorted(wanted))) or 'NULL'})"
        if name == "samples" and series:
            found = [each for each in series if wanted is None or each.metric in wanted]
            if found and not any(_PLAN in text for each in found for text in _texts(each)):
                parts.append(f"samples AS ({_named(found, f'run IN ({numbers})', name_of_run, timeless)})")
                continue
        view = VIEWS[name]
        sql = (view.timeless or view.sql if timeless else view.sql).format(
            runs=f"run IN ({numbers})", id=name_of_run, metrics=chosen
        )
        parts.append(f"{name} AS ({sql})")
    return f"WITH {', '.join(parts)} " if parts else ""


_PLAN = "_name:"
"""What the engine's plan says before a name; a text with it in a view would be taken for one."""


def _texts(series: Series) -> tuple[str, ...]:
    return series.metric, series.host or "", series.device or "", series.labels or ""


def _named(series: Sequence[Series], runs: str, run: str, timeless: bool) -> str:
    """The view of samples of some series, their names looked up by their place in lists."""
    mids = ", ".join(str(each.mid) for each in series)
    where = f"{runs} AND mid IN ({mids})"
    rows = f"SELECT run, mid, rank, step, value FROM lens.samples WHERE {where}" if timeless else timed(where, runs)
    columns = zip(*map(_texts, series), strict=True)
    metric, host, device, labels = (
        f"[{', '.join(map(quote, texts))}]::Array(LowCardinality(String))[place]" for texts in columns
    )
    place = f"transform(mid, [{mids}], [{', '.join(map(str, range(1, len(series) + 1)))}], 0) AS place"
    return (
        f"SELECT {run} AS run, {metric} AS metric, rank, nullIf(toString({host}), '') AS host, "
        f"nullIf(toString({device}), '') AS device, "
        f"CAST(JSONExtractKeysAndValues(toString({labels}), 'String'), 'Map(String, String)') AS labels, "
        f"{_int('step')}, {'' if timeless else 't_ns, '}value "
        f"FROM (SELECT run AS number, * EXCEPT (run, mid, rank), nullIf(rank, -1) AS rank, {place} FROM ({rows}))"
    )


COLUMNS = frozenset(
    words_of("""
attrs bytes config created_ns device dtype duration_s experts first_t_ns gc_ns group groups host is_async kind
labels last_step last_t_ns layer local_rank log_ns metric micro_batch micro_batches model name op peer phase
rank recompiles run seq seq_sq severity step t0_ns t1_ns t_done_ns t_ns t_wait_ns tags text tokens value values
vendor world_size
""")
)
"""Columns of all views together."""
OWN_FUNCTIONS = frozenset({"transform", "nullIf", "toString", "JSONExtract", "JSONExtractRaw", "JSONExtractString",
                           "JSONExtractInt", "JSONExtractKeysAndValues", "CAST", "in", "notIn", "arrayElement",
                           "firstNonDefault"})  # fmt: skip
"""What the views call themselves."""
OWN_TABLES = frozenset(
    {f"lens.{name}" for name in (*VIEWS, "progress", "moments")}
    | {"system.one"}  # system.one stands for no FROM at all
)
