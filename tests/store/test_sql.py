"""SQL of users: what it may read, and that nothing else can be read, written, or run for long."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lens.store.errors import BadQueryError, StoreFullError
from lens.store.folder import DataFolder
from lens.store.sql import guest as asking
from lens.store.sql.guest import Guest, SqlLimits
from lens.store.sql.views import COLUMNS, VIEWS

from .helpers import SECOND, START, sample, send, step_span

pytestmark = pytest.mark.xdist_group("sql")  # one folder for the module
SECRET = "the secret of this test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataFolder]:
    folder = DataFolder(tmp_path_factory.mktemp("sql") / "data")
    for run in ("a", "b"):
        folder.describe_run({"run": run, "world_size": 2, "ranks": [{"rank": 0, "host": "h0"}, {"rank": 1}]})
        phase = {"type": "span", "kind": "phase", "name": "forward", "t0_ns": START, "rank": 0, "step": 0}
        attrs = {"group": "dp/0", "seq": 1, "bytes": 4}
        records = [
            *(step_span(rank, step, 0.1 * (rank + 1)) for rank in (0, 1) for step in range(10)),
            *(sample("train.loss", 3 - step / 10, step, rank=0) for step in range(10)),
            *(sample("hw.power", 100.0, host="h0", labels={"hw.type": "gpu"}, t_ns=START + s) for s in range(5)),
            {**phase, "t1_ns": None},
            {**phase, "t1_ns": START + SECOND},
            {**phase, "kind": "collective", "name": "all_reduce", "t1_ns": START + 5, "attrs": attrs},
            {"type": "vector", "t_ns": START, "metric": "moe.expert.tokens", "values": [1, 2, 3], "layer": 1},
            {"type": "event", "t_ns": START, "kind": "gpu.xid", "severity": "error", "text": "boo", "rank": 0},
        ]
        send(folder, run, records)
    folder.applier.wait(folder.log.end, 120)
    yield folder
    folder.close()


@pytest.fixture(scope="module")
def guest(folder: DataFolder) -> Guest:
    """Its queries end, but not because a busy machine is slow."""
    return Guest(folder.store, folder.registry, SqlLimits(seconds=120))


@pytest.fixture
def hasty(folder: DataFolder) -> Guest:
    """A guest whose queries are over after three seconds."""
    return Guest(folder.store, folder.registry, SqlLimits(seconds=3))


def rows(guest: Guest, sql: str, run: str | None = None) -> list[tuple[object, ...]]:
    table = guest.ask(sql, run).table
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def test_views_show_the_records_with_absent_values_as_null(guest: Guest) -> None:
    assert rows(guest, "SELECT run, world_size FROM runs ORDER BY run") == [("a", 2), ("b", 2)]
    assert rows(guest, "SELECT rank, host, last_step FROM ranks ORDER BY rank", "a") == [(0, "h0", 9), (1, None, 9)]
    assert rows(guest, "SELECT metric, host FROM series WHERE metric LIKE 'hw%'", "a") == [("hw.power", "h0")]
    assert rows(guest, "SELECT rank, labels['hw.type'], step FROM samples WHERE metric = 'hw.power' LIMIT 1") == [
        (None, "gpu", None)
    ]
    assert rows(guest, "SELECT rank, max(duration_s) FROM steps GROUP BY rank ORDER BY rank", "b") == [
        (0, pytest.approx(0.1)),
        (1, pytest.approx(0.2)),
    ]
    assert rows(guest, "SELECT name, duration_s FROM spans", "a") == [("forward", 1.0)], "the open one was closed"
    assert rows(guest, "SELECT op, group, seq, bytes, layer FROM collectives", "a") == [
        ("all_reduce", "dp/0", 1, 4, None)
    ]
    assert rows(guest, "SELECT sum(v) FROM vectors ARRAY JOIN values AS v", "a") == [(6.0,)]
    assert rows(guest, "SELECT severity, text FROM events", "a") == [("error", "boo")]
    assert rows(guest, "SELECT value FROM latest WHERE metric = 'train.loss'", "a") == [(pytest.approx(2.1),)]


def test_a_run_filter_and_named_metrics_change_nothing_but_what_is_read(guest: Guest) -> None:
    everything = "SELECT run, metric, count(), sum(value) FROM samples GROUP BY ALL ORDER BY ALL"
    losses = [row for row in rows(guest, everything) if row[1] == "train.loss"]
    for where in ("metric = 'train.loss'", "s.metric = 'train.loss'", "metric IN ('train.loss', 'none')"):
        found = rows(guest, f"SELECT run, metric, count(), sum(value) FROM samples AS s WHERE {where} GROUP BY ALL")
        assert sorted(found) == losses
    shadowed = "SELECT count(), 'x' AS metric FROM samples WHERE metric = 'x'"
    assert rows(guest, shadowed) == [(30, "x")], "an alias is not the column"
    both = "SELECT count() FROM samples WHERE metric = 'hw.power' UNION ALL SELECT count() FROM samples"
    assert sorted(rows(guest, both)) == [(10,), (30,)]
    assert rows(guest, "SELECT count() FROM samples HAVING count() = 30") == [(30,)]
    assert rows(guest, "SELECT DISTINCT run FROM samples WHERE run = 'b'") == [("b",)]
    assert rows(guest, "SELECT DISTINCT run FROM samples", "b") == [("b",)]


def test_order_and_limit_are_kept_and_more_rows_are_told(guest: Guest) -> None:
    answer = guest.ask("SELECT step FROM steps WHERE rank = 0 ORDER BY step DESC", "a", limit=3)
    assert answer.table.column(0).to_pylist() == [9, 8, 7]
    assert answer.truncated
    assert not guest.ask("SELECT 1").truncated


@pytest.mark.parametrize(
    "sql",
    [
        "WITH slow AS (SELECT * FROM steps WHERE duration_s > 0.15) SELECT rank FROM slow WHERE step IN (SELECT 3)",
        "SELECT s.step, t.value FROM steps s JOIN samples t ON s.run = t.run AND s.step = t.step",
        "SELECT quantile(0.9)(duration_s), avgIf(duration_s, rank = 1), count(DISTINCT step) FROM steps",
        "SELECT value - lagInFrame(value) OVER (PARTITION BY run ORDER BY step) FROM samples",
        "SELECT CASE WHEN value > 2 THEN 'high' ELSE 'low' END AS c, count() FROM samples GROUP BY c WITH TOTALS",
        "SELECT arrayMap(x -> x / arraySum(values), values), step::Float64, -1, NULL, 'it''s' FROM vectors",
        "SELECT toStartOfInterval(fromUnixTimestamp64Nano(t_ns), INTERVAL 1 MINUTE) AS m FROM samples ORDER BY m",
        "(SELECT 1) UNION ALL (SELECT 2) /* and a remark */ -- at the end",
        "SELECT * EXCEPT attrs FROM steps LIMIT 1 BY rank",
    ],
)
def test_what_analysts_write_is_taken(guest: Guest, sql: str) -> None:
    guest.ask(sql)


def escapes(secret: Path, target: Path) -> list[str]:
    """Every way out that is known."""
    into = f"INTO OUTFILE '{target}' TRUNCATE FORMAT CSV"
    return [
        # writing
        f"SELECT 1 {into}",
        f"(SELECT 1) {into}",
        f"SELECT 1 UNION ALL SELECT 2 {into}",
        f"SELECT 1) {into} --",
        f"SELECT 1 FROM runs LIMIT 1 BY run {into}",
        f"INSERT INTO FUNCTION file('{target}') SELECT 1",
        "INSERT INTO lens.runs FORMAT CSV\n1,2,3,4",
        f"BACKUP DATABASE lens TO File('{target}')",
        f"CREATE TABLE lens_guest.t ENGINE = File(CSV, '{target}') AS SELECT 1",
        "SELECT 1; DROP TABLE lens.samples",
        "SELECT 1; SELECT 2",
        "DROP TABLE lens.samples",
        "ALTER TABLE lens.samples DELETE WHERE 1",
        "TRUNCATE TABLE lens.samples",
        "OPTIMIZE TABLE lens.samples",
        "CREATE FUNCTION f AS x -> x",
        "SELECT 1 PARALLEL WITH DROP TABLE lens.samples",
        # reading files and other machines
        f"SELECT file('{secret}')",
        f"SELECT arrayMap(file, ['{secret}'])",
        f"SELECT arrayMap(FILE, ['{secret}'])",
        f"SELECT arrayMap(x -> file(x), ['{secret}'])",
        f"WITH file AS g SELECT arrayMap(g, ['{secret}'])",
        f"WITH (x -> file(x)) AS g SELECT arrayMap(g, ['{secret}'])",
        f"SELECT * APPLY file FROM (SELECT '{secret}')",
        f"SELECT * APPLY(x -> file(x)) FROM (SELECT '{secret}')",
        f"SELECT * FROM file('{secret}', 'LineAsString')",
        f"SELECT * FROM `{secret}`",
        f"SELECT * FROM '{secret}'",
        f"SELECT 1 WHERE 'x' IN `{secret}`",
        f"SELECT 1 WHERE 'x' IN file('{secret}', 'LineAsString')",
        f"SELECT (SELECT * FROM file('{secret}', 'LineAsString'))",
        f"WITH x AS (SELECT * FROM file('{secret}', 'LineAsString')) SELECT * FROM x",
        f"SELECT * FROM executable('cat {secret}', 'LineAsString', 'x String')",
        f"SELECT * FROM sqlite('{secret}', 't')",
        "SELECT * FROM runs AS `x\n   Function file`",
        "SELECT * FROM url('http://127.0.0.1:1/', 'LineAsString')",
        "SELECT * FROM s3('http://127.0.0.1:1/b/k', 'CSV')",
        "SELECT * FROM remote('127.0.0.1:1', lens.runs)",
        "SELECT * FROM mysql('127.0.0.1:1', 'd', 't', 'u', 'p')",
        "SELECT * FROM Python(rows)",
        # what is not a view
        "SELECT * FROM system.tables",
        "SELECT * FROM `system`.`tables`",
        "SELECT * FROM lens.samples",
        "SELECT * FROM lens.batches",
        "SELECT * FROM default.samples",
        "SELECT * FROM information_schema.tables",
        "SELECT 1 WHERE 1 IN system.one",
        "SELECT 1 WHERE 1 IN (system.one)",
        "SELECT count() FROM runs, system.parts",
        "SELECT * FROM runs JOIN system.parts ON 1 = 1",
        "SELECT * FROM merge('lens', '.*')",
        "SELECT * FROM view(SELECT 1)",
        "SELECT * FROM viewExplain('EXPLAIN', '', (SELECT 1))",
        "SELECT * FROM (EXPLAIN SELECT 1)",
        "SELECT * FROM numbers(10)",
        "SELECT * FROM runs WHERE run = 'x\\') UNION ALL SELECT * FROM system.one --' OR hostName() = 'x'",
        "WITH RECURSIVE t AS (SELECT * FROM system.one UNION ALL SELECT * FROM t) SELECT * FROM t",
        "EXPLAIN SELECT 1",
        "DESCRIBE TABLE lens.samples",
        "SHOW TABLES FROM lens",
        "EXISTS TABLE lens.samples",
        # the server itself
        "SELECT 1 SETTINGS readonly = 0",
        "SELECT (SELECT 1 SETTINGS max_execution_time = 0)",
        "SELECT * FROM (SELECT 1 SETTINGS max_memory_usage = 0)",
        "SELECT 1 FORMAT CSV",
        "SELECT {name:String}",
        "SET readonly = 0",
        "USE system",
        "KILL QUERY WHERE 1",
        "SYSTEM FLUSH LOGS",
        "GRANT ALL ON *.* TO default",
        "SELECT dictGet('d', 'a', 1)",
        "SELECT joinGet('lens.runs', 'id', 1)",
        "SELECT hostName()",
        "SELECT getSetting('readonly')",
        "SELECT @@version",
        "SELECT currentDatabase()",
        "SELECT sleep(3)",
        "SELECT hasColumnInTable('system', 'one', 'dummy')",
        "SELECT catboostEvaluate('/x', 1)",
        "SELECT repeat('a', 1000000)",
        "SELECT range(100000000)",
        "SELECT CAST(unhex('00') AS AggregateFunction(sum, UInt64))",
        "SELECT CAST('00' AS AggregateFunction(sum, UInt64))",
        "SELECT sumMerge(x) FROM (SELECT sumState(1) AS x)",
        "SELECT __scalarSubqueryResult(1)",
        "SELECT 1 FROM runs SAMPLE 0.1",
        "",
        "\0SELECT 1",
        "SELECT " + "(" * 5000 + "1" + ")" * 5000,
        "SELECT '" + "x" * 70_000 + "'",
    ]


def test_every_known_escape_is_refused_and_nothing_is_read_or_written(guest: Guest, tmp_path: Path) -> None:
    secret, target = tmp_path / "secret", tmp_path / "written"
    secret.write_text(SECRET)
    before = rows(guest, "SELECT count() FROM samples")
    for sql in escapes(secret, target):
        with pytest.raises(BadQueryError) as refused:
            guest.ask(sql)
        assert SECRET not in str(refused.value), sql
        assert not target.exists(), sql
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret"]
    assert rows(guest, "SELECT count() FROM samples") == before


def test_long_and_large_queries_end_and_do_not_spoil_the_next(hasty: Guest) -> None:
    product = "SELECT count() FROM samples a, samples b, samples c, samples d, samples e, samples f, samples g"
    endless = "SELECT n FROM (SELECT 1 AS n) ORDER BY n WITH FILL FROM 0 TO 1000000000000"
    large = (
        "SELECT groupArray(concat(a.metric, b.metric, c.metric, d.metric, e.metric)) FROM samples a, samples b, "
    )
    large += "samples c, samples d, samples e"
    for sql in (product, endless, large):
        with pytest.raises(BadQueryError, match="exceeded"):
            hasty.ask(sql)
        assert in_time(hasty, "SELECT DISTINCT op, group FROM collectives") == [("all_reduce", "dp/0")]


def in_time(hasty: Guest, sql: str) -> list[tuple[object, ...]]:
    """The rows, asked for again where the machine was too busy to find them within the guest's time."""
    deadline = time.monotonic() + 90
    while True:
        try:
            return rows(hasty, sql)
        except BadQueryError as error:
            if "exceeded" not in str(error) or time.monotonic() > deadline:
                raise


def test_more_queries_at_once_than_allowed_are_told_to_wait(hasty: Guest) -> None:
    endless = "SELECT n FROM (SELECT 1 AS n) ORDER BY n WITH FILL FROM 0 TO 1000000000000"
    enough = threading.Event()

    def ask() -> None:
        while not enough.wait(0.01):
            with suppress(BadQueryError, StoreFullError):
                hasty.ask(endless)

    busy = [threading.Thread(target=ask) for _ in range(SqlLimits().queries)]
    for thread in busy:
        thread.start()
    try:
        with pytest.raises(StoreFullError):
            _ask_for_seconds(hasty, 90)
    finally:
        enough.set()
        for thread in busy:
            thread.join()
    assert in_time(hasty, "SELECT 1") == [(1,)]


def _ask_for_seconds(hasty: Guest, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        in_time(hasty, "SELECT 1")
        time.sleep(0.05)  # a place is free meanwhile for who waits for one


def test_the_documentation_lists_every_view_and_column(guest: Guest) -> None:
    text = (Path(__file__).parents[2] / "docs" / "sql.md").read_text()
    listed = {
        name: set(re.findall(r"\w+", columns)) for name, columns in re.findall(r"\| `(\w+)` \| (.+?) \|", text)
    }
    seen = set()
    for name in VIEWS:
        columns = set(guest.ask(f"SELECT * FROM {name}").table.column_names)
        assert listed[name] == columns, name
        seen |= columns
    assert seen == COLUMNS
    assert set(listed) == set(VIEWS)


ODD_LABELS = ("{run}", "it's \\ odd\n", "table_name: system.users", "ö", "")


@pytest.mark.parametrize("few", [0, 2000])
def test_names_of_samples_are_right_whether_they_are_listed_or_joined(
    folder: DataFolder, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr(asking, "FEW_SERIES", few)
    run = f"odd-{few}"
    for name in (run, f"{run}-plain"):
        folder.describe_run({"run": name})
        send(folder, name, [
            sample("m", float(index), index, rank=index or None, host=text or None, labels={"text": text, "{}": "1"})
            for index, text in enumerate(ODD_LABELS) if "plain" not in name or "name:" not in text
        ])  # fmt: skip
        folder.applier.wait(folder.log.end, 120)
        guest = Guest(folder.store, folder.registry, SqlLimits(seconds=120))
        found = rows(
            guest, "SELECT metric, host, labels['text'], labels['{}'], rank, value FROM samples ORDER BY step", name
        )
        assert found == [
            ("m", text or None, text, "1", index or None, float(index))
            for index, text in enumerate(ODD_LABELS) if "plain" not in name or "name:" not in text
        ]  # fmt: skip
    assert rows(guest, "SELECT count() FROM samples WHERE metric = 'unheard'", run) == [(0,)]
    assert rows(
        guest, "SELECT run, count(), max(t_ns) FROM samples WHERE run IN ('a', 'b') GROUP BY run ORDER BY run"
    ) == [(name, 15, START + 9 * SECOND) for name in ("a", "b")]
